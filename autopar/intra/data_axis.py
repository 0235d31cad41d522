"""How each op of a block is sharded on the data axis: along the batch, wherever it can be.

Most ops can: their rule has the batch among its labels, and every tensor that grows with the batch stays ``Shard(0)``
from op to op. An op that cannot (a sort over all tokens, an op without a rule) is replicated on all data ranks, and its
inputs are gathered first. Some can in more than one way (the logits between all pairs of samples have the batch twice).
The options of all ops are the same for every mesh, those of the least

    sum over edges  link bytes that redistribute the value from producer to consumer, and its gradient back
                                                                                             (_redistribution_link_bytes)
    + sum over replicated ops that grow with the batch
                    bytes / MEMORY_BYTES_PER_LINK_BYTE + FLOPs / FLOPS_PER_LINK_BYTE             (_replication_link_bytes)

found by elimination (choose_data_axis), over the options of the op's rule and two that every op has: replicated with
replicated gradients, and replicated while Partial gradients pass through (a backward is linear in the gradient).
At the boundary of a block a tensor is sharded along its first dim that grows with the batch; a tensor without one is
replicated and its gradient Partial; a scalar with a gradient (the loss) is Partial (end_pair).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from autopar.choice.mini_buckets import make_eliminator
from autopar.core.placement import PARTIAL, REPLICATE, Placement, Shard
from autopar.graph.ir import Block, Graph, Value
from autopar.rules.axis_options import AxisOption
from autopar.rules.dim_factors import DimFactor, without_size
from autopar.rules.op_sharding_rule import OpShardingRule
from autopar.rules.placement_pair import PARTIAL_GRADIENT, PARTIAL_VALUE, REPLICATED, PlacementPair

MEMORY_BYTES_PER_LINK_BYTE = 8.0
"""Bytes of memory traffic that take as long as one byte between GPUs of a node (H100: 3.3 TB/s against 0.4 TB/s)."""
FLOPS_PER_LINK_BYTE = 1500.0
"""FLOPs that take as long as one byte between GPUs of a node (H100: 600 TFLOP/s against 0.4 TB/s)."""
SLICE_LINK_BYTES = 1e-6
"""Link bytes that a local slice counts per byte: next to none, so that it only breaks ties."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataAxis:
    """The data axis's choices: an option per op node (``op_options``), a pair per shared node (``shared_pairs``) and per
    block input and output (``boundary_pairs``, by value id).

    ``is_batch_parallel``: every tensor that grows with the batch is sharded along it and no collective of the block
    spans the axis, so that a rank's prices follow from its share of the batch alone. ``partial_gradient_parameters``
    (value ids) have a use that leaves a Partial gradient over the data ranks.
    """

    op_options: tuple[AxisOption, ...]
    shared_pairs: tuple[PlacementPair, ...]
    boundary_pairs: Mapping[int, PlacementPair]
    is_batch_parallel: bool
    partial_gradient_parameters: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RuledOp:
    """What is needed of an op here: its rule, the options that can run, and its tensors."""

    rule: OpShardingRule
    options: tuple[AxisOption, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


EdgeTuple = tuple[int, int, int, int | None, int | None]
"""(value id, source node, target node, output of the source, input of the target), as in ``block_space.TensorEdge``."""


def end_pair(graph: Graph, value: int) -> PlacementPair:
    """The pair of a value (id) on the data axis at the boundary of a block."""
    tensor = graph.values[value]
    for dim, size in enumerate(tensor.shape):
        if graph.batch.is_proportional(size):
            return PlacementPair.sharded(DimFactor(dim=dim, size=size))
    if not tensor.requires_grad:
        return REPLICATED
    return PARTIAL_GRADIENT if tensor.shape else PARTIAL_VALUE


def choose_data_axis(
    graph: Graph, block: Block, ops: Sequence[RuledOp], shared_values: Sequence[int], tensor_edges: Sequence[EdgeTuple]
) -> DataAxis:
    """The least-cost options of a block's ops; ``shared_values`` are the values (ids) of its shared nodes."""
    boundary_pairs = {value: end_pair(graph, value) for value in (*block.inputs, *block.outputs)}
    options = [_data_options(graph, op) for op in ops]
    pairs = [_shared_pairs(graph, value, ops, options, boundary_pairs) for value in shared_values]
    first_shared = 2 + len(ops)

    def pairs_at(node: int, value: int, output: int | None, position: int | None) -> list[PlacementPair]:
        """By choice of a node, the pair of a value: its output number ``output``, or its input at ``position``."""
        if node < 2:
            return [boundary_pairs[value]]
        if node >= first_shared:
            return list(pairs[node - first_shared])
        if output is not None:
            return [option.outputs[output] for option in options[node - 2]]
        assert position is not None
        return [option.inputs[position] for option in options[node - 2]]

    ends = [
        (pairs_at(source, value, out, None), pairs_at(target, value, None, at))
        for value, source, target, out, at in tensor_edges
    ]
    counts = (1, 1, *(len(chosen) for chosen in options), *(len(chosen) for chosen in pairs))
    node_costs = [np.zeros((1, count)) for count in counts]
    for at, (op, chosen) in enumerate(zip(ops, options, strict=True)):
        node_costs[2 + at][0] = [0.0 if option.is_sharded else _replication_link_bytes(graph, op) for option in chosen]
    edge_costs = [
        np.array([[[_redistribution_link_bytes(graph.values[link[0]], a, b) for b in taken] for a in made]])
        for link, (made, taken) in zip(tensor_edges, ends, strict=True)
    ]
    edges = tuple((link[1], link[2]) for link in tensor_edges)
    choices = make_eliminator(counts, edges).solve(node_costs, edge_costs).backtrack_all()[:, 0]
    picked = tuple(chosen[choices[2 + at]] for at, chosen in enumerate(options))
    is_redistributed = not all(
        made[choices[link[1]]].without_size == taken[choices[link[2]]].without_size
        for link, (made, taken) in zip(tensor_edges, ends, strict=True)
    )
    is_sharded = all(
        pair.factor is not None
        for op, option in zip(ops, picked, strict=True)
        for value, pair in zip((*op.inputs, *op.outputs), (*option.inputs, *option.outputs), strict=True)
        if any(graph.batch.is_proportional(size) for size in value.shape)
    )
    return DataAxis(
        op_options=picked,
        shared_pairs=tuple(chosen[choices[first_shared + at]] for at, chosen in enumerate(pairs)),
        boundary_pairs=boundary_pairs,
        is_batch_parallel=is_sharded
        and not is_redistributed
        and not any(option.runs_kernel_collectives for option in picked),
        partial_gradient_parameters=frozenset(
            value.id
            for op, option in zip(ops, picked, strict=True)
            for value, pair in zip(op.inputs, option.inputs, strict=True)
            if value.kind == "parameter" and pair == PARTIAL_GRADIENT
        ),
    )


def _data_options(graph: Graph, op: RuledOp) -> tuple[AxisOption, ...]:
    """The options of an op on the data axis. Of equal cost the first wins: sharded along the batch, then replicated with
    Partial gradients, then the unsharded options of the rule."""
    found = [option for option in op.options if option.is_sharded and graph.batch.is_proportional(option.max_shards)]
    passing = AxisOption(
        inputs=tuple(PARTIAL_GRADIENT if value.requires_grad else REPLICATED for value in op.inputs),
        outputs=tuple(PARTIAL_GRADIENT if value.requires_grad else REPLICATED for value in op.outputs),
    )
    found += [passing, *(option for option in op.options if not option.is_sharded)]
    return tuple(dict.fromkeys(found))


def _shared_pairs(
    graph: Graph,
    value: int,
    ops: Sequence[RuledOp],
    options: Sequence[tuple[AxisOption, ...]],
    boundary_pairs: Mapping[int, PlacementPair],
) -> tuple[PlacementPair, ...]:
    """The pairs that a shared value may have: those of its producer and its consumers, of equal placements the first,
    and the replicated ones."""
    found: dict[PlacementPair, PlacementPair] = {}
    if value in boundary_pairs:
        found[boundary_pairs[value].without_size] = boundary_pairs[value]
    for op, chosen in zip(ops, options, strict=True):
        for option in chosen:
            tensors = zip((*op.inputs, *op.outputs), (*option.inputs, *option.outputs), strict=True)
            for tensor, pair in tensors:
                if tensor.id == value:
                    found.setdefault(pair.without_size, pair)
    for pair in (PARTIAL_GRADIENT, REPLICATED) if graph.values[value].requires_grad else (REPLICATED,):
        found.setdefault(pair, pair)
    return tuple(found.values())


def _replication_link_bytes(graph: Graph, op: RuledOp) -> float:
    """What it costs, in link bytes, that all data ranks run an op on the whole micro-batch; 0 for views and for ops
    that do not grow with the batch."""
    tensors = (*op.inputs, *op.outputs)
    if op.rule.compute == "free" or not any(
        graph.batch.is_proportional(size) for value in tensors for size in value.shape
    ):
        return 0.0
    sizes = dict(op.rule.hidden_label_sizes)
    for value, dims in zip(tensors, (*op.rule.input_labels, *op.rule.output_labels), strict=True):
        sizes.update(zip(dims, value.shape, strict=True))
    multiplied = {label for label, role in op.rule.roles if role in "bhmnkqd"}
    flops = 2.0 * prod(sizes.get(label, 1) for label in multiplied) if multiplied else 0.0
    return (
        sum(prod(value.shape) * value.itemsize for value in tensors) / MEMORY_BYTES_PER_LINK_BYTE
        + flops / FLOPS_PER_LINK_BYTE
    )


def _redistribution_link_bytes(value: Value, source: PlacementPair, target: PlacementPair) -> float:
    """Link bytes that redistribute a value forward and its gradient back."""
    forward = _link_bytes_per_byte(source.forward, target.forward)
    backward = _link_bytes_per_byte(target.gradient, source.gradient) if value.requires_grad else 0.0
    return (forward + backward) * prod(value.shape) * value.itemsize


def _link_bytes_per_byte(source: Placement, target: Placement) -> float:
    """Link bytes of a redistribution per byte of the full tensor: 2 for an all-reduce, 1 for an all-gather and a
    reduce-scatter, 0.5 for an all-to-all."""
    if without_size(source) == without_size(target):
        return 0.0
    if source == REPLICATE:
        return SLICE_LINK_BYTES
    if source == PARTIAL:
        return 2.0 if target == REPLICATE else 1.0
    return 0.5 if isinstance(target, Shard) else 1.0
