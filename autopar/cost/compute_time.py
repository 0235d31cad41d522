"""Seconds that one op computes on one rank, forward and backward, under many shardings at once.

    matmul-like   the device's curve at the local (batch, m, n, k); backward is (m, k, n) for the input's gradient and
                  (n, k, m) for the weight's, each only where that gradient is wanted
    attention     the device's attention curve at the local shape; backward at its own
    anything      + bytes of its other kernels / sustained bandwidth + how many these are * kernel latency

A sharding divides labels of the op's rule (``ShardedOp.degrees``). FLOPs of a matmul whose labels do not tell all of its
work (strides, dilations) are scaled to those its profile counted.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

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


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardedOp:
    """An op at ``local_batch`` samples under several shardings, here called strategies. ``degrees``: label -> by what each
    strategy divides it, one array element a strategy."""

    graph: Graph
    op: Op
    rule: OpShardingRule
    profile: OpProfile
    local_batch: int
    degrees: Mapping[int, Floats]

    @cached_property
    def ones(self) -> Floats:
        """1 per strategy; a single 1 where nothing is divided."""
        return np.ones_like(next(iter(self.degrees.values()))) if self.degrees else np.ones(1)

    @cached_property
    def num_shards(self) -> Floats:
        """By how many ranks each strategy divides the work of the op."""
        num_shards = self.ones.copy()
        for degree in self.degrees.values():
            num_shards = num_shards * degree
        return num_shards

    @cached_property
    def label_sizes(self) -> dict[int, int]:
        """Unsharded sizes of the labels."""
        return label_sizes(self.graph, self.op, self.rule, self.local_batch)

    def local_role_sizes(self, ones: Floats) -> dict[str, Floats]:
        """Role -> product of the local sizes of its labels, an array of the shape of ``ones``."""
        roles: dict[str, Floats] = {}
        for label, role in self.rule.roles:
            size = np.ceil(self.label_sizes.get(label, 1) / self.degrees.get(label, ones))
            roles[role] = roles.get(role, ones) * size
        return roles

    @property
    def compute_dtype(self) -> str:
        """The dtype of the first input that can be trained in; float32 where there is none."""
        dtypes = (self.graph.values[value].dtype for value in self.op.inputs)
        return next((dtype for dtype in dtypes if dtype in TRAINING_DTYPES), "float32")

    def rows_are_aligned(self, ones: Floats) -> NDArray[np.bool_]:
        """Whether rows of all operands begin at 16 bytes. What an axis shards is padded so that they do (a vocabulary of
        50257 to a multiple of 128 per rank); what none shards is computed as the model has it."""
        elements = 16 // ITEMSIZE[self.compute_dtype]
        aligned = ones > 0
        for label, role in self.rule.roles:
            size = self.label_sizes.get(label, 1)
            if role in "nk" and size % elements and size > elements:
                aligned = aligned & (self.degrees.get(label, ones) > 1)
        return aligned

    @property
    def shards_vocabulary(self) -> NDArray[np.bool_]:
        """Whether a cross entropy sees a shard of the vocabulary: then it is a chain of fp32 kernels between its
        collectives."""
        sharded = self.ones < 0
        for label, kind in enumerate(self.rule.label_kinds):
            if kind == "collective":
                sharded = sharded | (self.degrees.get(label, self.ones) > 1)
        return sharded


def label_sizes(graph: Graph, op: Op, rule: OpShardingRule, local_batch: int) -> dict[int, int]:
    """Unsharded sizes of the labels of an op at ``local_batch`` samples."""
    sizes = dict(rule.hidden_label_sizes)
    for value, dims in zip((*op.inputs, *op.outputs), (*rule.input_labels, *rule.output_labels), strict=True):
        for size, label in zip(graph.values[value].shape, dims, strict=True):
            if label != NO_LABEL:
                sizes[label] = graph.batch.scale(size, local_batch)
    return sizes


def op_seconds(
    sharded: ShardedOp, device: Device, execution: ExecutionModel, savings: FusionSavings = NO_SAVINGS
) -> tuple[Floats, Floats]:
    """Forward and backward seconds per strategy. ``savings``: traffic and kernels that fusion saves of the op."""
    profile, rule = sharded.profile, sharded.rule
    traffic_s = _memory_traffic_s(sharded, device, execution, savings)
    wanted = wanted_gradients(sharded)
    num_products = (1, max(sum(wanted), 1)) if profile.forward_flops else (0, 0)
    if rule.compute == "attention":
        num_products = (profile.forward_kernels, profile.backward_kernels)
    num_kernels = memory_kernels(savings, profile, num_products)
    forward_s, backward_s = (
        time_s + count * device.kernel_latency_s for time_s, count in zip(traffic_s, num_kernels, strict=True)
    )
    if not profile.forward_flops:
        return forward_s, backward_s
    if rule.compute == "attention":
        attention_s = _attention_s(sharded, device, execution)
        return forward_s + attention_s[0], backward_s + attention_s[1]
    forward_product_s, products_s = _matmul_s(sharded, device, wanted)
    forward_s = forward_s + forward_product_s
    for product_s in products_s:
        backward_s = backward_s + product_s
    return forward_s, backward_s


def _memory_traffic_s(
    sharded: ShardedOp, device: Device, execution: ExecutionModel, savings: FusionSavings
) -> tuple[Floats, Floats]:
    """Seconds of the kernels that move memory, forward and backward, without their latencies."""
    graph, op, profile, ones = sharded.graph, sharded.op, sharded.profile, sharded.ones
    shapes = (graph.values[value].shape for value in (*op.inputs, *op.outputs))
    growth = graph.batch.bytes_factor(shapes, sharded.local_batch)
    traffic = (profile.forward_bytes, profile.backward_bytes)
    forward_bytes, backward_bytes = (
        ones * (max(traced_bytes - saved_bytes, 0.0) * growth)
        for traced_bytes, saved_bytes in zip(traffic, savings[:2], strict=True)
    )
    if op.target.startswith("aten.cross_entropy_loss"):
        is_chain = sharded.shards_vocabulary | (execution.loss_kernels == "chain")
        shape, software = graph.values[op.inputs[0]].shape, execution.software
        logits = math.prod(shape) * graph.batch.bytes_factor([shape], sharded.local_batch)
        forward_bytes = np.where(is_chain, logits * software.loss_forward_bytes_per_logit, forward_bytes)
        backward_bytes = np.where(is_chain, logits * software.loss_backward_bytes_per_logit, backward_bytes)
    return (
        np.asarray(device.memory_bound_s(forward_bytes / sharded.num_shards), float),
        np.asarray(device.memory_bound_s(backward_bytes / sharded.num_shards), float),
    )


def _matmul_s(sharded: ShardedOp, device: Device, wanted: list[bool]) -> tuple[Floats, list[Floats]]:
    """Seconds of the forward product, and of each backward product that is ``wanted`` (the input's, the weight's)."""
    rule, profile, ones, batch = sharded.rule, sharded.profile, sharded.ones, sharded.graph.batch
    roles = sharded.local_role_sizes(ones)
    b, m, n, k = (roles.get(role, ones) for role in "bmnk")
    dtype, aligned = sharded.compute_dtype, sharded.rows_are_aligned(ones)
    flops = flops_at_batch(profile.forward_flops, batch, sharded.local_batch)
    labelled_flops = 2.0 * math.prod(sharded.label_sizes.get(label, 1) for label, role in rule.roles if role in "bmnk")
    scale = flops / max(labelled_flops, 1.0)
    if not rule.roles:  # a matmul-like op without a rule: a square matmul of its FLOPs
        m = n = k = ones * (flops / 2 / sharded.num_shards) ** (1 / 3)
        b, scale = ones, 1.0
    forward_s = scale * np.asarray(device.matmul_s(m, n, k, b, dtype=dtype, aligned=aligned), float)
    ratio = profile.backward_flops / profile.forward_flops
    shapes = [shape for shape, want in zip(((m, k, n), (n, k, m)), wanted, strict=False) if want] or [(m, n, k)]
    products_s = []
    for shape in shapes:
        product_s = np.asarray(device.matmul_s(*shape, b, dtype=dtype, aligned=aligned), float)
        products_s.append(scale * product_s * ratio / len(shapes))
    return forward_s, products_s


def _matmul_operands(op: Op) -> tuple[int, ...]:
    """The two values that an op multiplies; addmm and baddbmm add a third, which comes before them."""
    return op.inputs[1:3] if op.target.startswith(("aten.addmm", "aten.baddbmm")) else op.inputs[:2]


def wanted_gradients(sharded: ShardedOp) -> list[bool]:
    """Whether the gradient of each of the op's two operands is wanted."""
    return [bool(sharded.graph.values[value].requires_grad) for value in _matmul_operands(sharded.op)]


