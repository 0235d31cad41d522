"""The search of one micro-batch size: its pipelines of 1F1B or GPipe, and its interleaved ones."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from autopar.inter.branch_and_bound import is_small, least_s, search
from autopar.inter.interleaved_search import Interleaving
from autopar.inter.pipeline_candidate import Arrangement
from autopar.inter.pipeline_problem import PipelineProblem, PipelineResult, StageTable
from autopar.inter.stage_cost_tables import StageTables
from autopar.inter.stage_costs import StageBook
from autopar.pipeline.schedule import Schedule

REACHES = (1.25, 1.6, 2.5, 6.0, math.inf)
"""Where no step is known, steps are sought below these multiples of the bound without memory, one after the other."""
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
    inf where none fits. ``guesses``: about what even pipelines take, or, where all are interleaved, bounds on them.
    ``found``: what was simulated and was the best of its search until then."""

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
        self.found: list[Best] = []
        self.guesses: list[tuple[float, Arrangement]] = []
        free = self.tables.free()
        self._straight_bound_s = np.inf  # of pipelines that are not interleaved
        if self._straight and self.tables.can_fit(book.held_at_most()):
            bound_s = least_s(self._problem(lambda in_flight: free, np.inf))
            self._straight_bound_s = max(self.tables.work_bound_s(), bound_s)
            self.guesses = [(seconds, self._arranged(stages)) for seconds, stages in self.tables.guesses()]
        self._interleaving = Interleaving(self.tables, self.cuts_s) if "interleaved" in schedules else None
        if self._interleaving is not None and self._straight is None:
            self.guesses = self._interleaving.bounded()
        self.free_bound_s = min(
            self._straight_bound_s, self._interleaving.free_bound_s if self._interleaving is not None else np.inf
        )

    def try_pipeline(self, arrangement: Arrangement) -> None:
        """Simulate one pipeline."""
        self._simulate(arrangement, np.inf)

    def run(self, known_s: float) -> float:
        """Find the best pipeline below ``known_s`` seconds; returns a bound on all of this size (at most
        ``known_s``)."""
        bound_s, below_s = self._run_straight(known_s)
        if self._interleaving is not None:
            self.tables.ignore_from(below_s)
            bound_s = min(bound_s, self._interleaving.run(below_s, self.deadline_s, self._simulate))
        return bound_s

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
        """Stages (first block, last block + 1, devices), not interleaved."""
        return Arrangement(book=self.book, stages=stages, schedule=self.book.schedule)

    def _simulate(self, arrangement: Arrangement, below_s: float) -> float:
        """The step of a pipeline; inf where it does not fit, or where it is plain that it takes ``below_s`` or more."""
        runs = arrangement.finished(below_s)
        step_time_s = np.inf if runs is None else arrangement.step_time_s(runs)
        if step_time_s < below_s:
            self.found.append(Best(arrangement=arrangement, step_time_s=step_time_s))
        return step_time_s

    def _search(self, table: Callable[[int], StageTable], below_s: float, evaluations: int | None) -> PipelineResult:
        best_s = below_s

        def evaluate(stages: tuple[tuple[int, int, int], ...]) -> float:
            nonlocal best_s
            named = tuple((first, end, self.sizes[k]) for first, end, k in stages)
            step_time_s = self._simulate(self._arranged(named), best_s)
            best_s = min(best_s, step_time_s)
            return step_time_s

        remaining = max(self.deadline_s - time.perf_counter(), 0.1)
        problem = self._problem(table, below_s)
        if evaluations is None and is_small(problem):
            evaluations = SMALL_EVALUATIONS
        return search(problem, evaluate=evaluate, deadline_s=remaining, max_evaluations=evaluations)

    def _run_straight(self, known_s: float) -> tuple[float, float]:
        """A bound on pipelines that are not interleaved, and the best step: of one of them, or ``known_s``."""
        known = math.isfinite(known_s)
        for below_s in [known_s] if known else [reach * self._straight_bound_s for reach in REACHES]:
            if self._straight_bound_s >= below_s:
                return known_s, known_s
            self.tables.ignore_from(below_s)
            if least_s(self._problem(self.tables.bounding, below_s)) >= below_s:
                continue
            # First by times that are reached, which finds good pipelines; then by bounds, to prove or find better ones.
            even = self._search(self.tables.even, below_s, EVEN_EVALUATIONS).best
            target_s = even.step_time_s if even is not None else below_s
            result = self._search(self.tables.bounding, target_s, None)
            best = result.best or even
            if best is not None:
                return min(result.lower_bound_s, best.step_time_s), best.step_time_s
            if below_s == known_s:
                return min(result.lower_bound_s, known_s), known_s
        return known_s, known_s
