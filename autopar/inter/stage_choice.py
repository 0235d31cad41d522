"""The fastest way to run one stage on one mesh, within a budget: which point of its frontier each block takes.

With one point p for all blocks, the stage's totals are sums over its columns c (n_c equal blocks each). Where the point
that is fast does not fit and the one that fits is slow, the column m with most blocks may mix two of them,

    k blocks at the lean point q, n_m - k at the fast point p, the other columns at p or at q,
    k = ceil((memory at p - M) / (memory_m(p) - memory_m(q)))            the least k that fits, at both ``_moments``

(DESIGN: a stage as a mix of two neighbouring frontier points; the same as "recompute k layers" of Megatron-LM.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from autopar.inter.block_pricer import Mesh
from autopar.intra import block_totals as tt
from autopar.intra.block_totals import memory_bytes
from autopar.intra.frontier import BlockPoints

Floats = NDArray[np.float64]
PointRef = tuple[int, int]  # phase of the price rows, and the row
MAX_MIXED = 16  # points on the lower hull of (memory, time) that are mixed; hulls of real blocks have 5 to 11


@dataclass(frozen=True, slots=True, kw_only=True)
class StageChoice:
    """How a stage runs: mesh, boundary placement (position), and per column how many of its blocks take which point."""

    mesh: Mesh
    boundary: int
    points: tuple[tuple[int, tuple[tuple[PointRef, int], ...]], ...]

    def per_block(self, columns: Sequence[int]) -> tuple[PointRef, ...]:
        """The point of each block, in order; the first blocks of a column take its first point."""
        left = {column: [ref for ref, count in mix for _ in range(count)] for column, mix in self.points}
        return tuple(left[column].pop(0) for column in columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """Seconds per micro-batch, seconds per step, bytes on a device; ``time_s`` is per micro-batch with its share of
    the step."""

    forward_s: float
    backward_s: float
    step_s: float
    memory_bytes: float
    time_s: float
    choice: StageChoice


class Prices(Protocol):
    """What a stage's totals cost (`StageBook`)."""

    def times_s(self, totals: Floats) -> tuple[Floats, Floats, Floats]: ...

    def time_s(self, totals: Floats) -> Floats: ...

    def fixed_bytes(self) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StagePoints:
    """``totals[column, point, boundary]`` (seven metrics) of the columns of one stage, and where each point is from."""

    mesh: Mesh
    columns: tuple[int, ...]
    numbers: tuple[int, ...]
    refs: tuple[PointRef, ...]
    totals: Floats

    @staticmethod
    def of(
        mesh: Mesh,
        columns: tuple[int, ...],
        numbers: tuple[int, ...],
        parts: Sequence[tuple[int, slice, Sequence[BlockPoints]]],
    ) -> "StagePoints":
        """``parts``: for each phase, which rows of it, and the points of every column."""
        refs = tuple((phase, row) for phase, kept, found in parts for row in range(len(found[0].rows))[kept])
        stacked = [np.stack([one.totals[kept] for one in found]) for _, kept, found in parts]
        return StagePoints(
            mesh=mesh, columns=columns, numbers=numbers, refs=refs, totals=np.concatenate(stacked, axis=1)
        )


def finished(prices: Prices, totals: Floats, in_flight: float, choice: StageChoice) -> Finished:
    """A stage of these totals."""
    forward, backward, step = prices.times_s(totals)
    return Finished(
        forward_s=float(forward),
        backward_s=float(backward),
        step_s=float(step),
        memory_bytes=float(memory_bytes(totals, in_flight)) + prices.fixed_bytes(),
        time_s=float(prices.time_s(totals)),
        choice=choice,
    )


def add(parts: Sequence[tuple[Floats, Floats | float]]) -> Floats:
    """Totals of several blocks: (totals, how many), workspace by maximum of those that occur."""
    summed = sum((totals * np.asarray(count)[..., None] for totals, count in parts), np.zeros(1))
    workspace = np.zeros(summed.shape[:-1])
    for totals, count in parts:
        workspace = np.maximum(workspace, np.where(np.asarray(count) > 0, totals[..., tt.WORKSPACE], 0.0))
    summed[..., tt.WORKSPACE] = workspace
    return np.asarray(summed)


def fastest(
    points: StagePoints,
    prices: Prices,
    in_flight: float,
    room_bytes: float,
    boundary: int | None = None,
    below_s: float = np.inf,
) -> Finished | None:
    """The fastest choice whose memory without the fixed share is at most ``room_bytes``; None when none fits, or when
    no point is below ``below_s``."""
    best: Finished | None = None
    for at in range(points.totals.shape[2]) if boundary is None else (boundary,):
        found = _at_boundary(points, prices, in_flight, room_bytes, at, below_s)
        if found is not None and (best is None or found.time_s < best.time_s):
            best = found
    return best


