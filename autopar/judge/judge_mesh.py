"""How the judge redistributes one tensor on a mesh: the cheapest sequence of collectives, by Dijkstra.

States are placements on all axes; a step changes a set of axes from one placement to another:

    P -> R  all_reduce      bytes: what a rank stores           P -> S  reduce_scatter   bytes: what a rank stores
    S -> R  all_gather      bytes: what a rank stores after     S -> S' all_to_all       bytes: what a rank stores
    R -> S  a local slice, free                                 R -> P  zeros on all ranks but the first, free

Nothing becomes P on an axis that does not end as P. Dims are sharded outermost axis first, so a shard may only come or
go where no axis further in shards the same dim. Axes of one rank change for nothing. Among equally cheap paths the one
of fewest bytes wins, then of fewest steps, then the first in order of its text.

Worked example: (4, 8) fp16 = 64 bytes from ``P`` to ``S(0)`` on an axis of 2: one reduce_scatter of 64 bytes.
"""

import heapq
import itertools
from dataclasses import dataclass, replace

from autopar.cluster.cluster import Cluster, RankGroup
from autopar.core.errors import CheckError
from autopar.core.placement import PARTIAL, REPLICATE, Placement, Placements, Shard, format_placements, parse_placements
from autopar.core.plan import CollectiveKind

