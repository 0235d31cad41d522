"""Good pipelines to start from: Alpa's recurrence on the slowest stage (Zheng et al., OSDI 2022, section 5).

    F(s, i, d; t_max) = min over the next stage, with t + c <= t_max, of   t + c + F(s - 1, j, d - n_k; t_max)
    T(t_max)          = min_s F(s, 0, D; t_max) + (B - 1) t_max

F is the least sum over s stages of blocks i..L-1 on d devices, none slower than t_max; the first of them, blocks i..j-1 on
a submesh of n_k devices, takes t per micro-batch, and c for its transfer (`min_stage_sums`). A stage is charged c in F and
against t_max alike: where 1F1B has too few micro-batches in flight to overlap the transfer, a micro-batch takes t + c in
the long run. T only ranks pipelines, it does not bound the simulated time; `branch_and_bound` evaluates what
`alpa_candidates` yields. F falls as t_max rises, so no T with t_max in (low, high] is
below F(high) + (B - 1) low: the interval with the least such value is halved next.
"""

import heapq
import math
from collections.abc import Iterator

import numpy as np

from autopar.inter.bound_tables import FeasibleBand, Floats, LevelTimes, true_range
from autopar.inter.stage_span import SubmeshStage


def min_stage_sums(level_times: LevelTimes, band: FeasibleBand, max_stage_s: float) -> Floats:
    """F of the module's docstring, (S + 1, L + 1, D + 1) seconds, for t_max = ``max_stage_s``."""
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
            devices_after = slice(low - size, high - size)
            time_s = time_s + level_times.stage_boundary_s[k, first:end, devices_after]
            time_s = np.where(time_s <= max_stage_s, time_s, np.inf)
            extended = sums[1 : depth + 1, i, low:high]
            np.minimum(extended, (sums[:depth, first:end, devices_after] + time_s).min(axis=1), out=extended)
    return sums


def backtrack_stages(
    level_times: LevelTimes, stage_sums: Floats, num_stages: int, max_stage_s: float
) -> tuple[SubmeshStage, ...]:
    """The stages, first to last, whose sum is F(num_stages, 0, D) of ``stage_sums`` (made with ``max_stage_s``)."""
    stages: list[SubmeshStage] = []
    i, devices = 0, level_times.num_devices
    sizes = np.array(level_times.submesh_sizes)
    for s in range(num_stages, 0, -1):
        devices_after = np.maximum(devices - sizes, 0)
        boundary_s = level_times.stage_boundary_s[np.arange(len(sizes)), :, devices_after].T
        time_s = level_times.forward_s[s, i] + level_times.backward_s[s, i] + boundary_s
        time_s = np.where((time_s <= max_stage_s) & (sizes <= devices), time_s, np.inf)
        remaining_s = stage_sums[s - 1][:, devices_after]
        j, k = np.unravel_index(int(np.argmin(time_s + remaining_s)), time_s.shape)
        stages.append(SubmeshStage(i, int(j), int(k)))
        i, devices = int(j), devices - level_times.submesh_sizes[k]
    assert (i, devices) == (level_times.num_blocks, 0), f"{stages} do not use up blocks and devices"
    return tuple(stages)


def alpa_candidates(
    level_times: LevelTimes, band: FeasibleBand, *, num_passes: int = 10, num_counts: int = 3
) -> Iterator[tuple[SubmeshStage, ...]]:
    """Pipelines of small T: for each of ``num_passes`` values of t_max the best for each of the ``num_counts`` best
    numbers of stages; a pipeline may come more than once."""
    repeats = level_times.num_microbatches - 1
    # An open interval of t_max: (lower bound on its T, low, high, F at high). The first pass takes its upper end.
    intervals = [(0.0, 0.0, band.threshold_s / level_times.num_microbatches, 0.0)]
    best = math.inf
    for number in range(num_passes):
        if not intervals or intervals[0][0] >= best:
            return
        _, low, high, sum_high = heapq.heappop(intervals)
        max_stage_s = high if number == 0 else (low + high) / 2
        sums = min_stage_sums(level_times, band, max_stage_s)
        sum_of_count = sums[:, 0, level_times.num_devices]
        least, reached = float(sum_of_count.min()), max_stage_s
        for rank, count in enumerate(np.argsort(sum_of_count, kind="stable")[:num_counts].tolist()):
            if math.isfinite(sum_of_count[count]):
                stages = backtrack_stages(level_times, sums, count, max_stage_s)
                slowest = _slowest_stage_s(level_times, stages)
                best = min(best, float(sum_of_count[count]) + repeats * slowest)
                reached = slowest if rank == 0 else reached
                yield stages
        if number == 0:
            # Not all stages are faster than their mean.
            low = least / level_times.num_stages / 2 if math.isfinite(least) else low
        else:
            heapq.heappush(intervals, (sum_high + repeats * max_stage_s, max_stage_s, high, sum_high))
        # From the best pipeline's own slowest stage up to max_stage_s, F is the same, so T is least at that stage.
        if math.isfinite(least) and low < reached:
            heapq.heappush(intervals, (least + repeats * low, low, reached, least))


def _slowest_stage_s(level_times: LevelTimes, stages: tuple[SubmeshStage, ...]) -> float:
    """The largest t + c of a pipeline's stages; inf where one is impossible."""
    slowest, devices = 0.0, 0
    for s, (i, j, k) in enumerate(reversed(stages), 1):
        time_s = (
            level_times.forward_s[s, i, j, k]
            + level_times.backward_s[s, i, j, k]
            + level_times.stage_boundary_s[k, j, devices]
        )
        slowest, devices = max(slowest, float(time_s)), devices + level_times.submesh_sizes[k]
    return slowest


def neighbouring_pipelines(
    level_times: LevelTimes, stages: tuple[SubmeshStage, ...]
) -> Iterator[tuple[SubmeshStage, ...]]:
    """Possible pipelines that are one change away: a stage boundary moved by one block, the submeshes of two adjacent
    stages swapped, a stage on another class of the same size, or two adjacent stages merged."""
    for n, (i, j, k) in enumerate(stages):
        changed: list[tuple[SubmeshStage, ...]] = []
        for other, size in enumerate(level_times.submesh_sizes):
            if size == level_times.submesh_sizes[k] and other != k:
                changed.append((*stages[:n], SubmeshStage(i, j, other), *stages[n + 1 :]))
        if n + 1 < len(stages):
            _, end, following = stages[n + 1]
            splits = [(boundary, k, following) for boundary in (j - 1, j + 1) if i < boundary < end]
            splits += [(j, following, k)] if following != k else []
            for boundary, first, second in splits:
                pair = SubmeshStage(i, boundary, first), SubmeshStage(boundary, end, second)
                changed.append((*stages[:n], *pair, *stages[n + 2 :]))
            for other, size in enumerate(level_times.submesh_sizes):
                if size == level_times.submesh_sizes[k] + level_times.submesh_sizes[following]:
                    changed.append((*stages[:n], SubmeshStage(i, end, other), *stages[n + 2 :]))
        for candidate in changed:
            if math.isfinite(_slowest_stage_s(level_times, candidate)):
                yield candidate
