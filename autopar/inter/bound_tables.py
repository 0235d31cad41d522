"""Dynamic programs over (stages, blocks, devices) that bound from below every pipeline that ends in a given suffix.

A state is a suffix of the pipeline: s stages of blocks i..L-1 on d devices. In the letters of `pipeline_bounds`:

    suffix bounds (`suffix_bounds`), the minimum of each over all suffixes of a state:
        R[s, i, d]   round trip through the suffix, transfers between its stages included
        M[s, i, d]   first arrival at the suffix to the end of its first stage's last backward
        W[s, i, d]   first arrival at the suffix to the end of the step
    prefix bounds (`prefix_bounds`), over the prefixes of blocks 0..i-1 on the other D - d devices with which the step
    can be below ``threshold_s``:
        trip[s, i, d]   sum of t + c over the prefix, plus its first stage's per-step time
        down[s, i, d]   sum of f over the prefix
        step[s, i, d]   the bound by the prefix's own stages
    so a suffix with values (M, W) ends no earlier than   max(M + trip, W + down, step)

Every recursion is monotone in the value it extends, so minima extend to minima. A level is a stage's number from the
last, which decides its micro-batches in flight. A version without levels (`level_free_bounds`), which takes the
fastest time of each stage at any level, first tells which (i, d) matter at all (`feasible_band`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from autopar.inter.pipeline_bounds import own_order_bound_s
from autopar.pipeline.schedule import Schedule

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LevelTimes:
    """A problem in arrays of seconds. ``forward_s``, ``backward_s``, ``step_s`` are (S + 1, L + 1, L + 1, K):
    [s, i, j, k] is stage number s from the last (level 0 is unused) with blocks i..j-1 on submesh class k, inf where
    impossible. ``submesh_sizes`` (K,) and ``num_devices`` count units of the sizes' greatest common divisor;
    ``stage_boundary_s`` (K, L + 1, D + 1) bounds a micro-batch's transfers, there and back, across the boundary before
    block i between a stage of class k and the d devices after it."""

    schedule: Schedule
    num_microbatches: int
    submesh_sizes: tuple[int, ...]
    num_devices: int
    stage_boundary_s: Floats
    forward_s: Floats
    backward_s: Floats
    step_s: Floats
    fastest_s: Floats  # (L + 1, L + 1, K): minimum over levels of forward plus backward
    busy_s: Floats | None  # (S + 1, L + 1, L + 1, K): as in StageTimeTable; None where times are exact

    @property
    def num_stages(self) -> int:
        """The most stages of a pipeline, S."""
        return self.forward_s.shape[0] - 1

    @property
    def relaxed(self) -> bool:
        """Whether the times are those of a relaxed `StageTimeTable`: forward alone and forward plus backward are bounds,
        backward alone is not."""
        return self.busy_s is not None

    @property
    def num_blocks(self) -> int:
        """Blocks of the model, L."""
        return self.forward_s.shape[1] - 1

    def truncated(self, num_stages: int) -> "LevelTimes":
        """The same with at most ``num_stages`` stages."""
        levels = slice(0, num_stages + 1)
        busy_s = None if self.busy_s is None else self.busy_s[levels]
        return replace(
            self,
            forward_s=self.forward_s[levels],
            backward_s=self.backward_s[levels],
            step_s=self.step_s[levels],
            busy_s=busy_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SuffixBounds:
    """R, M, W of the module's docstring, (S + 1, L + 1, D + 1) seconds; inf where no suffix is below the threshold."""

    round_trip_s: Floats
    last_backward_s: Floats
    step_time_s: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PrefixBounds:
    """trip, down and step of the module's docstring, (S + 1, L + 1, D + 1) seconds."""

    round_trip_s: Floats
    forward_s: Floats
    own_bound_s: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FeasibleBand:
    """Which states a step below ``threshold_s`` can have: low[i] <= d < high[i] devices after the boundary before block
    i; both 0 where there are none."""

    threshold_s: float
    low: Sequence[int]
    high: Sequence[int]


