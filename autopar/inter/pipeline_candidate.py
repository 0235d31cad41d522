"""A pipeline of one micro-batch size: its stages on devices, their fastest choices that fit, and the simulated step.

An interleaved schedule assigns the S v chunks to the S submeshes round-robin, chunk c to submesh c mod S; the chunks of a
submesh share its mesh, its boundary placement and its memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from autopar.core.plan import memory_of_chunks
from autopar.inter.stage_choice import FrontierRef, StageChoice, StagePrice
from autopar.inter.stage_costs import StageCosts
from autopar.inter.stage_span import DeviceStage
from autopar.inter.stage_transfers import first_devices
from autopar.inter.tied_gradients import tied_gradient_s
from autopar.pipeline.schedule import Schedule, in_flight_by_chunk
from autopar.pipeline.simulate import StageTimes, simulate

MAX_MEMORY_RETRIES = 4
"""How often a submesh whose peak exceeds the budget is priced, each time with a budget less by the excess."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineCandidate:
    """Stages in model order under a schedule; interleaved where ``num_chunks``,
    the chunks per submesh, is more than 1."""

    stage_costs: StageCosts
    stages: tuple[DeviceStage, ...]
    schedule: Schedule
    num_chunks: int = 1

    @property
    def num_submeshes(self) -> int:
        """The number of submeshes, S."""
        return len(self.stages) // self.num_chunks

    def in_flight(self) -> tuple[int, ...]:
        """Micro-batches in flight on each stage at the moment when most are in flight on its submesh."""
        return in_flight_by_chunk(self.schedule, self.num_submeshes, self.stage_costs.num_microbatches, self.num_chunks)

    def first_devices(self) -> tuple[int, ...]:
        """The first device of each stage."""
        per_node = self.stage_costs.pricer.cluster.devices_per_node
        num_devices = [devices for _, _, devices in self.stages[: self.num_submeshes]]
        return first_devices(num_devices, per_node) * self.num_chunks

    def fastest_prices(self, cutoff_s: float = np.inf) -> tuple[StagePrice, ...] | None:
        """The fastest choice that fits for each stage; None where a submesh has none, or one works for ``cutoff_s``
        seconds of a step or more."""
        found: dict[int, StagePrice] = {}
        for submesh in range(self.num_submeshes):
            prices = self._submesh_prices(submesh, by_ilp=False)
            if prices is None:
                return None
            if self.stage_costs.num_microbatches * sum(price.amortised_s for price in prices) >= cutoff_s:
                return None
            found |= zip(self._chunks_on(submesh), prices, strict=True)
        return tuple(found[stage] for stage in range(len(self.stages)))

    def improved_by_ilp(self, prices: tuple[StagePrice, ...]) -> tuple[StagePrice, ...]:
        """``prices`` with those of a submesh, the busiest first, replaced by the mix of frontier points that the stage ILP
        proves best, wherever the simulated step does not get longer."""
        best_s = self.step_time_s(prices)
        submeshes = range(self.num_submeshes)
        busy_s = [sum(prices[stage].amortised_s for stage in self._chunks_on(submesh)) for submesh in submeshes]
        for submesh in sorted(submeshes, key=lambda submesh: -busy_s[submesh]):
            improved = self._submesh_prices(submesh, by_ilp=True)
            if improved is not None:
                replaced = dict(zip(self._chunks_on(submesh), improved, strict=True))
                candidate = tuple(replaced.get(stage, price) for stage, price in enumerate(prices))
                if (step_time_s := self.step_time_s(candidate)) <= best_s:
                    prices, best_s = candidate, step_time_s
        return prices

    def stage_times(self, prices: Sequence[StagePrice]) -> list[StageTimes]:
        """Times of all stages, with transfers and the gradients of tied parameters."""
        choices, firsts = [price.choice for price in prices], self.first_devices()
        forward, backward = self.stage_costs.transfers.transfer_times_s(self.stages, firsts, choices)
        tied = tied_gradient_s([self.stage_costs.tied_gradients] * len(prices), self.stages, firsts, choices)
        return [
            StageTimes(
                forward_s=price.forward_s,
                backward_s=price.backward_s,
                step_s=price.step_s + tied[stage],
                transfer_forward_s=forward[stage],
                transfer_backward_s=backward[stage],
            )
            for stage, price in enumerate(prices)
        ]

    def step_time_s(self, prices: Sequence[StagePrice]) -> float:
        """Seconds of the simulated step."""
        return simulate(
            self.schedule, self.stage_times(prices), self.stage_costs.num_microbatches, self.num_chunks
        ).step_time_s

    def _chunks_on(self, submesh: int) -> range:
        """The indices of the stages on a submesh."""
        return range(submesh, len(self.stages), self.num_submeshes)

    def _submesh_prices(self, submesh: int, *, by_ilp: bool) -> tuple[StagePrice, ...] | None:
        """The fastest choices found for the chunks of a submesh whose peak is within the budget; None where there are
        none. ``by_ilp``: by the proven best mix of frontier points."""
        costs, in_flight = self.stage_costs, self.in_flight()[submesh :: self.num_submeshes]
        chunks = [self.stages[stage] for stage in self._chunks_on(submesh)]
        kinds = tuple(int(costs.stage_kind_of[first, end]) for first, end, _ in chunks)
        blocks = [end - first for first, end, _ in chunks]
        mean_in_flight = float(np.average(in_flight, weights=blocks))
        room_bytes = costs.pricing.tensor_budget_bytes
        for _ in range(MAX_MEMORY_RETRIES):
            together = costs.fastest_feasible(kinds, chunks[0][2], mean_in_flight, room_bytes)
            if together is not None and by_ilp:
                together = costs.improve_by_ilp(kinds, mean_in_flight, together, room_bytes)
            if together is None:
                return None
            prices: tuple[StagePrice, ...] = (together,)
            if len(chunks) > 1:
                choices = _choices_of_chunks(costs, kinds, in_flight, together)
                prices = tuple(
                    costs.price_choice(choice, count) for choice, count in zip(choices, in_flight, strict=True)
                )
            excess_bytes = self._peak_bytes(chunks, prices, in_flight) - costs.pricing.tensor_budget_bytes
            if excess_bytes <= 0:
                return prices
            room_bytes -= excess_bytes
        return None

    def _peak_bytes(self, stages: Sequence[DeviceStage], prices: Sequence[StagePrice], in_flight: Sequence[int]) -> int:
        """Peak bytes of tensors on a device, over all chunks of its submesh. The totals of `StageCosts` approximate it
        by a sum over blocks in any order."""
        memory = []
        for (first, end, _), price, count in zip(stages, prices, in_flight, strict=True):
            memory.append(self.stage_costs.memory.peak(price.choice, first, end, count))
        return memory_of_chunks(memory).tensor_bytes


