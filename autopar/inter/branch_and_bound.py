"""The outer search: which blocks form a stage, on which submesh, so that the simulated step is the shortest.

Best-first branch and bound over suffixes of the pipeline. A node is a `PartialPipeline`: the last stages, of which
each one's number from the end (its *level*), and so its micro-batches in flight, is known. The node with the least bound is extended greedily to a complete
pipeline (a dive), which is evaluated; the branches not taken go to the queue. The incumbent is optimal when no open node
has a bound below its step time.

Before that, good pipelines are found by Alpa's recurrence (`alpa_candidates`) and among their neighbours
(`_local_search`). Suffix and prefix bounds (`bound_tables`) are then computed for steps below the incumbent only, in a few
rounds, each from the other: states without a prefix drop out of the next suffix bounds, which makes them tighter
(`_tighten`).
"""

import heapq
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from autopar.choice.problem import SolveStatus
from autopar.inter.alpa_dp import alpa_candidates, neighbouring_pipelines
from autopar.inter.bound_tables import LevelTimes, feasible_band, level_free_bounds, prefix_bounds, suffix_bounds
from autopar.inter.partial_pipelines import Branches, PartialPipeline, SearchTree
from autopar.inter.pipeline_bounds import own_order_bound_s, pipeline_lower_bound_s
from autopar.inter.pipeline_problem import EvaluatedPipeline, PipelineProblem, PipelineResult, level_times_of
from autopar.inter.stage_span import SubmeshStage
from autopar.pipeline.simulate import StageTimes

Floats = NDArray[np.float64]
MAX_EXACT_PROBLEM = 2_000
"""Blocks x devices x submesh classes up to which a search is exact, without a limit on evaluations, by default."""
CANDIDATE_FACTORS = (1.3, 4.0, math.inf)
"""Alpa's candidates are sought below these multiples of the first bound, one after the other until some are found."""
MAX_TIGHTENING_ROUNDS = 4
"""The most rounds in which suffix and prefix bounds are computed from each other; a round that raises the bound by less
than 0.1 % is the last."""


@dataclass(slots=True)
class _SearchState:
    """What the search knows so far (the evaluated pipelines and the incumbent) and its limits. ``relaxed_bound_of``, set
    where the stage times are relaxed, bounds one pipeline over all choices of its stages; ``min_relaxed_bound_s`` is its
    minimum over the evaluated pipelines."""

    evaluate: Callable[[tuple[SubmeshStage, ...]], float]
    upper_bound_s: float
    tolerance: float
    deadline_s: float
    max_evaluations: float
    relaxed_bound_of: Callable[[tuple[SubmeshStage, ...]], float] | None = None
    incumbent: EvaluatedPipeline | None = None
    min_relaxed_bound_s: float = math.inf
    evaluated: set[tuple[SubmeshStage, ...]] = field(default_factory=set)
    num_dives: int = 0

    @property
    def incumbent_s(self) -> float:
        """Seconds of the incumbent; the upper bound while there is none."""
        return self.incumbent.step_time_s if self.incumbent else self.upper_bound_s

    @property
    def cutoff_s(self) -> float:
        """Nodes with a bound of at least this are pruned (1e-12: sums of the same times differ by their rounding)."""
        return self.incumbent_s * (1.0 - max(self.tolerance, 1e-12))

    @property
    def stopped(self) -> bool:
        """Whether a limit is reached: evaluations, dives or the deadline."""
        # Dives that reach only evaluated pipelines or dead ends count too: else a search full of ties would not end.
        used_up = len(self.evaluated) >= self.max_evaluations or self.num_dives >= 3 * self.max_evaluations
        return used_up or time.monotonic() > self.deadline_s

    def consider(self, stages: tuple[SubmeshStage, ...]) -> None:
        """Evaluate a pipeline that was not evaluated before."""
        if stages not in self.evaluated:
            self.evaluated.add(stages)
            if self.relaxed_bound_of is not None:  # another choice for the same stages may be faster than the evaluated
                self.min_relaxed_bound_s = min(self.min_relaxed_bound_s, self.relaxed_bound_of(stages))
            step_time_s = self.evaluate(stages)
            if step_time_s < self.incumbent_s:
                self.incumbent = EvaluatedPipeline(stages=stages, step_time_s=step_time_s)


