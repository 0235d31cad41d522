"""The cheapest sequence of collectives that redistributes one tensor: a shortest path, found by networkx.

Nodes are placements on all axes; an edge changes a set of axes from one placement to another at once:

    P -> R  all_reduce      bytes: what a rank stores           P -> S  reduce_scatter   bytes: what a rank stores
    S -> R  all_gather      bytes: what a rank stores after     S -> S' all_to_all       bytes: what a rank stores
    R -> S  a local slice, free                                 R -> P  zeros on all ranks but the first, free

No axis becomes P unless it ends as P. Dims are sharded outermost axis first, so a shard may appear or disappear only
where no axis further in shards the same dim. Axes of one rank change for nothing. Paths are compared by seconds, then by
bytes, then by the number of changes, then by the text of their placements.

Worked example: (4, 8) fp16 = 64 bytes from ``P`` to ``S(0)`` on an axis of 2: one reduce_scatter of 64 bytes.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import networkx

from autopar.core.errors import CheckError
from autopar.core.placement import PARTIAL, REPLICATE, Placement, Placements, format_placements
from autopar.core.plan import CollectiveKind

COMPARED_DECIMALS = 15
"""Decimals of seconds to which paths are compared: a sum of floats taken in another order differs after them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PricedCollective:
    """One collective over mesh axes (positions). ``num_bytes`` counts as ``plan.Collective`` does: an uneven shard is
    padded to equal parts. ``time_s`` is that of the unpadded tensor."""

    kind: CollectiveKind
    axes: tuple[int, ...]
    num_bytes: float
    time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RedistributionPath:
    """The collectives of one redistribution in order, and the placements after each change (slices included)."""

    collectives: tuple[PricedCollective, ...]
    placements: tuple[Placements, ...]

    @property
    def time_s(self) -> float:
        """Seconds of all collectives."""
        return sum(step.time_s for step in self.collectives)


PriceChange = Callable[[Placements, Placements, tuple[int, ...]], PricedCollective | None]
"""The collective that changes ``axes`` from the first placements to the second; None where the change is free."""


@dataclass(frozen=True, slots=True, order=True)
class _PathCost:
    """What paths are compared by, in this order; costs of successive changes add up."""

    time_s: float
    num_bytes: float
    num_changes: int
    texts: tuple[str, ...]

    def __add__(self, change: "_PathCost") -> "_PathCost":
        return _PathCost(
            round(self.time_s + change.time_s, COMPARED_DECIMALS),
            self.num_bytes + change.num_bytes,
            self.num_changes + change.num_changes,
            self.texts + change.texts,
        )

    def __radd__(self, start: int) -> "_PathCost":
        """networkx starts every path at the number 0."""
        return _PathCost(0.0, 0.0, 0, ()) + self


def find_path(
    source: Placements, target: Placements, *, price: PriceChange, prefers_all_to_all: bool
) -> RedistributionPath:
    """The cheapest path; CheckError where there is none (a partial sum that nothing made). ``prefers_all_to_all``: axes
    that shard a dim and are to shard another never become replicated in between where one all_to_all can change them."""
    if source == target:
        return RedistributionPath(collectives=(), placements=())
    changes = _possible_changes(source, target, prefers_all_to_all)

    def cost(before: Placements, after: Placements, change: dict[str, tuple[int, ...]]) -> _PathCost:
        step = price(before, after, change["axes"])
        text = format_placements(after)
        return _PathCost(step.time_s if step else 0.0, step.num_bytes if step else 0.0, 1, (text,))

    try:
        nodes = networkx.dijkstra_path(changes, source, target, weight=cost)
    except (networkx.NetworkXNoPath, networkx.NodeNotFound) as error:
        raise CheckError(
            f"no collective redistributes a tensor from {format_placements(source)} to {format_placements(target)}"
        ) from error
    steps = (price(before, after, changes.edges[before, after]["axes"]) for before, after in itertools.pairwise(nodes))
    return RedistributionPath(
        collectives=_merge_all_reduces(tuple(step for step in steps if step)), placements=tuple(nodes[1:])
    )


