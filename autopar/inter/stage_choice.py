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

from autopar.inter.block_pricer import StageMesh
from autopar.intra import block_totals as tt
from autopar.intra.block_totals import memory_bytes
from autopar.intra.frontier import BlockFrontier

Floats = NDArray[np.float64]
FrontierRef = tuple[int, int]  # phase of the price rows, and the row
MAX_HULL_POINTS = 16  # points on the lower hull of (memory, time) that are mixed; hulls of real blocks have 5 to 11


@dataclass(frozen=True, slots=True, kw_only=True)
class StageChoice:
    """How a stage runs: mesh, boundary placement (position), and per column how many of its blocks take which point."""

    mesh: StageMesh
    boundary: int
    mixes: tuple[tuple[int, tuple[tuple[FrontierRef, int], ...]], ...]

    def point_of_each_block(self, variants: Sequence[int]) -> tuple[FrontierRef, ...]:
        """The point of each block, in order; the first blocks of a column take its first point."""
        left = {column: [ref for ref, count in mix for _ in range(count)] for column, mix in self.mixes}
        return tuple(left[column].pop(0) for column in variants)


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePrice:
    """Seconds per micro-batch, seconds per step, bytes on a device; ``time_s`` is per micro-batch with its share of
    the step."""

    forward_s: float
    backward_s: float
    step_s: float
    memory_bytes: float
    amortised_s: float
    choice: StageChoice


class StagePricer(Protocol):
    """What a stage's totals cost (`StageBook`)."""

    def times_s(self, totals: Floats) -> tuple[Floats, Floats, Floats]: ...

    def amortised_s(self, totals: Floats) -> Floats: ...

    def fixed_bytes(self) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageFrontier:
    """``totals[column, point, boundary]`` (seven metrics) of the columns of one stage, and where each point is from."""

    mesh: StageMesh
    variants: tuple[int, ...]
    num_blocks: tuple[int, ...]
    refs: tuple[FrontierRef, ...]
    totals: Floats

    @staticmethod
    def of(
        mesh: StageMesh,
        variants: tuple[int, ...],
        num_blocks: tuple[int, ...],
        phases: Sequence[tuple[int, slice, Sequence[BlockFrontier]]],
    ) -> "StageFrontier":
        """``parts``: for each phase, which rows of it, and the points of every column."""
        refs = tuple((phase, row) for phase, kept, found in phases for row in range(len(found[0].objectives))[kept])
        stacked = [np.stack([one.totals[kept] for one in found]) for _, kept, found in phases]
        return StageFrontier(
            mesh=mesh, variants=variants, num_blocks=num_blocks, refs=refs, totals=np.concatenate(stacked, axis=1)
        )


def price_totals(pricing: StagePricer, totals: Floats, in_flight: float, choice: StageChoice) -> StagePrice:
    """A stage of these totals."""
    forward, backward, step = pricing.times_s(totals)
    return StagePrice(
        forward_s=float(forward),
        backward_s=float(backward),
        step_s=float(step),
        memory_bytes=float(memory_bytes(totals, in_flight)) + pricing.fixed_bytes(),
        amortised_s=float(pricing.amortised_s(totals)),
        choice=choice,
    )


def sum_totals(totals_and_counts: Sequence[tuple[Floats, Floats | float]]) -> Floats:
    """Totals of several blocks: (totals, how many), workspace by maximum of those that occur."""
    summed = sum((totals * np.asarray(count)[..., None] for totals, count in totals_and_counts), np.zeros(1))
    workspace = np.zeros(summed.shape[:-1])
    for totals, count in totals_and_counts:
        workspace = np.maximum(workspace, np.where(np.asarray(count) > 0, totals[..., tt.WORKSPACE], 0.0))
    summed[..., tt.WORKSPACE] = workspace
    return np.asarray(summed)


def fastest_feasible(
    frontier: StageFrontier,
    pricing: StagePricer,
    in_flight: float,
    tensor_budget_bytes: float,
    boundary: int | None = None,
    cutoff_s: float = np.inf,
) -> StagePrice | None:
    """The fastest choice whose memory without the fixed share is at most ``room_bytes``; None when none fits, or when
    no point is below ``below_s``."""
    best: StagePrice | None = None
    for at in range(frontier.totals.shape[2]) if boundary is None else (boundary,):
        found = _fastest_at_boundary(frontier, pricing, in_flight, tensor_budget_bytes, at, cutoff_s)
        if found is not None and (best is None or found.amortised_s < best.amortised_s):
            best = found
    return best


