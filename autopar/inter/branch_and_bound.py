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

from autopar.choice.problem import Status
from autopar.inter.alpa_dp import Stage, candidates, neighbours
from autopar.inter.bound_tables import Levels, head_tables, level_free, make_band, tail_tables
from autopar.inter.partial_pipelines import Branches, Tail, Tree
from autopar.inter.pipeline_bounds import lower_bound_s, own_s
from autopar.inter.pipeline_problem import Pipeline, PipelineProblem, PipelineResult, levels_of
from autopar.pipeline.simulate import StageTimes

Floats = NDArray[np.float64]
SMALL_PROBLEM = 2_000
"""Blocks x devices x classes up to which the default is an exact search without a cap."""
REACHES = (1.3, 4.0, math.inf)
"""The first candidates are sought below these multiples of the first bound, one after the other."""
MAX_ROUNDS = 4
"""How often tail and head tables are made from each other at most, while that lifts the bound by 0.1 %."""


@dataclass(slots=True)
class _Progress:
    """What the search knows so far: the evaluated pipelines, the best of them, and its limits."""

    evaluate: Callable[[tuple[Stage, ...]], float]
    upper_bound_s: float
    tolerance: float
    deadline_s: float
    max_evaluations: float
    bound_of: Callable[[tuple[Stage, ...]], float] | None = None  # of one pipeline, where times are relaxed
    best: Pipeline | None = None
    least_evaluated_s: float = math.inf
    known: set[tuple[Stage, ...]] = field(default_factory=set)
    num_dives: int = 0

    @property
    def best_s(self) -> float:
        return self.best.step_time_s if self.best else self.upper_bound_s

    @property
    def below_s(self) -> float:
        """Bounds from here on are not worth following (1e-12: sums of the same times differ by their rounding)."""
        return self.best_s * (1.0 - max(self.tolerance, 1e-12))

    @property
    def stopped(self) -> bool:
        # Dives that find only known pipelines or dead ends count too, or a cap would not end a search full of ties.
        used_up = len(self.known) >= self.max_evaluations or self.num_dives >= 3 * self.max_evaluations
        return used_up or time.monotonic() > self.deadline_s

    def consider(self, stages: tuple[Stage, ...]) -> None:
        if stages not in self.known:
            self.known.add(stages)
            if self.bound_of is not None:  # another way to run the same stages may be faster than the one evaluated
                self.least_evaluated_s = min(self.least_evaluated_s, self.bound_of(stages))
            step_time_s = self.evaluate(stages)
            if step_time_s < self.best_s:
                self.best = Pipeline(stages=stages, step_time_s=step_time_s)


