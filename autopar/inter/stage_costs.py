"""What every possible stage costs at one micro-batch size: blocks i..j-1 on a submesh with s in-flight micro-batches.

A stage runs all its blocks on one mesh with one boundary placement; its totals are the sums over its blocks, with
overlap applied once (`stage_pricing`):

    forward, backward    sums over blocks                                      seconds per micro-batch
    step                 max(reduction - last backward, 0) + optimizer         seconds per step
    memory               state + s * saved + max workspace + fixed             bytes, at most the budget M

The memory sum is an approximation: `stage_memory` gives the exact peak of blocks in order, and a pipeline's candidate
rejects choices whose peak exceeds the budget. The fastest choice that fits is made of the solutions of
`intra.frontier` when a pipeline with that stage is evaluated; lower bounds over all choices are in
`stage_cost_tables`. Stages with the same number of blocks of each variant cost the same (`stage_kinds`) and are priced
once.
"""

import numpy as np
from numpy.typing import NDArray

from autopar.inter.block_pricer import BlockPricer, StageMesh
from autopar.inter.fastest_choice import fastest_feasible
from autopar.inter.frontier_cache import PRICED, UNPRICED, FrontierCache
from autopar.inter.in_flight_grid import IN_FLIGHT_GRID, interpolation_weights
from autopar.inter.mesh_totals import MeshTotalsCache
from autopar.inter.micro_batch_setting import MicroBatchSetting
from autopar.inter.pipeline_bounds import max_in_flight
from autopar.inter.stage_choice import StageChoice, StageFrontier, StagePrice, price_totals, sum_totals
from autopar.inter.stage_ilp import best_frontier_mix
from autopar.inter.stage_memory import StageMemory
from autopar.inter.stage_pricing import StagePricing
from autopar.inter.stage_transfers import StageTransfers
from autopar.inter.tied_gradients import TiedGradients

Floats = NDArray[np.float64]
MAX_STAGES = 32
"""Pipelines have at most this many stages."""


