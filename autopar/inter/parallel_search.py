"""Searches the micro-batch sizes of a plan in two workers, of which a long search runs the second in another process.

A worker opens its sizes (makes their cost tables without a memory limit), simulates promising pipelines and searches one
size after the other. In every round each worker searches one size and gets the incumbent of the rounds before, so the
result does not depend on where a worker runs.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from autopar.inter.micro_batch_search import MicroBatchSearch, SimulatedPipeline
from autopar.inter.pipeline_candidate import PipelineCandidate
from autopar.inter.stage_costs import StageCosts
from autopar.inter.stage_span import DeviceStage
from autopar.inter.worker_process import InProcessRunner, MethodRunner, WorkerProcess, can_use_worker_process
from autopar.pipeline.schedule import Schedule

NUM_WORKERS = 2
"""Workers that share the micro-batch sizes."""
MIN_PARALLEL_WORK = 2_500
"""Ops of distinct blocks x meshes x micro-batch sizes from which on a worker process is used. It takes half a second to
start; GPTs of 2,700 plan in 6.4 and 9.1 s with one process, in 5.8 and 7.5 s with two (2 cores, 2026-11-22)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenMicroBatch:
    """A micro-batch size that is open, number ``index`` of a worker; ``unconstrained_bound_s`` and the seconds of the
    guesses are those of its `MicroBatchSearch`."""

    worker: int
    index: int
    micro_batch: int
    unconstrained_bound_s: float
    guesses_s: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundPipeline:
    """A pipeline of the micro-batch size number ``index`` of a worker, and its simulated step: what is sent back from a
    worker process."""

    index: int
    stages: tuple[DeviceStage, ...]
    schedule: Schedule
    num_chunks: int
    step_time_s: float


class SearchWorker:
    """The searches of some micro-batch sizes. None begins after ``deadline_s`` on the clock of ``time.perf_counter``,
    which all processes share; ``on_opened`` is called with the costs of each size that is opened."""

    def __init__(
        self,
        worker: int,
        stage_costs_by_size: Sequence[StageCosts],
        submesh_sizes: tuple[int, ...],
        schedules: tuple[Schedule, ...],
        deadline_s: float,
        *,
        on_opened: Callable[[StageCosts], None] | None = None,
    ) -> None:
        self._worker, self._stage_costs_by_size = worker, stage_costs_by_size
        self._submesh_sizes, self._schedules, self._deadline_s = submesh_sizes, schedules, deadline_s
        self._searches: list[MicroBatchSearch] = []
        self._searched: list[int] = []
        self._on_opened = on_opened

    def open(self) -> list[OpenMicroBatch]:
        """Open every size; past the deadline, only until one has a pipeline. Returns all that are open."""
        for costs in self._stage_costs_by_size:
            has_pipeline = any(math.isfinite(search.unconstrained_bound_s) for search in self._searches)
            if has_pipeline and time.perf_counter() > self._deadline_s:
                break
            opened = MicroBatchSearch(costs, self._submesh_sizes, self._schedules, self._deadline_s)
            self._searches.append(opened)
            if not math.isfinite(opened.unconstrained_bound_s):
                opened.tables.release()
            if self._on_opened is not None:
                self._on_opened(costs)
        return [
            OpenMicroBatch(
                worker=self._worker,
                index=index,
                micro_batch=search.stage_costs.micro_batch,
                unconstrained_bound_s=search.unconstrained_bound_s,
                guesses_s=tuple(seconds for seconds, _ in search.guesses),
            )
            for index, search in enumerate(self._searches)
        ]

    def simulate(self, guesses: Sequence[tuple[int, int]]) -> list[FoundPipeline]:
        """Simulate guesses, (number of the size, number of its guess) each; returns those that fit."""
        num_known = [len(search.incumbents) for search in self._searches]
        for index, guess in guesses:
            self._searches[index].simulate(self._searches[index].guesses[guess][1])
        return [found for index, count in enumerate(num_known) for found in self._found_since(index, count)]

    def search(self, index: int, incumbent_s: float) -> tuple[float, list[FoundPipeline]]:
        """(the bound of `MicroBatchSearch.search`, what it found). Of the sizes searched so far, all but the one with
        the best pipeline give back the memory of their tables."""
        num_known = len(self._searches[index].incumbents)
        bound_s = self._searches[index].search(incumbent_s)
        self._searched.append(index)
        steps = [
            (incumbent.step_time_s, number)
            for number, search in enumerate(self._searches)
            for incumbent in search.incumbents
        ]
        _, best = min(steps, default=(math.inf, -1))
        for number in self._searched:
            if number != best:
                self._searches[number].tables.release()
        return bound_s, self._found_since(index, num_known)

    def _found_since(self, index: int, num_known: int) -> list[FoundPipeline]:
        """The incumbents of a size but the first ``num_known``."""
        return [
            FoundPipeline(
                index=index,
                stages=incumbent.candidate.stages,
                schedule=incumbent.candidate.schedule,
                num_chunks=incumbent.candidate.num_chunks,
                step_time_s=incumbent.step_time_s,
            )
            for incumbent in self._searches[index].incumbents[num_known:]
        ]


