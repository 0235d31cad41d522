"""Memory traffic that fused kernels save: a tensor that passes from op to op inside one kernel is neither written nor
read.

A value v made by op A and read by op B, both fusable:

    B's forward does not read v; A's forward does not write it when no other op reads v and the backward does not keep
    it
    B's backward does not write v's gradient nor A's read it, when B alone reads v

Which ops are fusable is the program's: "pointwise" chains (bias, activation, dropout, residual additions: Megatron-LM's
fused kernels), and "norm", which adds normalisations and softmax as a compiler's reductions do. "loss" is a cross
entropy that works in the memory of its fp32 logits: they become the softmax, which is kept, and then its own gradient
(Megatron-LM, tensor_parallel/cross_entropy.py); eager PyTorch keeps the log-softmax and makes two gradients as large.

An op that joins the kernel of an earlier one launches none of its own on the device.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

from autopar.graph.ir import Graph, GraphProfile, Op, OpProfile

FUSABLE_POINTWISE_OPS = frozenset(
    (
        "add", "add_", "sub", "rsub", "mul", "mul_", "div", "neg", "pow", "sqrt", "rsqrt", "exp", "tanh", "sigmoid", "relu",
        "relu_", "gelu", "silu", "silu_", "leaky_relu", "hardtanh", "dropout", "native_dropout", "to", "_to_copy", "where",
        "clamp", "erf", "cos", "sin", "reciprocal", "type_as",
    )
)  # fmt: skip
FUSABLE_REDUCTION_OPS = frozenset(
    ("layer_norm", "native_layer_norm", "rms_norm", "group_norm", "softmax", "_softmax", "mean", "sum")
)


class FusionSavings(NamedTuple):
    """What fusion saves of an op: bytes, whole at the traced batch, and kernels, forward and backward."""

    forward_bytes: float = 0.0
    backward_bytes: float = 0.0
    forward_kernels: int = 0
    backward_kernels: int = 0


NO_SAVINGS = FusionSavings()


def fusion_savings(graph: Graph, profile: GraphProfile, fuses: Sequence[str]) -> dict[int, FusionSavings]:
    """Op id -> what fusion saves; ops that save nothing are left out."""
    fusable = {op.id: op for op in graph.ops if op.packet in _fusable_ops(fuses)}
    if not fusable:
        return {}
    makers = graph.producers()
    readers: dict[int, list[Op]] = defaultdict(list)
    kept: set[int] = set()
    for op in graph.ops:
        held = profile.ops[op.id]
        for value in op.inputs:
            readers[value].append(op)
        kept.update(profile.storage_owner[op.inputs[i]] for i in held.saved_inputs)
        kept.update(profile.storage_owner[op.outputs[i]] for i in held.saved_outputs)
    saved: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for op in fusable.values():
        for value in set(op.inputs):
            maker = makers.get(value)
            if (
                maker is None
                or maker.id not in fusable
                or maker.module_path.split(".")[:2] != op.module_path.split(".")[:2]
            ):
                continue
            size = float(prod(graph.values[value].shape) * graph.values[value].itemsize)
            saved[op.id][0] += size
            if all(reader.id in fusable for reader in readers[value]) and profile.storage_owner[value] not in kept:
                saved[maker.id][0] += size / len(readers[value])
            if len(readers[value]) == 1 and graph.values[value].requires_grad:
                saved[op.id][1] += size
                saved[maker.id][1] += size
    first = fused_kernel_of(graph, fuses)
    found: dict[int, FusionSavings] = {}
    for number, (forward, backward) in saved.items():
        ran, joins = profile.ops[number], first.get(number, number) != number
        kernels = (ran.forward_kernels, ran.backward_kernels) if joins else (0, 0)
        found[number] = FusionSavings(forward, backward, *kernels)
    return found


def memory_kernels(savings: FusionSavings, profile: OpProfile, num_products: tuple[int, int]) -> tuple[int, int]:
    """Kernels of an op, forward and backward, that move memory and are its own: neither products nor fused.

    >>> memory_kernels(NOTHING, linear, (1, 2))  # a bias gradient is a sum of its own  # doctest: +SKIP
    (0, 1)
    """
    return (
        max(profile.forward_kernels - savings.forward_kernels - num_products[0], 0),
        max(profile.backward_kernels - savings.backward_kernels - num_products[1], 0),
    )


def fused_kernel_of(graph: Graph, fuses: Sequence[str]) -> dict[int, int]:
    """Op id -> the first op of the kernel it is part of, for ops that are fused with others: those of one module (its
    first two names) that pass tensors to each other."""
    fusable = {op.id: op for op in graph.ops if op.packet in _fusable_ops(fuses)}
    makers = {value: op for op in fusable.values() for value in op.outputs}
    first: dict[int, int] = {}

    def root(op: int) -> int:
        while first.get(op, op) != op:
            op = first[op]
        return op

    for op in fusable.values():
        for value in op.inputs:
            maker = makers.get(value)
            if maker is not None and maker.module_path.split(".")[:2] == op.module_path.split(".")[:2]:
                ends = sorted((root(op.id), root(maker.id)))
                first[ends[1]] = ends[0]
    return {op: root(op) for op in fusable}


def _fusable_ops(fuses: Sequence[str]) -> frozenset[str]:
    return (FUSABLE_POINTWISE_OPS if "pointwise" in fuses else frozenset()) | (
        FUSABLE_REDUCTION_OPS if "norm" in fuses else frozenset()
    )


def with_fused_loss(graph: Graph, profile: GraphProfile, fuses: Sequence[str]) -> GraphProfile:
    """The profile with cross entropies that work in place, where the program has them."""
    if "loss" not in fuses:
        return profile
    ops = list(profile.ops)
    for op in graph.ops:
        ran = profile.ops[op.id]
        if op.packet != "cross_entropy_loss" or not graph.values[op.inputs[0]].requires_grad:
            continue
        logits, small = graph.values[op.inputs[0]], ran.saved_internal_tensors[1:]
        if logits.dtype == "float32":
            kept = tuple(sorted({0, *ran.saved_inputs}))
            changed = replace(ran, saved_inputs=kept, saved_internal_tensors=small, overwritten_inputs=(0,))
        else:  # it makes the fp32 copy itself, and its gradient from there
            changed = replace(ran, saved_internal_tensors=((logits.shape, 4), *small))
        ops[op.id] = replace(changed, forward_workspace_bytes=0, backward_workspace_bytes=0)
    return replace(profile, ops=tuple(ops))