class StageCosts:
    """The costs of all stages at one micro-batch size, and what they are made of: the ``frontiers`` of the blocks,
    their ``mesh_totals`` per stage kind, the ``pricing`` of totals, ``memory``, ``transfers`` and ``tied_gradients``.
    ``stage_kind_of[i, j]`` and ``num_blocks[stage kind, variant]`` are those of `StageKinds`."""

    def __init__(self, pricer: BlockPricer, setting: MicroBatchSetting) -> None:
        self.pricer, self.restriction, self.schedule = pricer, setting.restriction, setting.schedule
        self.micro_batch, self.num_microbatches = setting.micro_batch, setting.num_microbatches
        self.num_devices = setting.num_devices
        self.pricing = StagePricing.of(pricer, setting)
        self.frontiers = FrontierCache(pricer, setting)
        self.mesh_totals = MeshTotalsCache(self.frontiers, self.pricing)
        self.memory = StageMemory(self.frontiers, self.pricing.fixed_bytes)
        self.transfers = StageTransfers(self.frontiers)
        self.tied_gradients = TiedGradients(self.frontiers)
        kinds = pricer.stage_kinds
        self.variants, self.stage_kind_of, self.num_blocks = kinds.variants, kinds.kind_of, kinds.num_blocks
        self._fastest: dict[tuple[tuple[int, ...], int, float, float], StagePrice | None] = {}

    def release(self) -> None:
        """Free what was priced; it is priced again when asked for."""
        self._fastest.clear()
        for part in (self.frontiers, self.mesh_totals, self.memory, self.transfers, self.tied_gradients):
            part.release()

    @property
    def max_stages(self) -> int:
        """The most stages that a pipeline may have."""
        return min(len(self.pricer.blocks), self.num_devices, MAX_STAGES)

    def max_in_flight_from_last(self) -> tuple[int, ...]:
        """The in-flight micro-batches of stage number 1, 2, ..., counted from the last."""
        return tuple(
            max_in_flight(self.schedule, self.num_microbatches, number) for number in range(1, self.max_stages + 1)
        )

    def fastest_feasible(
        self, stage_kinds: tuple[int, ...], num_devices: int, in_flight: float, tensor_budget_bytes: float | None = None
    ) -> StagePrice | None:
        """The fastest choice that fits for the chunks ``stage_kinds`` of one submesh (one, unless interleaved), priced
        as one stage with ``in_flight`` micro-batches; None when none fits. ``tensor_budget_bytes`` defaults to all that
        the budget leaves to tensors."""
        if tensor_budget_bytes is None:
            tensor_budget_bytes = self.pricing.tensor_budget_bytes
        key = (stage_kinds, num_devices, in_flight, tensor_budget_bytes)
        if key not in self._fastest:
            self._fastest[key] = self._find_fastest(stage_kinds, num_devices, in_flight, tensor_budget_bytes)
        return self._fastest[key]

    def _find_fastest(
        self, stage_kinds: tuple[int, ...], num_devices: int, in_flight: float, tensor_budget_bytes: float
    ) -> StagePrice | None:
        best: StagePrice | None = None
        best_s = np.inf
        meshes = self.frontiers.meshes(num_devices)
        lower_s = dict.fromkeys(meshes, 0.0)
        if len(meshes) > 1:
            lower_s = {mesh: self.mesh_totals.unconstrained_bound_s(stage_kinds, mesh) for mesh in meshes}
        for mesh in sorted(lower_s, key=lambda mesh: lower_s[mesh]):
            if lower_s[mesh] >= best_s:
                break
            frontier = self._stage_frontier(stage_kinds, mesh, in_flight, tensor_budget_bytes)
            for boundary in self._boundaries(mesh):
                price = fastest_feasible(frontier, self.pricing, in_flight, tensor_budget_bytes, boundary, best_s)
                if price is None:
                    continue
                value_s = price.amortised_s + sum(self._receive_s(kind, price, num_devices) for kind in stage_kinds)
                if value_s < best_s:
                    best, best_s = price, value_s
        return best

    def _boundaries(self, mesh: StageMesh) -> list[int]:
        """The boundary placements that stages on a mesh may have."""
        roles = self.frontiers.frontier(0, mesh, UNPRICED).tables.boundary_roles
        if self.restriction is not None:
            return [roles.index(self.restriction.boundary_roles)]
        return list(range(len(roles)))

    def _receive_s(self, stage_kind: int, price: StagePrice, num_devices: int) -> float:
        """Seconds per micro-batch in which a stage receives its activations and gradients, if its neighbours have its
        size and are on other nodes. They break ties between boundary placements that are equally fast inside the
        stage."""
        if num_devices == self.num_devices or self.restriction is not None:
            return 0.0
        span = self.pricer.stage_kinds.example_of[stage_kind]
        return self.transfers.receive_s(span, num_devices, price.choice)

    def _stage_frontier(
        self, stage_kinds: tuple[int, ...], mesh: StageMesh, in_flight: float, tensor_budget_bytes: float
    ) -> StageFrontier:
        """The points that blocks of a stage may take: those of the unpriced objectives, and, where the fastest of them
        exceeds the budget, those of the memory-priced objectives near ``in_flight``."""
        kinds = list(stage_kinds)
        num_blocks = self.num_blocks[kinds].sum(axis=0)
        variants = tuple(int(variant) for variant in np.flatnonzero(num_blocks))
        phases = [(UNPRICED, slice(None))]
        if self.restriction is None:
            sums = self.mesh_totals.totals(mesh, UNPRICED)
            fastest = int(sums.amortised_s[kinds].sum(axis=0).argmin())
            if sums.memory_bytes(in_flight)[kinds].sum(axis=0).reshape(-1)[fastest] > tensor_budget_bytes:
                phases += [
                    (PRICED, self.frontiers.objective_slice(mesh, point))
                    for point, _ in interpolation_weights(IN_FLIGHT_GRID, in_flight)
                ]
        return StageFrontier.of(
            mesh,
            variants,
            tuple(int(num_blocks[variant]) for variant in variants),
            [
                (phase, rows, [self.frontiers.frontier(variant, mesh, phase) for variant in variants])
                for phase, rows in phases
            ],
        )

    def improve_by_ilp(
        self, stage_kinds: tuple[int, ...], in_flight: float, price: StagePrice, tensor_budget_bytes: float
    ) -> StagePrice:
        """``price``, or on its mesh the proved optimal mix of frontier points where that is faster."""
        frontier = self._stage_frontier(stage_kinds, price.choice.mesh, in_flight, tensor_budget_bytes)
        best = price
        for boundary in range(frontier.totals.shape[2]):
            mix = best_frontier_mix(frontier, self.pricing, in_flight, tensor_budget_bytes, boundary)
            if mix is not None and mix.amortised_s < best.amortised_s * (1 - 1e-9):
                best = mix
        return best

    def totals(self, choice: StageChoice) -> Floats:
        """(totals,) of all blocks of a stage under a choice (`block_totals`)."""
        parts: list[tuple[Floats, float]] = []
        for variant, mix in choice.mixes:
            for (phase, row), count in mix:
                frontier = self.frontiers.frontier(variant, choice.mesh, phase)
                parts.append((frontier.totals[row, choice.boundary], float(count)))
        return sum_totals(parts)

    def price_choice(self, choice: StageChoice, in_flight: float) -> StagePrice:
        """The price of a stage under a choice."""
        return price_totals(self.pricing, self.totals(choice), in_flight, choice)
