"""The outer search: which blocks form a stage, on which submesh, so that the simulated step is the shortest.

Pipelines are built from the last stage backwards, so a stage's place, and with it the micro-batches it holds, is known
when it is added (`tails`). Best first, the tail with the least bound is completed greedily (a
dive), which leaves its untaken branches in the queue; whole pipelines are evaluated. When the least bound left open is
not below the best evaluated time, that pipeline is optimal.

First come good pipelines by Alpa's recurrence (`candidates`) and their neighbours (`_climb`). The tables then speak
only of steps below the best time, and are made a few times over: what the heads rule out makes the next tails, and so
the bounds, tighter.
"""

import heapq
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from autopar.choice.problem import SolveStatus
from autopar.inter.alpa_dp import SubmeshStage, alpa_candidates, neighbouring_pipelines
from autopar.inter.bound_tables import LevelTimes, feasible_band, level_free_bounds, prefix_bounds, suffix_bounds
from autopar.inter.partial_pipelines import Branches, PartialPipeline, SearchTree
from autopar.inter.pipeline_bounds import own_order_bound_s, pipeline_lower_bound_s
from autopar.inter.pipeline_problem import EvaluatedPipeline, PipelineProblem, PipelineResult, level_times_of
from autopar.pipeline.simulate import StageTimes

Floats = NDArray[np.float64]
MAX_EXACT_PROBLEM = 2_000
"""Blocks x devices x classes up to which the default is an exact search without a cap."""
CANDIDATE_FACTORS = (1.3, 4.0, math.inf)
"""The first candidates are sought below these multiples of the first bound, one after the other."""
MAX_TIGHTENING_ROUNDS = 4
"""How often tail and head tables are made from each other at most, while that lifts the bound by 0.1 %."""


@dataclass(slots=True)
class _SearchState:
    """What the search knows so far: the evaluated pipelines, the best of them, and its limits."""

    evaluate: Callable[[tuple[SubmeshStage, ...]], float]
    upper_bound_s: float
    tolerance: float
    deadline_s: float
    max_evaluations: float
    relaxed_bound_of: Callable[[tuple[SubmeshStage, ...]], float] | None = (
        None  # of one pipeline, where times are relaxed
    )
    incumbent: EvaluatedPipeline | None = None
    min_relaxed_bound_s: float = math.inf
    evaluated: set[tuple[SubmeshStage, ...]] = field(default_factory=set)
    num_dives: int = 0

    @property
    def incumbent_s(self) -> float:
        return self.incumbent.step_time_s if self.incumbent else self.upper_bound_s

    @property
    def cutoff_s(self) -> float:
        """Bounds from here on are not worth following (1e-12: sums of the same times differ by their rounding)."""
        return self.incumbent_s * (1.0 - max(self.tolerance, 1e-12))

    @property
    def stopped(self) -> bool:
        # Dives that find only known pipelines or dead ends count too, or a cap would not end a search full of ties.
        used_up = len(self.evaluated) >= self.max_evaluations or self.num_dives >= 3 * self.max_evaluations
        return used_up or time.monotonic() > self.deadline_s

    def consider(self, stages: tuple[SubmeshStage, ...]) -> None:
        if stages not in self.evaluated:
            self.evaluated.add(stages)
            if (
                self.relaxed_bound_of is not None
            ):  # another way to run the same stages may be faster than the one evaluated
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

    ``evaluate`` gives the true step time of one candidate, never below the problem's own times (transfers and waiting
    only add to it). ``deadline_s`` is seconds from now; ``tolerance`` the relative gap at which to stop. Small problems
    default to an exact search without a cap, others to a tolerance of 1e-3 and 200 evaluations; what is left open is
    in ``lower_bound_s``.
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
    """A bound on every pipeline that is quick to have: by the busiest stage and by the way through all of them; with a
    finite ``upper_bound_s`` also by what tails and heads below it can be, and at most that."""
    levels = level_times_of(problem)
    if levels is None:
        return math.inf
    tail, head = level_free_bounds(levels)
    bound_s = float(max(tail[0, levels.num_devices], head[levels.num_blocks, 0]))
    if bound_s >= problem.upper_bound_s or math.isinf(problem.upper_bound_s):
        return bound_s
    return _tighten(levels, tail, head, bound_s, problem.upper_bound_s)[0]


def _tighten(
    level_times: LevelTimes, suffix_s: Floats, prefix_s: Floats, bound_s: float, threshold_s: float
) -> tuple[float, SearchTree | None]:
    """The bound by tables of tails and heads made from each other, and what is left to explore; None if nothing is."""
    missing, tree = prefix_s, None
    for number in range(MAX_TIGHTENING_ROUNDS):
        band = feasible_band(suffix_s, prefix_s, threshold_s)
        tails = suffix_bounds(level_times, band, missing)
        whole = tails.step_time_s[:, 0, level_times.num_devices]
        before_s, bound_s = bound_s, max(bound_s, min(float(whole.min()), threshold_s))
        if bound_s >= threshold_s:
            return bound_s, None
        level_times = level_times.truncated(int(np.flatnonzero(whole < threshold_s)[-1]))
        heads = prefix_bounds(level_times, band, tails)
        tree = SearchTree(level_times, heads)
        if number > 0 and bound_s < before_s * 1.001:
            break
        missing = heads.round_trip_s
    return bound_s, tree