def host_calls(op: Op, profile: OpProfile, execution: ExecutionModel, is_attention: bool) -> tuple[float, float]:
    """What the host does for an op, forward and backward, counted in kernel launches."""
    software = execution.software
    if is_attention and execution.attn == "math":
        return software.math_attention_forward_calls, software.math_attention_backward_calls
    views = software.view_calls if not profile.forward_kernels else 0.0
    return profile.forward_kernels + views, profile.backward_kernels


def gradient_products_s(sharded: ShardedOp, device: Device, num_strategies: int) -> tuple[Floats, Floats] | None:
    """Seconds of a linear op's two backward products, (num_strategies,) each: its input's gradient and its weight's. None
    for what is not a linear op, and where one of the two is not wanted."""
    rule = sharded.rule
    operands = [sharded.graph.values[value] for value in _matmul_operands(sharded.op)]
    if rule.compute != "matmul" or not rule.roles or len(operands) < 2 or operands[1].kind != "parameter":
        return None
    if not (sharded.profile.forward_flops and all(value.requires_grad for value in operands)):
        return None
    ones = np.ones(num_strategies)
    roles = sharded.local_role_sizes(ones)
    b, m, n, k = (roles.get(role, ones) for role in "bmnk")
    dtype, aligned = sharded.compute_dtype, sharded.rows_are_aligned(ones)
    products = [
        np.asarray(device.matmul_s(*shape, b, dtype=dtype, aligned=aligned), float) for shape in ((m, k, n), (n, k, m))
    ]
    return products[0], products[1]