class ParallelSearch:
    """All workers. ``on_opened`` is called with the costs of each size that this process opens, ``on_lost`` with the
    exit code of a worker process that ended early; where ``num_processes`` is 1 there is no worker process.
    ``deadline_s`` is on the clock of ``time.perf_counter``."""

    def __init__(
        self,
        stage_costs_by_size: Sequence[StageCosts],
        submesh_sizes: tuple[int, ...],
        schedules: tuple[Schedule, ...],
        deadline_s: float,
        *,
        num_processes: int,
        on_opened: Callable[[StageCosts], None],
        on_lost: Callable[[int], None],
    ) -> None:
        # 0 1 1 0 0 1 1 ...: neighbours, whose searches take about as long, go to different workers, and each worker is the
        # first of a pair in turn.
        self._stage_costs_by_worker = [
            [costs for index, costs in enumerate(stage_costs_by_size) if (index + 1) // 2 % NUM_WORKERS == worker]
            for worker in range(NUM_WORKERS)
        ]
        use_process = (
            _pricing_work(stage_costs_by_size, submesh_sizes) > MIN_PARALLEL_WORK
            and num_processes > 1
            and can_use_worker_process()
        )
        if use_process:  # sharding rules ask torch about ops: with all spaces made, the worker process need not load it
            for pricer in {id(costs.pricer): costs.pricer for costs in stage_costs_by_size}.values():
                pricer.make_all_spaces()
        workers = [
            SearchWorker(
                number,
                part,
                submesh_sizes,
                schedules,
                deadline_s,
                on_opened=on_opened if number == 0 or not use_process else None,
            )
            for number, part in enumerate(self._stage_costs_by_worker)
        ]
        first, *others = workers
        self._runners: list[MethodRunner] = [
            InProcessRunner(first),
            *(WorkerProcess(worker, on_lost) if use_process else InProcessRunner(worker) for worker in others),
        ]

    def close(self) -> None:
        """End the worker process."""
        for runner in self._runners:
            runner.close()

    def open(self) -> list[OpenMicroBatch]:
        """All sizes that could be opened in time."""
        return [size for found in self._call_all("open", [()] * NUM_WORKERS) for size in found]

    def simulate(self, guesses: Sequence[tuple[OpenMicroBatch, int]]) -> list[SimulatedPipeline]:
        """Simulate guesses, (size, number of its guess) each; returns those that fit."""
        parts = [
            [(size.index, guess) for size, guess in guesses if size.worker == worker] for worker in range(NUM_WORKERS)
        ]
        results = self._call_all("simulate", [(part,) if part else None for part in parts])
        return [self._as_simulated(worker, found) for worker, part in enumerate(results) for found in part or ()]

    def search(
        self, micro_batches: Sequence[OpenMicroBatch], incumbent_s: float
    ) -> tuple[float, list[SimulatedPipeline]]:
        """Search sizes, at most one of each worker: (lower bound in seconds on all their pipelines, what was found)."""
        index_of = {size.worker: size.index for size in micro_batches}
        assert len(index_of) == len(micro_batches), "a worker searches one size at a time"
        results = self._call_all(
            "search",
            [(index_of[worker], incumbent_s) if worker in index_of else None for worker in range(NUM_WORKERS)],
        )
        bounds_s = [result[0] for result in results if result is not None]
        return min(bounds_s), [
            self._as_simulated(worker, found) for worker, result in enumerate(results) if result for found in result[1]
        ]

    def _call_all(self, method: str, arguments: Sequence[tuple[Any, ...] | None]) -> list[Any]:
        """The results of a `SearchWorker` method, called in parallel on every worker that has arguments; None for the
        others."""
        calls = list(zip(self._runners, arguments, strict=True))
        for runner, values in calls:
            if values is not None:
                runner.submit(method, *values)
        return [runner.result() if values is not None else None for runner, values in calls]

    def _as_simulated(self, worker: int, pipeline: FoundPipeline) -> SimulatedPipeline:
        """What a worker found, as a pipeline of this process's costs."""
        candidate = PipelineCandidate(
            stage_costs=self._stage_costs_by_worker[worker][pipeline.index],
            stages=pipeline.stages,
            schedule=pipeline.schedule,
            num_chunks=pipeline.num_chunks,
        )
        return SimulatedPipeline(candidate=candidate, step_time_s=pipeline.step_time_s)


def _pricing_work(stage_costs_by_size: Sequence[StageCosts], submesh_sizes: tuple[int, ...]) -> int:
    """Ops of distinct blocks x meshes x micro-batch sizes."""
    if not stage_costs_by_size:
        return 0
    meshes = sum(len(costs.frontiers.meshes(size)) for costs in stage_costs_by_size for size in submesh_sizes)
    distinct_blocks = stage_costs_by_size[0].pricer.first_of_kind.values()
    return meshes * sum(block.end_op - block.first_op for block in distinct_blocks)
