"""Times that stages reach with all their blocks at the same frontier point: a good start for the search."""

import numpy as np
from numpy.typing import NDArray

from autopar.inter.block_pricer import StageMesh
from autopar.inter.frontier_cache import UNPRICED
from autopar.inter.mesh_totals import LEAST_IMPOSSIBLE, MeshTotals
from autopar.inter.stage_costs import StageCosts

Floats = NDArray[np.float64]
Ints = NDArray[np.integer]


class UniformTimes:
    """The fastest uniform choices found so far for stages with ``in_flight`` micro-batches: ``amortised_s`` (stage
    kinds,), inf where none fits."""

    def __init__(self, stage_costs: StageCosts, in_flight: int) -> None:
        self._stage_costs, self._in_flight = stage_costs, in_flight
        num_stage_kinds = len(stage_costs.num_blocks)
        self.amortised_s = np.full(num_stage_kinds, np.inf)
        self._seconds = np.full((3, num_stage_kinds), np.inf)

    def seconds(self) -> Floats:
        """(3, stage kinds) forward, backward and step of the fastest; inf where none fits."""
        return np.where(self.amortised_s < LEAST_IMPOSSIBLE, self._seconds, np.inf)

    def improve(self, mesh: StageMesh, totals: MeshTotals) -> None:
        """Take the fastest point of ``totals`` that fits for every stage kind for which it is faster."""
        kinds = np.flatnonzero(totals.fastest_s() < self.amortised_s)
        if not len(kinds):
            return
        fits = totals.memory_bytes(self._in_flight, kinds) <= self._stage_costs.pricing.tensor_budget_bytes
        flat_s = np.where(fits, totals.amortised_s[kinds], np.inf).reshape(len(kinds), -1)
        fastest = flat_s.argmin(axis=1)
        fastest_s = flat_s[np.arange(len(kinds)), fastest]
        faster = fastest_s < self.amortised_s[kinds]
        if faster.any():
            self.amortised_s[kinds[faster]] = fastest_s[faster]
            stage_totals = self._stage_totals(mesh, totals, kinds[faster], fastest[faster])
            for row, seconds in enumerate(self._stage_costs.pricing.times_s(stage_totals)):
                self._seconds[row, kinds[faster]] = seconds

    def _stage_totals(self, mesh: StageMesh, totals: MeshTotals, stage_kinds: Ints, points: Ints) -> Floats:
        """(stage kinds, totals) with all blocks at the flat (objective, boundary) index ``points`` of each kind."""
        rows, boundaries = np.divmod(points, totals.amortised_s.shape[2])
        frontiers = self._stage_costs.frontiers.frontiers_by_variant(mesh, totals.phase)
        of_block = np.stack([one.totals[totals.objective_slice][rows, boundaries] for one in frontiers], axis=1)
        num_blocks = self._stage_costs.num_blocks[stage_kinds][..., None]
        return np.asarray(np.sum(np.where(num_blocks > 0, of_block, 0.0) * num_blocks, axis=1))


def fastest_uniform_s(stage_costs: StageCosts, num_devices: int, stage_kind: int, in_flight: int) -> float:
    """Seconds per micro-batch, with its share of the step, of a stage kind at the fastest point of the unpriced
    objectives that fits; inf where none does."""
    fastest_s = np.inf
    for mesh in stage_costs.frontiers.meshes(num_devices):
        sums = stage_costs.mesh_totals.totals(mesh, UNPRICED)
        fits = sums.memory_bytes(in_flight, stage_kind) <= stage_costs.pricing.tensor_budget_bytes
        fastest_s = min(fastest_s, float(np.where(fits, sums.amortised_s[stage_kind], np.inf).min()))
    return fastest_s
