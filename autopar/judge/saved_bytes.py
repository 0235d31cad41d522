"""Bytes that a block saves for its backward, counted from the placements of its ops.

What autograd saves is memory: an op's result, or what a redistribution left. Results that are views share the memory of
what they view. One tensor saved in two placements counts twice, one saved by two ops counts once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

from autopar.core.placement import Placements, parse_placements
from autopar.core.plan import OpPlan, Recompute
from autopar.graph.ir import Op, OpProfile
from autopar.judge.block_redistributions import BlockRedistributions, TensorMemory
from autopar.judge.context import BlockContext
from autopar.judge.workspace_bytes import num_attention_scores


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedBytes:
    """Bytes that one micro-batch saves for the backward: ``always_bytes`` under none and selective recomputation,
    ``freed_bytes`` unless selective recomputation frees them, ``selective_only_bytes`` under selective recomputation
    alone, and ``inputs_bytes``, the block's inputs, under full recomputation alone."""

    always_bytes: float
    freed_bytes: float
    selective_only_bytes: float
    inputs_bytes: float

    def saved_under(self, recompute: Recompute) -> float:
        """Bytes that a micro-batch saves while it is in flight."""
        return {
            "none": self.always_bytes + self.freed_bytes,
            "selective": self.always_bytes + self.selective_only_bytes,
            "full": self.inputs_bytes,
        }[recompute]

    def restored_under(self, recompute: Recompute) -> float:
        """Bytes that recomputation restores while the backward is in the block."""
        return {"none": 0.0, "selective": self.freed_bytes, "full": self.always_bytes + self.freed_bytes}[recompute]


def count_saved_bytes(
    context: BlockContext, redistributions: BlockRedistributions, num_shards: dict[int, tuple[int, int]]
) -> SavedBytes:
    """What one micro-batch saves. ``num_shards``: by how many ranks the work of each op is divided, and by how many of
    those on axes that do not shard the batch."""
    memory = _SavedMemory(context, redistributions)
    selective, owners = context.selective, context.model.profile.storage_owner
    internal_bytes = {True: 0.0, False: 0.0}  # of ops that selective recomputation frees, and of the others
    selective_only_bytes = 0.0
    read: set[int] = set()
    for op, planned in context.distributed_ops():
        memory.add_op(op, planned)
        read.update(op.inputs)
        freed = op.is_attention if selective is None else op.id not in selective.saved_ops
        internal_bytes[freed] += _saved_internal_bytes(context, op, num_shards[op.id])
        if selective is not None and op.id in selective.saved_ops:
            results = zip(op.outputs, planned.outputs, strict=True)
            selective_only_bytes += sum(
                context.local_bytes(value, parse_placements(text))
                for value, text in results
                if owners[value] not in context.model.saved_owners
            )
    inputs = {
        value: context.local_bytes(value, parse_placements(planned.placement))
        for value, planned in zip(context.block.inputs, context.program.inputs, strict=True)
        if value in read
    }
    if selective is not None:
        counted = context.model.saved_owners | selective.result_owners
        selective_only_bytes += sum(size for value, size in inputs.items() if owners[value] not in counted)
    freed_bytes = sum(size for saved, size in memory.bytes_of.items() if saved in memory.freed)
    return SavedBytes(
        always_bytes=internal_bytes[False] + sum(memory.bytes_of.values()) - freed_bytes,
        freed_bytes=internal_bytes[True] + freed_bytes,
        selective_only_bytes=float(selective_only_bytes),
        inputs_bytes=float(sum(inputs.values())),
    )


def _saved_internal_bytes(context: BlockContext, op: Op, num_shards: tuple[int, int]) -> float:
    """Bytes of the tensors that an op saves besides its inputs and outputs; materialised attention saves its scores."""
    graph, internal = context.model.graph, context.model.profile.ops[op.id].saved_internal_tensors
    if context.materialises_scores(op):
        num_scores = num_attention_scores(graph, op, context.micro_batch)
        return num_scores * context.software.math_attention_bytes_per_score / num_shards[0]
    grows = any(graph.batch.is_proportional(size) for shape, _ in internal for size in shape)
    growth = graph.batch.bytes_factor((shape for shape, _ in internal), context.micro_batch)
    return sum(prod(shape) * itemsize for shape, itemsize in internal) * growth / num_shards[0 if grows else 1]