def search_pipelines(
    problem: PipelineProblem,
    *,
    evaluate: Callable[[tuple[SubmeshStage, ...]], float],
    deadline_s: float | None = None,
    max_evaluations: int | None = None,
    tolerance: float | None = None,
) -> PipelineResult:
    """The pipeline with the least evaluated step time of all that use every device.

    ``evaluate`` gives the step time of one pipeline in seconds, which is never below that of the problem's stage times
    (transfers and waiting only add to it). ``deadline_s`` is seconds from now, ``tolerance`` the relative gap at which
    to stop. Small problems default to an exact search without a limit, others to a tolerance of 1e-3 and 200
    evaluations; no pipeline, evaluated or not, is below the result's ``lower_bound_s``.
    """
    begin = time.monotonic()
    small = is_small_problem(problem)
    progress = _SearchState(
        evaluate=evaluate,
        upper_bound_s=problem.upper_bound_s,
        tolerance=(0.0 if small else 1e-3) if tolerance is None else tolerance,
        deadline_s=math.inf if deadline_s is None else begin + deadline_s,
        max_evaluations=(math.inf if small else 200) if max_evaluations is None else max_evaluations,
    )
    levels = level_times_of(problem)
    if levels is not None and levels.relaxed:
        progress.relaxed_bound_of = lambda stages: _relaxed_bound_s(levels, stages)
    bound_s = min(_branch_and_bound(levels, progress) if levels is not None else math.inf, progress.incumbent_s)
    bound_s = min(bound_s, progress.min_relaxed_bound_s)
    status: SolveStatus
    if progress.incumbent is not None:
        status = "optimal" if bound_s >= progress.cutoff_s else "feasible"
    else:
        status = "infeasible" if bound_s >= progress.cutoff_s else "failed"
    return PipelineResult(
        incumbent=progress.incumbent,
        lower_bound_s=bound_s,
        status=status,
        num_evaluated=len(progress.evaluated),
        seconds=time.monotonic() - begin,
    )


def is_small_problem(problem: PipelineProblem) -> bool:
    """Whether a search is exact by default."""
    return problem.num_blocks * problem.num_devices * len(problem.submesh_sizes) <= MAX_EXACT_PROBLEM


def quick_lower_bound_s(problem: PipelineProblem) -> float:
    """A lower bound in seconds on every pipeline; it is fast to compute: by the busiest stage and by the time through
    all of them; with a finite ``upper_bound_s`` also by suffix and prefix bounds below it, and at most that. inf where no
    pipeline is possible."""
    levels = level_times_of(problem)
    if levels is None:
        return math.inf
    suffix_s, prefix_s = level_free_bounds(levels)
    bound_s = float(max(suffix_s[0, levels.num_devices], prefix_s[levels.num_blocks, 0]))
    if bound_s >= problem.upper_bound_s or math.isinf(problem.upper_bound_s):
        return bound_s
    return _tighten(levels, suffix_s, prefix_s, bound_s, problem.upper_bound_s)[0]


def _tighten(
    level_times: LevelTimes, suffix_s: Floats, prefix_s: Floats, bound_s: float, threshold_s: float
) -> tuple[float, SearchTree | None]:
    """(the bound by suffix and prefix bounds computed from each other, the tree to search), starting from the level-free bounds and
    their bound on all pipelines; the tree is None where no pipeline is below ``threshold_s``."""
    missing, tree = prefix_s, None
    for number in range(MAX_TIGHTENING_ROUNDS):
        band = feasible_band(suffix_s, prefix_s, threshold_s)
        suffixes = suffix_bounds(level_times, band, missing)
        complete_s = suffixes.step_time_s[:, 0, level_times.num_devices]
        before_s, bound_s = bound_s, max(bound_s, min(float(complete_s.min()), threshold_s))
        if bound_s >= threshold_s:
            return bound_s, None
        level_times = level_times.truncated(int(np.flatnonzero(complete_s < threshold_s)[-1]))
        prefixes = prefix_bounds(level_times, band, suffixes)
        tree = SearchTree(level_times=level_times, prefixes=prefixes)
        if number > 0 and bound_s < before_s * 1.001:
            break
        missing = prefixes.round_trip_s
    return bound_s, tree


def _branch_and_bound(level_times: LevelTimes, state: _SearchState) -> float:
    """Evaluate until no open node is below the cutoff or a limit is reached; returns a lower bound in seconds on all
    pipelines that were not evaluated."""
    suffix_s, prefix_s = level_free_bounds(level_times)
    bound_s = float(max(suffix_s[0, level_times.num_devices], prefix_s[level_times.num_blocks, 0]))
    if bound_s >= state.cutoff_s or not math.isfinite(bound_s):
        return bound_s
    found = False
    for factor in CANDIDATE_FACTORS:
        below_s = min(bound_s * factor, state.incumbent_s)
        for stages in alpa_candidates(level_times, feasible_band(suffix_s, prefix_s, below_s)):
            found = True
            state.consider(stages)
            if state.stopped:
                return bound_s
        if found or below_s == state.incumbent_s:
            break
    if not found and math.isinf(state.incumbent_s):
        return math.inf  # the last factor excludes nothing
    _local_search(level_times, state)
    threshold_s = state.cutoff_s
    bound_s, tree = _tighten(level_times, suffix_s, prefix_s, bound_s, threshold_s)
    if tree is None or state.stopped:
        return bound_s
    return _best_first(tree, bound_s, threshold_s, state)


