"""All redistributions inside one block of a plan.

An activation is made in one placement (by an op, or as an input of the block) and read in others. With one reader it is
redistributed straight to it; with several it is first redistributed to the program's ``shared`` placement, and from there
once to every other (placement, gradient placement) that readers want. Each redistribution runs forward on the value and
backward on its gradient.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from autopar.core.errors import CheckError
from autopar.core.placement import PARTIAL, REPLICATE, Placements
from autopar.core.plan import BlockProgram, OpPlan
from autopar.graph.ir import Block, Graph, Op
from autopar.judge.context import shape_at
from autopar.judge.judge_mesh import JudgeMesh
from autopar.judge.redistribution_path import RedistributionPath


class TensorMemory(NamedTuple):
    """The memory of a value: where its op left it (``placements`` is ()), or where a redistribution left it in
    ``placements``."""

    origin: Literal["made", "redistributed"]
    value: int
    placements: Placements = ()


class PlacedValue(NamedTuple):
    """Placements of a tensor and of its gradient, () where it has none."""

    placements: Placements
    gradient: Placements


class ValueRead(NamedTuple):
    """A reader of a value, (op, input position) or None for the end of the block, and how it wants the value."""

    reader: tuple[int, int] | None
    wanted: PlacedValue


@dataclass(frozen=True, slots=True, kw_only=True)
class PathReaders:
    """Who reads the result of a redistribution: ``reached``, all ops (None: the end of the block); ``direct``, those of
    them that no further redistribution stands before. ``only_gathers``: whether it only all-gathers."""

    reached: tuple[int | None, ...]
    direct: tuple[int, ...]
    only_gathers: bool


@dataclass(slots=True)
class BlockRedistributions:
    """The redistributions of one block.

    ``forward_paths``, ``backward_paths``: in the order they run. ``regather_paths``: all-gathers that the backward repeats
    because their input was saved sharded; ``regathered_bytes``: (op, bytes of the gathered input). ``backward_readers``,
    ``regather_readers``: the readers of each path. ``memory_read``: (op, input position) -> the memory it reads.
    ``paths_to``: (op, input position) -> indices into ``forward_paths`` of the paths that its input came through."""

    forward_paths: list[RedistributionPath] = field(default_factory=list)
    backward_paths: list[RedistributionPath] = field(default_factory=list)
    regather_paths: list[RedistributionPath] = field(default_factory=list)
    backward_readers: list[PathReaders] = field(default_factory=list)
    regather_readers: list[PathReaders] = field(default_factory=list)
    regathered_bytes: list[tuple[int, float]] = field(default_factory=list)
    memory_read: dict[tuple[int, int], TensorMemory] = field(default_factory=dict)
    paths_to: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)


def find_redistributions(
    graph: Graph,
    block: Block,
    program: BlockProgram,
    mesh: JudgeMesh,
    micro_batch: int,
    parameter_free: frozenset[int],
) -> BlockRedistributions:
    """All redistributions of a block at ``micro_batch`` samples; values ``parameter_free`` need none. CheckError where the
    plan leaves a placement open or no path leads to it."""
    planned_ops = zip(graph.ops[block.first_op : block.end_op], program.ops, strict=True)
    regathering = frozenset((op.id, position) for op, planned in planned_ops for position in planned.regathered)
    finder = _RedistributionFinder(graph, program, mesh, micro_batch, regathering)
    made, reads = _made_and_read(graph, block, program, mesh, parameter_free)
    for value, reads_of_value in reads.items():
        finder.add_value(value, made[value], reads_of_value)
    return finder.found


def _made_and_read(
    graph: Graph, block: Block, program: BlockProgram, mesh: JudgeMesh, parameter_free: frozenset[int]
) -> tuple[dict[int, PlacedValue], dict[int, list[ValueRead]]]:
    """How each value of a block is made, and its reads in order; only activations are read."""
    made = {
        value: PlacedValue(mesh.parse(planned.placement), mesh.parse(planned.gradient))
        for value, planned in zip(block.inputs, program.inputs, strict=True)
    }
    reads: dict[int, list[ValueRead]] = {}
    for op, planned in zip(graph.ops[block.first_op : block.end_op], program.ops, strict=True):
        placed = list(_placed_tensors(op, planned, program, mesh))
        for position, value in enumerate(op.inputs):
            if graph.values[value].kind == "activation" and value not in parameter_free:
                reads.setdefault(value, []).append(ValueRead((op.id, position), placed[position]))
        made.update(zip(op.outputs, placed[len(op.inputs) :], strict=True))
    for value, output in zip(block.outputs, program.outputs, strict=True):
        if value not in parameter_free:
            wanted = PlacedValue(mesh.parse(output.placement), mesh.parse(output.gradient))
            reads.setdefault(value, []).append(ValueRead(None, wanted))
    return made, reads


def _placed_tensors(op: Op, planned: OpPlan, program: BlockProgram, mesh: JudgeMesh) -> Iterator[PlacedValue]:
    """Placements of the inputs of an op, then of its outputs."""
    if len(planned.input_gradients) != len(op.inputs) or len(planned.output_gradients) != len(op.outputs):
        raise CheckError(f"program {program.id!r}: op {op.name} lacks the placements of its gradients")
    texts = zip((*planned.inputs, *planned.outputs), (*planned.input_gradients, *planned.output_gradients), strict=True)
    return (PlacedValue(mesh.parse(text), mesh.parse(gradient)) for text, gradient in texts)


class _RedistributionFinder:
    """Collects the redistributions of one block in ``found``, value by value. ``regathering``: (op, input position) of
    inputs that are saved sharded and regathered in the backward."""

    def __init__(
        self,
        graph: Graph,
        program: BlockProgram,
        mesh: JudgeMesh,
        micro_batch: int,
        regathering: frozenset[tuple[int, int]],
    ) -> None:
        self.found = BlockRedistributions()
        self._graph, self._program, self._mesh, self._micro_batch = graph, program, mesh, micro_batch
        self._regathering = regathering
        self._shared = {
            value.name: PlacedValue(mesh.parse(value.placement), mesh.parse(value.gradient)) for value in program.shared
        }
        self._forward_readers: list[PathReaders] = []

    def add_value(self, value: int, made: PlacedValue, reads: Sequence[ValueRead]) -> None:
        """The redistributions of one value to all that read it."""
        found, source = self.found, made
        to_shared: tuple[int, ...] = ()
        if len(reads) > 1:
            name = self._graph.values[value].name
            if name not in self._shared:
                raise CheckError(
                    f"program {self._program.id!r}: {name} has {len(reads)} readers but no shared placement"
                )
            source = self._shared[name]
            to_shared = (self._add_path(value, made, source, reads),)
        paths = {}
        for wanted in dict.fromkeys(read.wanted for read in reads):
            alike = [read for read in reads if read.wanted == wanted]
            paths[wanted] = (*to_shared, self._add_path(value, source, wanted, alike))
        for reader, wanted in reads:
            if reader is not None:
                found.paths_to[reader] = paths[wanted]
                found.memory_read[reader] = (
                    TensorMemory("made", value)
                    if wanted.placements == made.placements
                    else TensorMemory("redistributed", value, wanted.placements)
                )
        self._add_regathers(value, made, reads, paths)

    def _add_path(self, value: int, source: PlacedValue, target: PlacedValue, reads: Sequence[ValueRead]) -> int:
        """Redistribute a value forward and, where it has a gradient, that backward. ``reads`` are all that the path leads
        to. Its index in ``forward_paths``."""
        found, tensor = self.found, self._graph.values[value]
        shape = shape_at(self._graph, tensor.shape, self._micro_batch)
        readers = PathReaders(
            reached=tuple(None if read.reader is None else read.reader[0] for read in reads),
            direct=tuple(read.reader[0] for read in reads if read.wanted == target and read.reader is not None),
            only_gathers=source.placements != target.placements
            and _is_gather_only(source.placements, target.placements),
        )
        self._forward_readers.append(readers)
        found.forward_paths.append(
            self._mesh.redistribution_path(shape, tensor.itemsize, source.placements, target.placements)
        )
        if tensor.requires_grad:
            found.backward_paths.append(
                self._mesh.redistribution_path(shape, tensor.itemsize, target.gradient, source.gradient)
            )
            found.backward_readers.append(readers)
        return len(found.forward_paths) - 1

    def _add_regathers(
        self, value: int, made: PlacedValue, reads: Sequence[ValueRead], paths: dict[PlacedValue, tuple[int, ...]]
    ) -> None:
        """Of reads whose ops save the value sharded, as it was made, and regather it in the backward."""
        found, tensor = self.found, self._graph.values[value]
        indices: list[int] = []
        for reader, wanted in reads:
            if reader in self._regathering and reader and _is_gather_only(made.placements, wanted.placements):
                shape = shape_at(self._graph, tensor.shape, self._micro_batch)
                gathered_bytes = self._mesh.local_bytes(shape, tensor.itemsize, wanted.placements)
                found.regathered_bytes.append((reader[0], gathered_bytes))
                found.memory_read[reader] = TensorMemory("made", value)
                indices += paths[wanted]
        for index in dict.fromkeys(indices):
            if found.forward_paths[index].collectives:
                found.regather_paths.append(found.forward_paths[index])
                found.regather_readers.append(self._forward_readers[index])


def _is_gather_only(made: Placements, read: Placements) -> bool:
    """Whether all-gathers alone lead from one placement to the other."""
    return all(
        source == target or (target == REPLICATE and source != PARTIAL)
        for source, target in zip(made, read, strict=True)
    )
