"""Small random models: MLPs, attention, convolutions, experts, tied weights, odd sizes, several inputs and outputs."""

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.workload.workload import Workload


class Mlp(nn.Module):
    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        hidden = draw.choice((8, 12, 16, 24))
        self.norm = nn.LayerNorm(width) if draw.random() < 0.5 else nn.Identity()
        self.up = nn.Linear(width, hidden, bias=draw.random() < 0.7)
        self.down = nn.Linear(hidden, width, bias=draw.random() < 0.7)
        self.act = draw.choice((F.gelu, F.relu, F.silu, torch.tanh))
        self.reuses_weights = draw.random() < 0.3
        self.gate = nn.Linear(width, hidden) if draw.random() < 0.3 else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(self.norm(x)))
        if self.gate is not None:
            h = h * torch.sigmoid(self.gate(x))
        y = x + self.down(h)
        return y + self.down(self.act(self.up(y))) if self.reuses_weights else y


class Attention(nn.Module):
    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        self.heads = draw.choice((2, 4))
        self.kv = draw.choice((self.heads, self.heads // 2))
        self.size = width // self.heads
        self.causal = draw.random() < 0.6
        self.fused = self.kv == self.heads and draw.random() < 0.6
        self.by_head = draw.random() < 0.5
        self.q = nn.Linear(width, width * (3 if self.fused else 1))
        self.k = None if self.fused else nn.Linear(width, self.kv * self.size)
        self.v = None if self.fused else nn.Linear(width, self.kv * self.size)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, width = x.shape
        if self.k is None or self.v is None:
            if self.by_head:
                q, k, v = self.q(x).view(batch, seq, self.heads, 3, self.size).unbind(3)
            else:
                q, k, v = (part.reshape(batch, seq, self.heads, self.size) for part in self.q(x).split(width, -1))
        else:
            q = self.q(x).view(batch, seq, self.heads, self.size)
            k, v = (layer(x).view(batch, seq, self.kv, self.size) for layer in (self.k, self.v))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        grouped = self.kv != self.heads
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=grouped)
        return x + self.out(y.transpose(1, 2).reshape(batch, seq, width))


class Mixture(nn.Module):
    """Soft experts: a softmax over experts weights their outputs; its balance is a product of means over tokens."""

    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        experts, hidden = draw.choice((2, 4)), draw.choice((4, 8))
        self.route = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.empty(experts, width, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.route(x).softmax(-1)
        h = F.relu(torch.einsum("bsw,ewh->ebsh", x, self.up))
        y = torch.einsum("ebsh,ehw->ebsw", h, self.down)
        balance = (weights.mean((0, 1)) * (weights > 0.3).to(x.dtype).mean((0, 1))).sum()
        return x + torch.einsum("bse,ebsw->bsw", weights, y) * (1 + balance)


class Sequence(nn.Module):
    """Tokens to classes, with a second output for a regression; the head may be tied."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        width, vocab = draw.choice((8, 16)), draw.choice((12, 15, 16))
        self.seq = draw.choice((4, 6))
        self.tokens = nn.Embedding(vocab, width)
        self.positions = nn.Parameter(torch.empty(self.seq, width)) if draw.random() < 0.6 else None
        kinds = draw.choices((Mlp, Attention, Mixture), (3, 3, 2), k=draw.randint(1, 4))
        self.layers = nn.ModuleList(kind(draw, width) for kind in kinds)
        self.head = nn.Linear(width, vocab, bias=False)
        if draw.random() < 0.5:
            self.head.weight = self.tokens.weight
        self.side = nn.Linear(width, 1) if draw.random() < 0.5 else None
        self.mix = nn.Linear(3, width) if draw.random() < 0.4 else None

    def forward(self, ids: Tensor, labels: Tensor, extra: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self.tokens(ids)
        if self.positions is not None:
            x = x + self.positions
        if self.mix is not None:
            x = x + self.mix(extra).unsqueeze(1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x), self.side(x.mean(1)) if self.side is not None else None


class Image(nn.Module):
    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        wide = draw.choice((4, 6, 8))
        self.first = nn.Conv2d(3, wide, 3, padding=1, bias=draw.random() < 0.5)
        self.layers = nn.ModuleList()
        for _ in range(draw.randint(1, 3)):
            norm = nn.BatchNorm2d(wide) if draw.random() < 0.6 else nn.GroupNorm(2, wide)
            groups = wide if draw.random() < 0.3 else 1
            self.layers.append(nn.Sequential(nn.Conv2d(wide, wide, 3, padding=1, groups=groups), norm, nn.ReLU()))
        self.head = nn.Linear(wide, 12)
        self.pool = draw.random() < 0.5

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = self.first(images)
        for layer in self.layers:
            x = x + layer(x)
        x = F.max_pool2d(x, 2) if self.pool else x
        return self.head(x.mean((2, 3)))


def random_workload(seed: int) -> Workload:
    """The model of a seed; equal seeds, equal models."""
    if random.Random(seed).random() < 0.25:
        return Workload(
            build_model=lambda: Image(random.Random(seed + 1)),
            example_inputs=lambda batch_size: {
                "images": torch.empty(batch_size, 3, 4, 4, device="meta"),
                "labels": torch.empty(batch_size, dtype=torch.long, device="meta"),
            },
            loss_fn=lambda output, inputs: F.cross_entropy(output, inputs["labels"]),
        )
    seq = Sequence(random.Random(seed + 1)).seq
    smoothing = random.Random(seed + 2).choice((0.0, 0.0, 0.1))

    def loss_fn(output: Any, inputs: dict[str, Tensor]) -> Tensor:
        logits, side = output
        loss = F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten(), label_smoothing=smoothing)
        return loss if side is None else loss + 0.3 * F.mse_loss(side, inputs["extra"][:, :1])

    return Workload(
        build_model=lambda: Sequence(random.Random(seed + 1)),
        example_inputs=lambda batch_size: {
            "ids": torch.empty(batch_size, seq, dtype=torch.long, device="meta"),
            "labels": torch.empty(batch_size, seq, dtype=torch.long, device="meta"),
            "extra": torch.empty(batch_size, 3, device="meta"),
        },
        loss_fn=loss_fn,
    )