def exposed_s(communication_s: Floats, compute_s: Floats, contention: float) -> Floats:
    """What a collective adds to the compute that it overlaps with: max(a, b) + contention * min(a, b) - compute.

    >>> exposed_s(np.array([3.0, 1.0]), np.array([2.0, 2.0]), 0.5).tolist()
    [2.0, 0.5]
    """
    overlapped_s = np.minimum(communication_s, compute_s)
    return np.asarray(communication_s - overlapped_s + contention * overlapped_s, float)


def _attention_s(sharded: ShardedOp, device: Device, execution: ExecutionModel) -> tuple[Floats, Floats]:
    """Seconds of an attention's kernel, forward and backward. A rank with a shard of the queries saves nothing by a causal
    mask, unless ranks take parts of equal work (``balances_causal_context``)."""
    op, graph = sharded.op, sharded.graph
    roles = sharded.local_role_sizes(sharded.ones)
    query, key = graph.values[op.inputs[0]], graph.values[op.inputs[1]]
    one = np.ones_like(roles["q"])
    batch, heads = roles.get("b", one), roles.get("h", one)
    query_heads, key_heads = (value.shape[-3] if len(value.shape) > 2 else 1 for value in (query, key))
    kv_heads = np.maximum(heads * key_heads / max(query_heads, 1), 1)
    causal = any(argument is True for argument in op.args[3:]) or bool(dict(op.kwargs).get("is_causal", False))
    shards_queries = roles["q"] < query.shape[-2]  # sequences do not grow with the batch

    def seconds(masked: bool, is_backward: bool) -> Floats:
        """The device's curve at the local shape."""
        return np.asarray(
            device.attention_s(
                batch,
                heads,
                kv_heads,
                roles["q"],
                roles["k"],
                roles["d"],
                causal=masked,
                dtype=sharded.compute_dtype,
                backward=is_backward,
                flash=execution.attn == "flash",
            ),
            float,
        )

    times = []
    for is_backward in (False, True):
        time_s = seconds(causal, is_backward)
        if causal and not execution.balances_causal_context and np.any(shards_queries):
            time_s = np.where(shards_queries, seconds(False, is_backward), time_s)
        times.append(time_s)
    return times[0], times[1] if sharded.profile.backward_flops else np.zeros_like(times[1])
