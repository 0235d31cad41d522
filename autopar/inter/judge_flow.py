"""How activations move inside one block of a plan, and which copies of them stay for the backward pass.

An activation is made in one placement (by an op, or as the block's input) and read in others. With one reader it moves
straight to it; with several it is first brought to the program's ``shared`` placement, and from there once to every
other (placement, gradient) that readers want. Each move is made forward by the value and backward by its gradient.

A *copy* is memory: an op's result, or what a move left. Results that are views share the memory of what they view. What
autograd keeps are copies: one tensor kept in two placements counts twice, one kept by two ops counts once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from autopar.graph.ir import Block, Graph
from autopar.graph.profile import GraphProfile
from autopar.inter.judge_ops import sizes_at
from autopar.inter.judge_routes import Mesh, Route
from autopar.inter.judge_selected import Selected
from autopar.inter.judge_workspace import whole_scores
from autopar.plan.errors import CheckError
from autopar.plan.mesh import parse_placements
from autopar.plan.plan import BlockProgram

Lie = tuple[str, str]
"""(placement, gradient placement or "")"""

Copy = tuple[str, int, str]
"""("made", value, "") is the memory an op left its result in; ("moved", value, placement) what a move left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Readers:
    """Of a route: all that it leads to (None: the block's end), the ``ops`` among them that read what it brings without
    moving it further, and whether it only ``gathers``."""

    led_to: tuple[int | None, ...]
    ops: tuple[int, ...]
    gathers: bool


@dataclass(slots=True)
class Moves:
    """Routes of one block in the order they run, forward and backward, and those of gathers that the backward makes
    ``again``, with the ops that ``keep_cut`` their input and what it takes whole, ``(op, bytes)``; ``copies`` maps (op,
    input position) to the memory it reads, ``ways`` to the positions in ``forward`` of the routes it came by.
    ``backward_behind`` and ``again_behind`` say of each route which ops read what it brings."""

    forward: list[Route] = field(default_factory=list)
    backward: list[Route] = field(default_factory=list)
    again: list[Route] = field(default_factory=list)
    backward_behind: list[Readers] = field(default_factory=list)
    again_behind: list[Readers] = field(default_factory=list)
    keep_cut: list[tuple[int, float]] = field(default_factory=list)
    copies: dict[tuple[int, int], Copy] = field(default_factory=dict)
    ways: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Bytes kept per micro-batch: those that selective recomputation frees (``core``) apart from the rest, those that
    it alone keeps (``beside``), and the block's inputs (all that full recomputation keeps)."""

    saved: float
    core: float
    beside: float
    inputs: float


def at_hand(graph: Graph) -> frozenset[int]:
    """Values that depend on no parameter (masks, positions, targets): every rank computes what it needs of them."""
    carrying = {value.id for value in graph.values if value.kind == "parameter"}
    for op in graph.ops:
        if carrying & set(op.inputs):
            carrying |= set(op.outputs)
    return frozenset(value.id for value in graph.values if value.id not in carrying)


