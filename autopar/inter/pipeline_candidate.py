"""A pipeline of one book: its stages on devices under a schedule, how each then runs, and the simulated step.

Interleaved, the S v chunks go round the S runs of devices v times, chunk c on run c mod S; the chunks of a run share
its mesh, its boundary placement and its memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from autopar.core.plan import chunks_memory
from autopar.inter.stage_choice import Finished, PointRef, StageChoice
from autopar.inter.stage_costs import StageBook
from autopar.inter.stage_memory import stage_memory
from autopar.inter.stage_transfers import first_devices
from autopar.inter.tied_gradients import tied_seconds
from autopar.pipeline.schedule import Schedule, held_by_chunk
from autopar.pipeline.simulate import StageTimes, simulate

MAX_TRIES = 4
"""How often a run of devices whose chunks do not fit is tried, each time with so much less room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrangement:
    """``stages`` (first block, last block + 1, devices) in model order; interleaved where ``num_chunks`` > 1."""

    book: StageBook
    stages: tuple[tuple[int, int, int], ...]
    schedule: Schedule
    num_chunks: int = 1

    @property
    def num_runs(self) -> int:
        """Runs of devices, S."""
        return len(self.stages) // self.num_chunks

    def held(self) -> tuple[int, ...]:
        """Micro-batches each stage holds when its devices hold most."""
        return held_by_chunk(self.schedule, self.num_runs, self.book.num_microbatches, self.num_chunks)

    def first_devices(self) -> tuple[int, ...]:
        """The first device of each stage."""
        per_node = self.book.blocks.cluster.devices_per_node
        return first_devices([devices for _, _, devices in self.stages[: self.num_runs]], per_node) * self.num_chunks

    def finished(self, below_s: float = np.inf) -> tuple[Finished, ...] | None:
        """How each stage runs, the fastest way that fits; None when one does not fit, or alone is busy for
        ``below_s`` seconds of a step."""
        found: dict[int, Finished] = {}
        for run in range(self.num_runs):
            finished = self._finish_run(run, proven=False)
            if finished is None or self.book.num_microbatches * sum(one.time_s for one in finished) >= below_s:
                return None
            found |= zip(self._chunks(run), finished, strict=True)
        return tuple(found[at] for at in range(len(self.stages)))

    def mixed(self, runs: tuple[Finished, ...]) -> tuple[Finished, ...]:
        """``runs`` with those of each run of devices replaced by the proven best mix of frontier points where the
        simulated step is then no longer."""
        best_s = self.step_time_s(runs)
        busy_s = [sum(runs[at].time_s for at in self._chunks(run)) for run in range(self.num_runs)]
        for run in sorted(range(self.num_runs), key=lambda run: -busy_s[run]):
            found = self._finish_run(run, proven=True)
            if found is not None:
                replaced = dict(zip(self._chunks(run), found, strict=True))
                candidate = tuple(replaced.get(at, one) for at, one in enumerate(runs))
                if (step_time_s := self.step_time_s(candidate)) <= best_s:
                    runs, best_s = candidate, step_time_s
        return runs

    def times(self, runs: Sequence[Finished]) -> list[StageTimes]:
        """Times of all stages, transfers and exchanges of tied parameters included."""
        choices, firsts = [run.choice for run in runs], self.first_devices()
        forward, backward = self.book.transfers.seconds(self.stages, firsts, choices)
        tied = tied_seconds([self.book] * len(runs), self.stages, firsts, choices)
        return [
            StageTimes(
                forward_s=run.forward_s,
                backward_s=run.backward_s,
                step_s=run.step_s + tied[at],
                send_forward_s=forward[at],
                send_backward_s=backward[at],
            )
            for at, run in enumerate(runs)
        ]

    def step_time_s(self, runs: Sequence[Finished]) -> float:
        """The simulated step."""
        return simulate(self.schedule, self.times(runs), self.book.num_microbatches, self.num_chunks).step_time_s

    def _chunks(self, run: int) -> range:
        """The stages of a run of devices."""
        return range(run, len(self.stages), self.num_runs)

    def _finish_run(self, run: int, *, proven: bool) -> tuple[Finished, ...] | None:
        """The stages of a run of devices, which share its memory: ``proven``, by the best mix of frontier points."""
        book, held = self.book, self.held()[run :: self.num_runs]
        chunks = [self.stages[at] for at in self._chunks(run)]
        kinds = tuple(int(book.type_of[first, end]) for first, end, _ in chunks)
        blocks = [end - first for first, end, _ in chunks]
        mean_held = float(np.average(held, weights=blocks))
        room_bytes = book.room_bytes
        for _ in range(MAX_TRIES):
            whole = book.finish(kinds, chunks[0][2], mean_held, room_bytes)
            if whole is not None and proven:
                whole = book.mix(kinds, mean_held, whole, room_bytes)
            if whole is None:
                return None
            parts: tuple[Finished, ...] = (whole,)
            if len(chunks) > 1:
                dealt = zip(_dealt(book, kinds, held, whole), held, strict=True)
                parts = tuple(book.priced(choice, count) for choice, count in dealt)
            over_bytes = self._peak_bytes(chunks, parts, held) - book.room_bytes
            if over_bytes <= 0:
                return parts
            room_bytes -= over_bytes
        return None

    def _peak_bytes(
        self, chunks: Sequence[tuple[int, int, int]], parts: Sequence[Finished], held: Sequence[int]
    ) -> int:
        """What the chunks of a run of devices hold together at their peak, all but the fixed share: the totals, which
        sum over blocks whatever their order, come near it."""
        found = []
        for (first, end, _), part, count in zip(chunks, parts, held, strict=True):
            key = (part.choice, first, end, count)
            if key not in self.book.peaks:
                self.book.peaks[key] = stage_memory(self.book, part.choice, first, end, count)
            found.append(self.book.peaks[key])
        return chunks_memory(found).tensor_bytes


def _dealt(book: StageBook, kinds: tuple[int, ...], held: Sequence[int], whole: Finished) -> list[StageChoice]:
    """The choice of each chunk: the points of all blocks of a run of devices dealt evenly to its chunks, the first
    points (the lean ones) from the chunk on that holds most micro-batches."""
    fullest_first = sorted(range(len(kinds)), key=lambda chunk: -held[chunk])
    points: list[list[tuple[int, tuple[tuple[PointRef, int], ...]]]] = [[] for _ in kinds]
    for column, mix in whole.choice.points:
        numbers = [int(book.counts[kind, column]) for kind in kinds]
        order = [chunk for at in range(max(numbers)) for chunk in fullest_first if numbers[chunk] > at]
        counts: list[dict[PointRef, int]] = [{} for _ in kinds]
        for chunk, ref in zip(order, (ref for ref, count in mix for _ in range(count)), strict=True):
            counts[chunk][ref] = counts[chunk].get(ref, 0) + 1
        for chunk, taken in enumerate(counts):
            if taken:
                points[chunk].append((column, tuple(taken.items())))
    return [replace(whole.choice, points=tuple(one)) for one in points]