def make_level_times(
    *,
    schedule: Schedule,
    num_microbatches: int,
    submesh_sizes: tuple[int, ...],
    num_devices: int,
    stage_boundary_s: Floats,
    tables: Sequence[tuple[Floats, Floats, Floats]],
    busy_s: Sequence[Floats] | None = None,
) -> LevelTimes:
    """``tables`` are (forward_s, backward_s, step_s), each (L + 1, L + 1, K), of stage number 1, 2, ... from the last;
    ``busy_s`` likewise where the times are relaxed (`StageTimeTable`)."""
    impossible = np.full_like(tables[0][0], np.inf)
    forward = np.stack([impossible, *(table[0] for table in tables)])
    backward = np.stack([impossible, *(table[1] for table in tables)])
    return LevelTimes(
        schedule=schedule,
        num_microbatches=num_microbatches,
        submesh_sizes=submesh_sizes,
        num_devices=num_devices,
        stage_boundary_s=stage_boundary_s,
        forward_s=forward,
        backward_s=backward,
        step_s=np.stack([impossible, *(table[2] for table in tables)]),
        fastest_s=np.asarray((forward + backward).min(axis=0)),
        busy_s=None if busy_s is None else np.stack([impossible, *busy_s]),
    )


def true_range(possible: NDArray[np.bool_]) -> tuple[int, int]:
    """(first, last + 1) index that is true; (0, 0) where none is."""
    where = np.flatnonzero(possible)
    return (int(where[0]), int(where[-1]) + 1) if len(where) else (0, 0)


def level_free_bounds(level_times: LevelTimes) -> tuple[Floats, Floats]:
    """(suffix, prefix), each (L + 1, D + 1) seconds, with every stage at its least time of any level: the least M of a
    suffix, by B t alone, and the least sum of t + c of a prefix; [i, d] is the boundary before block i with d devices
    after it."""
    L, D, B = level_times.num_blocks, level_times.num_devices, level_times.num_microbatches
    suffix, prefix = np.full((L + 1, D + 1), np.inf), np.full((L + 1, D + 1), np.inf)
    suffix[L, 0], prefix[0, D] = 0.0, 0.0
    for i in range(L - 1, -1, -1):
        for k, size in enumerate(level_times.submesh_sizes):
            low, high = true_range(np.isfinite(level_times.fastest_s[i, :, k]))
            if high and size <= D:
                time = level_times.fastest_s[i, low:high, k, None]
                after = (
                    time + level_times.stage_boundary_s[k, low:high, : D + 1 - size] + suffix[low:high, : D + 1 - size]
                )
                best = np.where(np.isfinite(after), np.maximum(B * time, after), np.inf).min(axis=0)
                np.minimum(suffix[i, size:], best, out=suffix[i, size:])
    for i in range(1, L + 1):
        for k, size in enumerate(level_times.submesh_sizes):
            low, high = true_range(np.isfinite(level_times.fastest_s[:, i, k]))
            if high and size <= D:
                best = (level_times.fastest_s[low:high, i, k, None] + prefix[low:high, size:]).min(axis=0)
                best = best + level_times.stage_boundary_s[k, i, : D + 1 - size]
                np.minimum(prefix[i, : D + 1 - size], best, out=prefix[i, : D + 1 - size])
    return suffix, prefix


def feasible_band(suffix_s: Floats, prefix_s: Floats, threshold_s: float) -> FeasibleBand:
    """The band of the states whose two level-free bounds (L + 1, D + 1) add up to less than ``threshold_s``."""
    spans = [true_range(row) for row in suffix_s + prefix_s < threshold_s]
    return FeasibleBand(threshold_s=threshold_s, low=[low for low, _ in spans], high=[high for _, high in spans])