def moves(
    graph: Graph,
    block: Block,
    program: BlockProgram,
    mesh: Mesh,
    micro_batch: int,
    free: frozenset[int],
) -> Moves:
    """All moves of a block; CheckError where the plan leaves one open or impossible."""
    ops = graph.ops[block.first_op : block.end_op]
    made: dict[int, Lie] = {
        value: (mesh.settled(planned.placement), mesh.settled(planned.gradient))
        for value, planned in zip(block.inputs, program.inputs, strict=True)
    }
    readers: dict[int, list[tuple[tuple[int, int] | None, Lie]]] = {}
    keep_cut = {(op.id, at) for op, planned in zip(ops, program.ops, strict=True) for at in planned.gathers_again}
    for op, planned in zip(ops, program.ops, strict=True):
        if len(planned.input_gradients) != len(op.inputs) or len(planned.output_gradients) != len(op.outputs):
            raise CheckError(f"program {program.id!r}: op {op.name} lacks the placements of its gradients")
        texts = zip(
            (*planned.inputs, *planned.outputs), (*planned.input_gradients, *planned.output_gradients), strict=True
        )
        lies = [(mesh.settled(text), mesh.settled(gradient)) for text, gradient in texts]
        for at, value in enumerate(op.inputs):
            if graph.values[value].kind == "activation" and value not in free:
                readers.setdefault(value, []).append(((op.id, at), lies[at]))
        for at, value in enumerate(op.outputs):
            made[value] = lies[len(op.inputs) + at]
    for value, output in zip(block.outputs, program.outputs, strict=True):
        if value not in free:
            readers.setdefault(value, []).append(
                (None, (mesh.settled(output.placement), mesh.settled(output.gradient)))
            )
    shared = {value.name: (mesh.settled(value.placement), mesh.settled(value.gradient)) for value in program.shared}
    found = Moves()
    behind: list[Readers] = []  # of each route forward
    for value, reads in readers.items():
        name = graph.values[value].name
        via = made[value]
        way: tuple[int, ...] = ()
        if len(reads) > 1:
            if name not in shared:
                raise CheckError(f"program {program.id!r}: {name} has {len(reads)} readers but no shared placement")
            via = shared[name]
            way = (_move(found, behind, graph, value, made[value], via, reads, mesh, micro_batch),)
        ways = {
            lie: (
                *way,
                _move(found, behind, graph, value, via, lie, [r for r in reads if r[1] == lie], mesh, micro_batch),
            )
            for lie in dict.fromkeys(lie for _, lie in reads)
        }
        for reader, lie in reads:
            if reader is not None:
                found.ways[reader] = ways[lie]
                found.copies[reader] = ("made", value, "") if lie[0] == made[value][0] else ("moved", value, lie[0])
        kept_cut = [
            (reader, lie)
            for reader, lie in reads
            if reader in keep_cut and reader is not None and _only_gathered(made[value][0], lie[0])
        ]
        for reader, lie in kept_cut:
            tensor = graph.values[value]
            sizes = sizes_at(graph, tensor.shape, micro_batch)
            found.keep_cut.append((reader[0], mesh.local_bytes(sizes, tensor.itemsize, parse_placements(lie[0]))))
        found.copies.update((reader, ("made", value, "")) for reader, _ in kept_cut)
        routes = dict.fromkeys(at for _, lie in kept_cut for at in ways[lie])
        for at in routes:
            if found.forward[at].steps:
                found.again.append(found.forward[at])
                found.again_behind.append(behind[at])
    return found


def _only_gathered(made: str, read: str) -> bool:
    pairs = zip(parse_placements(made), parse_placements(read), strict=True)
    return all(one == other or (other == "R" and one != "P") for one, other in pairs)


def _move(
    found: Moves,
    behind: list[Readers],
    graph: Graph,
    value: int,
    source: Lie,
    target: Lie,
    reads: Sequence[tuple[tuple[int, int] | None, Lie]],
    mesh: Mesh,
    micro_batch: int,
) -> int:
    """The position of the way forward; ``reads`` are those that it leads to."""
    tensor = graph.values[value]
    shape = sizes_at(graph, tensor.shape, micro_batch)
    behind.append(
        Readers(
            led_to=tuple(None if reader is None else reader[0] for reader, _ in reads),
            ops=tuple(reader[0] for reader, lie in reads if lie == target and reader is not None),
            gathers=source[0] != target[0] and _only_gathered(source[0], target[0]),
        )
    )
    found.forward.append(mesh.route(shape, tensor.itemsize, source[0], target[0]))
    if tensor.requires_grad:
        found.backward.append(mesh.route(shape, tensor.itemsize, target[1], source[1]))
        found.backward_behind.append(behind[-1])
    return len(found.forward) - 1


