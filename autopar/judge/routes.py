"""How the judge moves one tensor between two placements of a mesh: the cheapest sequence of collectives, by Dijkstra.

States are placements (a token text per axis), steps change all axes of a set that hold the same token to another one:

    P -> R  all_reduce      bytes: what a rank holds            P -> S  reduce_scatter   bytes: what a rank holds
    S -> R  all_gather      bytes: what a rank holds after      S -> S' all_to_all       bytes: what a rank holds
    R -> S  a local slice, free                                 R -> P  zeros on all ranks but the first, free

Nothing becomes P on an axis that does not end as P. Dims are cut outermost axis first, so a shard may only come or go
where no axis further in cuts the same dim. Axes of one rank change for nothing. Among equally cheap ways the one of
fewest bytes wins, then of fewest steps, then the first in order of its text.

Worked example: (4, 8) fp16 = 64 bytes from ``P`` to ``S(0)`` on an axis of 2: one reduce_scatter of 64 bytes.
"""

import heapq
import itertools
from dataclasses import dataclass, replace

from autopar.cluster.cluster import Cluster, Group
from autopar.plan.errors import CheckError
from autopar.plan.mesh import parse_placements, shard_dim
from autopar.plan.plan import CollectiveKind

Tokens = tuple[str, ...]
EQUAL_DIGITS = 15
"""Decimals of seconds to which ways are compared: the same sum in another order is another number after them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One collective over mesh axes (positions); ``num_bytes`` as ``plan.Collective`` counts them, equal parts of an
    uneven cut: what is lacking is padded. The time is that of the tensor alone."""

    kind: CollectiveKind
    axes: tuple[int, ...]
    num_bytes: float
    time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The collectives of one redistribution in order, and the placements after each change (slices included)."""

    steps: tuple[Step, ...]
    placements: tuple[str, ...]

    @property
    def time_s(self) -> float:
        return sum(step.time_s for step in self.steps)


def local_shape(shape: tuple[int, ...], tokens: Tokens, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape on the fullest rank: cut dim by dim, outermost axis first, rounding up piece by piece. Cuts of few
    pieces lie outside those of many, and leave a rank its share of the pieces.

    >>> local_shape((24, 5), ("_S(0,3)",), (4,)), local_shape((10, 4), ("S(0)", "R"), (4, 2))
    ((6, 5), (3, 4))
    >>> local_shape((16,), ("S(0)", "_S(0,8)"), (4, 2))  # 8 samples of 2: a rank has 2 samples, half of each
    (2,)
    """
    found = list(shape)
    cuts = []
    for axis, token in enumerate(tokens):
        dim = shard_dim(token)
        if dim is not None:
            cuts.append((int(token[:-1].split(",")[1]) if token.startswith("_") else 1, axis, dim))
    for pieces, axis, dim in sorted(cuts):
        taken = 1
        for fewer, outer, same in cuts:
            taken *= sizes[outer] if same == dim and fewer < pieces else 1
        held = max(1, pieces // taken)
        found[dim] = held * -(-found[dim] // (held * sizes[axis]))
    return tuple(found)


class Mesh:
    """The devices of one stage as the judge sees them: axis sizes, and the links every set of axes crosses.
    ``exchanges``: what is cut on one dim and then on another takes the all_to_all, as it runs, though a tensor as tiny
    as a twin's would be gathered and sliced in as little time."""

    def __init__(self, cluster: Cluster, sizes: tuple[int, ...], first_device: int, *, exchanges: bool = False) -> None:
        self.cluster, self.sizes, self.first_device, self.exchanges = cluster, sizes, first_device, exchanges
        self.num_devices = 1
        for size in sizes:
            self.num_devices *= size
        self._groups: dict[tuple[int, ...], Group] = {}
        self._routes: dict[tuple[object, ...], Route] = {}

    def degree(self, axes: tuple[int, ...]) -> int:
        """Ranks of a group over ``axes``."""
        product = 1
        for axis in axes:
            product *= self.sizes[axis]
        return product

    def group(self, axes: tuple[int, ...]) -> Group:
        if axes not in self._groups:
            self._groups[axes] = self.cluster.axis_group(self.num_devices, self.sizes, axes, self.first_device)
        return self._groups[axes]

    def step(
        self, kind: CollectiveKind, num_bytes: float, axes: tuple[int, ...], padded_bytes: float | None = None
    ) -> Step | None:
        """One collective of a tensor of ``num_bytes``, ``padded_bytes`` with what makes its parts equal; None where the
        axes have a single rank or there is nothing to move."""
        axes = tuple(axis for axis in axes if self.sizes[axis] > 1)
        if not axes or num_bytes <= 0:
            return None
        time_s = float(self.cluster.collective_s(kind, num_bytes, self.group(axes)))
        return Step(kind=kind, axes=axes, num_bytes=num_bytes if padded_bytes is None else padded_bytes, time_s=time_s)

    def local_bytes(self, shape: tuple[int, ...], itemsize: int, tokens: Tokens) -> int:
        """Bytes of a tensor on the fullest rank."""
        product = itemsize
        for size in local_shape(shape, tokens, self.sizes):
            product *= size
        return product

    def route(self, shape: tuple[int, ...], itemsize: int, source: str, target: str) -> Route:
        """The cheapest way; CheckError where there is none (a partial sum that nothing made)."""
        key = (shape, itemsize, source, target)
        if key not in self._routes:
            self._routes[key] = self._search(shape, itemsize, parse_placements(source), parse_placements(target))
        return self._routes[key]

    def _search(self, shape: tuple[int, ...], itemsize: int, source: Tokens, target: Tokens) -> Route:
        movable = _movable(source, target)
        tokens = tuple(dict.fromkeys([*(source[axis] for axis in movable), *(target[axis] for axis in movable), "R"]))
        # (seconds, bytes, steps, placements passed), state, collectives so far; the placements make the order total
        queue: list[tuple[float, float, int, tuple[str, ...], Tokens, tuple[Step, ...]]] = [(0, 0, 0, (), source, ())]
        done: set[Tokens] = set()
        while queue:
            time_s, moved, count, passed, state, steps = heapq.heappop(queue)
            if state == target:
                return Route(steps=_summed_at_once(steps), placements=passed)
            if state in done:
                continue
            done.add(state)
            for axes, token in _changes(state, movable, tokens, target):
                after = tuple(token if axis in axes else held for axis, held in enumerate(state))
                if after in done or not _innermost(after, axes):
                    continue
                if self.exchanges and token == "R" and _may_exchange(state, target, axes):
                    continue
                step = self._one(shape, itemsize, state, after, axes)
                cost = round(time_s + (step.time_s if step else 0.0), EQUAL_DIGITS)
                more = moved + (step.num_bytes if step else 0)
                made = (*steps, step) if step else steps
                heapq.heappush(queue, (cost, more, count + 1, (*passed, "".join(after)), after, made))
        raise CheckError(f"no collective brings a tensor from {''.join(source)} to {''.join(target)}")

    def settled(self, text: str) -> str:
        """A placement with what it says of axes of one rank, where all tokens mean the same, written "R"."""
        tokens = parse_placements(text)
        return "".join("R" if size == 1 else token for token, size in zip(tokens, self.sizes, strict=bool(tokens)))

    def _one(
        self, shape: tuple[int, ...], itemsize: int, before: Tokens, after: Tokens, axes: tuple[int, ...]
    ) -> Step | None:
        old, new = before[axes[0]], after[axes[0]]
        if old == "R":
            return None
        if new == "R" and old != "P":
            padded = self.local_bytes(shape, itemsize, before) * self.degree(axes)
            return self.step("all_gather", self.local_bytes(shape, itemsize, after), axes, padded)
        kind: CollectiveKind = "all_to_all" if old != "P" else "all_reduce" if new == "R" else "reduce_scatter"
        held = self.local_bytes(shape, itemsize, before)
        if kind == "all_reduce":
            return self.step(kind, held, axes)
        dim, whole, part = shard_dim(new), *(local_shape(shape, tokens, self.sizes) for tokens in (before, after))
        assert dim is not None
        return self.step(kind, held, axes, held * part[dim] * self.degree(axes) / max(whole[dim], 1))


def _summed_at_once(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Sums of one tensor over several axes as the one collective that runs, whatever prices said of the parts."""
    found: list[Step] = []
    for step in steps:
        alike = (at for at, one in enumerate(found) if one.kind == step.kind and one.num_bytes == step.num_bytes)
        same = next(alike, None) if step.kind == "all_reduce" else None
        if same is None:
            found.append(step)
        else:
            axes = tuple(sorted((*found[same].axes, *step.axes)))
            found[same] = replace(found[same], axes=axes, time_s=found[same].time_s + step.time_s)
    return tuple(found)


def _movable(source: Tokens, target: Tokens) -> tuple[int, ...]:
    """Axes that change, and those further in that cut a dim which a changing axis cuts before or after."""
    moving = {axis for axis, (a, b) in enumerate(zip(source, target, strict=True)) if a != b}
    dims = {shard_dim(side[axis]) for axis in moving for side in (source, target)} - {None}
    inside = {
        axis
        for axis in range(len(source))
        if any(axis > other for other in moving) and {shard_dim(source[axis]), shard_dim(target[axis])} & dims
    }
    return tuple(sorted(moving | inside))


def _changes(
    state: Tokens, movable: tuple[int, ...], tokens: Tokens, target: Tokens
) -> list[tuple[tuple[int, ...], str]]:
    found: list[tuple[tuple[int, ...], str]] = [
        ((axis,), "P") for axis in movable if state[axis] == "R" and target[axis] == "P"
    ]
    for count in range(1, len(movable) + 1):
        for axes in itertools.combinations(movable, count):
            old = state[axes[0]]
            if all(state[axis] == old for axis in axes) and _innermost(state, axes):
                found += [(axes, token) for token in tokens if token not in (old, "P")]
    return found


def _may_exchange(state: Tokens, target: Tokens, axes: tuple[int, ...]) -> bool:
    """Whether axes that cut a dim are to cut another, and can at once."""
    dims = [(shard_dim(state[axis]), shard_dim(target[axis])) for axis in axes]
    after = tuple(target[axis] if axis in axes else held for axis, held in enumerate(state))
    return all(None not in pair and pair[0] != pair[1] for pair in dims) and _innermost(after, axes)


def _innermost(state: Tokens, axes: tuple[int, ...]) -> bool:
    """Whether no axis further in than the first of ``axes``, other than they, cuts the dim that they cut."""
    dim = shard_dim(state[axes[0]])
    return dim is None or not any(
        axis > axes[0] and axis not in axes and shard_dim(token) == dim for axis, token in enumerate(state)
    )
