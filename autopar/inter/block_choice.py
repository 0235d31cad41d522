"""The blocks of a stage as the search decided them: which point of its frontier each block takes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.core.placement import PARTIAL, REPLICATE, Placement, Shard, format_placements
from autopar.core.plan import ParameterPlan
from autopar.cost.parameter_storage import ParameterStorage
from autopar.graph.ir import Graph
from autopar.inter.block_pricer import StageMesh
from autopar.inter.frontier_cache import FrontierCache
from autopar.inter.stage_choice import FrontierRef, StageChoice
from autopar.intra.frontier import BlockFrontier
from autopar.rules.placement_pair import PARTIAL_GRADIENT, REPLICATED, PlacementPair


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockChoice:
    """A block of a stage on ``mesh``: its variant (an index into those of `FrontierCache`), and the point
    ``frontier_ref`` of its ``frontier`` that it takes at the stage's ``boundary`` placement."""

    variant: int
    frontier_ref: FrontierRef
    frontier: BlockFrontier
    boundary: int
    mesh: StageMesh

    @property
    def row(self) -> int:
        """The index of the point's objective in its phase."""
        return self.frontier_ref[1]

    @property
    def totals(self) -> NDArray[np.float64]:
        """(totals,) of the block (`block_totals`)."""
        return np.asarray(self.frontier.totals[self.row, self.boundary])

    def strategy(self, op_index: int) -> int:
        """The index of the strategy of the block's op number ``op_index``."""
        return int(self.frontier.choices[2 + op_index, self.row, self.boundary])

    def parameter_plans(self, graph: Graph) -> dict[int, ParameterPlan]:
        """The placements of each parameter of the block, by value; of one that several ops use, those of the first."""
        tables = self.frontier.tables
        plans: dict[int, ParameterPlan] = {}
        for op_index, node in enumerate(tables.space.ops):
            strategy = self.strategy(op_index)
            storages, chosen = self.frontier.storages[op_index]
            strategies = tables.strategies[op_index]
            for number, position in enumerate(node.parameter_inputs):
                value = graph.values[node.op.inputs[position]]
                storage = storages[number * len(strategies) + strategy][int(chosen[number][self.row, strategy])]
                is_partial = value.id in tables.space.data_axis.partial_gradient_parameters
                data_pair = PARTIAL_GRADIENT if is_partial else REPLICATED
                pairs = [data_pair, *(option.inputs[position] for option in strategies[strategy])]
                name = (value.qualified_names or (value.name,))[0]
                plans.setdefault(value.id, _parameter_plan(name, pairs, storage, self.mesh))
        return plans


def block_choices(frontiers: FrontierCache, choice: StageChoice, first_block: int, end_block: int) -> list[BlockChoice]:
    """The blocks ``first_block <= i < end_block`` of a stage under ``choice``, in order."""
    variants = frontiers.variants_of(first_block, end_block)
    return [
        BlockChoice(
            variant=variant,
            frontier_ref=ref,
            frontier=frontiers.frontier(variant, choice.mesh, ref[0]),
            boundary=choice.boundary,
            mesh=choice.mesh,
        )
        for variant, ref in zip(variants, choice.point_of_each_block(variants), strict=True)
    ]


def _parameter_plan(
    name: str, pairs: Sequence[PlacementPair], storage: ParameterStorage, mesh: StageMesh
) -> ParameterPlan:
    """The placements of a parameter that ops use under ``pairs`` (of all axes, the data axis first). ZeRO shards dim 0
    of a rank's local shard, so the split factor of its shard is the number of shards that the ops make of dim 0."""
    compute: list[Placement] = [pair.factor.shard if pair.factor is not None else REPLICATE for pair in pairs]
    num_shards = 1
    for placement, size in zip(compute, mesh.sizes, strict=True):
        if isinstance(placement, Shard) and placement.dim == 0:
            num_shards = max(num_shards, placement.split_factor * size)
    sharded = [Shard(0, num_shards) if axis in storage.axes else placement for axis, placement in enumerate(compute)]
    gradient = [
        PARTIAL if placement == REPLICATE and pair == PARTIAL_GRADIENT else placement
        for placement, pair in zip(sharded if storage.stage >= 2 else compute, pairs, strict=True)
    ]
    first_axis = 0 if mesh.has_data_axis else 1
    return ParameterPlan(
        name=name,
        compute=format_placements(compute[first_axis:]),
        parameter=format_placements((sharded if storage.stage == 3 else compute)[first_axis:]),
        gradient=format_placements(gradient[first_axis:]),
        optimizer=format_placements((sharded if storage.stage >= 1 else compute)[first_axis:]),
    )
