"""What one op computes on one rank, read from the shapes its placements leave there.

kernels that move memory   bytes of the op's profile / ranks that share them / sustained bandwidth + kernels * latency
matmul                     device curve at the local (b, m, n, k); the backward once as (m, k, n) for the first
                           operand's gradient and once as (n, k, m) for the second's, as far as each is wanted
attention                  device curve at the local shape, forward and backward
collectives inside         all_reduce of the statistics that the op's rule names, over axes that shard the label
"""

from dataclasses import dataclass
from math import prod

from autopar.core.dtypes import ITEMSIZE, TRAINING_DTYPES
from autopar.core.plan import OpPlan
from autopar.cost.fusion import NO_SAVINGS, memory_kernels
from autopar.graph.ir import Graph, Op
from autopar.judge.context import BlockContext
from autopar.judge.placed_op import PlacedOp
from autopar.judge.redistribution_path import PricedCollective


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedOpPrice:
    """Seconds of the kernels, forward and backward, and the collectives that the op issues by itself.

    ``num_shards``: by how many ranks its work is divided, the data axis included. ``num_fixed_shards`` counts only axes
    that shard a dim which does not grow with the batch: statistics over the batch (of batch norm) are divided by no other.
    ``linear_backward_s``: of a linear op that wants both gradients, its backward products for the input's and for the
    weight's."""

    forward_s: float
    backward_s: float
    forward_collectives: tuple[PricedCollective, ...]
    backward_collectives: tuple[PricedCollective, ...]
    num_shards: int
    num_fixed_shards: int
    linear_backward_s: tuple[float, float] | None = None


def price_op(context: BlockContext, op: Op, planned: OpPlan) -> JudgedOpPrice:
    """The price of an op of the block; CheckError where its placements contradict each other."""
    placed = PlacedOp.of(context, op, planned)
    graph, profile, rule = context.model.graph, context.model.profile.ops[op.id], placed.rule
    savings = context.model.fusion_savings.get(op.id, NO_SAVINGS)
    device, num_shards = context.mesh.cluster.device, placed.num_shards
    scale = graph.batch.bytes_factor((value.shape for value in placed.values), context.micro_batch)
    traffic = _memory_bytes(placed)
    forward_s, backward_s = (float(device.memory_bound_s(num_bytes * scale / num_shards)) for num_bytes in traffic)
    products_s: tuple[float, ...] = ()
    is_attention = rule.compute == "attention"
    num_products = (profile.forward_kernels, profile.backward_kernels) if is_attention else (0, 0)
    if profile.forward_flops and is_attention:
        attention_s = _attention_s(placed)
        forward_s, backward_s = forward_s + attention_s[0], backward_s + attention_s[1]
    elif profile.forward_flops:
        forward_product_s, products_s = _matmul_s(placed)
        num_products = (1, len(products_s))
        forward_s, backward_s = forward_s + forward_product_s, backward_s + sum(products_s)
    num_kernels = memory_kernels(savings, profile, num_products)  # each has its latency, however little it moves
    is_linear = rule.compute == "matmul" and rule.roles and graph.values[_matmul_operands(op)[-1]].kind == "parameter"
    forward_collectives, backward_collectives = _collectives_inside(placed)
    return JudgedOpPrice(
        forward_s=forward_s + num_kernels[0] * device.kernel_latency_s,
        backward_s=backward_s + num_kernels[1] * device.kernel_latency_s,
        forward_collectives=forward_collectives,
        backward_collectives=backward_collectives,
        num_shards=num_shards,
        num_fixed_shards=placed.num_fixed_shards,
        linear_backward_s=(products_s[0], products_s[1]) if is_linear and len(products_s) == 2 else None,
    )


def _memory_bytes(placed: PlacedOp) -> tuple[float, float]:
    """Bytes that all ranks move at the traced batch, forward and backward. A cross entropy over a sharded vocabulary, in
    Megatron's program any, is a chain of fp32 kernels."""
    context, op = placed.context, placed.op
    sharded = set[int]().union(*(placed.sharded_labels(axis) for axis in range(len(context.mesh.sizes))))
    profile, savings = context.model.profile.ops[op.id], context.model.fusion_savings.get(op.id, NO_SAVINGS)
    is_chain = context.model.execution.loss == "chain" or any(
        placed.label_kind(label) == "collective" for label in sharded
    )
    if "cross_entropy_loss" in op.target and is_chain:
        logits, software = prod(context.model.graph.values[op.inputs[0]].shape), context.software
        return logits * software.loss_forward_bytes_per_logit, logits * software.loss_backward_bytes_per_logit
    return max(profile.forward_bytes - savings[0], 0.0), max(profile.backward_bytes - savings[1], 0.0)