def _branch_and_bound(level_times: LevelTimes, state: _SearchState) -> float:
    """Evaluate until nothing better is open or a limit stops it; returns what no unevaluated pipeline is below."""
    tail, head = level_free_bounds(level_times)
    bound_s = float(max(tail[0, level_times.num_devices], head[level_times.num_blocks, 0]))
    if bound_s >= state.cutoff_s or not math.isfinite(bound_s):
        return bound_s
    found = False
    for reach in CANDIDATE_FACTORS:
        reach_s = min(bound_s * reach, state.incumbent_s)
        for stages in alpa_candidates(level_times, feasible_band(tail, head, reach_s)):
            found = True
            state.consider(stages)
            if state.stopped:
                return bound_s
        if found or reach_s == state.incumbent_s:
            break
    if not found and math.isinf(state.incumbent_s):
        return math.inf  # the last reach left out nothing
    _local_search(level_times, state)
    threshold_s = state.cutoff_s
    bound_s, tree = _tighten(level_times, tail, head, bound_s, threshold_s)
    if tree is None or state.stopped:
        return bound_s
    return _best_first(tree, bound_s, threshold_s, state)


def _local_search(level_times: LevelTimes, state: _SearchState) -> None:
    """Replace the best pipeline by a better neighbour while there is one and half of the evaluations are left."""
    climbing = state.incumbent is not None
    while climbing and state.incumbent is not None:
        best, climbing = state.incumbent, False
        for stages in neighbouring_pipelines(level_times, best.stages):
            if state.stopped or 2 * len(state.evaluated) >= state.max_evaluations:
                return
            if level_times.relaxed or _exact_bound_s(level_times, stages) < state.cutoff_s:
                state.consider(stages)
                if state.incumbent is not best:
                    climbing = True
                    break


def _exact_bound_s(level_times: LevelTimes, stages: tuple[SubmeshStage, ...]) -> float:
    """`lower_bound_s` of one whole pipeline."""
    times: list[StageTimes] = []
    behind, before = level_times.num_devices, 0
    for s, (i, j, k) in zip(range(len(stages), 0, -1), stages, strict=True):
        times.append(
            StageTimes(
                forward_s=float(level_times.forward_s[s, i, j, k]),
                backward_s=float(level_times.backward_s[s, i, j, k]),
                step_s=float(level_times.step_s[s, i, j, k]),
                transfer_forward_s=0.0,
                transfer_backward_s=float(level_times.stage_boundary_s[before, i, behind]),
            )
        )
        behind, before = behind - level_times.submesh_sizes[k], k
    return pipeline_lower_bound_s(level_times.schedule, times, level_times.num_microbatches)


def _relaxed_bound_s(level_times: LevelTimes, stages: tuple[SubmeshStage, ...]) -> float:
    """What no way to run these stages is below, by the recursion of `bounds` on relaxed times."""
    assert level_times.busy_s is not None
    trip = finish = total = np.zeros(())
    behind, after = 0, stages[-1][2]
    for s, (i, j, k) in enumerate(reversed(stages), 1):
        forward, backward = (values[s, i, j, k] for values in (level_times.forward_s, level_times.backward_s))
        cut = max(level_times.stage_boundary_s[k, j, behind], level_times.stage_boundary_s[after, j, behind])
        way = np.asarray(trip + cut)
        own = own_order_bound_s(
            level_times.schedule, level_times.num_microbatches, np.array(s), forward, backward, way, True
        )
        finish = np.maximum(own, forward + backward + cut + finish)
        trip = way + forward + backward
        stepped = np.maximum(finish + level_times.step_s[s, i, j, k], level_times.busy_s[s, i, j, k])
        total = np.maximum(stepped, forward + total)
        behind, after = behind + level_times.submesh_sizes[k], k
    return float(total)


def _best_first(tree: SearchTree, lower_bound_s: float, threshold_s: float, state: _SearchState) -> float:
    """Evaluate what may be below the threshold, least bound first; returns the least bound left open."""
    empty = PartialPipeline(0, tree.level_times.num_blocks, 0, 0.0, 0.0, 0.0, 0.0, 0.0, None, None)
    queue: list[tuple[float, int, Branches, int]] = []
    count = 0
    # Branches cut at the time that was best when they were made stay cut: that time only falls.
    first = tree.branches(empty, min(threshold_s, state.incumbent_s))
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
            tail = branches.partial_pipeline(index)
            if tail.first_block == 0:
                state.consider(tail.stages())
                break
            following = tree.branches(tail, min(threshold_s, state.incumbent_s))
            if following is None:
                break
            branches, index = following, 0
    return threshold_s