def _possible_changes(source: Placements, target: Placements, prefers_all_to_all: bool) -> networkx.DiGraph:
    """Placements reachable from ``source``, and the changes between them; an edge has the ``axes`` that it changes. No edge
    leads back to ``source``: no cheapest path takes it."""
    changeable = _changeable_axes(source, target)
    met = (*(source[axis] for axis in changeable), *(target[axis] for axis in changeable), REPLICATE)
    choices = tuple(dict.fromkeys(met))
    graph = networkx.DiGraph()
    graph.add_node(source)
    queue = [source]
    while queue:
        before = queue.pop()
        for axes, new in _next_changes(before, changeable, choices, target):
            after = tuple(new if axis in axes else old for axis, old in enumerate(before))
            if after == source or not _is_innermost(after, axes):
                continue
            if prefers_all_to_all and new == REPLICATE and _can_all_to_all(before, target, axes):
                continue
            if after not in graph:
                queue.append(after)
            graph.add_edge(before, after, axes=axes)
    return graph


def _merge_all_reduces(collectives: tuple[PricedCollective, ...]) -> tuple[PricedCollective, ...]:
    """All-reduces of equal bytes over several axes as the single collective that runs; its time is the sum of theirs."""
    merged: list[PricedCollective] = []
    for step in collectives:
        equal = (
            index
            for index, other in enumerate(merged)
            if step.kind == "all_reduce" == other.kind and other.num_bytes == step.num_bytes
        )
        index = next(equal, None)
        if index is None:
            merged.append(step)
        else:
            other = merged[index]
            axes = tuple(sorted((*other.axes, *step.axes)))
            merged[index] = replace(other, axes=axes, time_s=other.time_s + step.time_s)
    return tuple(merged)


def _changeable_axes(source: Placements, target: Placements) -> tuple[int, ...]:
    """Axes whose placement differs at the end, and those further in that shard a dim which such an axis shards before or
    after: they may have to be replicated in between."""
    changed = {axis for axis, (before, after) in enumerate(zip(source, target, strict=True)) if before != after}
    dims = {side[axis].shard_dim for axis in changed for side in (source, target)} - {None}
    inside = {
        axis
        for axis in range(len(source))
        if any(axis > other for other in changed) and {source[axis].shard_dim, target[axis].shard_dim} & dims
    }
    return tuple(sorted(changed | inside))


def _next_changes(
    placements: Placements, changeable: tuple[int, ...], choices: Placements, target: Placements
) -> list[tuple[tuple[int, ...], Placement]]:
    """Changes that one collective, slice or filling with zeros makes: (axes, the placement of ``choices`` that they change
    to)."""
    found: list[tuple[tuple[int, ...], Placement]] = [
        ((axis,), PARTIAL) for axis in changeable if placements[axis] == REPLICATE and target[axis] == PARTIAL
    ]
    for count in range(1, len(changeable) + 1):
        for axes in itertools.combinations(changeable, count):
            old = placements[axes[0]]
            if all(placements[axis] == old for axis in axes) and _is_innermost(placements, axes):
                found += [(axes, new) for new in choices if new not in (old, PARTIAL)]
    return found


def _can_all_to_all(placements: Placements, target: Placements, axes: tuple[int, ...]) -> bool:
    """Whether a single all_to_all can make all of ``axes`` shard the dim that they shard in ``target``, another than now."""
    dims = [(placements[axis].shard_dim, target[axis].shard_dim) for axis in axes]
    after = tuple(target[axis] if axis in axes else old for axis, old in enumerate(placements))
    return all(None not in pair and pair[0] != pair[1] for pair in dims) and _is_innermost(after, axes)


def _is_innermost(placements: Placements, axes: tuple[int, ...]) -> bool:
    """Whether no axis further in than the first of ``axes``, other than they, shards the dim that they shard; true where
    they shard none."""
    dim = placements[axes[0]].shard_dim
    return dim is None or not any(
        axis > axes[0] and axis not in axes and placement.shard_dim == dim for axis, placement in enumerate(placements)
    )
