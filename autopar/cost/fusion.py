"""Memory traffic that fused kernels save: a tensor that goes from op to op inside one kernel is neither written nor read.

A value v made by op A and read by op B, both fusable:

    B's forward does not read v; A's forward does not write it when only fusable ops read v and no op saves it
    B's backward does not write v's gradient nor A's read it, when B alone reads v

Which ops are fusable is the program's: "pointwise" chains (bias, activation, dropout, residual additions: Megatron-LM's
fused kernels), and "norm", which adds normalisations and softmax as a compiler's reductions do. "loss" is a cross
entropy that works in the memory of its fp32 logits: they become the softmax, which is saved, and then its own gradient
(Megatron-LM, tensor_parallel/cross_entropy.py); eager PyTorch saves the log-softmax and makes two gradients as large.

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
    """What fusion saves of an op, forward and backward: bytes of traffic, unsharded at the traced batch, and kernels."""

    forward_bytes: float = 0.0
    backward_bytes: float = 0.0
    forward_kernels: int = 0
    backward_kernels: int = 0


NO_SAVINGS = FusionSavings()


def fusion_savings(graph: Graph, profile: GraphProfile, fuses: Sequence[str]) -> dict[int, FusionSavings]:
    """Op id -> what fusion saves, under a program that ``fuses`` these kinds of ops; ops without savings are left out."""
    fusable = {op.id: op for op in graph.ops if op.packet in _fusable_ops(fuses)}
    if not fusable:
        return {}
    makers = graph.producers()
    readers: dict[int, list[Op]] = defaultdict(list)
    saved_owners: set[int] = set()
    for op in graph.ops:
        op_profile = profile.ops[op.id]
        for value in op.inputs:
            readers[value].append(op)
        saved_owners.update(profile.storage_owner[op.inputs[i]] for i in op_profile.saved_inputs)
        saved_owners.update(profile.storage_owner[op.outputs[i]] for i in op_profile.saved_outputs)
    avoided_bytes: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
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
            avoided_bytes[op.id][0] += size
            if (
                all(reader.id in fusable for reader in readers[value])
                and profile.storage_owner[value] not in saved_owners
            ):
                avoided_bytes[maker.id][0] += size / len(readers[value])
            if len(readers[value]) == 1 and graph.values[value].requires_grad:
                avoided_bytes[op.id][1] += size
                avoided_bytes[maker.id][1] += size
    first = fused_kernel_of(graph, fuses)
    found: dict[int, FusionSavings] = {}
    for op_id, (forward_bytes, backward_bytes) in avoided_bytes.items():
        op_profile, joins_another = profile.ops[op_id], first.get(op_id, op_id) != op_id
        kernels = (op_profile.forward_kernels, op_profile.backward_kernels) if joins_another else (0, 0)
        found[op_id] = FusionSavings(forward_bytes, backward_bytes, *kernels)
    return found


def memory_kernels(savings: FusionSavings, profile: OpProfile, num_products: tuple[int, int]) -> tuple[int, int]:
    """Kernels of an op, forward and backward, that move memory: neither products nor fused into another op's kernel.

    >>> memory_kernels(NO_SAVINGS, linear, (1, 2))  # the gradient of a bias is a kernel  # doctest: +SKIP
    (0, 1)
    """
    return (
        max(profile.forward_kernels - savings.forward_kernels - num_products[0], 0),
        max(profile.backward_kernels - savings.backward_kernels - num_products[1], 0),
    )


def fused_kernel_of(graph: Graph, fuses: Sequence[str]) -> dict[int, int]:
    """Op id -> the first op of its kernel, of all fusable ops. Ops of one module (its path's first two names) that pass
    tensors to each other share a kernel."""
    fusable = {op.id: op for op in graph.ops if op.packet in _fusable_ops(fuses)}
    makers = {value: op for op in fusable.values() for value in op.outputs}
    first: dict[int, int] = {}

    def root(op: int) -> int:
        """The first op of the kernel so far."""
        while first.get(op, op) != op:
            op = first[op]
        return op

    for op in fusable.values():
        for value in op.inputs:
            maker = makers.get(value)
            if maker is not None and maker.module_path.split(".")[:2] == op.module_path.split(".")[:2]:
                earlier, later = sorted((root(op.id), root(maker.id)))
                first[later] = earlier
    return {op: root(op) for op in fusable}


def _fusable_ops(fuses: Sequence[str]) -> frozenset[str]:
    """Names of the ops that a program fuses."""
    return (FUSABLE_POINTWISE_OPS if "pointwise" in fuses else frozenset()) | (
        FUSABLE_REDUCTION_OPS if "norm" in fuses else frozenset()
    )


def with_fused_loss(graph: Graph, profile: GraphProfile, fuses: Sequence[str]) -> GraphProfile:
    """``profile`` with cross entropies that work in place, where the program ``fuses`` the loss."""
    if "loss" not in fuses:
        return profile
    ops = list(profile.ops)
    for op in graph.ops:
        op_profile = profile.ops[op.id]
        if op.packet != "cross_entropy_loss" or not graph.values[op.inputs[0]].requires_grad:
            continue
        logits, small = graph.values[op.inputs[0]], op_profile.saved_internal_tensors[1:]
        if logits.dtype == "float32":
            saved_inputs = tuple(sorted({0, *op_profile.saved_inputs}))
            fused = replace(
                op_profile, saved_inputs=saved_inputs, saved_internal_tensors=small, overwritten_inputs=(0,)
            )
        else:  # it makes the fp32 copy itself, and its gradient from there
            fused = replace(op_profile, saved_internal_tensors=((logits.shape, 4), *small))
        ops[op.id] = replace(fused, forward_workspace_bytes=0, backward_workspace_bytes=0)
    return replace(profile, ops=tuple(ops))