def _fastest_at_boundary(
    frontier: StageFrontier,
    pricing: StagePricer,
    in_flight: float,
    tensor_budget_bytes: float,
    boundary: int,
    cutoff_s: float,
) -> StagePrice | None:
    usable = np.flatnonzero(np.isfinite(frontier.totals[:, :, boundary]).all(axis=(0, 2)))
    if not len(usable):
        return None
    totals = frontier.totals[:, usable, boundary]
    whole = sum_totals([(column, float(number)) for column, number in zip(totals, frontier.num_blocks, strict=True)])
    time, memory = pricing.amortised_s(whole), memory_bytes(whole, in_flight)
    fitting = np.where(memory <= tensor_budget_bytes, time, np.inf)
    if not np.isfinite(fitting).any() or time.min() >= cutoff_s:
        return None
    pick = int(fitting.argmin())

    def build(values: Floats, mixes: Sequence[tuple[tuple[FrontierRef, int], ...]]) -> StagePrice:
        choice = StageChoice(
            mesh=frontier.mesh, boundary=boundary, mixes=tuple(zip(frontier.variants, mixes, strict=True))
        )
        return price_totals(pricing, values, in_flight, choice)

    def ref(point: int) -> FrontierRef:
        return frontier.refs[usable[point]]

    best = build(whole[pick], [((ref(pick), number),) for number in frontier.num_blocks])
    if time.min() >= best.amortised_s or max(frontier.num_blocks) < 2:
        return best
    main = int(np.argmax(frontier.num_blocks))
    number = frontier.num_blocks[main]
    hull = _lower_hull(memory_bytes(totals[main], in_flight), pricing.amortised_s(totals[main]))
    fast, lean = (grid.reshape(-1) for grid in np.meshgrid(hull, hull, indexing="ij"))
    saving = totals[main, fast] - totals[main, lean]
    others = [at for at in range(len(frontier.num_blocks)) if at != main]
    for side in (fast, lean):
        rest = [(totals[other, side], float(frontier.num_blocks[other])) for other in others]
        none = sum_totals([*rest, (totals[main, fast], float(number))])
        # workspace of both points from the start: k is then enough whichever is the larger
        work = np.maximum(none[:, tt.WORKSPACE], totals[main, lean][:, tt.WORKSPACE])
        needed = np.zeros(len(fast))
        for weights in _memory_weights(in_flight):
            over, per_block = none @ weights + work - tensor_budget_bytes, saving @ weights
            with np.errstate(divide="ignore", invalid="ignore"):
                blocks = np.ceil(over / per_block)
            needed = np.maximum(needed, np.where(over <= 0, 0.0, np.where(per_block > 0, blocks, np.inf)))
        valid = (needed >= 1) & (needed <= number - 1)
        k = np.where(valid, needed, 0.0)
        mixed = sum_totals([*rest, (totals[main, fast], number - k), (totals[main, lean], k)])
        value = np.where(
            valid & (memory_bytes(mixed, in_flight) <= tensor_budget_bytes), pricing.amortised_s(mixed), np.inf
        )
        won = int(value.argmin())
        if value[won] < best.amortised_s:
            count = int(k[won])
            mixes: list[tuple[tuple[FrontierRef, int], ...]] = [
                ((ref(int(side[won])), n),) for n in frontier.num_blocks
            ]
            mixes[main] = ((ref(int(lean[won])), count), (ref(int(fast[won])), number - count))
            best = build(mixed[won], mixes)
    return best


def _memory_weights(in_flight: float) -> tuple[Floats, Floats]:
    """Weights of the totals in memory, workspace left out, at the start of a backward and at its end."""
    start, end = np.zeros(tt.NUM_TOTALS), np.zeros(tt.NUM_TOTALS)
    start[[tt.STATE, tt.SAVED]] = 1.0, in_flight
    end[[tt.STATE, tt.SAVED, tt.NEW_GRADIENTS]] = 1.0, in_flight - 1.0, 1.0
    return start, end


def _lower_hull(memory_bytes: Floats, time_s: Floats) -> NDArray[np.integer]:
    """Points that are fastest for some price of memory, at most ``MAX_MIXED``.

    >>> _hull(np.array([4.0, 2.0, 1.0, 3.0]), np.array([1.0, 2.0, 8.0, 9.0])).tolist()
    [0, 1, 2]
    """
    order = np.lexsort((time_s, memory_bytes))
    least = np.minimum.accumulate(time_s[order])
    useful = order[np.append(True, least[1:] < least[:-1])]  # no other needs less memory and no more time
    hull: list[int] = []
    for point in useful[::-1]:  # from much memory to little: time must rise ever more steeply
        while len(hull) > 1 and _slope(memory_bytes, time_s, hull[-2], hull[-1]) >= _slope(
            memory_bytes, time_s, hull[-1], point
        ):
            hull.pop()
        hull.append(int(point))
    return np.array(hull[:MAX_HULL_POINTS], int)


def _slope(memory_bytes: Floats, time_s: Floats, first: int, second: int) -> float:
    saved = memory_bytes[first] - memory_bytes[second]
    return float((time_s[second] - time_s[first]) / saved) if saved > 0 else np.inf
