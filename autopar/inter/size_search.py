"""The search of one micro-batch size: its pipelines of 1F1B or GPipe, and its interleaved ones."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from autopar.inter.arrangement import Arrangement
from autopar.inter.interleaving import Interleaving
from autopar.inter.partition import is_small, least_s, search
from autopar.inter.pipelines import PipelineProblem, PipelineResult, StageTable
from autopar.inter.stage_tables import StageTables
from autopar.inter.stages import StageBook
from autopar.plan.schedule import Schedule

REACHES = (1.25, 1.6, 2.5, 6.0, math.inf)
"""Where nothing is known, steps are sought below these multiples of the bound without memory, one after the other, from
the first on that is above ``GUESS_REACH`` times the guess."""
GUESS_REACH = 1.1
EVEN_EVALUATIONS = 200
"""Pipelines simulated at most in the first of the two searches of a micro-batch size."""
SMALL_EVALUATIONS = 1_000
"""The same of the second where the problem is small: many stages that the host's launches bind are near each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The best pipeline of one micro-batch size, and its simulated step."""

    arrangement: Arrangement
    step_time_s: float


class SizeSearch:
    """The search of one book; ``schedules`` that it may use. ``free_bound_s``: no pipeline is faster, memory aside;
    inf where none fits. ``guess_s``: about what its best may take, inf where nothing says."""

    def __init__(
        self,
        book: StageBook,
        sizes: tuple[int, ...],
        schedules: tuple[Schedule, ...],
        deadline_s: float,
    ) -> None:
        self.book, self.schedules, self.deadline_s = book, schedules, deadline_s
        self.sizes = tuple(size for size in sizes if book.meshes(size))
        self.tables = StageTables(book, self.sizes)
        self.cuts_s = book.transfers.cut_bounds_s(self.sizes)
        free = self.tables.free()
        self._best_s = np.inf  # of the pipelines that the search at hand has evaluated
        self._straight_bound_s = np.inf  # of pipelines that are not interleaved
        if self._straight and self.tables.can_fit(book.held_at_most()):
            bound_s = least_s(self._problem(lambda in_flight: free, np.inf))
            self._straight_bound_s = max(self.tables.work_bound_s(), bound_s)
        self.guess_s = self.tables.guess_s() if math.isfinite(self._straight_bound_s) else np.inf
        self._interleaving = Interleaving(self.tables, self.cuts_s) if "interleaved" in schedules else None
        self.free_bound_s = min(
            self._straight_bound_s, self._interleaving.free_bound_s if self._interleaving is not None else np.inf
        )

    def run(self, known_s: float) -> tuple[Best | None, float]:
        """The best pipeline below ``known_s`` seconds, and a bound on all of this size (at most ``known_s``)."""
        best, bound_s = self._run_straight(known_s)
        if self._interleaving is not None:
            below_s = best.step_time_s if best is not None else known_s
            self.tables.ignore_from(below_s)
            found, least_open_s = self._interleaving.run(below_s, self.deadline_s)
            bound_s = min(bound_s, least_open_s)
            if found is not None:
                best = Best(arrangement=found[0], step_time_s=found[1])
        return best, bound_s

    @property
    def _straight(self) -> Schedule | None:
        return next((schedule for schedule in self.schedules if schedule != "interleaved"), None)

    def _problem(self, table: Callable[[int], StageTable], below_s: float) -> PipelineProblem:
        book = self.book
        return PipelineProblem(
            num_blocks=len(book.blocks.blocks),
            num_devices=book.gpus,
            num_microbatches=book.num_microbatches,
            submesh_sizes=self.sizes,
            stage_times=table,
            schedule=book.schedule,
            max_stages=book.max_stages,
            upper_bound_s=below_s,
            cut_transfer_s=self.cuts_s,
        )

    def _arranged(self, stages: tuple[tuple[int, int, int], ...]) -> Arrangement:
        named = tuple((first, end, self.sizes[k]) for first, end, k in stages)
        return Arrangement(book=self.book, stages=named, schedule=self.book.schedule)

    def _evaluate(self, stages: tuple[tuple[int, int, int], ...]) -> float:
        """The step of a pipeline; inf where none fits, or where it is plain that others were faster."""
        arrangement = self._arranged(stages)
        runs = arrangement.finished(self._best_s)
        step_time_s = np.inf if runs is None else arrangement.step_time_s(runs)
        self._best_s = min(self._best_s, step_time_s)
        return step_time_s

    def _search(self, table: Callable[[int], StageTable], below_s: float, evaluations: int | None) -> PipelineResult:
        remaining = max(self.deadline_s - time.perf_counter(), 0.1)
        problem, self._best_s = self._problem(table, below_s), below_s
        if evaluations is None and is_small(problem):
            evaluations = SMALL_EVALUATIONS
        return search(problem, evaluate=self._evaluate, deadline_s=remaining, max_evaluations=evaluations)

    def _reaches_s(self, known_s: float) -> list[float]:
        """Below what steps are sought, one after the other."""
        if math.isfinite(known_s):
            return [known_s]
        reaches_s = [reach * self._straight_bound_s for reach in REACHES]
        start_s = GUESS_REACH * self.guess_s
        if not self._straight_bound_s < start_s < math.inf:
            return reaches_s
        return [start_s, *(reach_s for reach_s in reaches_s if reach_s > start_s)]

    def _run_straight(self, known_s: float) -> tuple[Best | None, float]:
        for below_s in self._reaches_s(known_s):
            if self._straight_bound_s >= below_s:
                return None, known_s
            self.tables.ignore_from(below_s)
            if least_s(self._problem(self.tables.bounding, below_s)) >= below_s:
                if below_s == known_s:
                    return None, known_s
                continue
            # First by times that are reached, which finds good pipelines; then by bounds, to prove or find better ones.
            even = self._search(self.tables.even, below_s, EVEN_EVALUATIONS).best
            target_s = even.step_time_s if even is not None else below_s
            result = self._search(self.tables.bounding, target_s, None)
            best = result.best or even
            if best is not None:
                bound_s = min(result.lower_bound_s, best.step_time_s)
                return Best(arrangement=self._arranged(best.stages), step_time_s=best.step_time_s), bound_s
            if below_s == known_s:
                break
        return None, min(result.lower_bound_s, known_s)
