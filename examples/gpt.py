"""GPT with layer norms before each block, as trained by Megatron-LM and Alpa.

Sizes: Narayanan et al. SC'21 and Alpa OSDI'22 (125M to 39B share sequence 1024; 76B, 530B, 1T follow Megatron, 175B
is GPT-3). Parameters, with embeddings tied: 12 L h^2 + 13 L h + (V + s + 2) h. Example: "39B" has 39.1e9.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GLOBAL_BATCH = 1024

SIZES = {  # hidden, layers, heads, sequence
    "125M": (768, 12, 12, 1024),
    "350M": (1024, 24, 16, 1024),
    "760M": (1536, 24, 16, 1024),
    "1.3B": (2048, 24, 32, 1024),
    "2.6B": (2560, 32, 32, 1024),
    "6.7B": (4096, 32, 32, 1024),
    "15B": (5120, 48, 40, 1024),
    "39B": (8192, 48, 64, 1024),
    "76B": (10240, 60, 80, 1024),
    "175B": (12288, 96, 96, 2048),
    "530B": (20480, 105, 128, 1024),
    "1T": (25600, 128, 160, 2048),
}


class Attention(nn.Module):
    """Causal self-attention, [batch, seq, hidden] -> [batch, seq, hidden]."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = hidden // heads
        # The rows of the fused projection are ordered head by head (q, k, v of head 0, then of head 1, ...), so a shard
        # of them has all rows of some heads.
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Attends to all earlier positions."""
        batch, seq, hidden = x.shape
        qkv = self.qkv(x).view(batch, seq, self.heads, 3, self.head_dim)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(3))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(attended.transpose(1, 2).reshape(batch, seq, hidden))


class MLP(nn.Module):
    """Two linear layers with a GELU between them, [batch, seq, hidden] -> [batch, seq, hidden]."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, ffn)
        self.fc2 = nn.Linear(ffn, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the same layers to every position."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """A transformer layer with layer norms before attention and MLP."""

    def __init__(self, hidden: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden)
        self.attn = Attention(hidden, heads)
        self.norm2 = nn.LayerNorm(hidden)
        self.mlp = MLP(hidden, ffn)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Token and position embeddings, the layers, a final norm and the projection to the vocabulary."""

    def __init__(
        self, *, layers: int, hidden: int, heads: int, ffn: int, vocab: int, seq: int, tied_embeddings: bool
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, hidden)
        self.positions = nn.Embedding(seq, hidden)
        self.layers = nn.ModuleList(Block(hidden, heads, ffn) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocab, bias=False)
        if tied_embeddings:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Logits [batch, seq, vocab] of ``tokens`` [batch, seq]; ``labels`` are for ``loss_fn``."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(positions)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def _size(size: str) -> tuple[int, int, int, int]:
    if size not in SIZES:
        raise ValueError(f"no size {size!r}; choose one of {', '.join(SIZES)}")
    return SIZES[size]


def build_model(
    size: str = "39B",
    *,
    layers: int | None = None,
    hidden: int | None = None,
    heads: int | None = None,
    ffn: int | None = None,
    vocab: int = 51200,
    seq: int | None = None,
    tied_embeddings: bool = True,
) -> nn.Module:
    """The model of a row of ``SIZES``, in which any number may be replaced; ``ffn`` is four times ``hidden`` unless given."""
    size_hidden, size_layers, size_heads, size_seq = _size(size)
    hidden = hidden or size_hidden
    heads = heads or size_heads
    if hidden % heads:
        raise ValueError(f"hidden={hidden} is not divisible by heads={heads}")
    return GPT(
        layers=layers or size_layers,
        hidden=hidden,
        heads=heads,
        ffn=ffn or 4 * hidden,
        vocab=vocab,
        seq=seq or size_seq,
        tied_embeddings=tied_embeddings,
    )


def example_inputs(batch_size: int, size: str = "39B", seq: int | None = None) -> dict[str, Tensor]:
    """Token ids and targets, [batch_size, seq] each."""
    shape = (batch_size, seq or _size(size)[3])
    return {name: torch.empty(shape, dtype=torch.long, device="meta") for name in ("tokens", "labels")}


def loss_fn(output: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Cross-entropy in fp32, as Megatron-LM."""
    return F.cross_entropy(output.flatten(0, 1).float(), inputs["labels"].flatten())


def init_weights(model: nn.Module) -> None:
    """Normal(0, 0.02), divided by sqrt(2 L) for projections into the residual stream, as in GPT-2."""
    residual_std = 0.02 / (2 * len(model.layers)) ** 0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            nn.init.constant_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            nn.init.normal_(parameter, std=residual_std if name.endswith(("proj.weight", "fc2.weight")) else 0.02)