@np.errstate(invalid="ignore")
def suffix_bounds(level_times: LevelTimes, band: FeasibleBand, prefix_s: Floats) -> SuffixBounds:
    """The least R, M and W of every suffix that can become a step below the band's threshold; ``prefix_s`` (L + 1,
    D + 1) or (S + 1, L + 1, D + 1) is the least sum of t + c of the prefix that is missing."""
    S, L, D, B = level_times.num_stages, level_times.num_blocks, level_times.num_devices, level_times.num_microbatches
    trip, finish, total = (np.full((S + 1, L + 1, D + 1), np.inf) for _ in range(3))
    for table in (trip, finish, total):
        table[0, L, 0] = 0.0
    missing = prefix_s[: S + 1] if prefix_s.ndim == 3 else prefix_s
    allowed = np.broadcast_to(band.threshold_s - missing, trip.shape)
    place = np.arange(1, S + 1)[:, None, None]
    for i in range(L - 1, -1, -1):
        depth = min(S, L - i, band.high[i])
        for k, size in enumerate(level_times.submesh_sizes):
            low, high = max(band.low[i], size), band.high[i]
            first, end = true_range(B * level_times.fastest_s[i, :, k] < band.threshold_s)
            if low >= high or not end:
                continue
            forward = level_times.forward_s[1 : depth + 1, i, first:end, k, None]
            backward = level_times.backward_s[1 : depth + 1, i, first:end, k, None]
            step = level_times.step_s[1 : depth + 1, i, first:end, k, None]
            before = (slice(0, depth), slice(first, end), slice(low - size, high - size))
            after = (slice(1, depth + 1), i, slice(low, high))
            boundary = level_times.stage_boundary_s[k, first:end, low - size : high - size]
            round_trip = trip[before] + boundary
            through = (forward + backward) + boundary
            own = own_order_bound_s(
                level_times.schedule,
                B,
                num_from_last=place[:depth],
                forward_s=forward,
                backward_s=backward,
                round_trip_s=round_trip,
                relaxed=level_times.relaxed,
            )
            ended = np.maximum(own, through + finish[before])
            ended[~(ended < allowed[after][:, None])] = np.inf  # the negation: inf * 0 of an impossible stage is NaN
            stepped = ended + step
            if level_times.busy_s is not None:
                stepped = np.maximum(stepped, level_times.busy_s[1 : depth + 1, i, first:end, k, None])
            step_end = np.maximum(stepped, forward + total[before])
            passed = np.where(np.isfinite(ended), round_trip + (forward + backward), np.inf)
            np.minimum(trip[after], passed.min(axis=1), out=trip[after])
            np.minimum(finish[after], ended.min(axis=1), out=finish[after])
            np.minimum(total[after], step_end.min(axis=1), out=total[after])
    return SuffixBounds(round_trip_s=trip, last_backward_s=finish, step_time_s=total)


@np.errstate(invalid="ignore")
def prefix_bounds(level_times: LevelTimes, band: FeasibleBand, suffixes: SuffixBounds) -> PrefixBounds:
    """The prefix bounds within ``band``, for suffixes with the bounds ``suffixes`` (made with at least the band's
    threshold)."""
    S, L, D, B = level_times.num_stages, level_times.num_blocks, level_times.num_devices, level_times.num_microbatches
    trip, down, worst = (np.full((S + 1, L + 1, D + 1), np.inf) for _ in range(3))
    for table in (trip, down, worst):
        table[:, 0, D] = 0.0
    place = np.arange(1, S + 1)[:, None, None]
    for i in range(1, L):
        for k, size in enumerate(level_times.submesh_sizes):
            low, high = band.low[i], min(band.high[i], D + 1 - size)
            first, end = true_range(B * level_times.fastest_s[:, i, k] < band.threshold_s)
            if low >= high or not end:
                continue
            # Stage number s + 1, blocks j..i-1, comes before a suffix of s stages at (i, d).
            depth = min(S - 1, L - i, high)
            forward = level_times.forward_s[2 : depth + 2, first:end, i, k, None]
            backward = level_times.backward_s[2 : depth + 2, first:end, i, k, None]
            step = level_times.step_s[2 : depth + 2, first:end, i, k, None]
            before = (slice(2, depth + 2), slice(first, end), slice(low + size, high + size))
            after = (slice(1, depth + 1), i, slice(low, high))
            boundary = level_times.stage_boundary_s[k, i, low:high]
            through = (forward + backward) + boundary
            own = own_order_bound_s(
                level_times.schedule,
                B,
                num_from_last=place[1 : depth + 1],
                forward_s=forward,
                backward_s=backward,
                round_trip_s=suffixes.round_trip_s[after][:, None] + boundary,
                relaxed=level_times.relaxed,
            )
            ended = np.maximum(own, through + suffixes.last_backward_s[after][:, None])
            stepped = ended + step
            if level_times.busy_s is not None:
                stepped = np.maximum(stepped, level_times.busy_s[2 : depth + 2, first:end, i, k, None])
            bound = np.maximum(np.maximum(trip[before] + ended, down[before] + stepped), worst[before])
            possible = bound < band.threshold_s
            if first == 0:  # the first stage's per-step time follows the last backward of all
                through = through + np.where(np.arange(end)[:, None] == 0, step, 0.0)
            for table, value in ((trip, trip[before] + through), (down, down[before] + forward), (worst, bound)):
                np.minimum(table[after], np.where(possible, value, np.inf).min(axis=1), out=table[after])
    return PrefixBounds(round_trip_s=trip, forward_s=down, own_bound_s=worst)
