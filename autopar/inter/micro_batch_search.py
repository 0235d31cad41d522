"""The search of one micro-batch size: pipelines of 1F1B or GPipe (here "flat"), and interleaved ones."""

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
from autopar.inter.stage_span import DeviceStage, SubmeshStage
from autopar.pipeline.schedule import Schedule

UPPER_BOUND_FACTORS = (1.25, 1.6, 2.5, 6.0, math.inf)
"""Without an incumbent, the search looks for steps below these multiples of the bound that ignores memory, one multiple
after the other until a pipeline is found."""
MAX_UNIFORM_EVALUATIONS = 200
"""The most pipelines that the first of the two searches, by the times of uniform choices, simulates."""
MAX_SMALL_EVALUATIONS = 1_000
"""The most pipelines that the second search, by lower bounds, simulates where the problem is small: where kernel launches
take longer than compute, many pipelines have nearly equal steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedPipeline:
    """A pipeline that was an incumbent of its search, and its simulated step in seconds."""

    candidate: PipelineCandidate
    step_time_s: float


class MicroBatchSearch:
    """The search of one micro-batch size with the given schedules.

    ``unconstrained_bound_s`` is a lower bound on all steps that ignores memory, inf where no pipeline fits;
    ``guesses`` are (estimated step in seconds, pipeline) of even pipelines; where only interleaved pipelines are searched,
    (lower bound in seconds, pipeline) of those; ``incumbents`` are the pipelines that were the best of their search when they were simulated.
    ``deadline_s`` is on the clock of ``time.perf_counter``.
    """

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
        unconstrained = self.tables.bounds_without_memory()
        self._flat_bound_s = np.inf
        if self._flat_schedule and self.tables.can_any_pipeline_fit(stage_costs.max_in_flight_from_last()):
            bound_s = quick_lower_bound_s(self._problem(lambda in_flight: unconstrained, np.inf))
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
        """Simulate one pipeline, and add it to ``incumbents`` where it fits."""
        self._simulate_below(candidate, np.inf)

    def search(self, incumbent_s: float) -> float:
        """Find the best pipeline below ``incumbent_s``; returns a lower bound in seconds on all pipelines of this size,
        at most ``incumbent_s``."""
        bound_s, below_s = self._best_flat(incumbent_s)
        if self._interleaved_search is not None:
            self.tables.set_cutoff(below_s)
            bound_s = min(bound_s, self._interleaved_search.search(below_s, self.deadline_s, self._simulate_below))
        return bound_s

    @property
    def _flat_schedule(self) -> Schedule | None:
        """The schedule of flat pipelines; None where only interleaved ones are searched."""
        return next((schedule for schedule in self.schedules if schedule != "interleaved"), None)

    def _problem(self, stage_times: Callable[[int], StageTimeTable], cutoff_s: float) -> PipelineProblem:
        """The flat pipelines below ``cutoff_s`` as a problem of the outer search."""
        costs = self.stage_costs
        return PipelineProblem(
            num_blocks=len(costs.pricer.blocks),
            num_devices=costs.num_devices,
            num_microbatches=costs.num_microbatches,
            submesh_sizes=self.submesh_sizes,
            stage_times=stage_times,
            schedule=costs.schedule,
            max_stages=costs.max_stages,
            upper_bound_s=cutoff_s,
            stage_boundary_s=self.stage_boundary_s,
        )

    def _flat_candidate(self, stages: tuple[DeviceStage, ...]) -> PipelineCandidate:
        """The pipeline of these stages that is not interleaved."""
        return PipelineCandidate(stage_costs=self.stage_costs, stages=stages, schedule=self.stage_costs.schedule)

    def _simulate_below(self, candidate: PipelineCandidate, cutoff_s: float) -> float:
        """The simulated step of a pipeline in seconds; inf where it does not fit, or where one submesh alone works for
        ``cutoff_s`` or more."""
        prices = candidate.fastest_prices(cutoff_s)
        step_time_s = np.inf if prices is None else candidate.step_time_s(prices)
        if step_time_s < cutoff_s:
            self.incumbents.append(SimulatedPipeline(candidate=candidate, step_time_s=step_time_s))
        return step_time_s

    def _search_flat(
        self, stage_times: Callable[[int], StageTimeTable], cutoff_s: float, max_evaluations: int | None
    ) -> PipelineResult:
        """The branch and bound by some stage times, with simulated steps, below ``cutoff_s``."""
        best_s = cutoff_s

        def evaluate(stages: tuple[SubmeshStage, ...]) -> float:
            nonlocal best_s
            on_devices = tuple(DeviceStage(first, end, self.submesh_sizes[k]) for first, end, k in stages)
            step_time_s = self._simulate_below(self._flat_candidate(on_devices), best_s)
            best_s = min(best_s, step_time_s)
            return step_time_s

        remaining = max(self.deadline_s - time.perf_counter(), 0.1)
        problem = self._problem(stage_times, cutoff_s)
        if max_evaluations is None and is_small_problem(problem):
            max_evaluations = MAX_SMALL_EVALUATIONS
        return search_pipelines(problem, evaluate=evaluate, deadline_s=remaining, max_evaluations=max_evaluations)

    def _best_flat(self, incumbent_s: float) -> tuple[float, float]:
        """(lower bound on flat pipelines, best step) in seconds; the step is of a flat pipeline or ``incumbent_s``."""
        factors_s = [factor * self._flat_bound_s for factor in UPPER_BOUND_FACTORS]
        for below_s in [incumbent_s] if math.isfinite(incumbent_s) else factors_s:
            if self._flat_bound_s >= below_s:
                return incumbent_s, incumbent_s
            self.tables.set_cutoff(below_s)
            if quick_lower_bound_s(self._problem(self.tables.lower_bounds, below_s)) >= below_s:
                continue
            # First with stage times that some choice really reaches, to find good pipelines; then with lower bounds, to
            # find better ones or prove that there are none.
            attained = self._search_flat(self.tables.uniform_times, below_s, MAX_UNIFORM_EVALUATIONS).incumbent
            target_s = attained.step_time_s if attained is not None else below_s
            result = self._search_flat(self.tables.lower_bounds, target_s, None)
            best = result.incumbent or attained
            if best is not None:
                return min(result.lower_bound_s, best.step_time_s), best.step_time_s
            if below_s == incumbent_s:
                return min(result.lower_bound_s, incumbent_s), incumbent_s
        return incumbent_s, incumbent_s
