"""Tables over all stages (first block, end block, submesh) for the outer search: lower bounds (`mesh_bounds`), and times
that are reached (`uniform_times`).
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autopar.inter.block_pricer import StageMesh
from autopar.inter.even_pipelines import guess_even_pipelines
from autopar.inter.frontier_cache import UNPRICED
from autopar.inter.in_flight_grid import IN_FLIGHT_GRID, interpolation_weights
from autopar.inter.memory_fit import MemoryFit
from autopar.inter.mesh_bounds import MeshBounds, StageBounds
from autopar.inter.pipeline_bounds import max_in_flight
from autopar.inter.pipeline_problem import StageTimeTable
from autopar.inter.stage_costs import StageCosts
from autopar.inter.stage_span import DeviceStage
from autopar.inter.uniform_times import UniformTimes

Floats = NDArray[np.float64]


class StageCostTables:
    """The tables of one micro-batch size over submeshes of ``submesh_sizes`` devices."""

    def __init__(self, stage_costs: StageCosts, submesh_sizes: tuple[int, ...]) -> None:
        self.stage_costs, self.submesh_sizes = stage_costs, submesh_sizes
        self.cutoff_s = np.inf
        self._memory_fit = MemoryFit(stage_costs)
        self._mesh_bounds = MeshBounds(stage_costs, self._memory_fit)
        self._bounds: dict[tuple[int, int], tuple[StageBounds, Floats]] = {}

    def release(self) -> None:
        """Free what was priced; it is priced again when asked for."""
        self._bounds.clear()
        for part in (self._memory_fit, self._mesh_bounds, self.stage_costs):
            part.release()

    def set_cutoff(self, cutoff_s: float) -> None:
        """Steps of ``cutoff_s`` seconds or longer are of no interest: stages busy for that long need no better
        bound."""
        if cutoff_s != self.cutoff_s:
            self.cutoff_s = cutoff_s
            self._bounds.clear()

    def bounds_without_memory(self) -> StageTimeTable:
        """Lower bounds of all stages, whatever their memory."""
        return self._table(None, [self._unconstrained(size) for size in self.submesh_sizes])

    def lower_bounds(self, in_flight: int) -> StageTimeTable:
        """Lower bounds of all stages with ``in_flight`` micro-batches; inf for those that cannot have as many (1F1B:
        stage number ``in_flight`` from the last)."""
        return self._table(in_flight, [self.bounds(size, in_flight) for size in self.submesh_sizes])

    def uniform_times(self, in_flight: int) -> StageTimeTable:
        """Times of the fastest choices whose blocks all take one point: reached, not bounds."""
        by_size = [self._bounds_and_uniform(size, in_flight)[1] for size in self.submesh_sizes]
        forward, backward, step = (self._by_stage(in_flight, [one[row] for one in by_size]) for row in range(3))
        return StageTimeTable(forward_s=forward, backward_s=backward, step_s=step)

    def forward_backward_s(self, num_devices: int) -> Floats:
        """(L + 1, L + 1) seconds that forward and backward of blocks i..j-1 take at least on ``num_devices`` devices,
        whatever their memory; inf where j <= i."""
        return self._spread(self._unconstrained(num_devices).forward_backward_s)

    def per_step_s(self, num_devices: int) -> Floats:
        """(L + 1, L + 1) seconds that the work once per step (reductions, optimizer) takes at least, likewise."""
        return self._spread(self._unconstrained(num_devices).step_s)

    def submesh_busy_s(self, num_devices: int, stage_kinds: tuple[int, ...], in_flight: tuple[int, ...]) -> float:
        """Seconds that a submesh with these chunks is busy at least in a step; inf where nothing fits."""
        return self._mesh_bounds.submesh_busy_s(num_devices, stage_kinds, in_flight, self.cutoff_s)

    def work_lower_bound_s(self) -> float:
        """Seconds that a step takes at least, whatever its pipeline and memory."""
        return self._mesh_bounds.work_lower_bound_s(self.submesh_sizes)

    def guess_even_pipelines(self) -> list[tuple[float, tuple[DeviceStage, ...]]]:
        """Even pipelines that fit, one for each possible number of stages, and about what a step of each takes."""
        return guess_even_pipelines(self.stage_costs, self.submesh_sizes)

    def can_any_pipeline_fit(self, in_flight_from_last: tuple[int, ...]) -> bool:
        """False: no pipeline fits the budget, even with the least-memory choices, if stage number s from the last has
        ``in_flight_from_last[s - 1]`` in-flight micro-batches."""
        num_blocks, unit = len(self.stage_costs.pricer.blocks), math.gcd(*self.submesh_sizes)
        # which (first block, devices in units) a suffix of the pipeline can have
        suffixes = np.zeros((num_blocks + 1, self.stage_costs.num_devices // unit + 1), np.float32)
        suffixes[num_blocks, 0] = 1.0
        for in_flight in in_flight_from_last:
            longer = np.zeros_like(suffixes)
            for size in self.submesh_sizes:
                meshes = self.stage_costs.frontiers.meshes(size)
                fits = np.any([self._memory_fit.can_fit(mesh, in_flight) for mesh in meshes], axis=0)
                possible = self.possible_stages(size, in_flight)
                stages = np.where(possible, fits[self.stage_costs.stage_kind_of], False).astype(np.float32)
                longer[:, size // unit :] += stages @ suffixes[:, : suffixes.shape[1] - size // unit]
            suffixes = np.minimum(longer, 1.0)
            if suffixes[0, -1]:
                return True
        return False

    def bounds(self, num_devices: int, in_flight: int) -> StageBounds:
        """Lower bounds of every stage kind on ``num_devices`` devices with ``in_flight`` micro-batches."""
        return self._bounds_and_uniform(num_devices, in_flight)[0]

    def possible_stages(self, num_devices: int, in_flight: int | None) -> NDArray[np.bool_]:
        """(L + 1, L + 1) which (first block, end block) a stage on ``num_devices`` devices can have. With fewer in-flight
        micro-batches than there are (None: any number), 1F1B says how many stages follow, each of at least one
        block."""
        kinds, num_microbatches = self.stage_costs.stage_kind_of, self.stage_costs.num_microbatches
        first, end = np.indices(kinds.shape)
        num_blocks = len(kinds) - 1
        if num_devices == self.stage_costs.num_devices:
            only_stage = max_in_flight(self.stage_costs.schedule, num_microbatches, 1)
            return np.asarray((first == 0) & (end == num_blocks) & (in_flight in (only_stage, None)))
        if in_flight is None or in_flight >= num_microbatches:
            return np.asarray(kinds >= 0)
        last_blocks = (end == num_blocks) if in_flight == 1 else (end <= num_blocks + 1 - in_flight)
        return np.asarray((kinds >= 0) & last_blocks)

    def _unconstrained(self, num_devices: int) -> StageBounds:
        meshes = self.stage_costs.frontiers.meshes(num_devices)
        return StageBounds.minimum([self._mesh_bounds.unconstrained(mesh) for mesh in meshes])

    def _bounds_and_uniform(self, num_devices: int, in_flight: int) -> tuple[StageBounds, Floats]:
        """Lower bounds of every stage kind, and the (3, stage kinds) times of the fastest uniform choices."""
        key = (num_devices, in_flight)
        if key not in self._bounds:
            self._bounds[key] = self._make_bounds(num_devices, in_flight)
        return self._bounds[key]

    def _make_bounds(self, num_devices: int, in_flight: int) -> tuple[StageBounds, Floats]:
        costs = self.stage_costs
        uniform = UniformTimes(costs, in_flight)
        needed = np.zeros(len(costs.num_blocks), bool)
        needed[costs.stage_kind_of[self.possible_stages(num_devices, in_flight)]] = True
        if not needed.any():
            return StageBounds.impossible(len(costs.num_blocks)), uniform.seconds()
        meshes = costs.frontiers.meshes(num_devices)
        bounds = [self._mesh_bounds.unconstrained(mesh) for mesh in meshes]
        for mesh in meshes:
            uniform.improve(mesh, costs.mesh_totals.totals(mesh, UNPRICED))
        fits = [self._memory_fit.can_fit(mesh, in_flight) for mesh in meshes]
        for index in sorted(range(len(meshes)), key=lambda index: float(bounds[index].busy_s.min())):
            mesh, busy_s = meshes[index], bounds[index].busy_s
            is_bound_by_memory = ~self._fits_at_fastest(mesh, in_flight)
            is_open = (busy_s < costs.num_microbatches * uniform.amortised_s) & (busy_s < self.cutoff_s)
            wanted = needed & fits[index] & is_bound_by_memory & is_open
            if wanted.any():
                for point, _ in interpolation_weights(IN_FLIGHT_GRID, in_flight):
                    uniform.improve(mesh, costs.mesh_totals.totals(mesh, point))
                bounds[index] = self._mesh_bounds.constrained(mesh, in_flight, wanted)
        return StageBounds.minimum(bounds, fits), uniform.seconds()

    def _fits_at_fastest(self, mesh: StageMesh, in_flight: int) -> NDArray[np.bool_]:
        """(stage kinds,) whether the fastest uniform choice of the unpriced objectives fits."""
        sums = self.stage_costs.mesh_totals.totals(mesh, UNPRICED)
        return np.asarray(sums.bytes_of_fastest(in_flight) <= self.stage_costs.pricing.tensor_budget_bytes)

    def _table(self, in_flight: int | None, bounds: Sequence[StageBounds]) -> StageTimeTable:
        """A table from the bounds on each submesh size."""
        backward_s = [
            one.forward_backward_s - np.where(np.isfinite(one.forward_backward_s), one.forward_s, 0.0) for one in bounds
        ]
        return StageTimeTable(
            forward_s=self._by_stage(in_flight, [one.forward_s for one in bounds]),
            backward_s=self._by_stage(in_flight, backward_s),
            step_s=self._by_stage(in_flight, [one.step_s for one in bounds]),
            busy_s=self._by_stage(in_flight, [one.busy_s for one in bounds]),
        )

    def _by_stage(self, in_flight: int | None, by_stage_kind: Sequence[Floats]) -> Floats:
        """(L + 1, L + 1, submesh sizes) of possible stages, from (stage kinds,) for each size; else inf."""
        planes = [
            np.where(self.possible_stages(size, in_flight), values[self.stage_costs.stage_kind_of], np.inf)
            for size, values in zip(self.submesh_sizes, by_stage_kind, strict=True)
        ]
        return np.stack(planes, axis=-1)

    def _spread(self, by_stage_kind: Floats) -> Floats:
        """(L + 1, L + 1) from (stage kinds,); inf where there is no stage."""
        kinds = self.stage_costs.stage_kind_of
        return np.where(kinds >= 0, by_stage_kind[kinds], np.inf)
