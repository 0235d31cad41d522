"""The blocks of a stage as the search decided them: which point of its frontier each takes."""

from dataclasses import dataclass

import numpy as np

from autopar.inter.blocks import Mesh
from autopar.inter.finish import PointRef, StageChoice
from autopar.inter.stages import StageBook
from autopar.intra.frontier import BlockPoints


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
