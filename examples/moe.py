"""GShard mixture of experts (Lepikhin et al. 2020), as sized by Alpa OSDI'22: every second layer's MLP is a set of
experts.

Tokens are routed in groups of ``group_size``. Each token goes to the ``top_k`` experts with its highest gate values; an
expert takes at most ``capacity = top_k * group_size / experts * capacity_factor`` tokens of a group, and the others skip
the layer. With 8 experts and groups of 2048 that is 512. Shapes below: G groups, S tokens of a group, M hidden, E
experts, C capacity, H the MLP's width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GLOBAL_BATCH = 1024

SIZES = {  # hidden, layers, experts
    "380M": (768, 8, 8),
    "690M": (768, 8, 16),
    "1.3B": (768, 16, 16),
    "2.4B": (1024, 16, 16),
    "10B": (1536, 16, 32),
    "27B": (2048, 16, 48),
    "70B": (2048, 32, 64),
}
BALANCE_WEIGHT = 0.01


def one_hot(index: Tensor, classes: int) -> Tensor:
    """[..., classes] in fp32 with a one at ``index`` [...]; all zeros where the index is ``classes`` or more."""
    return (index.unsqueeze(-1) == torch.arange(classes, device=index.device)).float()


def gate(logits: Tensor, top_k: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Combine weights [G, S, E, C] and the load-balancing loss, from router logits [G, S, E], both in fp32.

    ``combine[g, s, e, c]`` is the weight of expert e's result for token s if the token is in the expert's slot c, else
    0."""
    gates = logits.float().softmax(-1)
    experts = gates.shape[-1]
    remaining, taken = gates, None
    choices, weights = [], []
    balance = None
    for _ in range(top_k):
        chosen = one_hot(remaining.argmax(-1), experts)
        if balance is None:
            balance = experts * (gates.mean(1) * chosen.mean(1)).sum(-1).mean()
        # The slot of a token: the number of tokens before it, or of earlier choices, that went to the same expert.
        slot = chosen.cumsum(1) - chosen
        slot = ((slot if taken is None else slot + taken) * chosen).sum(-1)
        taken = chosen.sum(1, keepdim=True) if taken is None else taken + chosen.sum(1, keepdim=True)
        weights.append((gates * chosen).sum(-1))
        choices.append((chosen, one_hot(slot, capacity)))
        remaining = remaining * (1 - chosen)
    total = sum(weights) + 1e-9
    combine = sum(
        (weight / total)[..., None, None] * chosen.unsqueeze(-1) * slots.unsqueeze(-2)
        for weight, (chosen, slots) in zip(weights, choices, strict=True)
    )
    return combine, balance


class Experts(nn.Module):
    """E two-layer MLPs with stacked weights."""

    def __init__(self, hidden: int, ffn: int, experts: int) -> None:
        super().__init__()
        self.fc1 = nn.Parameter(torch.empty(experts, hidden, ffn))
        self.fc2 = nn.Parameter(torch.empty(experts, ffn, hidden))

    def forward(self, x: Tensor) -> Tensor:
        """[E, G, C, M] -> [E, G, C, M], expert e on the slots of expert e."""
        x = F.gelu(torch.einsum("EGCM,EMH->EGCH", x, self.fc1), approximate="tanh")
        return torch.einsum("EGCH,EHM->EGCM", x, self.fc2)