COMPARED_DECIMALS = 15
"""Decimals of seconds to which ways are compared: the same sum in another order is another number after them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PricedCollective:
    """One collective over mesh axes (positions); ``num_bytes`` as ``plan.Collective`` counts them, equal parts of an
    uneven shard: what is lacking is padded. The time is that of the tensor alone."""

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
        return sum(step.time_s for step in self.collectives)


def local_shape(shape: tuple[int, ...], placements: Placements, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape on the rank that stores most: split dim by dim, outermost axis first, rounding up piece by piece. Shards
    of few pieces are outside those of many, and leave a rank its share of the pieces.

    >>> local_shape((24, 5), (Shard(0, split_factor=3),), (4,)), local_shape((10, 4), (Shard(0), REPLICATE), (4, 2))
    ((6, 5), (3, 4))
    >>> eight_samples_of_two = (Shard(0), Shard(0, split_factor=8))  # a rank has 2 samples, half of each
    >>> local_shape((16,), eight_samples_of_two, (4, 2))
    (2,)
    """
    found = list(shape)
    shards = [
        (placement.split_factor, axis, placement.dim)
        for axis, placement in enumerate(placements)
        if isinstance(placement, Shard)
    ]
    for pieces, axis, dim in sorted(shards):
        taken = 1
        for fewer, outer, same in shards:
            taken *= sizes[outer] if same == dim and fewer < pieces else 1
        local_pieces = max(1, pieces // taken)
        found[dim] = local_pieces * -(-found[dim] // (local_pieces * sizes[axis]))
    return tuple(found)


class JudgeMesh:
    """The devices of one stage as the judge sees them: axis sizes, and the links every set of axes crosses.
    ``exchanges``: what is sharded on one dim and then on another takes the all_to_all, as it runs, though a tensor as tiny
    as a twin's would be gathered and sliced in as little time."""

    def __init__(
        self, cluster: Cluster, sizes: tuple[int, ...], first_device: int, *, prefers_all_to_all: bool = False
    ) -> None:
        self.cluster, self.sizes, self.first_device, self.prefers_all_to_all = (
            cluster,
            sizes,
            first_device,
            prefers_all_to_all,
        )
        self.num_devices = 1
        for size in sizes:
            self.num_devices *= size
        self._groups: dict[tuple[int, ...], RankGroup] = {}
        self._paths: dict[tuple[object, ...], RedistributionPath] = {}

    def group_size(self, axes: tuple[int, ...]) -> int:
        """Ranks of a group over ``axes``."""
        product = 1
        for axis in axes:
            product *= self.sizes[axis]
        return product

    def group(self, axes: tuple[int, ...]) -> RankGroup:
        if axes not in self._groups:
            self._groups[axes] = self.cluster.axis_group(self.num_devices, self.sizes, axes, self.first_device)
        return self._groups[axes]

    def collective(
        self, kind: CollectiveKind, num_bytes: float, axes: tuple[int, ...], padded_bytes: float | None = None
    ) -> PricedCollective | None:
        """One collective of a tensor of ``num_bytes``, ``padded_bytes`` with what makes its parts equal; None where the
        axes have a single rank or there is nothing to move."""
        axes = tuple(axis for axis in axes if self.sizes[axis] > 1)
        if not axes or num_bytes <= 0:
            return None
        time_s = float(self.cluster.collective_s(kind, num_bytes, self.group(axes)))
        return PricedCollective(
            kind=kind, axes=axes, num_bytes=num_bytes if padded_bytes is None else padded_bytes, time_s=time_s
        )

    def local_bytes(self, shape: tuple[int, ...], itemsize: int, placements: Placements) -> int:
        """Bytes of a tensor on the rank that stores most."""
        product = itemsize
        for size in local_shape(shape, placements, self.sizes):
            product *= size
        return product

    def redistribution_path(
        self, shape: tuple[int, ...], itemsize: int, source: Placements, target: Placements
    ) -> RedistributionPath:
        """The cheapest path; CheckError where there is none (a partial sum that nothing made)."""
        key = (shape, itemsize, source, target)
        if key not in self._paths:
            self._paths[key] = self._find_path(shape, itemsize, source, target)
        return self._paths[key]

    def _find_path(
        self, shape: tuple[int, ...], itemsize: int, source: Placements, target: Placements
    ) -> RedistributionPath:
        movable = _changeable_axes(source, target)
        met = (*(source[axis] for axis in movable), *(target[axis] for axis in movable), REPLICATE)
        choices = tuple(dict.fromkeys(met))
        # (seconds, bytes, steps, texts passed), state, collectives so far; the texts make the order total
        queue: list[tuple[float, float, int, tuple[str, ...], Placements, tuple[PricedCollective, ...]]] = []
        heapq.heappush(queue, (0, 0, 0, (), source, ()))
        done: set[Placements] = set()
        while queue:
            time_s, moved, count, passed, state, steps = heapq.heappop(queue)
            if state == target:
                return RedistributionPath(
                    collectives=_merge_all_reduces(steps), placements=tuple(map(parse_placements, passed))
                )
            if state in done:
                continue
            done.add(state)
            for axes, new in _next_changes(state, movable, choices, target):
                after = tuple(new if axis in axes else old for axis, old in enumerate(state))
                if after in done or not _is_innermost(after, axes):
                    continue
                if self.prefers_all_to_all and new == REPLICATE and _can_all_to_all(state, target, axes):
                    continue
                step = self._price_change(shape, itemsize, state, after, axes)
                cost = round(time_s + (step.time_s if step else 0.0), COMPARED_DECIMALS)
                more = moved + (step.num_bytes if step else 0)
                made = (*steps, step) if step else steps
                heapq.heappush(queue, (cost, more, count + 1, (*passed, format_placements(after)), after, made))
        raise CheckError(
            f"no collective redistributes a tensor from {format_placements(source)} to {format_placements(target)}"
        )

    def parse(self, text: str) -> Placements:
        """The ``settled`` placements of a text; () of none."""
        return self.canonical(parse_placements(text))

    def canonical(self, placements: Placements) -> Placements:
        """``placements`` with those of axes of one rank, where all mean the same, as ``REPLICATE``."""
        pairs = zip(placements, self.sizes, strict=bool(placements))
        return tuple(REPLICATE if size == 1 else placement for placement, size in pairs)

    def _price_change(
        self, shape: tuple[int, ...], itemsize: int, before: Placements, after: Placements, axes: tuple[int, ...]
    ) -> PricedCollective | None:
        old, new = before[axes[0]], after[axes[0]]
        if old == REPLICATE:
            return None
        if new == REPLICATE and old != PARTIAL:
            padded = self.local_bytes(shape, itemsize, before) * self.group_size(axes)
            return self.collective("all_gather", self.local_bytes(shape, itemsize, after), axes, padded)
        num_bytes = self.local_bytes(shape, itemsize, before)
        if not isinstance(new, Shard):
            return self.collective("all_reduce", num_bytes, axes)
        kind: CollectiveKind = "reduce_scatter" if old == PARTIAL else "all_to_all"
        full, part = (local_shape(shape, placements, self.sizes)[new.dim] for placements in (before, after))
        return self.collective(kind, num_bytes, axes, num_bytes * part * self.group_size(axes) / max(full, 1))


def _merge_all_reduces(collectives: tuple[PricedCollective, ...]) -> tuple[PricedCollective, ...]:
    """Sums of one tensor over several axes as the one collective that runs, whatever prices said of the parts."""
    found: list[PricedCollective] = []
    for step in collectives:
        alike = (at for at, one in enumerate(found) if one.kind == step.kind and one.num_bytes == step.num_bytes)
        same = next(alike, None) if step.kind == "all_reduce" else None
        if same is None:
            found.append(step)
        else:
            axes = tuple(sorted((*found[same].axes, *step.axes)))
            found[same] = replace(found[same], axes=axes, time_s=found[same].time_s + step.time_s)
    return tuple(found)


def _changeable_axes(source: Placements, target: Placements) -> tuple[int, ...]:
    """Axes that change, and those further in that shard a dim which a changing axis shards before or after."""
    moving = {axis for axis, (a, b) in enumerate(zip(source, target, strict=True)) if a != b}
    dims = {side[axis].shard_dim for axis in moving for side in (source, target)} - {None}
    inside = {
        axis
        for axis in range(len(source))
        if any(axis > other for other in moving) and {source[axis].shard_dim, target[axis].shard_dim} & dims
    }
    return tuple(sorted(moving | inside))


def _next_changes(
    placements: Placements, changeable: tuple[int, ...], choices: Placements, target: Placements
) -> list[tuple[tuple[int, ...], Placement]]:
    """(axes, what they change to), of ``choices``."""
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
    """Whether axes that shard a dim are to shard another, and can at once."""
    dims = [(placements[axis].shard_dim, target[axis].shard_dim) for axis in axes]
    after = tuple(target[axis] if axis in axes else old for axis, old in enumerate(placements))
    return all(None not in pair and pair[0] != pair[1] for pair in dims) and _is_innermost(after, axes)


def _is_innermost(state: Placements, axes: tuple[int, ...]) -> bool:
    """Whether no axis further in than the first of ``axes``, other than they, shards the dim that they shard."""
    dim = state[axes[0]].shard_dim
    return dim is None or not any(
        axis > axes[0] and axis not in axes and placement.shard_dim == dim for axis, placement in enumerate(state)
    )
