"""How activations move inside one block of a plan.

An activation is made in one placement (by an op, or as the block's input) and read in others. With one reader it moves
straight to it; with several it is first brought to the program's ``shared`` placement, and from there once to every
other (placement, gradient) that readers want. Each move is made forward by the value and backward by its gradient.

A *copy* is memory: an op's result, or what a move left (`kept` says which stay for the backward).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from autopar.core.errors import CheckError
from autopar.core.placement import PARTIAL, REPLICATE, Placements
from autopar.core.plan import BlockProgram
from autopar.graph.ir import Block, Graph
from autopar.judge.judge_mesh import JudgeMesh, RedistributionPath
from autopar.judge.op_price import shape_at

PlacedPair = tuple[Placements, Placements]
"""Where a tensor is and where its gradient is, () where it has none."""

TensorMemory = tuple[str, int, Placements]
"""("made", value, ()) is the memory an op left its result in; ("moved", value, placements) what a move left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PathReaders:
    """Of a route: all that it leads to (None: the block's end), the ``ops`` among them that read what it brings without
    moving it further, and whether it only ``gathers``."""

    reached: tuple[int | None, ...]
    direct: tuple[int, ...]
    only_gathers: bool


@dataclass(slots=True)
class BlockRedistributions:
    """Routes of one block in the order they run, forward and backward, and those of gathers that the backward makes
    ``again``, with the ops that ``keep_cut`` their input and what it takes whole, ``(op, bytes)``; ``copies`` maps (op,
    input position) to the memory it reads, ``ways`` to the positions in ``forward`` of the routes it came by.
    ``backward_behind`` and ``again_behind`` say of each route which ops read what it brings."""

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
    """All moves of a block; CheckError where the plan leaves one open or impossible."""
    ops = graph.ops[block.first_op : block.end_op]
    made: dict[int, PlacedPair] = {
        value: (mesh.parse(planned.placement), mesh.parse(planned.gradient))
        for value, planned in zip(block.inputs, program.inputs, strict=True)
    }
    readers: dict[int, list[tuple[tuple[int, int] | None, PlacedPair]]] = {}
    keep_cut = {(op.id, at) for op, planned in zip(ops, program.ops, strict=True) for at in planned.regathered}
    for op, planned in zip(ops, program.ops, strict=True):
        if len(planned.input_gradients) != len(op.inputs) or len(planned.output_gradients) != len(op.outputs):
            raise CheckError(f"program {program.id!r}: op {op.name} lacks the placements of its gradients")
        texts = zip(
            (*planned.inputs, *planned.outputs), (*planned.input_gradients, *planned.output_gradients), strict=True
        )
        pairs = [(mesh.parse(text), mesh.parse(gradient)) for text, gradient in texts]
        for at, value in enumerate(op.inputs):
            if graph.values[value].kind == "activation" and value not in parameter_free:
                readers.setdefault(value, []).append(((op.id, at), pairs[at]))
        for at, value in enumerate(op.outputs):
            made[value] = pairs[len(op.inputs) + at]
    for value, output in zip(block.outputs, program.outputs, strict=True):
        if value not in parameter_free:
            readers.setdefault(value, []).append((None, (mesh.parse(output.placement), mesh.parse(output.gradient))))
    shared = {value.name: (mesh.parse(value.placement), mesh.parse(value.gradient)) for value in program.shared}
    found = BlockRedistributions()
    behind: list[PathReaders] = []  # of each route forward
    for value, reads in readers.items():
        name = graph.values[value].name
        via = made[value]
        way: tuple[int, ...] = ()
        if len(reads) > 1:
            if name not in shared:
                raise CheckError(f"program {program.id!r}: {name} has {len(reads)} readers but no shared placement")
            via = shared[name]
            way = (_add_redistribution(found, behind, graph, value, made[value], via, reads, mesh, micro_batch),)
        ways = {
            pair: (
                *way,
                _add_redistribution(
                    found, behind, graph, value, via, pair, [r for r in reads if r[1] == pair], mesh, micro_batch
                ),
            )
            for pair in dict.fromkeys(pair for _, pair in reads)
        }
        for reader, pair in reads:
            if reader is not None:
                found.paths_to[reader] = ways[pair]
                found.memory_read[reader] = (
                    ("made", value, ()) if pair[0] == made[value][0] else ("moved", value, pair[0])
                )
        kept_cut = [
            (reader, pair)
            for reader, pair in reads
            if reader in keep_cut and reader is not None and _is_gather_only(made[value][0], pair[0])
        ]
        for reader, pair in kept_cut:
            tensor = graph.values[value]
            sizes = shape_at(graph, tensor.shape, micro_batch)
            found.regathered_bytes.append((reader[0], mesh.local_bytes(sizes, tensor.itemsize, pair[0])))
        found.memory_read.update((reader, ("made", value, ())) for reader, _ in kept_cut)
        routes = dict.fromkeys(at for _, pair in kept_cut for at in ways[pair])
        for at in routes:
            if found.forward_paths[at].collectives:
                found.regather_paths.append(found.forward_paths[at])
                found.regather_readers.append(behind[at])
    return found


def _is_gather_only(made: Placements, read: Placements) -> bool:
    return all(one == other or (other == REPLICATE and one != PARTIAL) for one, other in zip(made, read, strict=True))


def _add_redistribution(
    found: BlockRedistributions,
    path_readers: list[PathReaders],
    graph: Graph,
    value: int,
    source: PlacedPair,
    target: PlacedPair,
    reads: Sequence[tuple[tuple[int, int] | None, PlacedPair]],
    mesh: JudgeMesh,
    micro_batch: int,
) -> int:
    """The position of the way forward; ``reads`` are those that it leads to."""
    tensor = graph.values[value]
    shape = shape_at(graph, tensor.shape, micro_batch)
    path_readers.append(
        PathReaders(
            reached=tuple(None if reader is None else reader[0] for reader, _ in reads),
            direct=tuple(reader[0] for reader, pair in reads if pair == target and reader is not None),
            only_gathers=source[0] != target[0] and _is_gather_only(source[0], target[0]),
        )
    )
    found.forward_paths.append(mesh.redistribution_path(shape, tensor.itemsize, source[0], target[0]))
    if tensor.requires_grad:
        found.backward_paths.append(mesh.redistribution_path(shape, tensor.itemsize, target[1], source[1]))
        found.backward_readers.append(path_readers[-1])
    return len(found.forward_paths) - 1
