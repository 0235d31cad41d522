"""Models of the installed transformers at real size, and a plain convolutional network: ``--set name=gpt2-xl``.

Sizes are those of their publications: GPT-2 XL (1.56B parameters), Mixtral 8x7B (46.7B), T5-3B (2.85B), ViT-L/16 (304M),
BERT-large (335M), VGG-16 (138M).
"""

import torch
import transformers as hf
from torch import Tensor, nn

GLOBAL_BATCH = 512
LANGUAGE = {  # configuration, model, sequence
    "gpt2-xl": (hf.GPT2Config(n_embd=1600, n_layer=48, n_head=25), hf.GPT2LMHeadModel, 1024),
    "mixtral-8x7b": (hf.MixtralConfig(), hf.MixtralForCausalLM, 4096),
    "t5-3b": (
        hf.T5Config(
            vocab_size=32128, d_model=1024, d_kv=128, d_ff=16384, num_layers=24, num_heads=32, decoder_start_token_id=0
        ),
        hf.T5ForConditionalGeneration,
        512,
    ),
    "bert-large": (
        hf.BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
        hf.BertForMaskedLM,
        512,
    ),
}
VIT_LARGE = hf.ViTConfig(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, num_labels=1000
)
VGG = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
"""Channels of the convolutions of VGG-16 (Simonyan and Zisserman 2014); 0 halves the picture."""


class Classifier(nn.Module):
    """VGG-16 with its loss."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for channels in VGG:
            if channels:
                layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
                before = channels
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Linear(512 * 49, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000)
        )

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.features(pixel_values).flatten(1)), labels)


def build_model(name: str = "gpt2-xl") -> nn.Module:
    if name == "vgg-16":
        return Classifier()
    if name == "vit-l":
        return hf.ViTForImageClassification(VIT_LARGE)
    config, model, _ = LANGUAGE[name]
    return model(config)


def example_inputs(batch_size: int, name: str = "gpt2-xl") -> dict[str, Tensor]:
    if name not in LANGUAGE:
        labels = torch.empty(batch_size, dtype=torch.long, device="meta")
        return {"pixel_values": torch.empty(batch_size, 3, 224, 224, device="meta"), "labels": labels}
    ids = torch.empty(batch_size, LANGUAGE[name][2], dtype=torch.long, device="meta")
    names = ("input_ids", "attention_mask", "labels") if name == "bert-large" else ("input_ids", "labels")
    return {key: ids.clone() for key in names}
