"""The blocks of a stage as the search decided them: which point of its frontier each takes, and what they hold."""

from collections import Counter
from dataclasses import dataclass
from math import prod

import numpy as np

from autopar.cost import parameters as pm
from autopar.inter.blocks import Mesh
from autopar.inter.finish import PointRef, StageChoice
from autopar.inter.stages import StageBook
from autopar.intra import frontier as fr
from autopar.intra.frontier import BlockPoints
from autopar.plan.plan import MemoryParts


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


def stage_memory(book: StageBook, choice: StageChoice, first: int, end: int, in_flight: int) -> MemoryParts:
    """What a stage holds on its fullest device."""
    return memory_of(book, uses_of(book, choice, first, end), in_flight)


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


def memory_of(book: StageBook, uses: list[Use], in_flight: int) -> MemoryParts:
    """Bytes on the fullest device with ``in_flight`` micro-batches held."""
    sums = np.zeros(4)
    saved = workspace = 0.0
    execution = book.blocks.execution
    numbers = Counter((use.column, use.ref, use.boundary, use.mesh) for use in uses)
    of_key = {(use.column, use.ref, use.boundary, use.mesh): use for use in uses}
    for key, count in numbers.items():
        use = of_key[key]
        saved += count * use.totals[fr.SAVED]
        workspace = max(workspace, float(use.totals[fr.WORKSPACE]))
        held = book.columns[use.column][1]
        for at, of_op in enumerate(use.points.tables.parameter_uses):
            strategy = use.strategy(at)
            names, chosen = use.points.storages[at]
            for number, (value, per_strategy) in enumerate(of_op):
                if value.id in held or (at, number) in use.points.tables.again:
                    continue
                elements = per_strategy[strategy][0]
                if value.kind == "buffer" or not value.requires_grad:
                    sums[0] += count * elements * value.itemsize
                    continue
                storage = names[number * len(per_strategy) + strategy][int(chosen[number][use.row, strategy])]
                shards = prod(use.mesh.sizes[axis] for axis in storage.axes)
                state = pm.state_bytes(storage, shards, elements, value.itemsize, execution)
                late = pm.late_bytes(storage, state[1], elements, value.itemsize, execution)
                sums += count * np.array((*state, late))
    # what the backward's gradients add to the saved tensors in whose place they come, beyond those counted at rest
    at_start = sums[1] if execution.accumulate else 0.0
    late = at_start + max(float(sums[3]) - saved, 0.0) - float(sums[1])
    return MemoryParts(
        parameters_bytes=round(sums[0]),
        gradients_bytes=round(sums[1]),
        optimizer_bytes=round(sums[2]),
        saved_activations_bytes=round(in_flight * saved),
        workspace_bytes=round(workspace + max(late, 0.0)),
        fixed_bytes=round(book.fixed_bytes()),
        overlaid_bytes=round(max(-late, 0.0)),
    )
