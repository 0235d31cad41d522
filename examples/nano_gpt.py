"""A small GPT in the manner of nanoGPT with every hook that a model file may have: copy it to begin a file of your own."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Causal self-attention and an MLP, each after a layer norm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, 2))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Token ids (batch, seq) in, logits (batch, seq, vocab) out."""

    def __init__(self, layers: int, width: int, heads: int, vocab: int, context: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


GLOBAL_BATCH = 480  # samples of one optimizer step; --global-batch replaces it


def build_model(layers=12, width=768, heads=12, vocab=50304, context=1024):  # built without memory, at any size
    return GPT(layers, width, heads, vocab, context)


def example_inputs(batch_size, context=1024):  # shapes and dtypes of a micro-batch; dim 0 is the batch
    return {"idx": torch.empty(batch_size, context, dtype=torch.long)}  # the keyword arguments of forward


def loss_fn(logits, inputs):  # optional; without it, the output's `loss`, or the output if it is a scalar
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["idx"][:, 1:].flatten())


def random_inputs(batch_size, seed, context=1024, vocab=50304):  # optional: real values, for `autopar verify`
    return {"idx": torch.randint(vocab, (batch_size, context), generator=torch.Generator().manual_seed(seed))}


def init_weights(model):  # optional: the initial weights, for models too large to initialise on one machine
    model.apply(lambda part: nn.init.normal_(part.weight, std=0.02) if isinstance(part, nn.Linear) else None)
