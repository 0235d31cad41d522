"""The blocks of a stage as the search decided them: which point of its frontier each takes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autopar.core.placement import PARTIAL, REPLICATE, Placement, Shard, format_placements
from autopar.core.plan import ParameterPlan
from autopar.cost.parameter_storage import ParameterStorage
from autopar.graph.ir import Graph
from autopar.inter.block_pricer import StageMesh
from autopar.inter.stage_choice import FrontierRef, StageChoice
from autopar.inter.stage_costs import StageCosts
from autopar.intra.frontier import BlockFrontier
from autopar.rules.placement_pair import PARTIAL_GRADIENT, REPLICATED, PlacementPair


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockChoice:
    """A block of a stage: its column, and the point of its frontier that it takes."""

    variant: int
    frontier_ref: FrontierRef
    frontier: BlockFrontier
    boundary: int
    mesh: StageMesh

    @property
    def row(self) -> int:
        return self.frontier_ref[1]

    def strategy(self, op_index: int) -> int:
        """The strategy of the block's op ``at``."""
        return int(self.frontier.choices[2 + op_index, self.row, self.boundary])

    def parameter_plans(self, graph: Graph) -> dict[int, ParameterPlan]:
        """Where the block keeps each of its parameters."""
        tables = self.frontier.tables
        found: dict[int, ParameterPlan] = {}
        for at, node in enumerate(tables.space.ops):
            strategy = self.strategy(at)
            names, chosen = self.frontier.storages[at]
            for number, position in enumerate(node.parameter_inputs):
                value = graph.values[node.op.inputs[position]]
                storage = names[number * len(tables.strategies[at]) + strategy][int(chosen[number][self.row, strategy])]
                data = (
                    PARTIAL_GRADIENT if value.id in tables.space.data_axis.partial_gradient_parameters else REPLICATED
                )
                pairs = [data, *(option.inputs[position] for option in tables.strategies[at][strategy])]
                found.setdefault(
                    value.id, _parameter_plan(value.qualified_names or (value.name,), pairs, storage, self.mesh)
                )
        return found

    @property
    def totals(self) -> np.ndarray:  # type: ignore[type-arg]
        return self.frontier.totals[self.row, self.boundary]


def block_choices(stage_costs: StageCosts, choice: StageChoice, first_block: int, end_block: int) -> list[BlockChoice]:
    """Blocks first..end-1 under a choice, in order."""
    columns = stage_costs.variants_of(first_block, end_block)
    return [
        BlockChoice(
            variant=column,
            frontier_ref=ref,
            frontier=stage_costs.frontier(column, choice.mesh, ref[0]),
            boundary=choice.boundary,
            mesh=choice.mesh,
        )
        for column, ref in zip(columns, choice.point_of_each_block(columns), strict=True)
    ]


def _parameter_plan(
    names: Sequence[str], pairs: Sequence[PlacementPair], storage: ParameterStorage, mesh: StageMesh
) -> ParameterPlan:
    """ZeRO shards dim 0 of what the op's own shards leave to a rank, so its split factor is the pieces that they make.
    ``pairs`` are those of all axes, the data axis first."""
    compute: list[Placement] = [pair.atom.shard if pair.atom is not None else REPLICATE for pair in pairs]
    pieces = 1
    for placement, size in zip(compute, mesh.sizes, strict=True):
        if isinstance(placement, Shard) and placement.dim == 0:
            pieces = max(pieces, placement.split_factor * size)
    sharded = [Shard(0, pieces) if axis in storage.axes else placement for axis, placement in enumerate(compute)]
    gradient = [
        PARTIAL if placement == REPLICATE and pair == PARTIAL_GRADIENT else placement
        for placement, pair in zip(sharded if storage.stage >= 2 else compute, pairs, strict=True)
    ]
    first = 0 if mesh.has_data_axis else 1
    return ParameterPlan(
        name=names[0],
        compute=format_placements(compute[first:]),
        parameter=format_placements((sharded if storage.stage == 3 else compute)[first:]),
        gradient=format_placements(gradient[first:]),
        optimizer=format_placements((sharded if storage.stage >= 1 else compute)[first:]),
    )
