"""Tiny configurations of Hugging Face's models, by name."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "n_routed_experts": 4, "n_shared_experts": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED, tie_word_embeddings=True)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**GROUPED, sliding_window=4)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**GROUPED)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**GROUPED, head_dim=8, sliding_window=4)),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SIZES)),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=64,
            max_position_embeddings=32,
            word_embed_proj_dim=32,
        )
    ),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64)),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**SIZES)),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**SIZES)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)),
    "deepseek": lambda: tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**SIZES, **EXPERTS, **LATENT)),
}


class Logits(nn.Module):
    """The model's logits alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        return self.inner(input_ids=input_ids).logits


def build_model(name: str) -> nn.Module:
    model = MODELS[name]()
    model.config.use_cache = False
    return Logits(model)


def example_inputs(batch_size: int) -> dict[str, Tensor]:
    return {name: torch.empty(batch_size, 8, dtype=torch.long, device="meta") for name in ("input_ids", "targets")}


def loss_fn(output: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1).float(), inputs["targets"].flatten())