def kept(
    graph: Graph,
    profile: GraphProfile,
    block: Block,
    program: BlockProgram,
    mesh: Mesh,
    micro_batch: int,
    moved: Moves,
    free: frozenset[int],
    shards: dict[int, tuple[int, int]],
    bytes_per_score: float,
    as_megatron: bool = False,
    selected: Selected | None = None,
    kept_anyhow: frozenset[int] = frozenset(),
) -> Kept:
    """What one micro-batch keeps; ``shards`` is by how many ranks each op's work is divided, and by how many of
    axes that do not cut the batch. Materialised attention keeps ``bytes_per_score`` of its scores (0: it is fused).
    ``as_megatron``: attention computed again leaves its result where another op keeps it. ``selected``: what selective
    recomputation keeps (None: it frees attention's insides); ``kept_anyhow``: memories that some op keeps for its
    backward."""
    earlier = _kept_before(graph, profile, block.first_op)
    held: dict[Copy, float] = {}
    core: set[Copy] = set()
    roots: dict[int, Copy] = {}
    placed = {v: p.placement for v, p in zip(block.inputs, program.inputs, strict=True)}
    saved = inside = beside = 0.0

    def local(value: int, text: str) -> int:
        tensor = graph.values[value]
        return mesh.local_bytes(sizes_at(graph, tensor.shape, micro_batch), tensor.itemsize, parse_placements(text))

    def size_of(copy: Copy, value: int, text: str) -> float:
        """Bytes of a copy, of which a saver sees ``value`` lying as ``text``."""
        if copy[0] == "moved" or (copy[1] in placed and copy[1] not in free):
            owner = graph.values[copy[1]]
            tokens = parse_placements(copy[2] if copy[0] == "moved" else placed[copy[1]])
            return float(mesh.local_bytes(sizes_at(graph, owner.shape, micro_batch), owner.itemsize, tokens))
        # memory of an earlier block, or of what is at hand anywhere: as much of the whole as the saver's part of it
        owner, seen = graph.values[copy[1]], sizes_at(graph, graph.values[value].shape, micro_batch)
        whole, part = prod(sizes_at(graph, owner.shape, micro_batch)) * owner.itemsize, parse_placements(text)
        if prod(seen) * graph.values[value].itemsize > whole:  # expanded: a rank keeps what it sees, at most all
            return min(float(whole), float(mesh.local_bytes(seen, graph.values[value].itemsize, part)))
        return whole * mesh.local_bytes(seen, 1, part) / max(prod(seen), 1)

    for op, planned in zip(graph.ops[block.first_op : block.end_op], program.ops, strict=True):
        if free.issuperset((*op.inputs, *op.outputs)):
            continue
        ran = profile.ops[op.id]
        is_core = "scaled_dot_product" in op.target
        memory: dict[int, Copy] = {}
        for at, value in enumerate(op.inputs):
            copy = moved.copies.get((op.id, at), ("made", value, ""))
            memory[value] = (
                roots.get(value, ("made", profile.owners[value], "")) if copy == ("made", value, "") else copy
            )
        for at, value in enumerate(op.outputs):
            owner = profile.owners[value]
            viewed = next((v for v in op.inputs if owner != value and profile.owners[v] == owner), None)
            roots[value] = ("made", value, "") if viewed is None else memory[viewed]
            placed[value] = planned.outputs[at]
            memory.setdefault(value, roots[value])
            if is_core and viewed is None and selected is None:
                core.add(roots[value])
        texts = (*planned.inputs, *planned.outputs)
        for at in (*ran.saved_inputs, *(len(op.inputs) + i for i in ran.saved_outputs)):
            value = (*op.inputs, *op.outputs)[at]
            copy = memory[value]
            if selected is not None:
                if copy[0] == "moved" or (copy[1] not in selected.made and copy[1] not in selected.handed_on):
                    core.add(copy)
            elif as_megatron and not is_core:
                core.discard(copy)
            if graph.values[profile.owners[value]].kind not in ("parameter", "buffer") and copy not in held:
                held[copy] = 0.0 if copy[0] == "made" and copy[1] in earlier else size_of(copy, value, texts[at])
        grows = any(graph.batch.grows(size) for shape, _ in ran.saved_internal for size in shape)
        growth = graph.batch.growth((shape for shape, _ in ran.saved_internal), micro_batch)
        internal = sum(prod(shape) * itemsize for shape, itemsize in ran.saved_internal) * growth
        internal /= shards[op.id][0] if grows else shards[op.id][1]
        if is_core and bytes_per_score:
            internal = whole_scores(graph, op, micro_batch) * bytes_per_score / shards[op.id][0]
        freed = is_core if selected is None else op.id not in selected.ops
        saved, inside = (saved, inside + internal) if freed else (saved + internal, inside)
        if selected is not None and op.id in selected.ops:
            beside += sum(
                local(value, planned.outputs[at])
                for at, value in enumerate(op.outputs)
                if profile.owners[value] not in kept_anyhow
            )
    read = {
        value
        for op in graph.ops[block.first_op : block.end_op]
        if not free.issuperset((*op.inputs, *op.outputs))
        for value in op.inputs
    }
    inputs = {
        value: local(value, planned.placement)
        for value, planned in zip(block.inputs, program.inputs, strict=True)
        if value in read
    }
    if selected is not None:
        beside += sum(
            size
            for value, size in inputs.items()
            if profile.owners[value] not in kept_anyhow and profile.owners[value] not in selected.made
        )
    return Kept(
        saved=saved + sum(size for copy, size in held.items() if copy not in core),
        core=inside + sum(size for copy, size in held.items() if copy in core),
        beside=float(beside),
        inputs=float(sum(inputs.values())),
    )


def _kept_before(graph: Graph, profile: GraphProfile, first_op: int) -> set[int]:
    """Values whose memory an op of an earlier block keeps: it is charged there."""
    found = set()
    for op in graph.ops[:first_op]:
        ran = profile.ops[op.id]
        tensors = (*op.inputs, *op.outputs)
        for at in (*ran.saved_inputs, *(len(op.inputs) + i for i in ran.saved_outputs)):
            found.add(profile.owners[tensors[at]])
    return found