def _local_search(level_times: LevelTimes, state: _SearchState) -> None:
    """Replace the incumbent by a better neighbour while there is one and half of the evaluations are left."""
    improved = state.incumbent is not None
    while improved and state.incumbent is not None:
        best, improved = state.incumbent, False
        for stages in neighbouring_pipelines(level_times, best.stages):
            if state.stopped or 2 * len(state.evaluated) >= state.max_evaluations:
                return
            if level_times.relaxed or _exact_bound_s(level_times, stages) < state.cutoff_s:
                state.consider(stages)
                if state.incumbent is not best:
                    improved = True
                    break


def _exact_bound_s(level_times: LevelTimes, stages: tuple[SubmeshStage, ...]) -> float:
    """`pipeline_lower_bound_s` of one complete pipeline, by exact times."""
    times: list[StageTimes] = []
    remaining, previous = level_times.num_devices, 0
    for s, (i, j, k) in zip(range(len(stages), 0, -1), stages, strict=True):
        times.append(
            StageTimes(
                forward_s=float(level_times.forward_s[s, i, j, k]),
                backward_s=float(level_times.backward_s[s, i, j, k]),
                step_s=float(level_times.step_s[s, i, j, k]),
                transfer_forward_s=0.0,
                transfer_backward_s=float(level_times.stage_boundary_s[previous, i, remaining]),
            )
        )
        remaining, previous = remaining - level_times.submesh_sizes[k], k
    return pipeline_lower_bound_s(level_times.schedule, times, level_times.num_microbatches)


def _relaxed_bound_s(level_times: LevelTimes, stages: tuple[SubmeshStage, ...]) -> float:
    """A lower bound in seconds on every choice for these stages: the recursion of `pipeline_bounds` on relaxed times."""
    assert level_times.busy_s is not None
    trip = finish = total = np.zeros(())
    devices_after, following = 0, stages[-1].submesh
    for s, (i, j, k) in enumerate(reversed(stages), 1):
        forward, backward = (values[s, i, j, k] for values in (level_times.forward_s, level_times.backward_s))
        boundary = max(level_times.stage_boundary_s[side, j, devices_after] for side in (k, following))
        round_trip = np.asarray(trip + boundary)
        own = own_order_bound_s(
            level_times.schedule,
            level_times.num_microbatches,
            num_from_last=np.array(s),
            forward_s=forward,
            backward_s=backward,
            round_trip_s=round_trip,
            relaxed=True,
        )
        finish = np.maximum(own, forward + backward + boundary + finish)
        trip = round_trip + forward + backward
        stepped = np.maximum(finish + level_times.step_s[s, i, j, k], level_times.busy_s[s, i, j, k])
        total = np.maximum(stepped, forward + total)
        devices_after, following = devices_after + level_times.submesh_sizes[k], k
    return float(total)


def _best_first(tree: SearchTree, lower_bound_s: float, threshold_s: float, state: _SearchState) -> float:
    """Evaluate what may be below the threshold, least bound first; returns the least bound of an open node in seconds, at
    most ``threshold_s``."""
    root = PartialPipeline.empty(tree.level_times.num_blocks)
    queue: list[tuple[float, int, Branches, int]] = []
    count = 0
    # Branches pruned by the incumbent of the time when they were made stay pruned: the incumbent only falls.
    first = tree.branches(root, min(threshold_s, state.incumbent_s))
    if first is not None:
        queue.append((first.bound_s[0], count, first, 0))
    while queue:
        bound_s = max(queue[0][0], lower_bound_s)
        if bound_s >= state.cutoff_s or state.stopped:
            return min(bound_s, threshold_s)
        _, _, branches, index = heapq.heappop(queue)
        state.num_dives += 1
        while True:
            if index + 1 < len(branches.bound_s):
                count += 1
                heapq.heappush(queue, (branches.bound_s[index + 1], count, branches, index + 1))
            partial = branches.partial_pipeline(index)
            if partial.first_block == 0:
                state.consider(partial.stages())
                break
            following = tree.branches(partial, min(threshold_s, state.incumbent_s))
            if following is None:
                break
            branches, index = following, 0
    return threshold_s
