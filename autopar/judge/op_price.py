"""What one op computes on one rank, read from the shapes its placements leave there.

    kernels that move memory   bytes of the op's profile / axes that shard it / sustained bandwidth + kernels * latency
    matmul                     device curve at the local (b, m, n, k); the backward once as (m, k, n) for the first
                               operand's gradient and once as (n, k, m) for the second's, as far as each is wanted
    attention                  device curve at the local shape, forward and backward
    exchanged inside           all_reduce of the statistics that the op's rule names, over axes that shard the label

Labels (of the op's sharding rule) name equal dims of different tensors: all tensors must leave a label at the same
local size, the label a rule contracts must leave a partial sum, and an input that lacks a sharded label a partial
gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from math import prod

from autopar.cluster.device import Device
from autopar.core.dtypes import ITEMSIZE, TRAINING_DTYPES
from autopar.core.errors import CheckError
from autopar.core.placement import PARTIAL, REPLICATE, Placements, parse_placements
from autopar.core.plan import OpPlan
from autopar.cost.fusion import NO_SAVINGS, memory_kernels
from autopar.graph.ir import Graph, Op, OpProfile
from autopar.judge.context import BlockContext
from autopar.judge.judge_mesh import JudgeMesh, PricedCollective, local_shape
from autopar.rules.op_sharding_rule import NO_LABEL, OpShardingRule
from autopar.rules.registry import sharding_rule


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedOpPrice:
    """Seconds of the kernels, forward and backward, and the collectives the op issues by itself. ``shards`` is by how
    many ranks its work is divided, the data axis included; ``fixed_shards`` counts only axes that cut a dim which does
    not grow with the batch: statistics over the batch (of batch norm) are divided by no other. ``products_s``: of a
    linear op that wants both, its backward products for the input's gradient and for the weight's."""

    forward_s: float
    backward_s: float
    forward_collectives: tuple[PricedCollective, ...]
    backward_collectives: tuple[PricedCollective, ...]
    num_shards: int
    num_fixed_shards: int
    linear_backward_s: tuple[float, float] | None = None


def shape_at(graph: Graph, shape: Sequence[int], micro_batch: int) -> tuple[int, ...]:
    """A traced shape at ``micro_batch`` samples."""
    return tuple(graph.batch.scale(size, micro_batch) for size in shape)


def price_op(context: BlockContext, op: Op, planned: OpPlan) -> JudgedOpPrice:
    """CheckError where the placements contradict each other."""
    graph, mesh, micro_batch = context.model.graph, context.mesh, context.micro_batch
    profile, fused = context.model.profile.ops[op.id], context.model.fusion_savings.get(op.id, NO_SAVINGS)
    rule = sharding_rule(op, graph.values)
    values = [graph.values[value] for value in (*op.inputs, *op.outputs)]
    placed = [parse_placements(text) for text in (*planned.inputs, *planned.outputs)]
    labelled = (*rule.input_labels, *rule.output_labels)
    local: dict[int, int] = {}
    for value, placements, labels in zip(values, placed, labelled, strict=True):
        shape = local_shape(shape_at(graph, value.shape, micro_batch), placements, mesh.sizes)
        for dim, label in enumerate(labels):
            if label != NO_LABEL and local.setdefault(label, shape[dim]) != shape[dim]:
                raise CheckError(
                    f"op {op.name}: its tensors disagree on how a dim is sharded: {_placements_text(planned)}"
                )
    wanting = [v.requires_grad for v in values[: len(op.inputs)]]
    _check_partial_sums(op, rule, planned, placed, labelled, wanting, mesh.sizes)
    sharding = [any(each[axis].shard_dim is not None for each in placed) for axis in range(len(mesh.sizes))]
    shards = prod(compress(mesh.sizes, sharding))
    fixed = [
        any(
            (sharded := placements[axis].shard_dim) is not None
            and not graph.batch.is_proportional(value.shape[sharded])
            for value, placements in zip(values, placed, strict=True)
        )
        for axis in range(len(mesh.sizes))
    ]
    scale = graph.batch.bytes_factor((value.shape for value in values), micro_batch)
    device = mesh.cluster.device
    traffic = _memory_bytes(context, op, rule, placed, labelled)
    forward, backward = (float(device.memory_bound_s(num_bytes * scale / shards)) for num_bytes in traffic)
    products: tuple[float, ...] = ()
    counted = (profile.forward_kernels, profile.backward_kernels) if rule.compute == "attention" else (0, 0)
    if profile.forward_flops:
        if rule.compute == "attention":
            times = _attention_s(context, op, rule, local)
        else:
            forward_s, products = _matmul_s(graph, op, rule, profile, local, shards, micro_batch, device)
            times = (forward_s, sum(products))
            counted = (1, len(products))
        forward, backward = forward + times[0], backward + times[1]
    beside = memory_kernels(fused, profile, counted)  # each starts and ends once, however little it moves
    forward += beside[0] * device.kernel_latency_s
    backward += beside[1] * device.kernel_latency_s
    linear = rule.compute == "matmul" and rule.roles and graph.values[_matmul_operands(op)[-1]].kind == "parameter"
    steps = _collectives_inside(graph, rule, placed, labelled, micro_batch, mesh)
    return JudgedOpPrice(
        forward_s=forward,
        backward_s=backward,
        forward_collectives=steps[0],
        backward_collectives=steps[1],
        num_shards=shards,
        num_fixed_shards=prod(compress(mesh.sizes, fixed)),
        linear_backward_s=(products[0], products[1]) if linear and len(products) == 2 else None,
    )


def _memory_bytes(
    context: BlockContext,
    op: Op,
    rule: OpShardingRule,
    placements: Sequence[Placements],
    dim_labels: Sequence[tuple[int, ...]],
) -> tuple[float, float]:
    """Traced bytes of all ranks, forward and backward; a cross entropy over a sharded vocabulary, Megatron's always, is a
    chain of fp32 kernels."""
    sharded = set[int]().union(
        *(_sharded_labels(placements, dim_labels, axis) for axis in range(len(context.mesh.sizes)))
    )
    profile, fused = context.model.profile.ops[op.id], context.model.fusion_savings.get(op.id, NO_SAVINGS)
    chain = context.model.execution.loss == "chain" or any(
        _label_kind(rule, label) == "collective" for label in sharded
    )
    if "cross_entropy_loss" in op.target and chain:
        logits, software = prod(context.model.graph.values[op.inputs[0]].shape), context.software
        return logits * software.loss_forward_bytes_per_logit, logits * software.loss_backward_bytes_per_logit
    return max(profile.forward_bytes - fused[0], 0.0), max(profile.backward_bytes - fused[1], 0.0)


def _sharded_labels(placed: Sequence[Placements], labelled: Sequence[tuple[int, ...]], axis: int) -> set[int]:
    """The labels that an axis shards."""
    return {
        labels[dim]
        for placements, labels in zip(placed, labelled, strict=True)
        if (dim := placements[axis].shard_dim) is not None
    } - {NO_LABEL}


def _placements_text(planned: OpPlan) -> str:
    return f"{', '.join(planned.inputs)} -> {', '.join(planned.outputs)}"


def _check_partial_sums(
    op: Op,
    rule: OpShardingRule,
    planned: OpPlan,
    placements: Sequence[Placements],
    dim_labels: Sequence[tuple[int, ...]],
    requires_grad: list[bool],
    mesh_sizes: tuple[int, ...],
) -> None:
    """On an axis that shards the op by labels, what lacks them is partial: outputs forward, inputs backward."""
    gradients = [parse_placements(text) if text else None for text in planned.input_gradients]
    num_inputs = len(op.inputs)
    for axis in range(len(placements[0]) if placements else 0):
        if mesh_sizes[axis] == 1:
            continue
        sharded = _sharded_labels(placements, dim_labels, axis)
        if not sharded or rule.view_groups:
            continue
        if len({_label_kind(rule, label) for label in sharded}) == 1 and next(iter(sharded)) < len(rule.label_kinds):
            kind = _label_kind(rule, next(iter(sharded)))
            if kind == "replicated":
                raise CheckError(
                    f"op {op.name}: it shards a dim that its rule does not allow to be sharded: {_placements_text(planned)}"
                )
            for output in placements[num_inputs:]:
                if kind == "sum" and output[axis] != PARTIAL:
                    raise CheckError(
                        f"op {op.name}: it shards a contracted dim, so its result must be partial: {_placements_text(planned)}"
                    )
        for at, gradient in enumerate(gradients):
            lacks = placements[at][axis] == REPLICATE and gradient is not None and gradient[axis] != PARTIAL
            if lacks and requires_grad[at]:
                raise CheckError(
                    f"op {op.name}: input {at} is replicated in a sharded op, so its gradient must be partial"
                )


def _label_kind(rule: OpShardingRule, label: int) -> str:
    return rule.label_kinds[label] if label < len(rule.label_kinds) else "parallel"


def _compute_dtype(graph: Graph, op: Op) -> str:
    return next((v.dtype for v in (graph.values[i] for i in op.inputs) if v.dtype in TRAINING_DTYPES), "float32")


def _matmul_s(
    graph: Graph,
    op: Op,
    rule: OpShardingRule,
    profile: OpProfile,
    local_sizes: dict[int, int],
    num_shards: int,
    micro_batch: int,
    device: Device,
) -> tuple[float, tuple[float, ...]]:
    """Seconds of the forward, and of each backward product that is wanted."""
    traced = {
        label: size
        for value, labels in zip((*op.inputs, *op.outputs), (*rule.input_labels, *rule.output_labels), strict=True)
        for size, label in zip(graph.values[value].shape, labels, strict=True)
    }
    whole = dict.fromkeys("bmnk", 1)
    here = dict.fromkeys("bmnk", 1)
    for label, role in rule.roles:
        whole[role] *= traced.get(label, 1)
        here[role] *= local_sizes.get(label, 1)
    b, m, n, k = (float(here[role]) for role in "bmnk")
    repeats = profile.forward_flops / (2.0 * prod(whole.values()))
    if not rule.roles:  # unknown: a square product of as many FLOPs
        power, rest = 0, profile.forward_flops
        while rest % graph.batch.prime == 0:
            power, rest = power + 1, rest // graph.batch.prime
        flops = profile.forward_flops * (micro_batch / graph.batch.traced_size) ** power / num_shards
        b, repeats = 1.0, 1.0
        m = n = k = (flops / 2) ** (1 / 3)
    dtype = _compute_dtype(graph, op)
    vector = 16 // ITEMSIZE[dtype]  # elements of a vector load, which rows of odd length that nothing cuts spoil
    aligned = not any(
        role in "nk" and (size := traced.get(label, 1)) > vector and size % vector and local_sizes.get(label, 1) == size
        for label, role in rule.roles
    )
    forward = repeats * float(device.matmul_s(m, n, k, b, dtype=dtype, aligned=aligned))
    wanted = [graph.values[value].requires_grad for value in _matmul_operands(op)]
    products = [shape for shape, want in zip(((m, k, n), (n, k, m)), wanted, strict=False) if want] or [(m, n, k)]
    share = profile.backward_flops / profile.forward_flops / len(products)
    return forward, tuple(
        repeats * share * float(device.matmul_s(*shape, b, dtype=dtype, aligned=aligned)) for shape in products
    )


def _matmul_operands(op: Op) -> tuple[int, ...]:
    return op.inputs[1:3] if op.packet in ("addmm", "baddbmm") else op.inputs[:2]


def _attention_s(
    context: BlockContext, op: Op, rule: OpShardingRule, local_sizes: dict[int, int]
) -> tuple[float, float]:
    graph = context.model.graph
    sizes = dict.fromkeys("bhqkd", 1)
    for label, role in rule.roles:
        sizes[role] *= local_sizes.get(label, 1)
    shapes = [graph.values[op.inputs[at]].shape for at in (0, 1)]
    heads, kv_heads = (shape[-3] if len(shape) > 2 else 1 for shape in shapes)
    causal = any(argument is True for argument in op.args[3:]) or dict(op.kwargs).get("is_causal") is True
    # a rank with some of the queries runs them against all keys under a mask, unless ranks take parts of equal work
    causal = causal and (context.is_megatron or sizes["q"] == graph.values[op.inputs[0]].shape[-2])
    times = [
        float(
            context.mesh.cluster.device.attention_s(
                sizes["b"],
                sizes["h"],
                max(sizes["h"] * kv_heads / heads, 1),
                sizes["q"],
                sizes["k"],
                sizes["d"],
                causal=causal,
                dtype=_compute_dtype(graph, op),
                backward=backward,
                flash=context.model.execution.attn == "flash",
            )
        )
        for backward in (False, True)
    ]
    return times[0], times[1] if context.model.profile.ops[op.id].backward_flops else 0.0


def _collectives_inside(
    graph: Graph,
    rule: OpShardingRule,
    placements: Sequence[Placements],
    dim_labels: Sequence[tuple[int, ...]],
    micro_batch: int,
    mesh: JudgeMesh,
) -> tuple[tuple[PricedCollective, ...], tuple[PricedCollective, ...]]:
    inside = rule.kernel_collectives
    if inside is None:
        return (), ()
    exchanged, dividing = [], 1
    for axis, size in enumerate(mesh.sizes):
        sharded = _sharded_labels(placements, dim_labels, axis)
        if any(_label_kind(rule, label) == "collective" for label in sharded):
            exchanged.append(axis)
        elif sharded & set(inside.labels):
            dividing *= size
    found = []
    for exchanges in (inside.forward_bytes, inside.backward_bytes):
        steps = (
            mesh.collective(
                "all_reduce",
                whole
                * (micro_batch / graph.batch.traced_size if graph.batch.is_proportional(whole) else 1.0)
                / dividing,
                tuple(exchanged),
            )
            for whole in exchanges
        )
        found.append(tuple(step for step in steps if step is not None))
    return found[0], found[1]