@dataclass(slots=True)
class _SavedMemory:
    """The memory of the tensors of a block, as its ops run in turn.

    ``memory_of``: value -> the memory that its op left it in; ``placements_of``: value -> its placements there;
    ``saved_earlier``: values whose memory an earlier block saves. ``bytes_of``: bytes of each memory that is saved;
    ``freed``: those of them that selective recomputation frees."""

    context: BlockContext
    redistributions: BlockRedistributions
    memory_of: dict[int, TensorMemory] = field(default_factory=dict)
    placements_of: dict[int, Placements] = field(init=False)
    saved_earlier: frozenset[int] = field(init=False)
    bytes_of: dict[TensorMemory, float] = field(default_factory=dict)
    freed: set[TensorMemory] = field(default_factory=set)

    def __post_init__(self) -> None:
        block, program = self.context.block, self.context.program
        self.placements_of = {
            value: parse_placements(planned.placement)
            for value, planned in zip(block.inputs, program.inputs, strict=True)
        }
        self.saved_earlier = _saved_by_earlier_blocks(self.context)

    def add_op(self, op: Op, planned: OpPlan) -> None:
        """Enter the results of an op, then what it saves."""
        model, tensors = self.context.model, (*op.inputs, *op.outputs)
        input_memory = self._input_memory(op)
        memory_of_tensor = self._output_memory(op, planned, input_memory) | input_memory
        texts = (*planned.inputs, *planned.outputs)
        for position in _saved_positions(op, model.profile.ops[op.id]):
            value = tensors[position]
            memory = memory_of_tensor[value]
            self._update_freed(op, memory)
            owner = model.graph.values[model.profile.storage_owner[value]]
            if owner.kind not in ("parameter", "buffer") and memory not in self.bytes_of:
                counted_earlier = memory.origin == "made" and memory.value in self.saved_earlier
                self.bytes_of[memory] = (
                    0.0 if counted_earlier else self._memory_bytes(memory, value, parse_placements(texts[position]))
                )

    def _input_memory(self, op: Op) -> dict[int, TensorMemory]:
        """The memory of each input."""
        found: dict[int, TensorMemory] = {}
        for position, value in enumerate(op.inputs):
            made = TensorMemory("made", value)
            memory = self.redistributions.memory_read.get((op.id, position), made)
            owner = TensorMemory("made", self.context.model.profile.storage_owner[value])
            found[value] = self.memory_of.get(value, owner) if memory == made else memory
        return found

    def _output_memory(self, op: Op, planned: OpPlan, input_memory: dict[int, TensorMemory]) -> dict[int, TensorMemory]:
        """The memory of each output: its own, or that of what it views."""
        owners = self.context.model.profile.storage_owner
        for value, text in zip(op.outputs, planned.outputs, strict=True):
            viewed = next((v for v in op.inputs if owners[value] != value and owners[v] == owners[value]), None)
            self.memory_of[value] = TensorMemory("made", value) if viewed is None else input_memory[viewed]
            self.placements_of[value] = parse_placements(text)
            if op.is_attention and viewed is None and self.context.selective is None:
                self.freed.add(self.memory_of[value])
        return {value: self.memory_of[value] for value in op.outputs}

    def _update_freed(self, op: Op, memory: TensorMemory) -> None:
        """Decide whether selective recomputation frees a memory that ``op`` saves.

        By operation, it frees all but results of selected ops and inputs of blocks. Otherwise it frees what attention
        alone saves; in Megatron's program, the result of attention stays saved where another op saves it."""
        selective = self.context.selective
        if selective is not None:
            if memory.origin == "redistributed" or (
                memory.value not in selective.result_owners and memory.value not in selective.block_input_owners
            ):
                self.freed.add(memory)
        elif self.context.is_megatron and not op.is_attention:
            self.freed.discard(memory)

    def _memory_bytes(self, memory: TensorMemory, value: int, placements: Placements) -> float:
        """Bytes of a memory of which an op saves ``value`` in ``placements``."""
        context, values = self.context, self.context.model.graph.values
        if memory.origin == "redistributed":
            return float(context.local_bytes(memory.value, memory.placements))
        if memory.value in self.placements_of and memory.value not in context.model.parameter_free:
            return float(context.local_bytes(memory.value, self.placements_of[memory.value]))
        # memory of an earlier block, or computed by every rank: a rank saves the fraction of it that it saves of the value
        shape = context.full_shape(value)
        full_bytes = prod(context.full_shape(memory.value)) * values[memory.value].itemsize
        if prod(shape) * values[value].itemsize > full_bytes:  # expanded: a rank saves what it reads, at most all
            return min(float(full_bytes), float(context.local_bytes(value, placements)))
        return full_bytes * context.mesh.local_bytes(shape, 1, placements) / max(prod(shape), 1)


def _saved_positions(op: Op, profile: OpProfile) -> Iterator[int]:
    """Positions in (inputs, outputs) of the tensors that an op saves for its backward."""
    yield from profile.saved_inputs
    yield from (len(op.inputs) + position for position in profile.saved_outputs)


def _saved_by_earlier_blocks(context: BlockContext) -> frozenset[int]:
    """Values whose memory an op of an earlier block saves: it is counted there."""
    profile = context.model.profile
    return frozenset(
        profile.storage_owner[(*op.inputs, *op.outputs)[position]]
        for op in context.model.graph.ops[: context.block.first_op]
        for position in _saved_positions(op, profile.ops[op.id])
    )
