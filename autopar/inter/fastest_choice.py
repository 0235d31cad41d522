"""The fastest choice for one stage on one mesh within a memory budget: which frontier point each block takes.

With one point p for all blocks, the stage's totals are sums over its variants v (n_v equal blocks each). Where the
fast point does not fit and the point that fits is slow, the variant m with the most blocks may mix two of them,

    k blocks at the lean point q, n_m - k at the fast point p, the other variants at p or at q,
    k = ceil((memory at p - M) / (memory_m(p) - memory_m(q)))     the least k that fits, at both `_memory_weights`

which is Megatron-LM's "recompute k layers" for any two neighbouring points.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.inter.stage_choice import (
    StageChoice,
    StageFrontier,
    StagePrice,
    VariantMix,
    price_totals,
    sum_totals,
)
from autopar.inter.stage_pricing import StagePricing
from autopar.intra import block_totals as tt
from autopar.intra.block_totals import memory_bytes

Floats = NDArray[np.float64]
MAX_HULL_POINTS = 16
"""Points on the lower hull of (memory, time) that are mixed; hulls of real blocks have 5 to 11."""


def fastest_feasible(
    frontier: StageFrontier,
    pricing: StagePricing,
    in_flight: float,
    tensor_budget_bytes: float,
    boundary: int | None = None,
    cutoff_s: float = np.inf,
) -> StagePrice | None:
    """The fastest choice at one boundary placement (None: at any) whose memory without the fixed bytes is at most
    ``tensor_budget_bytes``; None when none fits, or when no point takes less than ``cutoff_s``."""
    best: StagePrice | None = None
    for index in range(frontier.totals.shape[2]) if boundary is None else (boundary,):
        usable = np.flatnonzero(np.isfinite(frontier.totals[:, :, index]).all(axis=(0, 2)))
        if not len(usable):
            continue
        mixer = _BoundaryMixer(
            frontier=frontier,
            pricing=pricing,
            in_flight=in_flight,
            tensor_budget_bytes=tensor_budget_bytes,
            boundary=index,
            points=usable,
            totals=frontier.totals[:, usable, index],
        )
        price = mixer.fastest(cutoff_s)
        if price is not None and (best is None or price.amortised_s < best.amortised_s):
            best = price
    return best


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _BoundaryMixer:
    """The choices at one boundary placement. ``totals[variant, point]`` of the ``points`` (indices into those of the
    frontier) that all variants have a solution for."""

    frontier: StageFrontier
    pricing: StagePricing
    in_flight: float
    tensor_budget_bytes: float
    boundary: int
    points: NDArray[np.integer]
    totals: Floats

    def fastest(self, cutoff_s: float) -> StagePrice | None:
        """The fastest choice with one point for all blocks, or with two points mixed over the main variant."""
        num_blocks = self.frontier.num_blocks
        uniform = sum_totals([(totals, float(count)) for totals, count in zip(self.totals, num_blocks, strict=True)])
        time_s, memory = self.pricing.amortised_s(uniform), memory_bytes(uniform, self.in_flight)
        fitting_s = np.where(memory <= self.tensor_budget_bytes, time_s, np.inf)
        if not np.isfinite(fitting_s).any() or time_s.min() >= cutoff_s:
            return None
        pick = int(fitting_s.argmin())
        best = self._price(uniform[pick], [((self.frontier.refs[self.points[pick]], count),) for count in num_blocks])
        if time_s.min() >= best.amortised_s or max(num_blocks) < 2:
            return best
        main = int(np.argmax(num_blocks))
        hull = _lower_hull(memory_bytes(self.totals[main], self.in_flight), self.pricing.amortised_s(self.totals[main]))
        fast, lean = (grid.reshape(-1) for grid in np.meshgrid(hull, hull, indexing="ij"))
        for others_at in (fast, lean):
            best = self._best_mix(best, main, fast, lean, others_at)
        return best

    def _best_mix(
        self,
        best: StagePrice,
        main: int,
        fast: NDArray[np.integer],
        lean: NDArray[np.integer],
        others_at: NDArray[np.integer],
    ) -> StagePrice:
        """``best``, or a faster mix of a pair of points (``fast[i]``, ``lean[i]``) over the variant ``main`` with all
        other variants at ``others_at[i]``."""
        num_blocks = self.frontier.num_blocks
        number = num_blocks[main]
        others = [
            (self.totals[variant, others_at], float(count))
            for variant, count in enumerate(num_blocks)
            if variant != main
        ]
        needed = self._lean_blocks_needed(main, fast, lean, others)
        valid = (needed >= 1) & (needed <= number - 1)
        k = np.where(valid, needed, 0.0)
        mixed = sum_totals([*others, (self.totals[main, fast], number - k), (self.totals[main, lean], k)])
        fits = valid & (memory_bytes(mixed, self.in_flight) <= self.tensor_budget_bytes)
        time_s = np.where(fits, self.pricing.amortised_s(mixed), np.inf)
        pick = int(time_s.argmin())
        if time_s[pick] >= best.amortised_s:
            return best
        refs, count = self.frontier.refs, int(k[pick])
        mixes: list[VariantMix] = [((refs[self.points[others_at[pick]]], blocks),) for blocks in num_blocks]
        mixes[main] = (
            (refs[self.points[lean[pick]]], count),
            (refs[self.points[fast[pick]]], number - count),
        )
        return self._price(mixed[pick], mixes)

    def _lean_blocks_needed(
        self,
        main: int,
        fast: NDArray[np.integer],
        lean: NDArray[np.integer],
        others: Sequence[tuple[Floats, float]],
    ) -> Floats:
        """k of the module's docstring for each pair of points; inf where no k fits."""
        saving = self.totals[main, fast] - self.totals[main, lean]
        all_fast = sum_totals([*others, (self.totals[main, fast], float(self.frontier.num_blocks[main]))])
        # the larger workspace of the two points, whatever k is: k is then enough in either case
        workspace = np.maximum(all_fast[:, tt.WORKSPACE], self.totals[main, lean][:, tt.WORKSPACE])
        needed = np.zeros(len(fast))
        for weights in _memory_weights(self.in_flight):
            over, per_block = all_fast @ weights + workspace - self.tensor_budget_bytes, saving @ weights
            with np.errstate(divide="ignore", invalid="ignore"):
                blocks = np.ceil(over / per_block)
            needed = np.maximum(needed, np.where(over <= 0, 0.0, np.where(per_block > 0, blocks, np.inf)))
        return needed

    def _price(self, totals: Floats, mixes: Sequence[VariantMix]) -> StagePrice:
        choice = StageChoice(
            mesh=self.frontier.mesh,
            boundary=self.boundary,
            mixes=tuple(zip(self.frontier.variants, mixes, strict=True)),
        )
        return price_totals(self.pricing, totals, self.in_flight, choice)


def _memory_weights(in_flight: float) -> tuple[Floats, Floats]:
    """Weights of the totals in memory without workspace, at the start of a backward and at its end."""
    start, end = np.zeros(tt.NUM_TOTALS), np.zeros(tt.NUM_TOTALS)
    start[[tt.STATE, tt.SAVED]] = 1.0, in_flight
    end[[tt.STATE, tt.SAVED, tt.NEW_GRADIENTS]] = 1.0, in_flight - 1.0, 1.0
    return start, end


def _lower_hull(memory_bytes: Floats, time_s: Floats) -> NDArray[np.integer]:
    """Indices of the points that are fastest for some price of memory, from much memory to little, at most
    ``MAX_HULL_POINTS``.

    >>> _lower_hull(np.array([4.0, 2.0, 1.0, 3.0]), np.array([1.0, 2.0, 8.0, 9.0])).tolist()
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
    """Seconds lost per byte saved from one point to the next; inf where none is saved."""
    saved = memory_bytes[first] - memory_bytes[second]
    return float((time_s[second] - time_s[first]) / saved) if saved > 0 else np.inf
