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

from autopar.choice.mini_buckets import eliminator
from autopar.core.placement import PARTIAL, REPLICATE, Placement, Shard
from autopar.graph.ir import Block, Graph, Value
from autopar.rules.axis_options import Option
from autopar.rules.dim_factors import Atom, without_size
from autopar.rules.op_sharding_rule import OpRule
from autopar.rules.placement_pair import PARTIAL_GRADIENT, PARTIAL_VALUE, REPLICATED, PlacementPair

MEMORY = 8.0
"""Bytes of memory traffic that take as long as one byte between GPUs of a node (3.3 TB/s against 0.4 TB/s)."""
MATMUL = 1500.0
"""FLOPs that take as long as one byte between GPUs of a node (600 TFLOP/s against 0.4 TB/s)."""
SLICE = 1e-6
"""What a local slice counts for, in bytes per byte: nothing, but that of two equal paths the one that slices nothing
wins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataAxis:
    """``options`` has one option per op node, ``hubs`` one pair per hub, ``ends`` one per block input and output.
    ``summed`` are the parameters of which some use leaves a partial gradient over the data ranks.
    ``plain``: every tensor that grows with the batch stays sharded along it, and nothing is exchanged over the axis, so
    that a rank's prices follow from its share of the batch alone."""

    options: tuple[Option, ...]
    hubs: tuple[PlacementPair, ...]
    ends: Mapping[int, PlacementPair]
    plain: bool
    summed: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """An op as this file sees it: its rule, the options that can run, and its tensors."""

    rule: OpRule
    options: tuple[Option, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


Link = tuple[int, int, int, int | None, int | None]
"""(value, source, target, output of the source, input of the target): nodes 0 and 1 are the block's ends, then the
calls, then the hubs; positions are None for ends and hubs."""


def end_pair(graph: Graph, value: int) -> PlacementPair:
    """How a value and its gradient are placed on the data axis where blocks meet."""
    found = graph.values[value]
    for dim, size in enumerate(found.shape):
        if graph.batch.grows(size):
            return PlacementPair.sharded(Atom(dim=dim, size=size))
    if not found.requires_grad:
        return REPLICATED
    return PARTIAL_GRADIENT if found.shape else PARTIAL_VALUE


def data_axis(
    graph: Graph, block: Block, calls: Sequence[Call], hubs: Sequence[int], links: Sequence[Link]
) -> DataAxis:
    """The options of all calls of a block; ``hubs`` are the values of its hubs."""
    ends = {value: end_pair(graph, value) for value in (*block.inputs, *block.outputs)}
    options = [_options(graph, call) for call in calls]
    pairs = [_hub_pairs(graph, value, calls, options, ends) for value in hubs]
    first_hub = 2 + len(calls)

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
        for value, source, target, out, at in links
    ]
    counts = (1, 1, *(len(chosen) for chosen in options), *(len(chosen) for chosen in pairs))
    node_costs = [np.zeros((1, count)) for count in counts]
    for at, (call, chosen) in enumerate(zip(calls, options, strict=True)):
        node_costs[2 + at][0] = [0.0 if option.sharded else _alike(graph, call) for option in chosen]
    edge_costs = [
        np.array([[[_moved_bytes(graph.values[link[0]], a, b) for b in taken] for a in made]])
        for link, (made, taken) in zip(links, sides, strict=True)
    ]
    edges = tuple((link[1], link[2]) for link in links)
    choices = eliminator(counts, edges).solve(node_costs, edge_costs).backtrack_all()[:, 0]
    picked = tuple(chosen[choices[2 + at]] for at, chosen in enumerate(options))
    still = all(
        made[choices[link[1]]].without_size == taken[choices[link[2]]].without_size
        for link, (made, taken) in zip(links, sides, strict=True)
    )
    sharded = all(
        pair.atom is not None
        for call, option in zip(calls, picked, strict=True)
        for value, pair in zip((*call.inputs, *call.outputs), (*option.inputs, *option.outputs), strict=True)
        if any(graph.batch.grows(size) for size in value.shape)
    )
    return DataAxis(
        options=picked,
        hubs=tuple(chosen[choices[first_hub + at]] for at, chosen in enumerate(pairs)),
        ends=ends,
        plain=still and sharded and not any(option.inside for option in picked),
        summed=frozenset(
            value.id
            for call, option in zip(calls, picked, strict=True)
            for value, pair in zip(call.inputs, option.inputs, strict=True)
            if value.kind == "parameter" and pair == PARTIAL_GRADIENT
        ),
    )


def _options(graph: Graph, call: Call) -> tuple[Option, ...]:
    """Shards of the batch first, so that they win among equals; then partial gradients, replicated, and partial
    sums."""
    found = [option for option in call.options if option.sharded and graph.batch.grows(option.size)]
    passing = Option(
        inputs=tuple(PARTIAL_GRADIENT if value.requires_grad else REPLICATED for value in call.inputs),
        outputs=tuple(PARTIAL_GRADIENT if value.requires_grad else REPLICATED for value in call.outputs),
    )
    found += [passing, *(option for option in call.options if not option.sharded)]
    return tuple(dict.fromkeys(found))


def _hub_pairs(
    graph: Graph,
    value: int,
    calls: Sequence[Call],
    options: Sequence[tuple[Option, ...]],
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


def _alike(graph: Graph, call: Call) -> float:
    """What it counts for that all data ranks run an op on the whole micro-batch."""
    tensors = (*call.inputs, *call.outputs)
    if call.rule.compute == "free" or not any(graph.batch.grows(size) for value in tensors for size in value.shape):
        return 0.0
    sizes = dict(call.rule.sizes)
    for value, dims in zip(tensors, (*call.rule.inputs, *call.rule.outputs), strict=True):
        sizes.update(zip(dims, value.shape, strict=True))
    multiplied = {label for label, role in call.rule.roles if role in "bhmnkqd"}
    flops = 2.0 * prod(sizes.get(label, 1) for label in multiplied) if multiplied else 0.0
    return sum(prod(value.shape) * value.itemsize for value in tensors) / MEMORY + flops / MATMUL


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
        return SLICE
    if source == PARTIAL:
        return 2.0 if target == REPLICATE else 1.0
    return 0.5 if isinstance(target, Shard) else 1.0
