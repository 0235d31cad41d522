"""A pipeline of one book: its stages on devices under a schedule, how each then runs, and the simulated step.

Interleaved, the S v chunks go round the S runs of devices v times, chunk c on run c mod S; the chunks of a run share
its mesh, its boundary placement and its memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from autopar.core.plan import memory_of_chunks
from autopar.inter.stage_choice import FrontierRef, StageChoice, StagePrice
from autopar.inter.stage_costs import StageCosts
from autopar.inter.stage_transfers import first_devices
from autopar.inter.tied_gradients import tied_gradient_s
from autopar.pipeline.schedule import Schedule, in_flight_by_chunk
from autopar.pipeline.simulate import StageTimes, simulate

MAX_MEMORY_RETRIES = 4
"""How often a run of devices whose chunks do not fit is tried, each time with so much less room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineCandidate:
    """``stages`` (first block, last block + 1, devices) in model order; interleaved where ``num_chunks`` > 1."""

    stage_costs: StageCosts
    stages: tuple[tuple[int, int, int], ...]
    schedule: Schedule
    num_chunks: int = 1

    @property
    def num_submeshes(self) -> int:
        """Runs of devices, S."""
        return len(self.stages) // self.num_chunks

    def in_flight(self) -> tuple[int, ...]:
        """Micro-batches each stage holds when its devices hold most."""
        return in_flight_by_chunk(self.schedule, self.num_submeshes, self.stage_costs.num_microbatches, self.num_chunks)

    def first_devices(self) -> tuple[int, ...]:
        """The first device of each stage."""
        per_node = self.stage_costs.pricer.cluster.devices_per_node
        return (
            first_devices([devices for _, _, devices in self.stages[: self.num_submeshes]], per_node) * self.num_chunks
        )

    def fastest_prices(self, cutoff_s: float = np.inf) -> tuple[StagePrice, ...] | None:
        """How each stage runs, the fastest way that fits; None when one does not fit, or alone is busy for
        ``below_s`` seconds of a step."""
        found: dict[int, StagePrice] = {}
        for run in range(self.num_submeshes):
            finished = self._submesh_prices(run, by_ilp=False)
            if (
                finished is None
                or self.stage_costs.num_microbatches * sum(one.amortised_s for one in finished) >= cutoff_s
            ):
                return None
            found |= zip(self._chunks_on(run), finished, strict=True)
        return tuple(found[at] for at in range(len(self.stages)))

    def improved_by_ilp(self, prices: tuple[StagePrice, ...]) -> tuple[StagePrice, ...]:
        """``runs`` with those of each run of devices replaced by the proven best mix of frontier points where the
        simulated step is then no longer."""
        best_s = self.step_time_s(prices)
        busy_s = [sum(prices[at].amortised_s for at in self._chunks_on(run)) for run in range(self.num_submeshes)]
        for run in sorted(range(self.num_submeshes), key=lambda run: -busy_s[run]):
            found = self._submesh_prices(run, by_ilp=True)
            if found is not None:
                replaced = dict(zip(self._chunks_on(run), found, strict=True))
                candidate = tuple(replaced.get(at, one) for at, one in enumerate(prices))
                if (step_time_s := self.step_time_s(candidate)) <= best_s:
                    prices, best_s = candidate, step_time_s
        return prices

    def stage_times(self, prices: Sequence[StagePrice]) -> list[StageTimes]:
        """Times of all stages, transfers and exchanges of tied parameters included."""
        choices, firsts = [run.choice for run in prices], self.first_devices()
        forward, backward = self.stage_costs.transfers.transfer_times_s(self.stages, firsts, choices)
        tied = tied_gradient_s([self.stage_costs.tied_gradients] * len(prices), self.stages, firsts, choices)
        return [
            StageTimes(
                forward_s=run.forward_s,
                backward_s=run.backward_s,
                step_s=run.step_s + tied[at],
                transfer_forward_s=forward[at],
                transfer_backward_s=backward[at],
            )
            for at, run in enumerate(prices)
        ]

    def step_time_s(self, prices: Sequence[StagePrice]) -> float:
        """The simulated step."""
        return simulate(
            self.schedule, self.stage_times(prices), self.stage_costs.num_microbatches, self.num_chunks
        ).step_time_s

    def _chunks_on(self, submesh: int) -> range:
        """The stages of a run of devices."""
        return range(submesh, len(self.stages), self.num_submeshes)

    def _submesh_prices(self, submesh: int, *, by_ilp: bool) -> tuple[StagePrice, ...] | None:
        """The stages of a run of devices, which share its memory: ``proven``, by the best mix of frontier points."""
        book, held = self.stage_costs, self.in_flight()[submesh :: self.num_submeshes]
        chunks = [self.stages[at] for at in self._chunks_on(submesh)]
        kinds = tuple(int(book.stage_kind_of[first, end]) for first, end, _ in chunks)
        blocks = [end - first for first, end, _ in chunks]
        mean_held = float(np.average(held, weights=blocks))
        room_bytes = book.pricing.tensor_budget_bytes
        for _ in range(MAX_MEMORY_RETRIES):
            whole = book.fastest_feasible(kinds, chunks[0][2], mean_held, room_bytes)
            if whole is not None and by_ilp:
                whole = book.improve_by_ilp(kinds, mean_held, whole, room_bytes)
            if whole is None:
                return None
            parts: tuple[StagePrice, ...] = (whole,)
            if len(chunks) > 1:
                dealt = zip(_choices_of_chunks(book, kinds, held, whole), held, strict=True)
                parts = tuple(book.price_choice(choice, count) for choice, count in dealt)
            over_bytes = self._peak_bytes(chunks, parts, held) - book.pricing.tensor_budget_bytes
            if over_bytes <= 0:
                return parts
            room_bytes -= over_bytes
        return None

    def _peak_bytes(
        self, stages: Sequence[tuple[int, int, int]], prices: Sequence[StagePrice], in_flight: Sequence[int]
    ) -> int:
        """What the chunks of a run of devices hold together at their peak, all but the fixed share: the totals, which
        sum over blocks whatever their order, come near it."""
        found = []
        for (first, end, _), part, count in zip(stages, prices, in_flight, strict=True):
            found.append(self.stage_costs.memory.peak(part.choice, first, end, count))
        return memory_of_chunks(found).tensor_bytes


def _choices_of_chunks(
    stage_costs: StageCosts, stage_kinds: tuple[int, ...], in_flight: Sequence[int], submesh_price: StagePrice
) -> list[StageChoice]:
    """The choice of each chunk: the points of all blocks of a run of devices dealt evenly to its chunks, the first
    points (the lean ones) from the chunk on that holds most micro-batches."""
    fullest_first = sorted(range(len(stage_kinds)), key=lambda chunk: -in_flight[chunk])
    points: list[list[tuple[int, tuple[tuple[FrontierRef, int], ...]]]] = [[] for _ in stage_kinds]
    for column, mix in submesh_price.choice.mixes:
        numbers = [int(stage_costs.num_blocks[kind, column]) for kind in stage_kinds]
        order = [chunk for at in range(max(numbers)) for chunk in fullest_first if numbers[chunk] > at]
        counts: list[dict[FrontierRef, int]] = [{} for _ in stage_kinds]
        for chunk, ref in zip(order, (ref for ref, count in mix for _ in range(count)), strict=True):
            counts[chunk][ref] = counts[chunk].get(ref, 0) + 1
        for chunk, taken in enumerate(counts):
            if taken:
                points[chunk].append((column, tuple(taken.items())))
    return [replace(submesh_price.choice, mixes=tuple(one)) for one in points]
