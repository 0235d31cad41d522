"""The search over all micro-batch sizes: which size is searched next, what was found, and the bound on what was not."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from autopar.inter.micro_batch_search import SimulatedPipeline
from autopar.inter.parallel_search import NUM_WORKERS, OpenMicroBatch, ParallelSearch
from autopar.inter.stage_costs import StageCosts

Progress = Callable[[str, str, float | None, float | None], None]
"""Called with (phase of the planning, detail, seconds of the best step so far, gap); the last two are None while unknown."""
NUM_SIMULATED_GUESSES = 4
"""Pipelines, of all micro-batch sizes together, that are simulated before any size is searched."""


@dataclass(slots=True, kw_only=True)
class SearchProgress:
    """The pipelines found so far in all micro-batch sizes. No pipeline that was not simulated takes less than
    ``lower_bound_s`` seconds, once ``search`` has returned."""

    report: Progress
    num_sizes: int
    num_opened: int = 0
    simulated: list[SimulatedPipeline] = field(default_factory=list)
    lower_bound_s: float = math.inf

    @property
    def by_step_time(self) -> list[SimulatedPipeline]:
        """All that was found, the fastest first."""
        return sorted(self.simulated, key=lambda pipeline: pipeline.step_time_s)

    @property
    def incumbent_s(self) -> float:
        """Seconds of the fastest step; inf while there is none."""
        return min((pipeline.step_time_s for pipeline in self.simulated), default=math.inf)

    def on_opened(self, stage_costs: StageCosts) -> None:
        """Report that the cost tables of a micro-batch size have been made."""
        self.num_opened += 1
        self.report(
            "tables", f"micro-batch {stage_costs.micro_batch}, {self.num_opened} of {self.num_sizes}", None, None
        )

    def on_worker_lost(self, exit_code: int) -> None:
        """Report that the worker process ended early."""
        self.report(
            "search",
            f"the worker process ended early (exit code {exit_code}); its share is searched again in this process",
            None,
            None,
        )

    def search(self, searches: ParallelSearch, deadline_s: float) -> None:
        """Search all micro-batch sizes in the order of their guesses, the fastest first. Past the deadline (on the
        clock of ``time.perf_counter``) no search begins if there is a pipeline; sizes whose tables were not made in time
        leave a lower bound of 0."""
        opened = searches.open()
        if len(opened) < self.num_sizes:
            self.lower_bound_s = 0.0
        pending = [size for size in opened if math.isfinite(size.unconstrained_bound_s)]
        pending.sort(key=lambda size: (min(size.guesses_s, default=math.inf), size.unconstrained_bound_s))
        count = len(pending)
        guesses = [(seconds, size, index) for size in pending for index, seconds in enumerate(size.guesses_s)]
        guesses.sort(key=lambda guess: guess[0])
        self.simulated += searches.simulate([(size, index) for _, size, index in guesses[:NUM_SIMULATED_GUESSES]])
        while pending:
            incumbent_s = self.incumbent_s
            if math.isfinite(incumbent_s) and time.perf_counter() > deadline_s:
                self.lower_bound_s = min(self.lower_bound_s, *(size.unconstrained_bound_s for size in pending))
                return
            pruned = [size for size in pending if size.unconstrained_bound_s >= incumbent_s]
            pending = [size for size in pending if size.unconstrained_bound_s < incumbent_s]
            next_of_worker = [
                next((size for size in pending if size.worker == worker), None) for worker in range(NUM_WORKERS)
            ]
            searched = [size for size in next_of_worker if size is not None]
            if searched:
                bound_s, found = searches.search(searched, incumbent_s)
                self.lower_bound_s = min(self.lower_bound_s, bound_s)
                self.simulated += found
            pending = [size for size in pending if size not in searched]
            self._report_progress([*searched, *pruned], pending, count)

    def _report_progress(self, searched: list[OpenMicroBatch], pending: list[OpenMicroBatch], count: int) -> None:
        """Report the sizes done in this round, the best step, and the gap to the bound on all sizes."""
        best_s = self.incumbent_s if self.simulated else None
        open_s = min([self.lower_bound_s, *(size.unconstrained_bound_s for size in pending)])
        gap = None if best_s is None else max(0.0, 1 - open_s / best_s)
        names = " and ".join(str(size.micro_batch) for size in searched)
        self.report("search", f"micro-batch {names}, {count - len(pending)} of {count}", best_s, gap)
