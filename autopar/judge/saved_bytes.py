"""What a block keeps for its backward, counted from the placements of its ops.

What autograd keeps are copies, that is, memory: an op's result, or what a move left. Results that are views share the memory
of what they view. One tensor kept in two placements counts twice, one kept by two ops counts once.
"""

from dataclasses import dataclass, field
from math import prod

from autopar.core.placement import Placements, parse_placements
from autopar.core.plan import OpPlan
from autopar.graph.ir import Op
from autopar.judge.block_redistributions import BlockRedistributions, TensorMemory
from autopar.judge.context import BlockContext
from autopar.judge.workspace_bytes import num_attention_scores


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedBytes:
    """Bytes kept per micro-batch: those that selective recomputation frees (``core``) apart from the rest, those that
    it alone keeps (``beside``), and the block's inputs (all that full recomputation keeps)."""

    always_bytes: float
    freed_bytes: float
    selective_only_bytes: float
    inputs_bytes: float


def count_saved_bytes(
    context: BlockContext, redistributions: BlockRedistributions, num_shards: dict[int, tuple[int, int]]
) -> SavedBytes:
    """What one micro-batch keeps; ``shards`` is by how many ranks each op's work is divided, and by how many of axes that
    do not cut the batch."""
    copies = _SavedMemory(context, redistributions)
    selected, owners = context.selective, context.model.profile.storage_owner
    insides = {True: 0.0, False: 0.0}  # of ops that selective recomputation frees, and of the others
    beside = 0.0
    read: set[int] = set()
    for op, planned in context.distributed_ops():
        copies.add_op(op, planned)
        read.update(op.inputs)
        freed = op.is_attention if selected is None else op.id not in selected.saved_ops
        insides[freed] += _saved_internal_bytes(context, op, num_shards[op.id])
        if selected is not None and op.id in selected.saved_ops:
            results = zip(op.outputs, planned.outputs, strict=True)
            beside += sum(
                context.local_bytes(value, parse_placements(text))
                for value, text in results
                if owners[value] not in context.model.saved_owners
            )
    inputs = {
        value: context.local_bytes(value, parse_placements(planned.placement))
        for value, planned in zip(context.block.inputs, context.program.inputs, strict=True)
        if value in read
    }
    if selected is not None:
        known = context.model.saved_owners | selected.result_owners
        beside += sum(size for value, size in inputs.items() if owners[value] not in known)
    core = sum(size for copy, size in copies.bytes_of.items() if copy in copies.freed)
    return SavedBytes(
        always_bytes=insides[False] + sum(copies.bytes_of.values()) - core,
        freed_bytes=insides[True] + core,
        selective_only_bytes=float(beside),
        inputs_bytes=float(sum(inputs.values())),
    )


def _saved_internal_bytes(context: BlockContext, op: Op, num_shards: tuple[int, int]) -> float:
    """Bytes of what an op keeps beside its tensors; materialised attention keeps its scores."""
    graph, internal = context.model.graph, context.model.profile.ops[op.id].saved_internal_tensors
    if context.materialises_scores(op):
        num_scores = num_attention_scores(graph, op, context.micro_batch)
        return num_scores * context.software.math_attention_bytes_per_score / num_shards[0]
    grows = any(graph.batch.is_proportional(size) for shape, _ in internal for size in shape)
    growth = graph.batch.bytes_factor((shape for shape, _ in internal), context.micro_batch)
    return sum(prod(shape) * itemsize for shape, itemsize in internal) * growth / num_shards[0 if grows else 1]


