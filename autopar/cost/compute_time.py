"""Seconds that one op computes on one rank, forward and backward, for many shardings at once.

    matmul-like   the device's curve at the local (batch, m, n, k); backward is (m, k, n) for the input's gradient and
                  (n, k, m) for the weight's, each only where that gradient is wanted
    attention     the device's attention curve at the local shape; backward at its own
    anything      + bytes of its other kernels / sustained bandwidth + how many these are * kernel latency

A sharding divides labels (``degrees``: label -> divisor per strategy). FLOPs of a matmul whose labels do not tell all
of its work (strides, dilations) are scaled to those its profile counted.
"""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from autopar.cluster.device import Device
from autopar.core.dtypes import ITEMSIZE, TRAINING_DTYPES
from autopar.cost.execution_model import ExecutionModel
from autopar.cost.fusion import NO_SAVINGS, FusionSavings, memory_kernels
from autopar.graph.flops import flops_at_batch
from autopar.graph.ir import Graph, Op, OpProfile
from autopar.rules.op_sharding_rule import NO_LABEL, OpShardingRule

Floats = NDArray[np.float64]


def label_sizes(graph: Graph, op: Op, rule: OpShardingRule, local_batch: int) -> dict[int, int]:
    """Sizes of the labels of an op at ``local_batch`` samples."""
    sizes = dict(rule.hidden_label_sizes)
    for value, dims in zip((*op.inputs, *op.outputs), (*rule.input_labels, *rule.output_labels), strict=True):
        for size, label in zip(graph.values[value].shape, dims, strict=True):
            if label != NO_LABEL:
                sizes[label] = graph.batch.scale(size, local_batch)
    return sizes


def op_seconds(
    graph: Graph,
    op: Op,
    rule: OpShardingRule,
    profile: OpProfile,
    local_batch: int,
    degrees: Mapping[int, Floats],
    device: Device,
    execution: ExecutionModel,
    savings: FusionSavings = NO_SAVINGS,
) -> tuple[Floats, Floats]:
    """Forward and backward seconds per strategy; ``degrees`` maps a label to what each strategy divides it by, and
    ``fused`` is what fusion saves."""
    sizes = label_sizes(graph, op, rule, local_batch)
    one = np.ones_like(next(iter(degrees.values()))) if degrees else np.ones(1)
    share = one.copy()
    for degree in degrees.values():
        share = share * degree
    growth = graph.batch.bytes_factor((graph.values[v].shape for v in (*op.inputs, *op.outputs)), local_batch)
    traffic = (profile.forward_bytes, profile.backward_bytes)
    forward_bytes, backward_bytes = (
        one * (max(whole - saved, 0.0) * growth) for whole, saved in zip(traffic, savings[:2], strict=True)
    )
    if op.target.startswith("aten.cross_entropy_loss"):
        cut = _shards_vocabulary(rule, degrees, one) | (execution.loss_kernels == "chain")
        logits = graph.values[op.inputs[0]].shape
        chain = math.prod(logits) * graph.batch.bytes_factor([logits], local_batch)
        software = execution.software
        forward_bytes = np.where(cut, chain * software.loss_forward_bytes_per_logit, forward_bytes)
        backward_bytes = np.where(cut, chain * software.loss_backward_bytes_per_logit, backward_bytes)
    forward = np.asarray(device.memory_bound_s(forward_bytes / share), float)
    backward = np.asarray(device.memory_bound_s(backward_bytes / share), float)
    wanted = [bool(graph.values[value].requires_grad) for value in _matmul_operands(op)]
    num_products = (1, max(sum(wanted[:2]), 1)) if profile.forward_flops else (0, 0)
    if rule.compute == "attention":
        num_products = (profile.forward_kernels, profile.backward_kernels)
    kernels = memory_kernels(savings, profile, num_products)
    forward, backward = (
        time_s + count * device.kernel_latency_s for time_s, count in zip((forward, backward), kernels, strict=True)
    )
    if not profile.forward_flops:
        return forward, backward
    roles = local_role_sizes(rule, sizes, degrees, one)
    if rule.compute == "attention":
        return _attention_seconds(op, roles, graph, forward, backward, profile, device, execution)
    b, m, n, k = (roles.get(role, one) for role in "bmnk")
    dtype = _compute_dtype(op, graph)
    aligned = _rows_are_aligned(rule, sizes, degrees, one, dtype)
    whole = 2.0 * math.prod(sizes.get(label, 1) for label, role in rule.roles if role in "bmnk")
    scale = flops_at_batch(profile.forward_flops, graph.batch, local_batch) / max(whole, 1.0)
    if not rule.roles:  # a matmul-like op without a rule: a square matmul of its FLOPs
        m = n = k = one * (flops_at_batch(profile.forward_flops, graph.batch, local_batch) / 2 / share) ** (1 / 3)
        b, scale = one, 1.0
    forward = forward + scale * np.asarray(device.matmul_s(m, n, k, b, dtype=dtype, aligned=aligned), float)
    ratio = profile.backward_flops / profile.forward_flops
    shapes = [shape for shape, want in zip(((m, k, n), (n, k, m)), wanted, strict=False) if want] or [(m, n, k)]
    for shape in shapes:
        part = np.asarray(device.matmul_s(*shape, b, dtype=dtype, aligned=aligned), float)
        backward = backward + scale * part * ratio / len(shapes)
    return forward, backward


def _matmul_operands(op: Op) -> tuple[int, ...]:
    """The two values an op multiplies; what addmm and baddbmm add comes before them."""
    return op.inputs[1:3] if op.target.startswith(("aten.addmm", "aten.baddbmm")) else op.inputs[:2]


