"""What full and selective recomputation run again of a block, whatever its placements.

The backward reads what autograd keeps: inputs, results and tensors of the insides of ops. An op runs again when the
backward reads its result or insides, or an op that runs again reads its result; what the block hands on stays. So the
last product of a transformer block, whose sum goes into the residual stream, does not run again: torch's checkpoint
stops before it, and our runtime leaves it out. Megatron-LM's runs the whole block.

Selective recomputation keeps more than the block's inputs (`Kept`): an op whose results it keeps does not run again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.cost.execution_model import ExecutionModel
from autopar.graph.ir import Block, Graph, GraphProfile
from autopar.intra.block_space import INPUT_NODE, OUTPUT_NODE, BlockSpace, TensorEdge


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectiveSaved:
    """What selective recomputation by operation keeps: ``ops`` (ids) keep their results and insides, ``memories`` are the
    values whose memory stays, ``inputs`` those of them that blocks read and none of these ops makes."""

    saved_ops: frozenset[int]
    saved_owners: frozenset[int]
    input_owners: frozenset[int]

    @staticmethod
    def by_operation(
        graph: Graph, profile: GraphProfile, blocks: Sequence[Block], execution: ExecutionModel
    ) -> "SelectiveSaved":
        """Of a whole graph; every block is a checkpoint of its own and counts its own products."""
        ops: set[int] = set()
        for block in blocks:
            number = 0
            for op in graph.ops[block.first_op : block.end_op]:
                if op.is_attention:
                    if execution.attn == "flash":
                        ops.add(op.id)
                elif profile.ops[op.id].forward_flops and any(
                    graph.values[value].kind == "parameter" for value in op.inputs
                ):
                    if number % 2 == 0:
                        ops.add(op.id)
                    number += 1
        made = {profile.storage_owner[value] for op in ops for value in graph.ops[op].outputs}
        read = {profile.storage_owner[value] for block in blocks for value in block.inputs}
        return SelectiveSaved(
            saved_ops=frozenset(ops), saved_owners=frozenset(made | read), input_owners=frozenset(read - made)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recomputation:
    """``ops`` (ids) run again, ``reads`` are (op, input position) of values that must be there again; ``None``: all."""

    ops: frozenset[int]
    needed_inputs: frozenset[tuple[int, int]] | None
    space: BlockSpace

    @staticmethod
    def of_block(
        space: BlockSpace, profile: GraphProfile, *, whole_block: bool, saved_ops: frozenset[int] = frozenset()
    ) -> "Recomputation":
        """``whole``: all of it; else what the backward reads and no op of ``stay`` has kept."""
        ops = {node.op.id: node.op for node in space.ops}
        if whole_block:
            return Recomputation(ops=frozenset(ops), needed_inputs=None, space=space)
        maker = {value: op.id for op in ops.values() for value in op.outputs}
        handed_on = frozenset(space.block.outputs)
        found: set[int] = set()
        reads: set[tuple[int, int]] = set()
        stack: list[int] = []

        def run(op: int) -> None:
            if op not in found and op not in saved_ops:
                found.add(op)
                stack.append(op)

        def read(op: int, at: int) -> None:
            reads.add((op, at))
            value = ops[op].inputs[at]
            if value in maker and value not in handed_on:
                run(maker[value])

        for op in ops.values():
            kept = profile.ops[op.id]
            for at in kept.saved_inputs:
                read(op.id, at)
            if kept.saved_internal_tensors or any(op.outputs[at] not in handed_on for at in kept.saved_outputs):
                run(op.id)
        while stack:
            op_id = stack.pop()
            for at in range(len(ops[op_id].inputs)):
                read(op_id, at)
        return Recomputation(ops=frozenset(found), needed_inputs=frozenset(reads), space=space)

    @staticmethod
    def of_attention(space: BlockSpace, attention_ops: frozenset[int]) -> "Recomputation":
        """Attention alone, whose inputs stay."""
        return Recomputation(
            ops=attention_ops & frozenset(node.op.id for node in space.ops), needed_inputs=frozenset(), space=space
        )

    def repeats_redistribution(self, edge: TensorEdge) -> bool:
        """Whether the value of a flow is moved again: an op behind it, or behind its hub, reads it again."""
        if self.needed_inputs is None:
            return True
        first_hub = 2 + len(self.space.ops)
        if edge.target in (INPUT_NODE, OUTPUT_NODE):
            return False
        if edge.target >= first_hub:
            return any(
                self.repeats_redistribution(other) for other in self.space.tensor_edges if other.source == edge.target
            )
        assert edge.input_index is not None
        return (self.space.ops[edge.target - 2].op.id, edge.input_index) in self.needed_inputs
