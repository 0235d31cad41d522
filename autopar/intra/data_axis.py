"""What the data axis does to each op of a block: it shards the batch wherever an op can be sharded along it.

Most ops can: their rule has the batch among its labels, and every tensor that grows with the batch is placed as ``S(0)``
from op to op. Some cannot (a sort of all tokens, an op without a rule): they run replicated on every data rank, and what
they read is gathered first. Some can in more than one way (the logits between all pairs of samples have the batch
twice). Which option each op takes is the same for every mesh: that of the least

    sum over values  bytes of the collectives that redistribute it from maker to reader, and its gradient back
    + sum over ops that run replicated though they grow with the batch   bytes / MEMORY + FLOPs / MATMUL

found exactly by elimination, over the options of the op's rule and two that every op has: to run replicated with
replicated gradients, and to run replicated while partial gradients pass through (a backward is linear in the gradient).
At the ends of a block a value is sharded on the first dim that grows with the batch; one that does not grow is
replicated and its gradient partial; a scalar that carries a gradient (a loss) is itself partial.
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
"""Bytes of memory traffic that take as long as one byte between GPUs of a node (3.3 TB/s against 0.4 TB/s)."""
FLOPS_PER_LINK_BYTE = 1500.0
"""FLOPs that take as long as one byte between GPUs of a node (600 TFLOP/s against 0.4 TB/s)."""
SLICE_LINK_BYTES = 1e-6
"""What a local slice counts for, in bytes per byte: nothing, but that of two equal paths the one that slices nothing
wins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataAxis:
    """``options`` has one option per op node, ``hubs`` one pair per hub, ``ends`` one per block input and output.
    ``summed`` are the parameters of which some use leaves a partial gradient over the data ranks.
    ``plain``: every tensor that grows with the batch stays sharded along it, and nothing is exchanged over the axis, so
    that a rank's prices follow from its share of the batch alone."""

    op_options: tuple[AxisOption, ...]
    shared_pairs: tuple[PlacementPair, ...]
    boundary_pairs: Mapping[int, PlacementPair]
    is_batch_parallel: bool
    partial_gradient_parameters: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RuledOp:
    """An op as this file sees it: its rule, the options that can run, and its tensors."""

    rule: OpShardingRule
    options: tuple[AxisOption, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


EdgeTuple = tuple[int, int, int, int | None, int | None]
"""(value, source, target, output of the source, input of the target): nodes 0 and 1 are the block's ends, then the
calls, then the hubs; positions are None for ends and hubs."""


def end_pair(graph: Graph, value: int) -> PlacementPair:
    """How a value and its gradient are placed on the data axis where blocks meet."""
    found = graph.values[value]
    for dim, size in enumerate(found.shape):
        if graph.batch.is_proportional(size):
            return PlacementPair.sharded(DimFactor(dim=dim, size=size))
    if not found.requires_grad:
        return REPLICATED
    return PARTIAL_GRADIENT if found.shape else PARTIAL_VALUE


def choose_data_axis(
    graph: Graph, block: Block, ops: Sequence[RuledOp], shared_values: Sequence[int], tensor_edges: Sequence[EdgeTuple]
) -> DataAxis:
    """The options of all calls of a block; ``hubs`` are the values of its hubs."""
    ends = {value: end_pair(graph, value) for value in (*block.inputs, *block.outputs)}
    options = [_data_options(graph, call) for call in ops]
    pairs = [_hub_pairs(graph, value, ops, options, ends) for value in shared_values]
    first_hub = 2 + len(ops)

    def pairs_at(node: int, value: int, output: int | None, position: int | None) -> list[PlacementPair]:
        """What each choice of a node makes of a value it gives (``output``) or takes (``position``)."""
        if node < 2:
            return [ends[value]]
        if node >= first_hub:
            return list(pairs[node - first_hub])
        if output is not None:
            return [option.outputs[output] for option in options[node - 2]]
        assert position is not None
        return [option.inputs[position] for option in options[node - 2]]

    sides = [
        (pairs_at(source, value, out, None), pairs_at(target, value, None, at))
        for value, source, target, out, at in tensor_edges
    ]
    counts = (1, 1, *(len(chosen) for chosen in options), *(len(chosen) for chosen in pairs))
    node_costs = [np.zeros((1, count)) for count in counts]
    for at, (call, chosen) in enumerate(zip(ops, options, strict=True)):
        node_costs[2 + at][0] = [
            0.0 if option.is_sharded else _replication_link_bytes(graph, call) for option in chosen
        ]
    edge_costs = [
        np.array([[[_moved_bytes(graph.values[link[0]], a, b) for b in taken] for a in made]])
        for link, (made, taken) in zip(tensor_edges, sides, strict=True)
    ]
    edges = tuple((link[1], link[2]) for link in tensor_edges)
    choices = make_eliminator(counts, edges).solve(node_costs, edge_costs).backtrack_all()[:, 0]
    picked = tuple(chosen[choices[2 + at]] for at, chosen in enumerate(options))
    still = all(
        made[choices[link[1]]].without_size == taken[choices[link[2]]].without_size
        for link, (made, taken) in zip(tensor_edges, sides, strict=True)
    )
    sharded = all(
        pair.atom is not None
        for call, option in zip(ops, picked, strict=True)
        for value, pair in zip((*call.inputs, *call.outputs), (*option.inputs, *option.outputs), strict=True)
        if any(graph.batch.is_proportional(size) for size in value.shape)
    )
    return DataAxis(
        op_options=picked,
        shared_pairs=tuple(chosen[choices[first_hub + at]] for at, chosen in enumerate(pairs)),
        boundary_pairs=ends,
        is_batch_parallel=still and sharded and not any(option.runs_kernel_collectives for option in picked),
        partial_gradient_parameters=frozenset(
            value.id
            for call, option in zip(ops, picked, strict=True)
            for value, pair in zip(call.inputs, option.inputs, strict=True)
            if value.kind == "parameter" and pair == PARTIAL_GRADIENT
        ),
    )


def _data_options(graph: Graph, op: RuledOp) -> tuple[AxisOption, ...]:
    """Shards of the batch first, so that they win among equals; then partial gradients, replicated, and partial
    sums."""
    found = [option for option in op.options if option.is_sharded and graph.batch.is_proportional(option.max_shards)]
    passing = AxisOption(
        inputs=tuple(PARTIAL_GRADIENT if value.requires_grad else REPLICATED for value in op.inputs),
        outputs=tuple(PARTIAL_GRADIENT if value.requires_grad else REPLICATED for value in op.outputs),
    )
    found += [passing, *(option for option in op.options if not option.is_sharded)]
    return tuple(dict.fromkeys(found))


def _hub_pairs(
    graph: Graph,
    value: int,
    calls: Sequence[RuledOp],
    options: Sequence[tuple[AxisOption, ...]],
    ends: Mapping[int, PlacementPair],
) -> tuple[PlacementPair, ...]:
    """What a shared value may be placed as: what its maker and readers may, of equal placements the first."""
    found: dict[PlacementPair, PlacementPair] = {}
    if value in ends:
        found[ends[value].without_size] = ends[value]
    for call, chosen in zip(calls, options, strict=True):
        for option in chosen:
            tensors = zip((*call.inputs, *call.outputs), (*option.inputs, *option.outputs), strict=True)
            for tensor, pair in tensors:
                if tensor.id == value:
                    found.setdefault(pair.without_size, pair)
    for pair in (PARTIAL_GRADIENT, REPLICATED) if graph.values[value].requires_grad else (REPLICATED,):
        found.setdefault(pair, pair)
    return tuple(found.values())


def _replication_link_bytes(graph: Graph, op: RuledOp) -> float:
    """What it counts for that all data ranks run an op on the whole micro-batch."""
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


def _moved_bytes(value: Value, made: PlacementPair, taken: PlacementPair) -> float:
    """Bytes that collectives move, of the value forward and of its gradient back."""
    forward = _moved_share(made.forward, taken.forward)
    backward = _moved_share(taken.gradient, made.gradient) if value.requires_grad else 0.0
    return (forward + backward) * prod(value.shape) * value.itemsize


def _moved_share(source: Placement, target: Placement) -> float:
    """Of a tensor's bytes."""
    if without_size(source) == without_size(target):
        return 0.0
    if source == REPLICATE:
        return SLICE_LINK_BYTES
    if source == PARTIAL:
        return 2.0 if target == REPLICATE else 1.0
    return 0.5 if isinstance(target, Shard) else 1.0
