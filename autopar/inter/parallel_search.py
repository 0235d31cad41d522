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

from autopar.inter.micro_batch_search import Best, SizeSearch
from autopar.inter.pipeline_candidate import Arrangement
from autopar.inter.stage_costs import StageBook
from autopar.inter.worker_process import Beside, Here, Runner, can_run_beside
from autopar.pipeline.schedule import Schedule

NUM_LANES = 2
WORTH = 2_500
"""Ops of distinct blocks x meshes x micro-batch sizes from which on a second process begins. It takes half a second to
begin; GPTs of 2,700 plan in 6.4 and 9.1 s with one process, in 5.8 and 7.5 s with two (2 cores, 2026-11-22)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A micro-batch size that is open, number ``at`` of a lane. ``free_bound_s`` and the seconds of ``guesses`` are
    those of `SizeSearch`."""

    lane: int
    at: int
    micro_batch: int
    free_bound_s: float
    guesses_s: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """A pipeline of the book number ``at`` of a lane, and its step."""

    at: int
    stages: tuple[tuple[int, int, int], ...]
    schedule: Schedule
    num_chunks: int
    step_time_s: float


class Lane:
    """The searches of some books; after ``deadline_s`` on the clock of ``time.perf_counter``, which all processes
    share, none is begun."""

    def __init__(
        self,
        number: int,
        books: Sequence[StageBook],
        sizes: tuple[int, ...],
        schedules: tuple[Schedule, ...],
        deadline_s: float,
    ) -> None:
        self._number, self._books, self._sizes, self._schedules = number, books, sizes, schedules
        self._deadline_s = deadline_s
        self._searches: list[SizeSearch] = []
        self._searched: list[int] = []
        self.opened: Callable[[StageBook], None] | None = None

    def open(self) -> list[Size]:
        """Open all; once the time is up, until one has a pipeline. Returns all that are open."""
        for book in self._books:
            some = any(math.isfinite(one.free_bound_s) for one in self._searches)
            if some and time.perf_counter() > self._deadline_s:
                break
            one = SizeSearch(book, self._sizes, self._schedules, self._deadline_s)
            self._searches.append(one)
            if not math.isfinite(one.free_bound_s):
                one.tables.release()
            if self.opened is not None:
                self.opened(book)
        return [
            Size(
                lane=self._number,
                at=at,
                micro_batch=one.book.micro_batch,
                free_bound_s=one.free_bound_s,
                guesses_s=tuple(seconds for seconds, _ in one.guesses),
            )
            for at, one in enumerate(self._searches)
        ]

    def simulate(self, guesses: Sequence[tuple[int, int]]) -> list[Simulated]:
        """Simulate guesses (size, number of the guess); what fits."""
        before = [len(one.found) for one in self._searches]
        for at, guess in guesses:
            self._searches[at].try_pipeline(self._searches[at].guesses[guess][1])
        return [found for at in range(len(before)) for found in self._found(at, before[at])]

    def run(self, at: int, known_s: float) -> tuple[float, list[Simulated]]:
        """`SizeSearch.run` and what it found. Only the size with the best pipeline keeps its tables."""
        before = len(self._searches[at].found)
        bound_s = self._searches[at].run(known_s)
        self._searched.append(at)
        found = [(best.step_time_s, number) for number, one in enumerate(self._searches) for best in one.found]
        _, kept = min(found, default=(math.inf, -1))
        for number in self._searched:
            if number != kept:
                self._searches[number].tables.release()
        return bound_s, self._found(at, before)

    def _found(self, at: int, before: int) -> list[Simulated]:
        """What the search of a size found, all but the first ``before``."""
        return [
            Simulated(
                at=at,
                stages=best.arrangement.stages,
                schedule=best.arrangement.schedule,
                num_chunks=best.arrangement.num_chunks,
                step_time_s=best.step_time_s,
            )
            for best in self._searches[at].found[before:]
        ]


class Lanes:
    """All lanes. ``opened`` is told a book whose size is open, ``lost`` the exit code of a second process that ended
    early; with one of ``processes`` there is none. ``deadline_s`` on the clock of ``time.perf_counter``."""

    def __init__(
        self,
        books: Sequence[StageBook],
        sizes: tuple[int, ...],
        schedules: tuple[Schedule, ...],
        deadline_s: float,
        *,
        processes: int,
        opened: Callable[[StageBook], None],
        lost: Callable[[int], None],
    ) -> None:
        # 0 1 1 0 0 1 1 ...: neighbours, which are alike, to different lanes, and the first of them to each in turn
        self._books = [
            [book for at, book in enumerate(books) if (at + 1) // 2 % NUM_LANES == lane] for lane in range(NUM_LANES)
        ]
        lanes = [Lane(number, part, sizes, schedules, deadline_s) for number, part in enumerate(self._books)]
        beside = _work(books, sizes) > WORTH and processes > 1 and can_run_beside()
        if beside:  # rules ask torch what it knows of an op; a second process need not load it for that
            for blocks in {id(book.blocks): book.blocks for book in books}.values():
                blocks.make_spaces()
        for lane in lanes[: 1 if beside else None]:
            lane.opened = opened
        first, *others = lanes
        self._runners: list[Runner] = [Here(first), *(Beside(lane, lost) if beside else Here(lane) for lane in others)]

    def close(self) -> None:
        for runner in self._runners:
            runner.close()

    def open(self) -> list[Size]:
        """All sizes that could be opened in time."""
        return [size for found in self._all("open", [()] * NUM_LANES) for size in found]

    def simulate(self, guesses: Sequence[tuple[Size, int]]) -> list[Best]:
        """Simulate guesses of sizes; what fits."""
        parts = [[(size.at, guess) for size, guess in guesses if size.lane == lane] for lane in range(NUM_LANES)]
        found = self._all("simulate", [(part,) if part else None for part in parts])
        return [self._best(lane, one) for lane, part in enumerate(found) for one in part or ()]

    def run(self, sizes: Sequence[Size], known_s: float) -> tuple[float, list[Best]]:
        """Search sizes, at most one of each lane; a bound on all of them, and what was found."""
        places = {size.lane: size.at for size in sizes}
        assert len(places) == len(sizes), "a lane searches one size at a time"
        done = self._all("run", [(places[lane], known_s) if lane in places else None for lane in range(NUM_LANES)])
        bounds_s = [one[0] for one in done if one is not None]
        return min(bounds_s), [self._best(lane, best) for lane, one in enumerate(done) if one for best in one[1]]

    def _all(self, method: str, arguments: Sequence[tuple[Any, ...] | None]) -> list[Any]:
        """A method of every lane that has arguments, side by side; None for the others."""
        pairs = list(zip(self._runners, arguments, strict=True))
        for runner, given in pairs:
            if given is not None:
                runner.begin(method, *given)
        return [runner.end() if given is not None else None for runner, given in pairs]

    def _best(self, lane: int, one: Simulated) -> Best:
        book = self._books[lane][one.at]
        made = Arrangement(book=book, stages=one.stages, schedule=one.schedule, num_chunks=one.num_chunks)
        return Best(arrangement=made, step_time_s=one.step_time_s)


def _work(books: Sequence[StageBook], sizes: tuple[int, ...]) -> int:
    """Ops of distinct blocks x meshes, of all books."""
    meshes = sum(len(book.meshes(size)) for book in books for size in sizes)
    return meshes * sum(block.end_op - block.first_op for block in books[0].blocks.kinds.values()) if books else 0
