"""The blocks of a stage as the search decided them: which point of its frontier each takes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autopar.cost.parameters import Storage
from autopar.graph.ir import Graph
from autopar.inter.blocks import Mesh
from autopar.inter.finish import PointRef, StageChoice
from autopar.inter.stages import StageBook
from autopar.intra.frontier import BlockPoints
from autopar.plan.plan import ParameterPlan
from autopar.rules.atoms import Atom
from autopar.rules.options import Token


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
                cut = "G" if value.id in tables.space.data_axis.summed else "R"
                tokens = [cut, *(option.inputs[position] for option in tables.strategies[at][strategy])]
                found.setdefault(value.id, _parameter(value.names or (value.name,), tokens, storage, self.mesh))
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


def _parameter(names: Sequence[str], tokens: Sequence[Token], storage: Storage, mesh: Mesh) -> ParameterPlan:
    """ZeRO cuts dim 0 of what the op's own cuts leave to a rank, so its pieces are those that they make. ``tokens`` are
    those of all axes, the data axis first."""
    compute = [token.text if isinstance(token, Atom) else "R" for token in tokens]
    pieces = 1
    for token, size in zip(tokens, mesh.sizes, strict=True):
        if isinstance(token, Atom) and token.dim == 0:
            pieces = max(pieces, token.repeats * size)
    shard = "S(0)" if pieces == 1 else f"_S(0,{pieces})"
    cut = [shard if axis in storage.axes else token for axis, token in enumerate(compute)]
    gradient = [
        "P" if token == "R" and tokens[axis] == "G" else token
        for axis, token in enumerate(cut if storage.stage >= 2 else compute)
    ]
    first = 0 if mesh.has_data_axis else 1
    return ParameterPlan(
        name=names[0],
        compute="".join(compute[first:]),
        parameter="".join((cut if storage.stage == 3 else compute)[first:]),
        gradient="".join(gradient[first:]),
        optimizer="".join((cut if storage.stage >= 1 else compute)[first:]),
    )
