"""The outer search: which blocks form a stage, on which submesh, so that the simulated step is the shortest.

Pipelines are built from the last stage backwards, so a stage's place, and with it the micro-batches it holds, is known
when it is added. A tail carries the M, W and R of `bounds`; with the head tables of `completion` they bound every whole
pipeline the tail can become (`_Tree.branches`). Best first, the tail with the least bound is completed greedily (a
dive), which leaves its untaken branches in the queue; whole pipelines are evaluated. When the least bound left open is
not below the best evaluated time, that pipeline is optimal.

First come good pipelines by Alpa's recurrence (`candidates`) and their neighbours (`_climb`). The tables then speak
only of steps below the best time, and are made a few times over: what the heads rule out makes the next tails, and so
the bounds, tighter.
"""

import heapq
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from autopar.inter.bounds import lower_bound_s, max_in_flight, own_s
from autopar.inter.candidates import Stage, candidates, neighbours
from autopar.inter.completion import (
    Heads,
    Levels,
    head_tables,
    level_free,
    make_band,
    make_levels,
    tail_tables,
)
from autopar.inter.simulate import StageTimes
from autopar.intra.problem import Status
from autopar.plan.errors import UsageError
from autopar.plan.schedule import Schedule

Floats = NDArray[np.float64]
SMALL_PROBLEM = 2_000
"""Blocks x devices x classes up to which the default is an exact search without a cap."""
REACHES = (1.3, 4.0, math.inf)
"""The first candidates are sought below these multiples of the first bound, one after the other."""
MAX_ROUNDS = 4
"""How often tail and head tables are made from each other at most, while that lifts the bound by 0.1 %."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageTable:
    """Seconds of every possible stage: each (L + 1, L + 1, K), [i, j, k] = blocks i..j-1 on submesh class k, per
    micro-batch (``step_s``: once per step, exposed); ``numpy.inf`` where it does not fit or is not allowed.

    With ``busy_s`` the times are *relaxed*: bounds over many ways to run the stage, each reached by another of them, of
    the forward, of forward + backward, of the step, and (``busy_s``) of all micro-batches and the step together.
    """

    forward_s: Floats
    backward_s: Floats
    step_s: Floats
    busy_s: Floats | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PipelineProblem:
    """Cut ``num_blocks`` blocks into stages whose submeshes take up all of ``num_devices`` devices.

    ``submesh_sizes[k]`` is the number of devices of class k (several classes may have one size);
    ``stage_times(in_flight)`` the times of stages that hold the saved tensors of ``in_flight`` micro-batches, called
    once for each value. ``cut_transfer_s`` (L + 1,) or (K, L + 1, D + 1), default 0, is the least time a micro-batch's
    activation and gradient together take across the cut before block i (next to a stage of class k, with d devices
    behind). Steps of ``upper_bound_s`` or longer are of no interest.
    """

    num_blocks: int
    num_devices: int
    num_microbatches: int
    submesh_sizes: tuple[int, ...]
    stage_times: Callable[[int], StageTable]
    schedule: Schedule = "1f1b"
    max_stages: int | None = None
    upper_bound_s: float = math.inf
    cut_transfer_s: Floats | None = None

    def __post_init__(self) -> None:
        if self.schedule not in ("1f1b", "gpipe"):
            raise UsageError(f"the stage search knows the schedules 1f1b and gpipe, not {self.schedule!r}")
        if min(self.num_blocks, self.num_devices, self.num_microbatches, *self.submesh_sizes) < 1:
            raise UsageError(
                f"a pipeline needs blocks, devices, micro-batches and submesh sizes of at least 1, not "
                f"{self.num_blocks}, {self.num_devices}, {self.num_microbatches}, {self.submesh_sizes}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """Stages (first block, last block + 1, submesh class), first to last, and their evaluated step time."""

    stages: tuple[Stage, ...]
    step_time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineResult:
    """``status``: "optimal" = nothing is better than ``best`` by more than the tolerance; "feasible" = stopped by a
    limit, or the times are relaxed and the bound of an evaluated pipeline is below its time; "infeasible" = no pipeline
    is below the problem's upper bound by more than the tolerance; "failed" = a limit came before any pipeline. No
    pipeline at all is below ``lower_bound_s``."""

    best: Pipeline | None
    lower_bound_s: float
    status: Status
    num_evaluated: int
    seconds: float

    @property
    def gap(self) -> float:
        """Relative distance of the best step time from the bound; infinite without a pipeline."""
        if self.best is None:
            return math.inf
        return max(0.0, 1.0 - self.lower_bound_s / self.best.step_time_s) if self.best.step_time_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class _Tail:
    """The last stages of a pipeline and the values of `bounds` that they hand on."""

    num_stages: int
    block: int
    devices: int
    trip_s: float
    finish_s: float
    total_s: float
    slowest_forward_s: float
    slowest_backward_s: float
    stage: Stage | None
    later: "_Tail | None"

    def stages(self) -> tuple[Stage, ...]:
        found, tail = [], self
        while tail.stage is not None and tail.later is not None:
            found.append(tail.stage)
            tail = tail.later
        return tuple(found)


@dataclass(frozen=True, slots=True)
class _Branches:
    """All tails that are ``later`` and one stage more, by rising ``bound_s``; columns of arrays, made when asked."""

    later: _Tail
    bound_s: list[float]
    start: list[int]
    size: list[int]
    submesh: list[int]
    values: Floats  # (branches, 5): trip_s, finish_s, total_s, slowest_forward_s, slowest_backward_s

    def tail(self, index: int) -> _Tail:
        start, later = self.start[index], self.later
        trip_s, finish_s, total_s, slowest_forward_s, slowest_backward_s = self.values[index].tolist()
        return _Tail(
            num_stages=later.num_stages + 1,
            block=start,
            devices=later.devices + self.size[index],
            trip_s=trip_s,
            finish_s=finish_s,
            total_s=total_s,
            slowest_forward_s=slowest_forward_s,
            slowest_backward_s=slowest_backward_s,
            stage=(start, later.block, self.submesh[index]),
            later=later,
        )


@dataclass(frozen=True, slots=True)
class _Tree:
    """How a tail branches."""

    levels: Levels
    heads: Heads

    def branches(self, tail: _Tail, below_s: float) -> _Branches | None:
        """Every tail of one stage more that can become a pipeline with a bound below ``below_s``; None if none can."""
        levels, heads, place, end = self.levels, self.heads, tail.num_stages + 1, tail.block
        if place > levels.num_stages:
            return None
        sizes = np.array(levels.sizes)
        devices = np.minimum(tail.devices + sizes, levels.num_devices)
        at = (place, np.arange(end)[:, None], devices)
        B = levels.num_microbatches
        forward, backward = levels.forward_s[place, :end, end], levels.backward_s[place, :end, end]
        step = levels.step_s[place, :end, end]
        time_s = forward + backward
        head_trip = heads.trip_s[at]
        fits = np.isfinite(time_s) & np.isfinite(head_trip) & (tail.devices + sizes <= levels.num_devices)
        rows, classes = np.nonzero(fits)
        if not len(rows):
            return None
        forward, backward, step, time_s = forward[fits], backward[fits], step[fits], time_s[fits]
        cut = levels.cut_s[classes, end, tail.devices]
        if tail.stage is not None:
            cut = np.maximum(cut, levels.cut_s[tail.stage[2], end, tail.devices])
        way = tail.trip_s + cut
        own = own_s(levels.schedule, B, np.array(place), forward, backward, way, levels.relaxed)
        finish = np.maximum(own, time_s + (cut + tail.finish_s))
        trip = time_s + (cut + tail.trip_s)
        slow_f, slow_b = np.maximum(forward, tail.slowest_forward_s), np.maximum(backward, tail.slowest_backward_s)
        if levels.schedule == "gpipe" and not levels.relaxed:
            finish = np.maximum(finish, trip + (B - 1) * (slow_f + slow_b))
        stepped = finish + step
        if levels.busy_s is not None:
            stepped = np.maximum(stepped, levels.busy_s[place, :end, end][fits])
        total = np.maximum(stepped, forward + tail.total_s)
        bound = np.maximum(np.maximum(finish + head_trip[fits], total + heads.down_s[at][fits]), heads.step_s[at][fits])
        order = np.argsort(bound, kind="stable")
        order = order[: int(np.searchsorted(bound[order], below_s))]
        if not len(order):
            return None
        values = np.stack([trip, finish, total, slow_f, slow_b], axis=1)[order]
        classes = classes[order]
        return _Branches(
            tail, bound[order].tolist(), rows[order].tolist(), sizes[classes].tolist(), classes.tolist(), values
        )


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
    small = problem.num_blocks * problem.num_devices * len(problem.submesh_sizes) <= SMALL_PROBLEM
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
) -> tuple[float, _Tree | None]:
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
        tree = _Tree(levels, heads)
        if number > 0 and bound_s < before_s * 1.001:
            break
        missing = heads.trip_s
    return bound_s, tree


def levels_of(problem: PipelineProblem) -> Levels | None:
    """The problem's arrays; None where no number of its submeshes makes up all devices with a stage each."""
    unit = math.gcd(*problem.submesh_sizes)
    if problem.num_devices % unit:
        return None
    num_stages = min(problem.num_blocks, problem.num_devices // min(problem.submesh_sizes))
    num_stages = num_stages if problem.max_stages is None else min(num_stages, problem.max_stages)
    if num_stages < 1:
        return None
    held = [max_in_flight(problem.schedule, problem.num_microbatches, place) for place in range(1, num_stages + 1)]
    tables = {count: problem.stage_times(count) for count in sorted(set(held))}
    cut_s = np.zeros((len(problem.submesh_sizes), problem.num_blocks + 1, problem.num_devices // unit + 1))
    if problem.cut_transfer_s is not None:
        least = problem.cut_transfer_s
        cut_s[:, 1:-1] = least[1:-1, None] if least.ndim == 1 else least[:, 1:-1, ::unit]
    return make_levels(
        schedule=problem.schedule,
        num_microbatches=problem.num_microbatches,
        sizes=tuple(size // unit for size in problem.submesh_sizes),
        num_devices=problem.num_devices // unit,
        cut_s=cut_s,
        tables=[(tables[c].forward_s, tables[c].backward_s, tables[c].step_s) for c in held],
        busy_s=busy_of([tables[c] for c in held]),
    )


def busy_of(tables: Sequence[StageTable]) -> list[Floats] | None:
    """``busy_s`` of all tables; None when the times are exact."""
    found = [table.busy_s for table in tables if table.busy_s is not None]
    assert len(found) in (0, len(tables)), "either all stage tables are relaxed or none"
    return found or None


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


def _explore(tree: _Tree, least_s: float, threshold_s: float, progress: _Progress) -> float:
    """Evaluate what may be below the threshold, least bound first; returns the least bound left open."""
    empty = _Tail(0, tree.levels.num_blocks, 0, 0.0, 0.0, 0.0, 0.0, 0.0, None, None)
    queue: list[tuple[float, int, _Branches, int]] = []
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