def search(
    problem: PipelineProblem,
    *,
    evaluate: Callable[[tuple[Stage, ...]], float],
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
    small = is_small(problem)
    progress = _Progress(
        evaluate=evaluate,
        upper_bound_s=problem.upper_bound_s,
        tolerance=(0.0 if small else 1e-3) if tolerance is None else tolerance,
        deadline_s=math.inf if deadline_s is None else begin + deadline_s,
        max_evaluations=(math.inf if small else 200) if max_evaluations is None else max_evaluations,
    )
    levels = levels_of(problem)
    if levels is not None and levels.relaxed:
        progress.bound_of = lambda stages: _relaxed_bound_s(levels, stages)
    bound_s = min(_search(levels, progress) if levels is not None else math.inf, progress.best_s)
    bound_s = min(bound_s, progress.least_evaluated_s)
    status: Status
    if progress.best is not None:
        status = "optimal" if bound_s >= progress.below_s else "feasible"
    else:
        status = "infeasible" if bound_s >= progress.below_s else "failed"
    return PipelineResult(
        best=progress.best,
        lower_bound_s=bound_s,
        status=status,
        num_evaluated=len(progress.known),
        seconds=time.monotonic() - begin,
    )


def is_small(problem: PipelineProblem) -> bool:
    """Whether a search is exact by default."""
    return problem.num_blocks * problem.num_devices * len(problem.submesh_sizes) <= SMALL_PROBLEM


def least_s(problem: PipelineProblem) -> float:
    """A bound on every pipeline that is quick to have: by the busiest stage and by the way through all of them; with a
    finite ``upper_bound_s`` also by what tails and heads below it can be, and at most that."""
    levels = levels_of(problem)
    if levels is None:
        return math.inf
    tail, head = level_free(levels)
    bound_s = float(max(tail[0, levels.num_devices], head[levels.num_blocks, 0]))
    if bound_s >= problem.upper_bound_s or math.isinf(problem.upper_bound_s):
        return bound_s
    return _narrowed(levels, tail, head, bound_s, problem.upper_bound_s)[0]


def _narrowed(
    levels: Levels, tail: Floats, head: Floats, bound_s: float, threshold_s: float
) -> tuple[float, Tree | None]:
    """The bound by tables of tails and heads made from each other, and what is left to explore; None if nothing is."""
    missing, tree = head, None
    for number in range(MAX_ROUNDS):
        band = make_band(tail, head, threshold_s)
        tails = tail_tables(levels, band, missing)
        whole = tails.total_s[:, 0, levels.num_devices]
        before_s, bound_s = bound_s, max(bound_s, min(float(whole.min()), threshold_s))
        if bound_s >= threshold_s:
            return bound_s, None
        levels = levels.first(int(np.flatnonzero(whole < threshold_s)[-1]))
        heads = head_tables(levels, band, tails)
        tree = Tree(levels, heads)
        if number > 0 and bound_s < before_s * 1.001:
            break
        missing = heads.trip_s
    return bound_s, tree


def _search(levels: Levels, progress: _Progress) -> float:
    """Evaluate until nothing better is open or a limit stops it; returns what no unevaluated pipeline is below."""
    tail, head = level_free(levels)
    bound_s = float(max(tail[0, levels.num_devices], head[levels.num_blocks, 0]))
    if bound_s >= progress.below_s or not math.isfinite(bound_s):
        return bound_s
    found = False
    for reach in REACHES:
        reach_s = min(bound_s * reach, progress.best_s)
        for stages in candidates(levels, make_band(tail, head, reach_s)):
            found = True
            progress.consider(stages)
            if progress.stopped:
                return bound_s
        if found or reach_s == progress.best_s:
            break
    if not found and math.isinf(progress.best_s):
        return math.inf  # the last reach left out nothing
    _climb(levels, progress)
    threshold_s = progress.below_s
    bound_s, tree = _narrowed(levels, tail, head, bound_s, threshold_s)
    if tree is None or progress.stopped:
        return bound_s
    return _explore(tree, bound_s, threshold_s, progress)


def _climb(levels: Levels, progress: _Progress) -> None:
    """Replace the best pipeline by a better neighbour while there is one and half of the evaluations are left."""
    climbing = progress.best is not None
    while climbing and progress.best is not None:
        best, climbing = progress.best, False
        for stages in neighbours(levels, best.stages):
            if progress.stopped or 2 * len(progress.known) >= progress.max_evaluations:
                return
            if levels.relaxed or _bound_s(levels, stages) < progress.below_s:
                progress.consider(stages)
                if progress.best is not best:
                    climbing = True
                    break


def _bound_s(levels: Levels, stages: tuple[Stage, ...]) -> float:
    """`lower_bound_s` of one whole pipeline."""
    times: list[StageTimes] = []
    behind, before = levels.num_devices, 0
    for s, (i, j, k) in zip(range(len(stages), 0, -1), stages, strict=True):
        times.append(
            StageTimes(
                forward_s=float(levels.forward_s[s, i, j, k]),
                backward_s=float(levels.backward_s[s, i, j, k]),
                step_s=float(levels.step_s[s, i, j, k]),
                send_forward_s=0.0,
                send_backward_s=float(levels.cut_s[before, i, behind]),
            )
        )
        behind, before = behind - levels.sizes[k], k
    return lower_bound_s(levels.schedule, times, levels.num_microbatches)


def _relaxed_bound_s(levels: Levels, stages: tuple[Stage, ...]) -> float:
    """What no way to run these stages is below, by the recursion of `bounds` on relaxed times."""
    assert levels.busy_s is not None
    trip = finish = total = np.zeros(())
    behind, after = 0, stages[-1][2]
    for s, (i, j, k) in enumerate(reversed(stages), 1):
        forward, backward = (values[s, i, j, k] for values in (levels.forward_s, levels.backward_s))
        cut = max(levels.cut_s[k, j, behind], levels.cut_s[after, j, behind])
        way = np.asarray(trip + cut)
        own = own_s(levels.schedule, levels.num_microbatches, np.array(s), forward, backward, way, True)
        finish = np.maximum(own, forward + backward + cut + finish)
        trip = way + forward + backward
        stepped = np.maximum(finish + levels.step_s[s, i, j, k], levels.busy_s[s, i, j, k])
        total = np.maximum(stepped, forward + total)
        behind, after = behind + levels.sizes[k], k
    return float(total)


def _explore(tree: Tree, least_s: float, threshold_s: float, progress: _Progress) -> float:
    """Evaluate what may be below the threshold, least bound first; returns the least bound left open."""
    empty = Tail(0, tree.levels.num_blocks, 0, 0.0, 0.0, 0.0, 0.0, 0.0, None, None)
    queue: list[tuple[float, int, Branches, int]] = []
    count = 0
    # Branches cut at the time that was best when they were made stay cut: that time only falls.
    first = tree.branches(empty, min(threshold_s, progress.best_s))
    if first is not None:
        queue.append((first.bound_s[0], count, first, 0))
    while queue:
        bound_s = max(queue[0][0], least_s)
        if bound_s >= progress.below_s or progress.stopped:
            return min(bound_s, threshold_s)
        _, _, branches, index = heapq.heappop(queue)
        progress.num_dives += 1
        while True:
            if index + 1 < len(branches.bound_s):
                count += 1
                heapq.heappush(queue, (branches.bound_s[index + 1], count, branches, index + 1))
            tail = branches.tail(index)
            if tail.block == 0:
                progress.consider(tail.stages())
                break
            following = tree.branches(tail, min(threshold_s, progress.best_s))
            if following is None:
                break
            branches, index = following, 0
    return threshold_s
