"""The micro-batch sizes of a plan in two lanes, of which a long search runs the second beside this process.

A lane opens its sizes (their tables without memory), simulates promising pipelines of them and searches one after the
other. In every round each lane searches a size of its own, and all know the best step of the rounds before; so what is
found does not depend on where a lane runs.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from autopar.inter.micro_batch_search import MicroBatchSearch, SimulatedPipeline
from autopar.inter.pipeline_candidate import PipelineCandidate
from autopar.inter.stage_costs import StageCosts
from autopar.inter.worker_process import InProcessRunner, MethodRunner, WorkerProcess, can_use_worker_process
from autopar.pipeline.schedule import Schedule

NUM_WORKERS = 2
MIN_PARALLEL_WORK = 2_500
"""Ops of distinct blocks x meshes x micro-batch sizes from which on a second process begins. It takes half a second to
begin; GPTs of 2,700 plan in 6.4 and 9.1 s with one process, in 5.8 and 7.5 s with two (2 cores, 2026-11-22)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenMicroBatch:
    """A micro-batch size that is open, number ``at`` of a lane. ``free_bound_s`` and the seconds of ``guesses`` are
    those of `SizeSearch`."""

    worker: int
    index: int
    micro_batch: int
    unconstrained_bound_s: float
    guesses_s: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundPipeline:
    """A pipeline of the book number ``at`` of a lane, and its step."""

    index: int
    stages: tuple[tuple[int, int, int], ...]
    schedule: Schedule
    num_chunks: int
    step_time_s: float


class SearchWorker:
    """The searches of some books; after ``deadline_s`` on the clock of ``time.perf_counter``, which all processes
    share, none is begun."""

    def __init__(
        self,
        worker: int,
        stage_costs_by_size: Sequence[StageCosts],
        submesh_sizes: tuple[int, ...],
        schedules: tuple[Schedule, ...],
        deadline_s: float,
    ) -> None:
        self._worker, self._stage_costs_by_size, self._submesh_sizes, self._schedules = (
            worker,
            stage_costs_by_size,
            submesh_sizes,
            schedules,
        )
        self._deadline_s = deadline_s
        self._searches: list[MicroBatchSearch] = []
        self._searched: list[int] = []
        self.on_opened: Callable[[StageCosts], None] | None = None

    def open(self) -> list[OpenMicroBatch]:
        """Open all; once the time is up, until one has a pipeline. Returns all that are open."""
        for book in self._stage_costs_by_size:
            some = any(math.isfinite(one.unconstrained_bound_s) for one in self._searches)
            if some and time.perf_counter() > self._deadline_s:
                break
            one = MicroBatchSearch(book, self._submesh_sizes, self._schedules, self._deadline_s)
            self._searches.append(one)
            if not math.isfinite(one.unconstrained_bound_s):
                one.tables.release()
            if self.on_opened is not None:
                self.on_opened(book)
        return [
            OpenMicroBatch(
                worker=self._worker,
                index=at,
                micro_batch=one.stage_costs.micro_batch,
                unconstrained_bound_s=one.unconstrained_bound_s,
                guesses_s=tuple(seconds for seconds, _ in one.guesses),
            )
            for at, one in enumerate(self._searches)
        ]

    def simulate(self, guesses: Sequence[tuple[int, int]]) -> list[FoundPipeline]:
        """Simulate guesses (size, number of the guess); what fits."""
        before = [len(one.incumbents) for one in self._searches]
        for at, guess in guesses:
            self._searches[at].simulate(self._searches[at].guesses[guess][1])
        return [found for at in range(len(before)) for found in self._found_since(at, before[at])]

    def search(self, index: int, incumbent_s: float) -> tuple[float, list[FoundPipeline]]:
        """`SizeSearch.run` and what it found. Only the size with the best pipeline keeps its tables."""
        before = len(self._searches[index].incumbents)
        bound_s = self._searches[index].search(incumbent_s)
        self._searched.append(index)
        found = [(best.step_time_s, number) for number, one in enumerate(self._searches) for best in one.incumbents]
        _, kept = min(found, default=(math.inf, -1))
        for number in self._searched:
            if number != kept:
                self._searches[number].tables.release()
        return bound_s, self._found_since(index, before)

    def _found_since(self, index: int, num_known: int) -> list[FoundPipeline]:
        """What the search of a size found, all but the first ``before``."""
        return [
            FoundPipeline(
                index=index,
                stages=best.candidate.stages,
                schedule=best.candidate.schedule,
                num_chunks=best.candidate.num_chunks,
                step_time_s=best.step_time_s,
            )
            for best in self._searches[index].incumbents[num_known:]
        ]


