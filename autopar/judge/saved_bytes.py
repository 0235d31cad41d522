"""What a block keeps for its backward, counted from the placements of its ops.

What autograd keeps are copies, that is, memory: an op's result, or what a move left. Results that are views share the memory
of what they view. One tensor kept in two placements counts twice, one kept by two ops counts once.
"""

from dataclasses import dataclass, field
from math import prod

from autopar.core.placement import Placements, parse_placements
from autopar.core.plan import OpPlan
from autopar.graph.ir import Op
from autopar.judge.block_redistributions import Copy, Moves
from autopar.judge.context import Case
from autopar.judge.workspace_bytes import whole_scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Bytes kept per micro-batch: those that selective recomputation frees (``core``) apart from the rest, those that
    it alone keeps (``beside``), and the block's inputs (all that full recomputation keeps)."""

    saved: float
    core: float
    beside: float
    inputs: float


def kept(case: Case, moved: Moves, shards: dict[int, tuple[int, int]]) -> Kept:
    """What one micro-batch keeps; ``shards`` is by how many ranks each op's work is divided, and by how many of axes that
    do not cut the batch."""
    copies = _Copies(case, moved)
    selected, owners = case.selected, case.ground.profile.owners
    insides = {True: 0.0, False: 0.0}  # of ops that selective recomputation frees, and of the others
    beside = 0.0
    read: set[int] = set()
    for op, planned in case.ops():
        copies.run(op, planned)
        read.update(op.inputs)
        freed = op.is_attention if selected is None else op.id not in selected.ops
        insides[freed] += _inside(case, op, shards[op.id])
        if selected is not None and op.id in selected.ops:
            results = zip(op.outputs, planned.outputs, strict=True)
            beside += sum(
                case.local_bytes(value, parse_placements(text))
                for value, text in results
                if owners[value] not in case.ground.keeps
            )
    inputs = {
        value: case.local_bytes(value, parse_placements(planned.placement))
        for value, planned in zip(case.block.inputs, case.program.inputs, strict=True)
        if value in read
    }
    if selected is not None:
        known = case.ground.keeps | selected.made
        beside += sum(size for value, size in inputs.items() if owners[value] not in known)
    core = sum(size for copy, size in copies.held.items() if copy in copies.core)
    return Kept(
        saved=insides[False] + sum(copies.held.values()) - core,
        core=insides[True] + core,
        beside=float(beside),
        inputs=float(sum(inputs.values())),
    )


def _inside(case: Case, op: Op, shards: tuple[int, int]) -> float:
    """Bytes of what an op keeps beside its tensors; materialised attention keeps its scores."""
    graph, internal = case.ground.graph, case.ground.profile.ops[op.id].saved_internal
    if case.materialises(op):
        num_scores = whole_scores(graph, op, case.micro_batch)
        return num_scores * case.software.math_attention_bytes_per_score / shards[0]
    grows = any(graph.batch.grows(size) for shape, _ in internal for size in shape)
    growth = graph.batch.growth((shape for shape, _ in internal), case.micro_batch)
    return sum(prod(shape) * itemsize for shape, itemsize in internal) * growth / shards[0 if grows else 1]


