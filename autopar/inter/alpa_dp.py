"""Good pipelines to begin with: Alpa's recurrence on the longest stage (Zheng et al., OSDI 2022, section 5).

    F(s, i, d; t_max) = min over the next stage, with t + c <= t_max, of   t + c + F(s - 1, j, d - n_k; t_max)
    T(t_max)          = min_s F(s, 0, D; t_max) + (B - 1) t_max

A stage is charged its transfer c both times: where 1F1B holds too few micro-batches to hide it, a micro-batch takes
t + c in the long run. T only ranks (it is no bound on the simulated time); `partition` evaluates what `candidates`
yields. F falls as t_max rises, so an interval (low, high] of t_max cannot hold a T below F(high) + (B - 1) low: the
interval with the least such value is halved next.
"""

import heapq
import math
from collections.abc import Iterator

import numpy as np

from autopar.inter.bound_tables import FeasibleBand, Floats, LevelTimes, true_range

SubmeshStage = tuple[int, int, int]
"""(first block, last block + 1, submesh class)"""


def min_stage_sums(level_times: LevelTimes, band: FeasibleBand, max_stage_s: float) -> Floats:
    """F of the module's docstring, (S + 1, L + 1, D + 1) seconds, for t_max = ``longest_s``."""
    S, L, D = level_times.num_stages, level_times.num_blocks, level_times.num_devices
    sums = np.full((S + 1, L + 1, D + 1), np.inf)
    sums[0, L, 0] = 0.0
    for i in range(L - 1, -1, -1):
        depth = min(S, L - i, band.high[i])
        for k, size in enumerate(level_times.submesh_sizes):
            low, high = max(band.low[i], size), band.high[i]
            first, end = true_range(level_times.fastest_s[i, :, k] <= max_stage_s)
            if low >= high or not end:
                continue
            stages = (slice(1, depth + 1), i, slice(first, end), k)
            time_s = (level_times.forward_s[stages] + level_times.backward_s[stages])[:, :, None]
            behind = slice(low - size, high - size)
            time_s = time_s + level_times.stage_boundary_s[k, first:end, behind]
            time_s = np.where(time_s <= max_stage_s, time_s, np.inf)
            after = sums[1 : depth + 1, i, low:high]
            np.minimum(after, (sums[:depth, first:end, behind] + time_s).min(axis=1), out=after)
    return sums


def backtrack_stages(
    level_times: LevelTimes, stage_sums: Floats, num_stages: int, max_stage_s: float
) -> tuple[SubmeshStage, ...]:
    """The stages, first to last, that F's least sum for ``num_stages`` stages is made of."""
    stages: list[SubmeshStage] = []
    i, devices = 0, level_times.num_devices
    sizes = np.array(level_times.submesh_sizes)
    for s in range(num_stages, 0, -1):
        behind = np.maximum(devices - sizes, 0)
        cut_s = level_times.stage_boundary_s[np.arange(len(sizes)), :, behind].T
        time_s = level_times.forward_s[s, i] + level_times.backward_s[s, i] + cut_s
        time_s = np.where((time_s <= max_stage_s) & (sizes <= devices), time_s, np.inf)
        rest = stage_sums[s - 1][:, behind]
        j, k = np.unravel_index(int(np.argmin(time_s + rest)), time_s.shape)
        stages.append((i, int(j), int(k)))
        i, devices = int(j), devices - level_times.submesh_sizes[k]
    assert (i, devices) == (level_times.num_blocks, 0), f"{stages} do not use up blocks and devices"
    return tuple(stages)


def alpa_candidates(
    level_times: LevelTimes, band: FeasibleBand, *, num_passes: int = 10, num_counts: int = 3
) -> Iterator[tuple[SubmeshStage, ...]]:
    """Pipelines of small T: for each of ``num_passes`` values of t_max the best of ``num_counts`` numbers of stages."""
    repeats = level_times.num_microbatches - 1
    # (what no T inside is below, low, high, F at high) of an open interval of t_max; the first pass is at its top.
    intervals = [(0.0, 0.0, band.threshold_s / level_times.num_microbatches, 0.0)]
    best = math.inf
    for number in range(num_passes):
        if not intervals or intervals[0][0] >= best:
            return
        _, low, high, sum_high = heapq.heappop(intervals)
        longest_s = high if number == 0 else (low + high) / 2
        sums = min_stage_sums(level_times, band, longest_s)
        ends = sums[:, 0, level_times.num_devices]
        least, reached = float(ends.min()), longest_s
        for rank, count in enumerate(np.argsort(ends, kind="stable")[:num_counts].tolist()):
            if math.isfinite(ends[count]):
                stages = backtrack_stages(level_times, sums, count, longest_s)
                slowest = _slowest_stage_s(level_times, stages)
                best = min(best, float(ends[count]) + repeats * slowest)
                reached = slowest if rank == 0 else reached
                yield stages
        if number == 0:
            # Stages cannot all be shorter than their mean.
            low = least / level_times.num_stages / 2 if math.isfinite(least) else low
        else:
            heapq.heappush(intervals, (sum_high + repeats * longest_s, longest_s, high, sum_high))
        # From the path's own longest stage up to longest_s the sum is the same, so T is least at that stage.
        if math.isfinite(least) and low < reached:
            heapq.heappush(intervals, (least + repeats * low, low, reached, least))


def _slowest_stage_s(level_times: LevelTimes, stages: tuple[SubmeshStage, ...]) -> float:
    longest, devices = 0.0, 0
    for s, (i, j, k) in enumerate(reversed(stages), 1):
        time_s = (
            level_times.forward_s[s, i, j, k]
            + level_times.backward_s[s, i, j, k]
            + level_times.stage_boundary_s[k, j, devices]
        )
        longest, devices = max(longest, float(time_s)), devices + level_times.submesh_sizes[k]
    return longest


def neighbouring_pipelines(
    level_times: LevelTimes, stages: tuple[SubmeshStage, ...]
) -> Iterator[tuple[SubmeshStage, ...]]:
    """Possible pipelines one change away: a cut moved by a block, two adjacent stages' submeshes swapped, a stage on
    another class of the same size, two adjacent stages merged."""
    for n, (i, j, k) in enumerate(stages):
        changed: list[tuple[SubmeshStage, ...]] = []
        for other, size in enumerate(level_times.submesh_sizes):
            if size == level_times.submesh_sizes[k] and other != k:
                changed.append((*stages[:n], (i, j, other), *stages[n + 1 :]))
        if n + 1 < len(stages):
            _, end, following = stages[n + 1]
            cuts = [(cut, k, following) for cut in (j - 1, j + 1) if i < cut < end]
            cuts += [(j, following, k)] if following != k else []
            for cut, first, second in cuts:
                changed.append((*stages[:n], (i, cut, first), (cut, end, second), *stages[n + 2 :]))
            for other, size in enumerate(level_times.submesh_sizes):
                if size == level_times.submesh_sizes[k] + level_times.submesh_sizes[following]:
                    changed.append((*stages[:n], (i, end, other), *stages[n + 2 :]))
        for candidate in changed:
            if math.isfinite(_slowest_stage_s(level_times, candidate)):
                yield candidate
