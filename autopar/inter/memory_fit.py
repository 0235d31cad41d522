"""Which stages fit a memory budget at all: the least bytes of any choice, from the least-memory objectives.

For any choice, price * bytes + seconds is at least the optimum of a least-memory objective, whose price
(``LEAST_MEMORY_PRICE_S_PER_BYTE``, s per byte) is so high that a block's seconds count for less than a byte. So no choice
needs less than optimum / price bytes, less a byte per block.
"""

import numpy as np
from numpy.typing import NDArray

from autopar.inter.block_pricer import StageMesh
from autopar.inter.frontier_cache import UNPRICED
from autopar.inter.in_flight_grid import LEAN_IN_FLIGHT_GRID, interpolation_weights
from autopar.inter.stage_costs import StageCosts
from autopar.intra.priced_objectives import LEAST_MEMORY_PRICE_S_PER_BYTE

Floats = NDArray[np.float64]


class MemoryFit:
    """Which stage kinds may fit on a mesh; False proves that no choice does."""

    def __init__(self, stage_costs: StageCosts) -> None:
        self.stage_costs = stage_costs
        self._can_fit: dict[tuple[StageMesh, int], NDArray[np.bool_]] = {}

    def release(self) -> None:
        """Free what was computed."""
        self._can_fit.clear()

    def can_fit(self, mesh: StageMesh, in_flight: int) -> NDArray[np.bool_]:
        """(stage kinds,) whether a choice may fit with ``in_flight`` micro-batches."""
        if (mesh, in_flight) not in self._can_fit:
            num_blocks = self.stage_costs.num_blocks
            need = self._min_bytes(mesh, in_flight) + self.min_workspace_bytes(mesh, num_blocks)
            need = need - num_blocks.sum(axis=1)
            self._can_fit[mesh, in_flight] = need <= self.stage_costs.pricing.tensor_budget_bytes
        return self._can_fit[mesh, in_flight]

    def can_chunks_fit(self, mesh: StageMesh, stage_kinds: tuple[int, ...], in_flight: tuple[int, ...]) -> bool:
        """Whether choices for chunks with ``in_flight`` micro-batches each may fit together on one mesh."""
        num_blocks = self.stage_costs.num_blocks[list(stage_kinds)].sum(axis=0)[None]
        need = sum(
            float(self._min_bytes(mesh, count)[kind]) for kind, count in zip(stage_kinds, in_flight, strict=True)
        )
        need = need + self.min_workspace_bytes(mesh, num_blocks)[0] - num_blocks.sum()
        return bool(need <= self.stage_costs.pricing.tensor_budget_bytes)

    def does_fastest_fit(self, mesh: StageMesh, stage_kinds: tuple[int, ...], in_flight: tuple[int, ...]) -> bool:
        """Whether the chunks fit together at the fastest point of the unpriced objectives, the same for all blocks."""
        sums = self.stage_costs.mesh_totals.totals(mesh, UNPRICED)
        fastest = int(sums.amortised_s[list(stage_kinds)].sum(axis=0).argmin())
        memory = sum(sums.memory_bytes(count)[kind] for kind, count in zip(stage_kinds, in_flight, strict=True))
        return bool(np.ravel(memory)[fastest] <= self.stage_costs.pricing.tensor_budget_bytes)

    def min_workspace_bytes(self, mesh: StageMesh, num_blocks: Floats) -> Floats:
        """(stages,) the least workspace of any choice, from the (stages, variants) numbers of blocks."""
        frontiers = self.stage_costs.frontiers.frontiers_by_variant(mesh, UNPRICED)
        least = np.array([frontier.minima[1] for frontier in frontiers])
        return np.asarray(np.where(num_blocks > 0, least, 0.0).max(axis=1))

    def _min_bytes(self, mesh: StageMesh, in_flight: int) -> Floats:
        """(stage kinds,) the least bytes of any choice without workspace and fixed bytes."""
        sums = self.stage_costs.mesh_totals.totals(mesh, UNPRICED)
        least = np.zeros(())
        for point, share in interpolation_weights(LEAN_IN_FLIGHT_GRID, in_flight):
            row = next(
                index
                for index, objective in enumerate(sums.objectives)
                if objective.family == "lean" and objective.saved_weight == point
            )
            least = least + share * sums.bound_s[:, row].min(axis=-1) / LEAST_MEMORY_PRICE_S_PER_BYTE
        return np.asarray(least)