def _shards_vocabulary(rule: OpShardingRule, degrees: Mapping[int, Floats], ones: Floats) -> NDArray[np.bool_]:
    """Whether a cross entropy sees part of the vocabulary: then it is a chain of fp32 kernels around its exchanges."""
    cut = ones < 0
    for label, kind in enumerate(rule.label_kinds):
        if kind == "collective":
            cut = cut | (degrees.get(label, ones) > 1)
    return cut


def host_calls(op: Op, profile: OpProfile, execution: ExecutionModel, is_attention: bool) -> tuple[float, float]:
    """What the host does for an op, forward and backward, counted in kernel launches."""
    software = execution.software
    if is_attention and execution.attn == "math":
        return software.math_attention_forward_calls, software.math_attention_backward_calls
    views = software.view_calls if not profile.forward_kernels else 0.0
    return profile.forward_kernels + views, profile.backward_kernels


def gradient_products_s(
    graph: Graph,
    op: Op,
    rule: OpShardingRule,
    profile: OpProfile,
    local_batch: int,
    degrees: Mapping[int, Floats],
    device: Device,
    count: int,
) -> tuple[Floats, Floats] | None:
    """Seconds of a linear op's two backward products, (count,) strategies each: its input's gradient and its weight's.
    None for what is no linear op, and where one of the two is not wanted."""
    operands = [graph.values[value] for value in _matmul_operands(op)]
    if rule.compute != "matmul" or not rule.roles or len(operands) < 2 or operands[1].kind != "parameter":
        return None
    if not (profile.forward_flops and all(value.requires_grad for value in operands)):
        return None
    sizes, one = label_sizes(graph, op, rule, local_batch), np.ones(count)
    roles = local_role_sizes(rule, sizes, degrees, one)
    b, m, n, k = (roles.get(role, one) for role in "bmnk")
    dtype = _compute_dtype(op, graph)
    aligned = _rows_are_aligned(rule, sizes, degrees, one, dtype)
    products = [
        np.asarray(device.matmul_s(*shape, b, dtype=dtype, aligned=aligned), float) for shape in ((m, k, n), (n, k, m))
    ]
    return products[0], products[1]


def exposed_s(communication_s: Floats, compute_s: Floats, contention: float) -> Floats:
    """What a collective adds to the compute beside which it runs: max(a, b) + contention * min(a, b) - compute.

    >>> exposed_s(np.array([3.0, 1.0]), np.array([2.0, 2.0]), 0.5).tolist()
    [2.0, 0.5]
    """
    hidden = np.minimum(communication_s, compute_s)
    return np.asarray(communication_s - hidden + contention * hidden, float)


def local_role_sizes(
    rule: OpShardingRule, sizes: Mapping[int, int], degrees: Mapping[int, Floats], ones: Floats
) -> dict[str, Floats]:
    """Role -> product of the local sizes of its labels, per strategy."""
    roles: dict[str, Floats] = {}
    for label, role in rule.roles:
        roles[role] = roles.get(role, ones) * np.ceil(sizes.get(label, 1) / degrees.get(label, ones))
    return roles


def _rows_are_aligned(
    rule: OpShardingRule, sizes: Mapping[int, int], degrees: Mapping[int, Floats], ones: Floats, dtype: str
) -> NDArray[np.bool_]:
    """Whether rows of all operands begin at 16 bytes. What an axis cuts is padded so that they do (a vocabulary of
    50257 to a multiple of 128 per rank); what none cuts runs as the model has it."""
    elements = 16 // ITEMSIZE[dtype]
    aligned = ones > 0
    for label, role in rule.roles:
        if role in "nk" and sizes.get(label, 1) % elements and sizes.get(label, 1) > elements:
            aligned = aligned & (degrees.get(label, ones) > 1)
    return aligned


def _attention_seconds(
    op: Op,
    roles: Mapping[str, Floats],
    graph: Graph,
    forward: Floats,
    backward: Floats,
    profile: OpProfile,
    device: Device,
    execution: ExecutionModel,
) -> tuple[Floats, Floats]:
    query, key = graph.values[op.inputs[0]], graph.values[op.inputs[1]]
    one = np.ones_like(roles["q"])
    batch, heads = roles.get("b", one), roles.get("h", one)
    query_heads, key_heads = (value.shape[-3] if len(value.shape) > 2 else 1 for value in (query, key))
    kv_heads = np.maximum(heads * key_heads / max(query_heads, 1), 1)
    causal = any(argument is True for argument in op.args[3:]) or bool(dict(op.kwargs).get("is_causal", False))
    cut = roles["q"] < query.shape[-2]  # sequences do not grow with the batch

    def seconds(masked: bool, is_backward: bool) -> Floats:
        return np.asarray(
            device.attention_s(
                batch,
                heads,
                kv_heads,
                roles["q"],
                roles["k"],
                roles["d"],
                causal=masked,
                dtype=_compute_dtype(op, graph),
                backward=is_backward,
                flash=execution.attn == "flash",
            ),
            float,
        )

    times = []
    for is_backward in (False, True):
        time_s = seconds(causal, is_backward)
        if causal and not execution.balances_causal_context and np.any(cut):
            time_s = np.where(cut, seconds(False, is_backward), time_s)
        times.append(time_s)
    return forward + times[0], backward + (times[1] if profile.backward_flops else 0.0)


def _compute_dtype(op: Op, graph: Graph) -> str:
    for value in op.inputs:
        if graph.values[value].dtype in TRAINING_DTYPES:
            return graph.values[value].dtype
    return "float32"
