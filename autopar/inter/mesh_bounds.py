"""Seconds that no choice for a stage on one mesh is below.

For a stage with n_v blocks of each variant v (D_v: optimum of an objective (`intra.priced_objectives`)), no choice
takes less than

    max over objectives of [sum_v n_v min over recompute modes of D_v - price * (M - fixed - workspace)]

seconds, then the least over boundary placements. An objective's weight of saved bytes is the number s of in-flight
micro-batches; for an s between two grid points the same combination of the two optima is a bound, as D is concave in
its prices.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.inter.block_pricer import StageMesh
from autopar.inter.frontier_cache import UNPRICED
from autopar.inter.in_flight_grid import IN_FLIGHT_GRID, interpolation_weights
from autopar.inter.memory_fit import MemoryFit
from autopar.inter.mesh_totals import LEAST_IMPOSSIBLE, with_launch_time
from autopar.inter.stage_costs import StageCosts
from autopar.intra import priced_objectives as po
from autopar.intra.priced_objectives import PricedObjective

Floats = NDArray[np.float64]
Ints = NDArray[np.integer]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageBounds:
    """Seconds that no choice for a stage kind is below, ``seconds`` (4, stage kinds), row by row: the forward, forward +
    backward, the step, and B micro-batches with the step (busy); inf where nothing fits."""

    seconds: Floats

    @property
    def forward_s(self) -> Floats:
        """(stage kinds,) of the forward of a micro-batch."""
        return np.asarray(self.seconds[0])

    @property
    def forward_backward_s(self) -> Floats:
        """(stage kinds,) of the forward and backward of a micro-batch."""
        return np.asarray(self.seconds[1])

    @property
    def step_s(self) -> Floats:
        """(stage kinds,) of what runs once per step."""
        return np.asarray(self.seconds[2])

    @property
    def busy_s(self) -> Floats:
        """(stage kinds,) of all micro-batches and the step."""
        return np.asarray(self.seconds[3])

    @staticmethod
    def impossible(num_stage_kinds: int) -> "StageBounds":
        """Nothing fits."""
        return StageBounds(seconds=np.full((4, num_stage_kinds), np.inf))

    @staticmethod
    def minimum(bounds: Sequence["StageBounds"], fits: Sequence[NDArray[np.bool_]] | None = None) -> "StageBounds":
        """What no choice on any of several meshes is below; ``fits`` (stage kinds,) of each mesh."""
        seconds = [one.seconds for one in bounds]
        if fits is not None:
            seconds = [np.where(fit, one, np.inf) for one, fit in zip(seconds, fits, strict=True)]
        return StageBounds(seconds=np.min(seconds, axis=0))


class MeshBounds:
    """The bounds of all stage kinds on each mesh, without memory and with it."""

    def __init__(self, stage_costs: StageCosts, memory_fit: MemoryFit) -> None:
        self.stage_costs, self.memory_fit = stage_costs, memory_fit
        self._unconstrained: dict[StageMesh, StageBounds] = {}
        self._constrained: dict[tuple[StageMesh, int], tuple[NDArray[np.bool_], StageBounds]] = {}

    def release(self) -> None:
        """Free what was computed."""
        self._unconstrained.clear()
        self._constrained.clear()

    def unconstrained(self, mesh: StageMesh) -> StageBounds:
        """The bounds of all stage kinds, whatever their memory."""
        if mesh not in self._unconstrained:
            sums = self.stage_costs.mesh_totals.totals(mesh, UNPRICED)
            num_blocks = self.stage_costs.num_blocks
            self._unconstrained[mesh] = self._bounds_from(mesh, num_blocks, sums.bound_s, sums.objectives)
        return self._unconstrained[mesh]

    def constrained(self, mesh: StageMesh, in_flight: int, wanted: NDArray[np.bool_]) -> StageBounds:
        """The bounds with the memory of ``in_flight`` micro-batches for the stage kinds ``wanted`` (stage kinds,) here or
        in an earlier call; without memory for the others."""
        if (mesh, in_flight) not in self._constrained:
            copied = StageBounds(seconds=self.unconstrained(mesh).seconds.copy())
            self._constrained[mesh, in_flight] = (np.zeros(len(wanted), bool), copied)
        done, bounds = self._constrained[mesh, in_flight]
        kinds = np.flatnonzero(wanted & ~done)
        if len(kinds):
            optima_s = self._lagrangian_bounds_s(mesh, in_flight, kinds)
            num_blocks = self.stage_costs.num_blocks[kinds]
            priced = self._bounds_from(mesh, num_blocks, optima_s, self._priced_objectives(mesh, in_flight))
            bounds.seconds[:, kinds] = np.maximum(bounds.seconds[:, kinds], priced.seconds)
            done[kinds] = True
        return bounds

    def submesh_busy_s(
        self, num_devices: int, stage_kinds: tuple[int, ...], in_flight: tuple[int, ...], cutoff_s: float
    ) -> float:
        """Seconds that a submesh is busy at least in a step with the chunks ``stage_kinds``, whose ``in_flight``
        micro-batches share its memory; inf where nothing fits. From ``cutoff_s`` on the bound need not be the best."""
        totals, least_s = self.stage_costs.mesh_totals, np.inf
        num_blocks = self.stage_costs.num_blocks[list(stage_kinds)].sum(axis=0)[None]
        for mesh in self.stage_costs.frontiers.meshes(num_devices):
            sums = totals.totals(mesh, UNPRICED)
            optima_s = sum((sums.bound_s[kind] for kind in stage_kinds), np.zeros(()))[None]
            busy_s = float(self._bounds_from(mesh, num_blocks, optima_s, sums.objectives).busy_s[0])
            if busy_s >= min(least_s, cutoff_s) or not self.memory_fit.can_chunks_fit(mesh, stage_kinds, in_flight):
                continue
            if not self.memory_fit.does_fastest_fit(mesh, stage_kinds, in_flight):
                parts_s = [
                    self._lagrangian_bounds_s(mesh, count, np.array([kind]))[0]
                    for kind, count in zip(stage_kinds, in_flight, strict=True)
                ]
                objectives = self._priced_objectives(mesh, in_flight[0])
                priced = self._bounds_from(mesh, num_blocks, np.sum(parts_s, axis=0)[None], objectives)
                busy_s = max(busy_s, float(priced.busy_s[0]))
            least_s = min(least_s, busy_s)
        return least_s

    def work_lower_bound_s(self, submesh_sizes: Sequence[int]) -> float:
        """Seconds that a step takes at least, whatever its pipeline and memory: the least device-seconds of every
        block, spread over all devices."""
        costs = self.stage_costs
        least_s = np.full(len(costs.variants), np.inf)
        for size in submesh_sizes:
            for mesh in costs.frontiers.meshes(size):
                for variant, frontier in enumerate(costs.frontiers.frontiers_by_variant(mesh, UNPRICED)):
                    path = [row for row, objective in enumerate(frontier.objectives) if objective.family == "path"]
                    prices = [objective.price_s_per_byte for objective in frontier.objectives]
                    budget_s = max(prices) * costs.pricing.budget_bytes
                    optimum_s = float(with_launch_time(frontier)[path].min()) - budget_s
                    seconds = max(optimum_s, self._launch_bound_s(variant, mesh))
                    least_s[variant] = min(least_s[variant], size * seconds)
        model = costs.num_blocks[int(costs.stage_kind_of[0, len(costs.pricer.blocks)])]
        blocks_s = np.where(model > 0, model * least_s, 0.0).sum() / costs.num_devices
        pricing = costs.pricing
        return float(pricing.num_microbatches * (blocks_s + pricing.microbatch_loop_s) + pricing.step_loop_s)

    def _lagrangian_bounds_s(self, mesh: StageMesh, in_flight: int, stage_kinds: Ints) -> Floats:
        """(stage kinds, objectives, boundaries): sums of the optima of the memory-priced objectives, between two grid
        points interpolated."""
        totals = self.stage_costs.mesh_totals
        return sum(
            (
                share * totals.totals(mesh, point).bound_s[stage_kinds]
                for point, share in interpolation_weights(IN_FLIGHT_GRID, in_flight)
            ),
            np.zeros(()),
        )

    def _priced_objectives(self, mesh: StageMesh, in_flight: int) -> tuple[PricedObjective, ...]:
        """The objectives of the first grid point next to ``in_flight``; those of another one have the same prices."""
        point, _ = interpolation_weights(IN_FLIGHT_GRID, in_flight)[0]
        return self.stage_costs.mesh_totals.totals(mesh, point).objectives

    def _bounds_from(
        self, mesh: StageMesh, num_blocks: Floats, optima_s: Floats, objectives: tuple[PricedObjective, ...]
    ) -> StageBounds:
        """The bounds of stages with ``num_blocks`` (stages, variants) from sums of optima (stages, objectives,
        boundaries)."""
        pricing, frontiers = self.stage_costs.pricing, self.stage_costs.frontiers
        minima = np.array([frontier.minima for frontier in frontiers.frontiers_by_variant(mesh, UNPRICED)])
        minima = np.where(np.isfinite(minima), minima, LEAST_IMPOSSIBLE)
        prices = np.array([objective.price_s_per_byte for objective in objectives])
        value_s = optima_s
        if np.isfinite(pricing.budget_bytes):
            budget_bytes = pricing.tensor_budget_bytes - self.memory_fit.min_workspace_bytes(mesh, num_blocks)
            value_s = optima_s - prices[:, None] * np.maximum(budget_bytes, 0.0)[:, None, None]
        best_s = {family: np.full(value_s.shape[::2], -np.inf) for family in po.OBJECTIVE_FAMILIES}
        for row, objective in enumerate(objectives):
            if objective.family != "lean":
                best_s[objective.family] = np.maximum(best_s[objective.family], value_s[:, row])
        forward_s, step_s = num_blocks @ minima[:, 0], num_blocks @ minima[:, 2]
        launches_s = num_blocks @ np.array(
            [self._launch_bound_s(variant, mesh) for variant in range(len(self.stage_costs.variants))]
        )
        path_s = np.maximum(best_s["path"], best_s["linked"])
        path_s = np.maximum(path_s, np.maximum(launches_s, forward_s)[:, None])
        B, loop_s, step_loop_s = pricing.num_microbatches, pricing.microbatch_loop_s, pricing.step_loop_s
        busy_s = B * np.maximum(np.maximum(best_s["hidden"], best_s["reduced"]), path_s)
        busy_s = np.maximum(busy_s, B * path_s + step_s[:, None]) + B * loop_s + step_loop_s
        return StageBounds(
            seconds=np.stack(
                [forward_s + loop_s / 2, path_s.min(axis=1) + loop_s, step_s + step_loop_s, busy_s.min(axis=1)]
            )
        )

    def _launch_bound_s(self, variant: int, mesh: StageMesh) -> float:
        """Seconds in which the host launches the kernels of a block's forward and backward."""
        forward, _, backward, _ = self.stage_costs.frontiers.frontier(variant, mesh, UNPRICED).tables.launch_s
        return forward + backward
