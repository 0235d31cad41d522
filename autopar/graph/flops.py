"""Model FLOPs of a training step: those of the model's mathematics, not those that a plan runs.

Counted: matmuls, convolutions, attention over the full s^2 square, forward and backward, 2 FLOPs per multiply-add. Not
counted: recomputation, the scores that flash attention recomputes (its backward is twice its forward here), gathers,
element-wise work, products with a vector. A convolution counts the taps of its kernel that fall on padding. For a GPT of L layers, width h, sequence s and vocabulary V (Narayanan et al. SC'21, appendix,
without recomputation) a step of B samples is

    72 B s L h^2 (1 + s / 6h + V / 12Lh)
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from autopar.graph.ir import Graph, Op, OpProfile, TracedBatch

ArithmeticKind = Literal["matmul", "attention", "convolution"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFlops:
    """FLOPs of the forward and of the backward over a batch, and the sum of both for each kind of arithmetic."""

    forward: int
    backward: int
    by_kind: tuple[tuple[ArithmeticKind, int], ...]

    @property
    def total(self) -> int:
        """FLOPs of forward and backward."""
        return self.forward + self.backward


def model_flops(graph: Graph, batch_size: int, profiles: Sequence[OpProfile]) -> ModelFlops:
    """FLOPs of the forward and backward over ``batch_size`` samples; ``profiles`` are those of all ops, in order.

    Example: Llama-2-7B, one sample of 4,096 tokens: 62.92e12 forward, 188.76e12 in total."""
    forward = backward = 0
    parts: dict[ArithmeticKind, int] = defaultdict(int)
    for op, profile in zip(graph.ops, profiles, strict=True):
        if not profile.forward_flops:
            continue
        kind = arithmetic_kind(op)
        op_forward = flops_at_batch(profile.forward_flops, graph.batch, batch_size)
        op_backward = flops_at_batch(profile.backward_flops, graph.batch, batch_size)
        if kind == "attention" and op_backward:
            op_backward = 2 * op_forward  # the kernel's fifth matmul recomputes the scores
        forward += op_forward
        backward += op_backward
        parts[kind] += op_forward + op_backward
    return ModelFlops(forward=forward, backward=backward, by_kind=tuple(sorted(parts.items())))


def flops_at_batch(flops: int, batch: TracedBatch, batch_size: int) -> int:
    """Scales FLOPs counted at the traced batch to ``batch_size`` samples.

    FLOPs are products of sizes, so the prime divides them as often as the batch occurs among these: once in a linear
    layer, never in one that works on positions alone, twice in a contrastive loss.

    >>> flops_at_batch(2 * 808 * 16 * 16, TracedBatch(traced_size=808, prime=101), 4)
    2048
    """
    power = 0
    remaining = flops
    while remaining and remaining % batch.prime == 0:
        remaining //= batch.prime
        power += 1
    return flops * batch_size**power // batch.traced_size**power


def arithmetic_kind(op: Op) -> ArithmeticKind:
    """The kind of arithmetic of a matmul-like op.

    >>> arithmetic_kind(graph.ops[5])  # aten.linear.default  # doctest: +SKIP
    'matmul'
    """
    if "attention" in op.target:
        return "attention"
    return "convolution" if "conv" in op.target else "matmul"


def num_parameters(graph: Graph, *, trainable_only: bool = False) -> int:
    """Elements of all parameters, or of the trainable ones; a tied parameter counts once, buffers do not count.

    Example: GPT of 1.3B -> 1.3e9, with its input embedding and output projection tied."""
    return sum(
        prod(value.shape)
        for value in graph.values
        if value.kind == "parameter" and (value.requires_grad or not trainable_only)
    )