def _choices_of_chunks(
    stage_costs: StageCosts, stage_kinds: tuple[int, ...], in_flight: Sequence[int], submesh_price: StagePrice
) -> list[StageChoice]:
    """The choice of each chunk: the frontier points of all blocks of a submesh are distributed round-robin over its
    chunks, the first points (those of least memory) starting with the chunk that has most micro-batches in flight."""
    fullest_first = sorted(range(len(stage_kinds)), key=lambda chunk: -in_flight[chunk])
    points: list[list[tuple[int, tuple[tuple[FrontierRef, int], ...]]]] = [[] for _ in stage_kinds]
    for variant, mix in submesh_price.choice.mixes:
        num_blocks = [int(stage_costs.num_blocks[kind, variant]) for kind in stage_kinds]
        order = [chunk for turn in range(max(num_blocks)) for chunk in fullest_first if num_blocks[chunk] > turn]
        counts: list[dict[FrontierRef, int]] = [{} for _ in stage_kinds]
        for chunk, ref in zip(order, (ref for ref, count in mix for _ in range(count)), strict=True):
            counts[chunk][ref] = counts[chunk].get(ref, 0) + 1
        for chunk, taken in enumerate(counts):
            if taken:
                points[chunk].append((variant, tuple(taken.items())))
    return [replace(submesh_price.choice, mixes=tuple(mixes)) for mixes in points]
