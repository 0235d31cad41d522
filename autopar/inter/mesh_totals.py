"""The totals of every stage kind on one mesh, with all blocks of a stage at the same frontier point, and optima below
which no choice is."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.inter.block_pricer import StageMesh
from autopar.inter.frontier_cache import PRICED, UNPRICED, FrontierCache
from autopar.inter.stage_pricing import StagePricing
from autopar.intra import block_totals as tt
from autopar.intra.frontier import BlockFrontier
from autopar.intra.priced_objectives import PricedObjective

Floats = NDArray[np.float64]
StageKindIndex = int | slice | NDArray[np.integer] | list[int]
IMPOSSIBLE = 1e30
"""Stands for infinity in sums, where inf times a count of zero would be undefined."""
LEAST_IMPOSSIBLE = 1e29
"""Sums of at least this contain an impossible addend."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeshTotals:
    """Arrays of shape (stage kinds, objectives, boundary placements), all blocks of a stage taking the solution of the
    same objective: ``amortised_s`` seconds per micro-batch with its share of the step, ``base_bytes`` without fixed
    bytes and saved tensors, ``saved_bytes`` per in-flight micro-batch. ``bound_s``: the least sum of the objective's
    optima. ``fastest`` (stage kinds,) is the flat (objective, boundary) index of the least ``amortised_s``.
    ``objectives`` are ``objective_slice`` of those of ``phase``."""

    phase: int
    objective_slice: slice
    objectives: tuple[PricedObjective, ...]
    amortised_s: Floats
    base_bytes: Floats
    saved_bytes: Floats
    bound_s: Floats
    fastest: NDArray[np.integer]

    def memory_bytes(self, in_flight: float, stage_kinds: StageKindIndex = slice(None)) -> Floats:
        """Bytes without the fixed ones of all or some stage kinds with ``in_flight`` micro-batches."""
        return np.asarray(self.base_bytes[stage_kinds] + in_flight * self.saved_bytes[stage_kinds])

    def fastest_s(self) -> Floats:
        """(stage kinds,) the least ``amortised_s``."""
        return self._at_fastest(self.amortised_s)

    def bytes_of_fastest(self, in_flight: float) -> Floats:
        """(stage kinds,) bytes without the fixed ones of the fastest point."""
        return self._at_fastest(self.base_bytes) + in_flight * self._at_fastest(self.saved_bytes)

    def _at_fastest(self, values: Floats) -> Floats:
        count = len(self.fastest)
        return np.asarray(values.reshape(count, -1)[np.arange(count), self.fastest])


class MeshTotalsCache:
    """The `MeshTotals` of every mesh and in-flight grid point, made once."""

    def __init__(self, frontiers: FrontierCache, pricing: StagePricing) -> None:
        self.frontiers, self.pricing = frontiers, pricing
        self._num_blocks = frontiers.pricer.stage_kinds.num_blocks
        self._cache: dict[tuple[StageMesh, int], MeshTotals] = {}

    def release(self) -> None:
        """Free the totals; they are summed again when asked for."""
        self._cache.clear()

    def totals(self, mesh: StageMesh, grid_in_flight: int) -> MeshTotals:
        """The totals of the memory-priced objectives of one point of the in-flight grid, or, for ``UNPRICED``, of the
        unpriced objectives."""
        if (mesh, grid_in_flight) not in self._cache:
            self._cache[mesh, grid_in_flight] = self._sum(mesh, grid_in_flight)
        return self._cache[mesh, grid_in_flight]

    def _sum(self, mesh: StageMesh, grid_in_flight: int) -> MeshTotals:
        phase = UNPRICED if grid_in_flight == UNPRICED else PRICED
        frontiers = self.frontiers.frontiers_by_variant(mesh, phase)
        rows = self.frontiers.objective_slice(mesh, grid_in_flight)
        objectives = self.frontiers.objectives(mesh, phase)[rows]
        totals = np.stack([np.where(np.isfinite(one.totals[rows]), one.totals[rows], IMPOSSIBLE) for one in frontiers])
        optima = np.stack([with_launch_time(one)[rows] for one in frontiers])
        sums = np.einsum("kv,vrbt->krbt", self._num_blocks, totals)
        sums[..., tt.WORKSPACE] = 0.0  # a maximum over the blocks, not a sum
        workspace = np.zeros(sums.shape[:-1])
        for variant, present in enumerate((self._num_blocks > 0).T):
            of_variant = np.where(present[:, None, None], totals[None, variant, :, :, tt.WORKSPACE], 0.0)
            np.maximum(workspace, of_variant, out=workspace)
        amortised_s = self.pricing.amortised_s(sums)
        return MeshTotals(
            phase=phase,
            objective_slice=rows,
            objectives=objectives,
            amortised_s=amortised_s,
            base_bytes=tt.memory_bytes(sums, 0) + workspace,
            saved_bytes=sums[..., tt.SAVED].copy(),
            bound_s=np.einsum("kv,vrb->krb", self._num_blocks, _min_over_recompute_modes(objectives, optima)),
            fastest=amortised_s.reshape(len(amortised_s), -1).argmin(axis=1),
        )

    def unconstrained_bound_s(self, stage_kinds: tuple[int, ...], mesh: StageMesh) -> float:
        """Seconds per micro-batch, with its share of the step, that no choice for the chunks ``stage_kinds`` on a mesh
        is below, whatever its memory."""
        sums = self.totals(mesh, UNPRICED)
        rows = [row for row, objective in enumerate(sums.objectives) if objective.family == "hidden"]
        charged_s = max(sums.objectives[row].price_s_per_byte for row in rows) * self.pricing.tensor_budget_bytes
        bound_s = float(sums.bound_s[list(stage_kinds)].sum(axis=0)[rows].min())
        return bound_s - (charged_s if np.isfinite(charged_s) else 0.0)


def with_launch_time(frontier: BlockFrontier) -> Floats:
    """(objectives, boundaries) optima of a block in seconds, which count the device alone, raised to the host's time to
    launch its kernels, or, where launches block, with that time added; ``IMPOSSIBLE`` where there is no solution."""
    forward, selective, backward, full = frontier.tables.launch_s
    recomputed = {"selective": selective, "full": full}
    launch_s = np.array(
        [
            0.0 if objective.family == "lean" else forward + backward + recomputed.get(objective.mode, 0.0)
            for objective in frontier.objectives
        ]
    )
    combine = np.add if frontier.tables.blocking_launches else np.maximum
    optima_s = np.where(np.isfinite(frontier.bound_s), frontier.bound_s, IMPOSSIBLE)
    return np.asarray(combine(optima_s, launch_s[:, None]))


def _min_over_recompute_modes(objectives: tuple[PricedObjective, ...], optima_s: Floats) -> Floats:
    """(variants, objectives, boundaries): each optimum replaced by the least of the objectives that differ in the
    recompute mode only."""
    groups: dict[tuple[str, float, float], list[int]] = {}
    for row, objective in enumerate(objectives):
        key = (objective.family, objective.price_s_per_byte, objective.saved_weight)
        groups.setdefault(key, []).append(row)
    least = optima_s.copy()
    for rows in groups.values():
        least[:, rows] = optima_s[:, rows].min(axis=1, keepdims=True)
    return least
