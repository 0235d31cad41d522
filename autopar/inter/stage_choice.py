"""How a stage runs and what that costs: the mesh, the boundary placement, and the frontier point of each block."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.inter.block_pricer import StageMesh
from autopar.inter.stage_pricing import StagePricing
from autopar.intra import block_totals as tt
from autopar.intra.block_totals import memory_bytes
from autopar.intra.frontier import BlockFrontier

Floats = NDArray[np.float64]
FrontierRef = tuple[int, int]
"""A point of a block's frontier: the phase of its objectives, and the objective's index in it."""
VariantMix = tuple[tuple[FrontierRef, int], ...]
"""How many blocks of one variant take which point."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageChoice:
    """How a stage runs: its mesh, its boundary placement (an index into the tables' boundary roles), and for each block
    variant how many of its blocks take which point."""

    mesh: StageMesh
    boundary: int
    mixes: tuple[tuple[int, VariantMix], ...]

    def point_of_each_block(self, variants: Sequence[int]) -> tuple[FrontierRef, ...]:
        """The points of blocks with these ``variants``, in order: the first blocks of a variant take the first point of
        its mix."""
        remaining = {variant: [ref for ref, count in mix for _ in range(count)] for variant, mix in self.mixes}
        return tuple(remaining[variant].pop(0) for variant in variants)


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePrice:
    """What a stage costs under ``choice``: ``forward_s`` and ``backward_s`` seconds per micro-batch, ``step_s`` exposed
    seconds per step, ``amortised_s`` seconds per micro-batch with its share of the step, ``memory_bytes`` on a device,
    fixed bytes included."""

    forward_s: float
    backward_s: float
    step_s: float
    memory_bytes: float
    amortised_s: float
    choice: StageChoice


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageFrontier:
    """The points that the blocks of a stage on ``mesh`` may take: ``totals[variant, point, boundary]`` (`block_totals`),
    ``num_blocks`` of each of ``variants``, and the ``refs`` of the points, which are the same for all variants."""

    mesh: StageMesh
    variants: tuple[int, ...]
    num_blocks: tuple[int, ...]
    refs: tuple[FrontierRef, ...]
    totals: Floats

    @staticmethod
    def of(
        mesh: StageMesh,
        variants: tuple[int, ...],
        num_blocks: tuple[int, ...],
        phases: Sequence[tuple[int, slice, Sequence[BlockFrontier]]],
    ) -> "StageFrontier":
        """``phases``: for each phase, which of its objectives, and the frontier of every variant."""
        refs = tuple((phase, row) for phase, rows, found in phases for row in range(len(found[0].objectives))[rows])
        stacked = [np.stack([frontier.totals[rows] for frontier in found]) for _, rows, found in phases]
        return StageFrontier(
            mesh=mesh, variants=variants, num_blocks=num_blocks, refs=refs, totals=np.concatenate(stacked, axis=1)
        )


def price_totals(pricing: StagePricing, totals: Floats, in_flight: float, choice: StageChoice) -> StagePrice:
    """The price of a stage whose blocks have these totals (totals,) together under ``choice``."""
    forward, backward, step = pricing.times_s(totals)
    return StagePrice(
        forward_s=float(forward),
        backward_s=float(backward),
        step_s=float(step),
        memory_bytes=float(memory_bytes(totals, in_flight)) + pricing.fixed_bytes,
        amortised_s=float(pricing.amortised_s(totals)),
        choice=choice,
    )


def sum_totals(totals_and_counts: Sequence[tuple[Floats, Floats | float]]) -> Floats:
    """The totals (..., totals) of several blocks from pairs of totals and number of blocks (...): sums, and of the
    workspace the maximum over those with a count above 0."""
    summed = sum((totals * np.asarray(count)[..., None] for totals, count in totals_and_counts), np.zeros(1))
    workspace = np.zeros(summed.shape[:-1])
    for totals, count in totals_and_counts:
        workspace = np.maximum(workspace, np.where(np.asarray(count) > 0, totals[..., tt.WORKSPACE], 0.0))
    summed[..., tt.WORKSPACE] = workspace
    return np.asarray(summed)