def _compute_dtype(graph: Graph, op: Op) -> str:
    """The dtype of the first input that can be trained in; float32 where there is none."""
    return next((v.dtype for v in (graph.values[i] for i in op.inputs) if v.dtype in TRAINING_DTYPES), "float32")


def _matmul_s(placed: PlacedOp) -> tuple[float, tuple[float, ...]]:
    """Seconds of the forward, and of each backward product that is wanted."""
    context, op, rule = placed.context, placed.op, placed.rule
    graph, profile, device = context.model.graph, context.model.profile.ops[op.id], context.mesh.cluster.device
    traced = {
        label: size
        for value, labels in zip((*op.inputs, *op.outputs), (*rule.input_labels, *rule.output_labels), strict=True)
        for size, label in zip(graph.values[value].shape, labels, strict=True)
    }
    traced_roles = dict.fromkeys("bmnk", 1)
    local_roles = dict.fromkeys("bmnk", 1)
    for label, role in rule.roles:
        traced_roles[role] *= traced.get(label, 1)
        local_roles[role] *= placed.local_sizes.get(label, 1)
    b, m, n, k = (float(local_roles[role]) for role in "bmnk")
    repeats = profile.forward_flops / (2.0 * prod(traced_roles.values()))
    if not rule.roles:  # unknown: a square product of as many FLOPs
        b, repeats = 1.0, 1.0
        m = n = k = (_local_flops(placed) / 2) ** (1 / 3)
    dtype = _compute_dtype(graph, op)
    vector = 16 // ITEMSIZE[dtype]  # elements of a vector load; unsharded rows of another length are not aligned to it
    aligned = not any(
        role in "nk"
        and (size := traced.get(label, 1)) > vector
        and size % vector
        and placed.local_sizes.get(label, 1) == size
        for label, role in rule.roles
    )
    forward_s = repeats * float(device.matmul_s(m, n, k, b, dtype=dtype, aligned=aligned))
    wanted = [graph.values[value].requires_grad for value in _matmul_operands(op)]
    products = [shape for shape, want in zip(((m, k, n), (n, k, m)), wanted, strict=False) if want] or [(m, n, k)]
    share = profile.backward_flops / profile.forward_flops / len(products)
    return forward_s, tuple(
        repeats * share * float(device.matmul_s(*shape, b, dtype=dtype, aligned=aligned)) for shape in products
    )


def _local_flops(placed: PlacedOp) -> float:
    """Forward FLOPs of one rank: they grow with the batch as often as its traced prime divides their count."""
    batch, flops = placed.context.model.graph.batch, placed.context.model.profile.ops[placed.op.id].forward_flops
    power, fixed_flops = 0, flops
    while fixed_flops % batch.prime == 0:
        power, fixed_flops = power + 1, fixed_flops // batch.prime
    return flops * (placed.context.micro_batch / batch.traced_size) ** power / placed.num_shards


def _matmul_operands(op: Op) -> tuple[int, ...]:
    """The two values that an op multiplies; addmm and baddbmm add a third, which comes before them."""
    return op.inputs[1:3] if op.packet in ("addmm", "baddbmm") else op.inputs[:2]


def _attention_s(placed: PlacedOp) -> tuple[float, float]:
    """Seconds forward and backward."""
    context, op = placed.context, placed.op
    graph = context.model.graph
    sizes = dict.fromkeys("bhqkd", 1)
    for label, role in placed.rule.roles:
        sizes[role] *= placed.local_sizes.get(label, 1)
    shapes = [graph.values[op.inputs[position]].shape for position in (0, 1)]
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


def _collectives_inside(placed: PlacedOp) -> tuple[tuple[PricedCollective, ...], tuple[PricedCollective, ...]]:
    """The all_reduces that the op issues by itself, forward and backward."""
    inside, mesh, batch = placed.rule.kernel_collectives, placed.context.mesh, placed.context.model.graph.batch
    if inside is None:
        return (), ()
    reduced_axes, num_shards = [], 1
    for axis, size in enumerate(mesh.sizes):
        sharded = placed.sharded_labels(axis)
        if any(placed.label_kind(label) == "collective" for label in sharded):
            reduced_axes.append(axis)
        elif sharded & set(inside.labels):
            num_shards *= size
    growth = placed.context.micro_batch / batch.traced_size

    def price(sizes_bytes: tuple[int, ...]) -> tuple[PricedCollective, ...]:
        """``sizes_bytes``: of the traced, unsharded tensors."""
        local = (size * (growth if batch.is_proportional(size) else 1.0) / num_shards for size in sizes_bytes)
        steps = (mesh.collective("all_reduce", num_bytes, tuple(reduced_axes)) for num_bytes in local)
        return tuple(step for step in steps if step is not None)

    return price(inside.forward_bytes), price(inside.backward_bytes)
