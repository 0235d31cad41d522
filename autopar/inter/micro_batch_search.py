"""The search of one micro-batch size: its pipelines of 1F1B or GPipe, and its interleaved ones."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from autopar.inter.branch_and_bound import is_small_problem, quick_lower_bound_s, search_pipelines
from autopar.inter.interleaved_search import InterleavedSearch
from autopar.inter.pipeline_candidate import PipelineCandidate
from autopar.inter.pipeline_problem import PipelineProblem, PipelineResult, StageTimeTable
from autopar.inter.stage_cost_tables import StageCostTables
from autopar.inter.stage_costs import StageCosts
from autopar.pipeline.schedule import Schedule

UPPER_BOUND_FACTORS = (1.25, 1.6, 2.5, 6.0, math.inf)
"""Where no step is known, steps are sought below these multiples of the bound without memory, one after the other."""
MAX_UNIFORM_EVALUATIONS = 200
"""Pipelines simulated at most in the first of the two searches of a micro-batch size."""
MAX_SMALL_EVALUATIONS = 1_000
"""The same of the second where the problem is small: many stages that the host's launches bind are near each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedPipeline:
    """The best pipeline of one micro-batch size, and its simulated step."""

    candidate: PipelineCandidate
    step_time_s: float


class MicroBatchSearch:
    """The search of one book; ``schedules`` that it may use. ``free_bound_s``: no pipeline is faster, memory aside;
    inf where none fits. ``guesses``: about what even pipelines take, or, where all are interleaved, bounds on them.
    ``found``: what was simulated and was the best of its search until then."""

    def __init__(
        self,
        stage_costs: StageCosts,
        submesh_sizes: tuple[int, ...],
        schedules: tuple[Schedule, ...],
        deadline_s: float,
    ) -> None:
        self.stage_costs, self.schedules, self.deadline_s = stage_costs, schedules, deadline_s
        self.submesh_sizes = tuple(size for size in submesh_sizes if stage_costs.frontiers.meshes(size))
        self.tables = StageCostTables(stage_costs, self.submesh_sizes)
        self.stage_boundary_s = stage_costs.transfers.stage_boundary_bounds_s(self.submesh_sizes)
        self.incumbents: list[SimulatedPipeline] = []
        self.guesses: list[tuple[float, PipelineCandidate]] = []
        free = self.tables.bounds_without_memory()
        self._flat_bound_s = np.inf  # of pipelines that are not interleaved
        if self._flat_schedule and self.tables.can_any_pipeline_fit(stage_costs.max_in_flight_from_last()):
            bound_s = quick_lower_bound_s(self._problem(lambda in_flight: free, np.inf))
            self._flat_bound_s = max(self.tables.work_lower_bound_s(), bound_s)
            self.guesses = [
                (seconds, self._flat_candidate(stages)) for seconds, stages in self.tables.guess_even_pipelines()
            ]
        self._interleaved_search = (
            InterleavedSearch(self.tables, self.stage_boundary_s) if "interleaved" in schedules else None
        )
        if self._interleaved_search is not None and self._flat_schedule is None:
            self.guesses = self._interleaved_search.bounded_candidates()
        self.unconstrained_bound_s = min(
            self._flat_bound_s,
            self._interleaved_search.unconstrained_bound_s if self._interleaved_search is not None else np.inf,
        )

    def simulate(self, candidate: PipelineCandidate) -> None:
        """Simulate one pipeline."""
        self._simulate_below(candidate, np.inf)

    def search(self, incumbent_s: float) -> float:
        """Find the best pipeline below ``known_s`` seconds; returns a bound on all of this size (at most
        ``known_s``)."""
        bound_s, below_s = self._best_flat(incumbent_s)
        if self._interleaved_search is not None:
            self.tables.set_cutoff(below_s)
            bound_s = min(bound_s, self._interleaved_search.search(below_s, self.deadline_s, self._simulate_below))
        return bound_s

    @property
    def _flat_schedule(self) -> Schedule | None:
        return next((schedule for schedule in self.schedules if schedule != "interleaved"), None)

    def _problem(self, stage_times: Callable[[int], StageTimeTable], cutoff_s: float) -> PipelineProblem:
        book = self.stage_costs
        return PipelineProblem(
            num_blocks=len(book.pricer.blocks),
            num_devices=book.num_devices,
            num_microbatches=book.num_microbatches,
            submesh_sizes=self.submesh_sizes,
            stage_times=stage_times,
            schedule=book.schedule,
            max_stages=book.max_stages,
            upper_bound_s=cutoff_s,
            stage_boundary_s=self.stage_boundary_s,
        )

    def _flat_candidate(self, stages: tuple[tuple[int, int, int], ...]) -> PipelineCandidate:
        """Stages (first block, last block + 1, devices), not interleaved."""
        return PipelineCandidate(stage_costs=self.stage_costs, stages=stages, schedule=self.stage_costs.schedule)

    def _simulate_below(self, candidate: PipelineCandidate, cutoff_s: float) -> float:
        """The step of a pipeline; inf where it does not fit, or where it is plain that it takes ``below_s`` or more."""
        runs = candidate.fastest_prices(cutoff_s)
        step_time_s = np.inf if runs is None else candidate.step_time_s(runs)
        if step_time_s < cutoff_s:
            self.incumbents.append(SimulatedPipeline(candidate=candidate, step_time_s=step_time_s))
        return step_time_s

    def _search_flat(
        self, stage_times: Callable[[int], StageTimeTable], cutoff_s: float, max_evaluations: int | None
    ) -> PipelineResult:
        best_s = cutoff_s

        def evaluate(stages: tuple[tuple[int, int, int], ...]) -> float:
            nonlocal best_s
            named = tuple((first, end, self.submesh_sizes[k]) for first, end, k in stages)
            step_time_s = self._simulate_below(self._flat_candidate(named), best_s)
            best_s = min(best_s, step_time_s)
            return step_time_s

        remaining = max(self.deadline_s - time.perf_counter(), 0.1)
        problem = self._problem(stage_times, cutoff_s)
        if max_evaluations is None and is_small_problem(problem):
            max_evaluations = MAX_SMALL_EVALUATIONS
        return search_pipelines(problem, evaluate=evaluate, deadline_s=remaining, max_evaluations=max_evaluations)

    def _best_flat(self, incumbent_s: float) -> tuple[float, float]:
        """A bound on pipelines that are not interleaved, and the best step: of one of them, or ``known_s``."""
        known = math.isfinite(incumbent_s)
        for below_s in [incumbent_s] if known else [reach * self._flat_bound_s for reach in UPPER_BOUND_FACTORS]:
            if self._flat_bound_s >= below_s:
                return incumbent_s, incumbent_s
            self.tables.set_cutoff(below_s)
            if quick_lower_bound_s(self._problem(self.tables.lower_bounds, below_s)) >= below_s:
                continue
            # First by times that are reached, which finds good pipelines; then by bounds, to prove or find better ones.
            even = self._search_flat(self.tables.uniform_times, below_s, MAX_UNIFORM_EVALUATIONS).incumbent
            target_s = even.step_time_s if even is not None else below_s
            result = self._search_flat(self.tables.lower_bounds, target_s, None)
            best = result.incumbent or even
            if best is not None:
                return min(result.lower_bound_s, best.step_time_s), best.step_time_s
            if below_s == incumbent_s:
                return min(result.lower_bound_s, incumbent_s), incumbent_s
        return incumbent_s, incumbent_s
