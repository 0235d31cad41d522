"""T5 at a test's size: encoder states reach every decoder layer, so they skip stages."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration


class T5(T5ForConditionalGeneration):
    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor, targets: Tensor) -> Any:
        return super().forward(input_ids=input_ids, decoder_input_ids=decoder_input_ids)


def build_model(layers: int = 2, hidden: int = 32, heads: int = 4, vocab: int = 64) -> nn.Module:
    config = T5Config(
        vocab_size=vocab,
        d_model=hidden,
        d_kv=hidden // heads,
        d_ff=2 * hidden,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=heads,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        use_cache=False,
    )
    return T5(config)


def example_inputs(batch_size: int, seq: int = 8) -> dict[str, Tensor]:
    return {
        name: torch.empty(batch_size, seq, dtype=torch.long, device="meta")
        for name in ("input_ids", "decoder_input_ids", "targets")
    }


def loss_fn(output: Any, inputs: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(output.logits.flatten(0, 1).float(), inputs["targets"].flatten())