def _at_boundary(
    points: StagePoints, prices: Prices, in_flight: float, room_bytes: float, at: int, below_s: float
) -> Finished | None:
    usable = np.flatnonzero(np.isfinite(points.totals[:, :, at]).all(axis=(0, 2)))
    if not len(usable):
        return None
    totals = points.totals[:, usable, at]
    whole = add([(column, float(number)) for column, number in zip(totals, points.numbers, strict=True)])
    time, memory = prices.time_s(whole), memory_bytes(whole, in_flight)
    fitting = np.where(memory <= room_bytes, time, np.inf)
    if not np.isfinite(fitting).any() or time.min() >= below_s:
        return None
    pick = int(fitting.argmin())

    def build(values: Floats, mixes: Sequence[tuple[tuple[PointRef, int], ...]]) -> Finished:
        choice = StageChoice(mesh=points.mesh, boundary=at, points=tuple(zip(points.columns, mixes, strict=True)))
        return finished(prices, values, in_flight, choice)

    def ref(point: int) -> PointRef:
        return points.refs[usable[point]]

    best = build(whole[pick], [((ref(pick), number),) for number in points.numbers])
    if time.min() >= best.time_s or max(points.numbers) < 2:
        return best
    main = int(np.argmax(points.numbers))
    number = points.numbers[main]
    hull = _hull(memory_bytes(totals[main], in_flight), prices.time_s(totals[main]))
    fast, lean = (grid.reshape(-1) for grid in np.meshgrid(hull, hull, indexing="ij"))
    saving = totals[main, fast] - totals[main, lean]
    others = [at for at in range(len(points.numbers)) if at != main]
    for side in (fast, lean):
        rest = [(totals[other, side], float(points.numbers[other])) for other in others]
        none = add([*rest, (totals[main, fast], float(number))])
        # workspace of both points from the start: k is then enough whichever is the larger
        work = np.maximum(none[:, tt.WORKSPACE], totals[main, lean][:, tt.WORKSPACE])
        needed = np.zeros(len(fast))
        for weights in _moments(in_flight):
            over, per_block = none @ weights + work - room_bytes, saving @ weights
            with np.errstate(divide="ignore", invalid="ignore"):
                blocks = np.ceil(over / per_block)
            needed = np.maximum(needed, np.where(over <= 0, 0.0, np.where(per_block > 0, blocks, np.inf)))
        valid = (needed >= 1) & (needed <= number - 1)
        k = np.where(valid, needed, 0.0)
        mixed = add([*rest, (totals[main, fast], number - k), (totals[main, lean], k)])
        value = np.where(valid & (memory_bytes(mixed, in_flight) <= room_bytes), prices.time_s(mixed), np.inf)
        won = int(value.argmin())
        if value[won] < best.time_s:
            count = int(k[won])
            mixes: list[tuple[tuple[PointRef, int], ...]] = [((ref(int(side[won])), n),) for n in points.numbers]
            mixes[main] = ((ref(int(lean[won])), count), (ref(int(fast[won])), number - count))
            best = build(mixed[won], mixes)
    return best


def _moments(in_flight: float) -> tuple[Floats, Floats]:
    """Weights of the totals in memory, workspace left out, at the start of a backward and at its end."""
    start, end = np.zeros(tt.NUM_TOTALS), np.zeros(tt.NUM_TOTALS)
    start[[tt.STATE, tt.SAVED]] = 1.0, in_flight
    end[[tt.STATE, tt.SAVED, tt.LATE]] = 1.0, in_flight - 1.0, 1.0
    return start, end


def _hull(memory: Floats, time: Floats) -> NDArray[np.integer]:
    """Points that are fastest for some price of memory, at most ``MAX_MIXED``.

    >>> _hull(np.array([4.0, 2.0, 1.0, 3.0]), np.array([1.0, 2.0, 8.0, 9.0])).tolist()
    [0, 1, 2]
    """
    order = np.lexsort((time, memory))
    least = np.minimum.accumulate(time[order])
    useful = order[np.append(True, least[1:] < least[:-1])]  # no other needs less memory and no more time
    hull: list[int] = []
    for point in useful[::-1]:  # from much memory to little: time must rise ever more steeply
        while len(hull) > 1 and _slope(memory, time, hull[-2], hull[-1]) >= _slope(memory, time, hull[-1], point):
            hull.pop()
        hull.append(int(point))
    return np.array(hull[:MAX_MIXED], int)


def _slope(memory: Floats, time: Floats, first: int, second: int) -> float:
    saved = memory[first] - memory[second]
    return float((time[second] - time[first]) / saved) if saved > 0 else np.inf