class ParallelSearch:
    """All lanes. ``opened`` is told a book whose size is open, ``lost`` the exit code of a second process that ended
    early; with one of ``processes`` there is none. ``deadline_s`` on the clock of ``time.perf_counter``."""

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
        # 0 1 1 0 0 1 1 ...: neighbours, which are alike, to different lanes, and the first of them to each in turn
        self._stage_costs_by_worker = [
            [book for at, book in enumerate(stage_costs_by_size) if (at + 1) // 2 % NUM_WORKERS == lane]
            for lane in range(NUM_WORKERS)
        ]
        lanes = [
            SearchWorker(number, part, submesh_sizes, schedules, deadline_s)
            for number, part in enumerate(self._stage_costs_by_worker)
        ]
        beside = (
            _pricing_work(stage_costs_by_size, submesh_sizes) > MIN_PARALLEL_WORK
            and num_processes > 1
            and can_use_worker_process()
        )
        if beside:  # rules ask torch what it knows of an op; a second process need not load it for that
            for blocks in {id(book.pricer): book.pricer for book in stage_costs_by_size}.values():
                blocks.make_all_spaces()
        for lane in lanes[: 1 if beside else None]:
            lane.on_opened = on_opened
        first, *others = lanes
        self._runners: list[MethodRunner] = [
            InProcessRunner(first),
            *(WorkerProcess(lane, on_lost) if beside else InProcessRunner(lane) for lane in others),
        ]

    def close(self) -> None:
        for runner in self._runners:
            runner.close()

    def open(self) -> list[OpenMicroBatch]:
        """All sizes that could be opened in time."""
        return [size for found in self._call_all("open", [()] * NUM_WORKERS) for size in found]

    def simulate(self, guesses: Sequence[tuple[OpenMicroBatch, int]]) -> list[SimulatedPipeline]:
        """Simulate guesses of sizes; what fits."""
        parts = [[(size.index, guess) for size, guess in guesses if size.worker == lane] for lane in range(NUM_WORKERS)]
        found = self._call_all("simulate", [(part,) if part else None for part in parts])
        return [self._as_simulated(lane, one) for lane, part in enumerate(found) for one in part or ()]

    def search(
        self, micro_batches: Sequence[OpenMicroBatch], incumbent_s: float
    ) -> tuple[float, list[SimulatedPipeline]]:
        """Search sizes, at most one of each lane; a bound on all of them, and what was found."""
        places = {size.worker: size.index for size in micro_batches}
        assert len(places) == len(micro_batches), "a lane searches one size at a time"
        done = self._call_all(
            "search", [(places[lane], incumbent_s) if lane in places else None for lane in range(NUM_WORKERS)]
        )
        bounds_s = [one[0] for one in done if one is not None]
        return min(bounds_s), [
            self._as_simulated(lane, best) for lane, one in enumerate(done) if one for best in one[1]
        ]

    def _call_all(self, method: str, arguments: Sequence[tuple[Any, ...] | None]) -> list[Any]:
        """A method of every lane that has arguments, side by side; None for the others."""
        pairs = list(zip(self._runners, arguments, strict=True))
        for runner, given in pairs:
            if given is not None:
                runner.submit(method, *given)
        return [runner.result() if given is not None else None for runner, given in pairs]

    def _as_simulated(self, worker: int, pipeline: FoundPipeline) -> SimulatedPipeline:
        book = self._stage_costs_by_worker[worker][pipeline.index]
        made = PipelineCandidate(
            stage_costs=book, stages=pipeline.stages, schedule=pipeline.schedule, num_chunks=pipeline.num_chunks
        )
        return SimulatedPipeline(candidate=made, step_time_s=pipeline.step_time_s)


def _pricing_work(stage_costs_by_size: Sequence[StageCosts], submesh_sizes: tuple[int, ...]) -> int:
    """Ops of distinct blocks x meshes, of all books."""
    meshes = sum(len(book.frontiers.meshes(size)) for book in stage_costs_by_size for size in submesh_sizes)
    return (
        meshes * sum(block.end_op - block.first_op for block in stage_costs_by_size[0].pricer.first_of_kind.values())
        if stage_costs_by_size
        else 0
    )