@dataclass(slots=True)
class _Copies:
    """Which memory the tensors of a block lie in as its ops run in turn (``roots``), and the bytes of what is ``held``; of
    that, ``core`` is freed by selective recomputation."""

    case: Case
    moved: Moves
    roots: dict[int, Copy] = field(default_factory=dict)
    placed: dict[int, Placements] = field(init=False)
    earlier: set[int] = field(init=False)
    held: dict[Copy, float] = field(default_factory=dict)
    core: set[Copy] = field(default_factory=set)

    def __post_init__(self) -> None:
        block, program = self.case.block, self.case.program
        self.placed = {
            value: parse_placements(at.placement) for value, at in zip(block.inputs, program.inputs, strict=True)
        }
        self.earlier = _kept_before(self.case)

    def run(self, op: Op, planned: OpPlan) -> None:
        """Enter what an op makes, then what it keeps."""
        case, tensors = self.case, (*op.inputs, *op.outputs)
        read = self._read(op)
        memory = self._made(op, planned, read) | read
        ran, owners, values = case.ground.profile.ops[op.id], case.ground.profile.owners, case.ground.graph.values
        texts = (*planned.inputs, *planned.outputs)
        for at in (*ran.saved_inputs, *(len(op.inputs) + i for i in ran.saved_outputs)):
            value = tensors[at]
            copy = memory[value]
            self._sort(op, copy)
            if values[owners[value]].kind not in ("parameter", "buffer") and copy not in self.held:
                there = copy[0] == "made" and copy[1] in self.earlier
                self.held[copy] = 0.0 if there else self._bytes(copy, value, parse_placements(texts[at]))

    def _read(self, op: Op) -> dict[int, Copy]:
        """The memory of each input."""
        found: dict[int, Copy] = {}
        for at, value in enumerate(op.inputs):
            made: Copy = ("made", value, ())
            copy = self.moved.copies.get((op.id, at), made)
            whole: Copy = ("made", self.case.ground.profile.owners[value], ())
            found[value] = self.roots.get(value, whole) if copy == made else copy
        return found

    def _made(self, op: Op, planned: OpPlan, read: dict[int, Copy]) -> dict[int, Copy]:
        """The memory of each output: its own, or that of what it views."""
        owners = self.case.ground.profile.owners
        for value, text in zip(op.outputs, planned.outputs, strict=True):
            viewed = next((v for v in op.inputs if owners[value] != value and owners[v] == owners[value]), None)
            self.roots[value] = ("made", value, ()) if viewed is None else read[viewed]
            self.placed[value] = parse_placements(text)
            if op.is_attention and viewed is None and self.case.selected is None:
                self.core.add(self.roots[value])
        return {value: self.roots[value] for value in op.outputs}

    def _sort(self, op: Op, copy: Copy) -> None:
        """Whether selective recomputation frees a copy that an op keeps: by operation, all but results of selected ops and
        what blocks hand on; else what attention alone keeps. In Megatron's program attention that is computed again
        leaves its result where another op keeps it."""
        selected = self.case.selected
        if selected is not None:
            if copy[0] == "moved" or (copy[1] not in selected.made and copy[1] not in selected.handed_on):
                self.core.add(copy)
        elif self.case.as_megatron and not op.is_attention:
            self.core.discard(copy)

    def _bytes(self, copy: Copy, value: int, placements: Placements) -> float:
        """Bytes of a copy, of which a saver sees ``value`` in ``placements``."""
        case, values = self.case, self.case.ground.graph.values
        if copy[0] == "moved" or (copy[1] in self.placed and copy[1] not in case.ground.free):
            return float(case.local_bytes(copy[1], copy[2] if copy[0] == "moved" else self.placed[copy[1]]))
        # memory of an earlier block, or of what is at hand anywhere: as much of the whole as the saver's part of it
        seen, whole = case.shape(value), prod(case.shape(copy[1])) * values[copy[1]].itemsize
        if prod(seen) * values[value].itemsize > whole:  # expanded: a rank keeps what it sees, at most all
            return min(float(whole), float(case.local_bytes(value, placements)))
        return whole * case.mesh.local_bytes(seen, 1, placements) / max(prod(seen), 1)


def _kept_before(case: Case) -> set[int]:
    """Values whose memory an op of an earlier block keeps: it is charged there."""
    found = set()
    for op in case.ground.graph.ops[: case.block.first_op]:
        ran = case.ground.profile.ops[op.id]
        tensors = (*op.inputs, *op.outputs)
        for at in (*ran.saved_inputs, *(len(op.inputs) + i for i in ran.saved_outputs)):
            found.add(case.ground.profile.owners[tensors[at]])
    return found
