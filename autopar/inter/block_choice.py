"""The blocks of a stage as the search decided them: which point of its frontier each takes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autopar.core.placement import PARTIAL, REPLICATE, Placement, Shard, format_placements
from autopar.core.plan import ParameterPlan
from autopar.cost.parameter_storage import Storage
from autopar.graph.ir import Graph
from autopar.inter.block_pricer import Mesh
from autopar.inter.stage_choice import PointRef, StageChoice
from autopar.inter.stage_costs import StageBook
from autopar.intra.frontier import BlockPoints
from autopar.rules.placement_pair import PARTIAL_GRADIENT, REPLICATED, PlacementPair


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Use:
    """A block of a stage: its column, and the point of its frontier that it takes."""

    column: int
    ref: PointRef
    points: BlockPoints
    boundary: int
    mesh: Mesh

    @property
    def row(self) -> int:
        return self.ref[1]

    def strategy(self, at: int) -> int:
        """The strategy of the block's op ``at``."""
        return int(self.points.choices[2 + at, self.row, self.boundary])

    def parameters(self, graph: Graph) -> dict[int, ParameterPlan]:
        """Where the block keeps each of its parameters."""
        tables = self.points.tables
        found: dict[int, ParameterPlan] = {}
        for at, node in enumerate(tables.space.ops):
            strategy = self.strategy(at)
            names, chosen = self.points.storages[at]
            for number, position in enumerate(node.parameters):
                value = graph.values[node.op.inputs[position]]
                storage = names[number * len(tables.strategies[at]) + strategy][int(chosen[number][self.row, strategy])]
                data = PARTIAL_GRADIENT if value.id in tables.space.data_axis.summed else REPLICATED
                pairs = [data, *(option.inputs[position] for option in tables.strategies[at][strategy])]
                found.setdefault(value.id, _parameter(value.names or (value.name,), pairs, storage, self.mesh))
        return found

    @property
    def totals(self) -> np.ndarray:  # type: ignore[type-arg]
        return self.points.totals[self.row, self.boundary]


def uses_of(book: StageBook, choice: StageChoice, first: int, end: int) -> list[Use]:
    """Blocks first..end-1 under a choice, in order."""
    columns = book.columns_of(first, end)
    return [
        Use(
            column=column,
            ref=ref,
            points=book.points(column, choice.mesh, ref[0]),
            boundary=choice.boundary,
            mesh=choice.mesh,
        )
        for column, ref in zip(columns, choice.per_block(columns), strict=True)
    ]


def _parameter(names: Sequence[str], pairs: Sequence[PlacementPair], storage: Storage, mesh: Mesh) -> ParameterPlan:
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