class MoE(nn.Module):
    """A mixture of experts: a router, the experts, and the dispatch and combination of tokens."""

    def __init__(
        self, hidden: int, ffn: int, experts: int, top_k: int, group_size: int, capacity_factor: float
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.group_size = group_size
        self.capacity = math.ceil(top_k * group_size * capacity_factor / experts)
        self.router = nn.Linear(hidden, experts, bias=False)
        self.experts = Experts(hidden, ffn, experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, seq, M] -> [batch, seq, M] and the load-balancing loss; ValueError where groups are not full."""
        batch, seq, hidden = x.shape
        if batch * seq % self.group_size:
            raise ValueError(f"{batch} x {seq} tokens do not fill groups of group_size={self.group_size}")
        grouped = x.reshape(batch * seq // self.group_size, self.group_size, hidden)
        combine, balance = gate(self.router(grouped), self.top_k, self.capacity)
        dispatch = (combine > 0).to(x.dtype)
        dispatched = torch.einsum("GSEC,GSM->EGCM", dispatch, grouped)
        combined = torch.einsum("GSEC,EGCM->GSM", combine.to(x.dtype), self.experts(dispatched))
        return combined.reshape(batch, seq, hidden), balance


class Attention(nn.Module):
    """Causal self-attention, [batch, seq, M] -> [batch, seq, M]."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)  # rows ordered head by head: q, k, v of head 0, of head 1, ...
        self.proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Attends to all earlier positions."""
        batch, seq, hidden = x.shape
        qkv = self.qkv(x).view(batch, seq, self.heads, 3, hidden // self.heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(3))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(attended.transpose(1, 2).reshape(batch, seq, hidden))


class MLP(nn.Module):
    """Two linear layers with a GELU between them, [batch, seq, M] -> [batch, seq, M]."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, ffn)
        self.fc2 = nn.Linear(ffn, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the same layers to every position."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """A transformer layer with layer norms before attention and MLP, which may be a mixture of experts."""

    def __init__(self, hidden: int, heads: int, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden)
        self.attn = Attention(hidden, heads)
        self.norm2 = nn.LayerNorm(hidden)
        self.mlp = mlp

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[batch, seq, M] -> [batch, seq, M] and the load-balancing loss of a mixture, else None."""
        x = x + self.attn(self.norm1(x))
        y, balance = self.mlp(self.norm2(x)), None
        if isinstance(y, tuple):
            y, balance = y
        return x + y, balance


class GShard(nn.Module):
    """Token and position embeddings, the layers, a final norm and the projection to the vocabulary."""

    def __init__(self, hidden: int, heads: int, vocab: int, seq: int, mlps: list[nn.Module]) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, hidden)
        self.positions = nn.Embedding(seq, hidden)
        self.layers = nn.ModuleList(Block(hidden, heads, mlp) for mlp in mlps)
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocab, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [batch, seq, vocab] of ``tokens`` [batch, seq], and the mean load-balancing loss."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(positions)
        balances = []
        for layer in self.layers:
            x, balance = layer(x)
            if balance is not None:
                balances.append(balance)
        return self.head(self.norm(x)), sum(balances) / len(balances)


def _size(size: str) -> tuple[int, int, int]:
    if size not in SIZES:
        raise ValueError(f"no size {size!r}; choose one of {', '.join(SIZES)}")
    return SIZES[size]


def build_model(
    size: str = "2.4B",
    *,
    layers: int | None = None,
    hidden: int | None = None,
    heads: int = 16,
    experts: int | None = None,
    ffn: int | None = None,
    vocab: int = 32000,
    seq: int = 1024,
    top_k: int = 2,
    group_size: int = 2048,
    capacity_factor: float = 1.0,
) -> nn.Module:
    """The model of a row of ``SIZES``, in which any number may be replaced; ``ffn`` is eight times ``hidden`` unless
    given."""
    size_hidden, size_layers, size_experts = _size(size)
    hidden, experts, layers = hidden or size_hidden, experts or size_experts, layers or size_layers
    ffn = ffn or 8 * hidden
    if layers < 2:
        raise ValueError(f"layers={layers}: every second layer is a mixture, so at least 2 are needed")
    mlps = [
        MoE(hidden, ffn, experts, top_k, group_size, capacity_factor) if number % 2 else MLP(hidden, ffn)
        for number in range(layers)
    ]
    return GShard(hidden, heads, vocab, seq, mlps)


def example_inputs(batch_size: int, seq: int = 1024) -> dict[str, Tensor]:
    """Token ids and targets, [batch_size, seq] each."""
    return {name: torch.empty(batch_size, seq, dtype=torch.long, device="meta") for name in ("tokens", "labels")}


def loss_fn(output: tuple[Tensor, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    """Cross-entropy in fp32 plus the mean load-balancing loss of the mixtures."""
    logits, balance = output
    return F.cross_entropy(logits.flatten(0, 1).float(), inputs["labels"].flatten()) + BALANCE_WEIGHT * balance


def init_weights(model: nn.Module) -> None:
    """Normal(0, 0.02); norms start as the identity."""
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            nn.init.constant_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            nn.init.normal_(parameter, std=0.02)
