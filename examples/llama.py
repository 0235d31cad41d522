"""Llama, from Hugging Face's own implementation: only the configuration is ours.

Sizes: 7B is Llama 2; 8B, 70B and 405B are Llama 3 (8.03e9, 70.55e9 and 405.85e9 parameters).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

GLOBAL_BATCH = 512

SIZES = {  # hidden, layers, heads, kv_heads, ffn, vocab, sequence
    "7B": (4096, 32, 32, 32, 11008, 32000, 4096),
    "8B": (4096, 32, 32, 8, 14336, 128256, 8192),
    "70B": (8192, 80, 64, 8, 28672, 128256, 8192),
    "405B": (16384, 126, 128, 8, 53248, 128256, 8192),
}


class Llama(LlamaForCausalLM):
    """The same model with the targets among its inputs, where ``loss_fn`` finds them."""

    def forward(self, input_ids: Tensor, targets: Tensor) -> Any:
        """The output of Hugging Face's model, with logits [batch, seq, vocab]."""
        return super().forward(input_ids=input_ids)


def _size(size: str) -> tuple[int, int, int, int, int, int, int]:
    if size not in SIZES:
        raise ValueError(f"no size {size!r}; choose one of {', '.join(SIZES)}")
    return SIZES[size]


def build_model(
    size: str = "8B",
    *,
    layers: int | None = None,
    hidden: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    ffn: int | None = None,
    vocab: int | None = None,
    seq: int | None = None,
    tied_embeddings: bool = False,
) -> nn.Module:
    """The model of a row of ``SIZES``, in which any number may be replaced."""
    row = _size(size)
    config = LlamaConfig(
        hidden_size=hidden or row[0],
        num_hidden_layers=layers or row[1],
        num_attention_heads=heads or row[2],
        num_key_value_heads=kv_heads or row[3],
        intermediate_size=ffn or row[4],
        vocab_size=vocab or row[5],
        max_position_embeddings=seq or row[6],
        tie_word_embeddings=tied_embeddings,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return Llama(config)


def example_inputs(batch_size: int, size: str = "8B", seq: int | None = None) -> dict[str, Tensor]:
    """Token ids and targets, [batch_size, seq] each."""
    shape = (batch_size, seq or _size(size)[6])
    return {name: torch.empty(shape, dtype=torch.long, device="meta") for name in ("input_ids", "targets")}


def loss_fn(output: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Cross-entropy in fp32; ``targets`` are the inputs shifted by one position, as data loaders give them."""
    return F.cross_entropy(output.logits.flatten(0, 1).float(), inputs["targets"].flatten())
