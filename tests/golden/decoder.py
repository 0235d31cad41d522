"""A decoder of today: RMSNorm, rotary positions, grouped key and value heads, SwiGLU, dropout, a mask made by hand."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GLOBAL_BATCH = 64


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, hidden // heads
        self.wq = nn.Linear(hidden, hidden, bias=False)
        self.wkv = nn.Linear(hidden, 2 * kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor) -> Tensor:
        batch, seq, hidden = x.shape
        q = self.wq(x).view(batch, seq, self.heads, self.head_dim).transpose(1, 2)
        k, v = self.wkv(x).view(batch, seq, 2 * self.kv_heads, self.head_dim).transpose(1, 2).chunk(2, dim=1)
        groups = self.heads // self.kv_heads
        k, v = (t.repeat_interleave(groups, dim=1) for t in (rotated(k, angles), v))
        out = F.scaled_dot_product_attention(rotated(q, angles), k, v, attn_mask=mask)
        return self.wo(out.transpose(1, 2).reshape(batch, seq, hidden))


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int, kv_heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.attention = Attention(hidden, heads, kv_heads)
        self.gate, self.up = nn.Linear(hidden, ffn, bias=False), nn.Linear(hidden, ffn, bias=False)
        self.down, self.drop = nn.Linear(ffn, hidden, bias=False), nn.Dropout(dropout)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.attention_norm(x), angles, mask))
        y = self.mlp_norm(x)
        return x + self.drop(self.down(F.silu(self.gate(y)) * self.up(y)))


class Decoder(nn.Module):
    def __init__(self, layers: int, hidden: int, heads: int, kv_heads: int, vocab: int, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(Layer(hidden, heads, kv_heads, 3 * hidden, dropout) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(hidden), nn.Linear(hidden, vocab, bias=False)
        self.register_buffer("frequencies", 10000.0 ** -torch.linspace(0, 1, hidden // heads // 2), persistent=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        seq = tokens.shape[1]
        positions = torch.arange(seq, device=tokens.device)
        angles = torch.outer(positions.to(self.frequencies.dtype), self.frequencies).repeat(1, 2)
        mask = positions[:, None] >= positions[None, :]
        x = self.tokens(tokens)
        for layer in self.layers:
            x = layer(x, angles, mask)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), labels.flatten())


def build_model(
    layers: int = 4, hidden: int = 1024, heads: int = 8, kv_heads: int = 2, vocab: int = 8192, dropout: float = 0.0
) -> nn.Module:
    return Decoder(layers, hidden, heads, kv_heads, vocab, dropout)


def example_inputs(batch_size: int, seq: int = 512) -> dict[str, Tensor]:
    return {name: torch.empty(batch_size, seq, dtype=torch.long) for name in ("tokens", "labels")}