@dataclass(slots=True)
class _SavedMemory:
    """Which memory the tensors of a block lie in as its ops run in turn (``roots``), and the bytes of what is ``held``; of
    that, ``core`` is freed by selective recomputation."""

    context: BlockContext
    redistributions: BlockRedistributions
    memory_of: dict[int, TensorMemory] = field(default_factory=dict)
    placements_of: dict[int, Placements] = field(init=False)
    saved_earlier: set[int] = field(init=False)
    bytes_of: dict[TensorMemory, float] = field(default_factory=dict)
    freed: set[TensorMemory] = field(default_factory=set)

    def __post_init__(self) -> None:
        block, program = self.context.block, self.context.program
        self.placements_of = {
            value: parse_placements(at.placement) for value, at in zip(block.inputs, program.inputs, strict=True)
        }
        self.saved_earlier = _saved_before(self.context)

    def add_op(self, op: Op, planned: OpPlan) -> None:
        """Enter what an op makes, then what it keeps."""
        case, tensors = self.context, (*op.inputs, *op.outputs)
        read = self._input_memory(op)
        memory = self._output_memory(op, planned, read) | read
        ran, owners, values = case.model.profile.ops[op.id], case.model.profile.storage_owner, case.model.graph.values
        texts = (*planned.inputs, *planned.outputs)
        for at in (*ran.saved_inputs, *(len(op.inputs) + i for i in ran.saved_outputs)):
            value = tensors[at]
            copy = memory[value]
            self._classify(op, copy)
            if values[owners[value]].kind not in ("parameter", "buffer") and copy not in self.bytes_of:
                there = copy[0] == "made" and copy[1] in self.saved_earlier
                self.bytes_of[copy] = 0.0 if there else self._memory_bytes(copy, value, parse_placements(texts[at]))

    def _input_memory(self, op: Op) -> dict[int, TensorMemory]:
        """The memory of each input."""
        found: dict[int, TensorMemory] = {}
        for at, value in enumerate(op.inputs):
            made: TensorMemory = ("made", value, ())
            copy = self.redistributions.memory_read.get((op.id, at), made)
            whole: TensorMemory = ("made", self.context.model.profile.storage_owner[value], ())
            found[value] = self.memory_of.get(value, whole) if copy == made else copy
        return found

    def _output_memory(self, op: Op, planned: OpPlan, input_memory: dict[int, TensorMemory]) -> dict[int, TensorMemory]:
        """The memory of each output: its own, or that of what it views."""
        owners = self.context.model.profile.storage_owner
        for value, text in zip(op.outputs, planned.outputs, strict=True):
            viewed = next((v for v in op.inputs if owners[value] != value and owners[v] == owners[value]), None)
            self.memory_of[value] = ("made", value, ()) if viewed is None else input_memory[viewed]
            self.placements_of[value] = parse_placements(text)
            if op.is_attention and viewed is None and self.context.selective is None:
                self.freed.add(self.memory_of[value])
        return {value: self.memory_of[value] for value in op.outputs}

    def _classify(self, op: Op, memory: TensorMemory) -> None:
        """Whether selective recomputation frees a copy that an op keeps: by operation, all but results of selected ops and
        what blocks hand on; else what attention alone keeps. In Megatron's program attention that is computed again
        leaves its result where another op keeps it."""
        selected = self.context.selective
        if selected is not None:
            if memory[0] == "moved" or (
                memory[1] not in selected.result_owners and memory[1] not in selected.block_input_owners
            ):
                self.freed.add(memory)
        elif self.context.is_megatron and not op.is_attention:
            self.freed.discard(memory)

    def _memory_bytes(self, memory: TensorMemory, value: int, placements: Placements) -> float:
        """Bytes of a copy, of which a saver sees ``value`` in ``placements``."""
        case, values = self.context, self.context.model.graph.values
        if memory[0] == "moved" or (memory[1] in self.placements_of and memory[1] not in case.model.parameter_free):
            return float(
                case.local_bytes(memory[1], memory[2] if memory[0] == "moved" else self.placements_of[memory[1]])
            )
        # memory of an earlier block, or of what is at hand anywhere: as much of the whole as the saver's part of it
        seen, whole = case.full_shape(value), prod(case.full_shape(memory[1])) * values[memory[1]].itemsize
        if prod(seen) * values[value].itemsize > whole:  # expanded: a rank keeps what it sees, at most all
            return min(float(whole), float(case.local_bytes(value, placements)))
        return whole * case.mesh.local_bytes(seen, 1, placements) / max(prod(seen), 1)


def _saved_before(context: BlockContext) -> set[int]:
    """Values whose memory an op of an earlier block keeps: it is charged there."""
    found = set()
    for op in context.model.graph.ops[: context.block.first_op]:
        ran = context.model.profile.ops[op.id]
        tensors = (*op.inputs, *op.outputs)
        for at in (*ran.saved_inputs, *(len(op.inputs) + i for i in ran.saved_outputs)):
            found.add(context.model.profile.storage_owner[tensors[at]])
    return found
