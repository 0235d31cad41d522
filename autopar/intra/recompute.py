"""What full and selective recomputation run once more in the backward of a block, whatever its placements.

The backward reads what autograd saves: inputs, outputs and internal tensors of ops. An op is recomputed when the
backward reads its output or its internal saved tensors, or when a recomputed op reads its output; the outputs of the
block are inputs of the next one, which saves them. So the last matmul of a transformer block, whose output is added to
the residual stream, is not recomputed: torch's checkpoint stops before it, and our runtime leaves it out. Megatron-LM
recomputes the whole block.

Selective recomputation saves more than the block's inputs (`SelectiveSaved`): an op whose outputs it saves is not
recomputed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.cost.execution_model import ExecutionModel
from autopar.graph.ir import Block, Graph, GraphProfile
from autopar.intra.block_space import INPUT_NODE, OUTPUT_NODE, BlockSpace, TensorEdge


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectiveSaved:
    """What selective recomputation by operation saves: the outputs and internal tensors of ``saved_ops`` (ids).
    ``saved_owners`` are the values (ids) whose memory is saved, ``input_owners`` those of them that are inputs of
    blocks and outputs of none of these ops."""

    saved_ops: frozenset[int]
    saved_owners: frozenset[int]
    input_owners: frozenset[int]

    @staticmethod
    def by_operation(
        graph: Graph, profile: GraphProfile, blocks: Sequence[Block], execution: ExecutionModel
    ) -> "SelectiveSaved":
        """Of all blocks of a graph. Saved are every second matmul with a parameter, counted block by block since each is
        a checkpoint of its own, and fused attention."""
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
    """``ops`` (ids) are recomputed; ``needed_inputs`` are the (op id, input position) that the backward or a recomputed
    op reads, None for all."""

    ops: frozenset[int]
    needed_inputs: frozenset[tuple[int, int]] | None
    space: BlockSpace

    @staticmethod
    def of_block(
        space: BlockSpace, profile: GraphProfile, *, whole_block: bool, saved_ops: frozenset[int] = frozenset()
    ) -> "Recomputation":
        """``whole_block``: every op; else what the backward reads, apart from the outputs of ``saved_ops`` (ids)."""
        ops = {node.op.id: node.op for node in space.ops}
        if whole_block:
            return Recomputation(ops=frozenset(ops), needed_inputs=None, space=space)
        producer = {value: op.id for op in ops.values() for value in op.outputs}
        block_outputs = frozenset(space.block.outputs)
        recomputed: set[int] = set()
        needed: set[tuple[int, int]] = set()
        stack: list[int] = []

        def recompute(op: int) -> None:
            if op not in recomputed and op not in saved_ops:
                recomputed.add(op)
                stack.append(op)

        def need(op: int, position: int) -> None:
            needed.add((op, position))
            value = ops[op].inputs[position]
            if value in producer and value not in block_outputs:
                recompute(producer[value])

        for op in ops.values():
            saved = profile.ops[op.id]
            for position in saved.saved_inputs:
                need(op.id, position)
            if saved.saved_internal_tensors or any(op.outputs[at] not in block_outputs for at in saved.saved_outputs):
                recompute(op.id)
        while stack:
            op_id = stack.pop()
            for position in range(len(ops[op_id].inputs)):
                need(op_id, position)
        return Recomputation(ops=frozenset(recomputed), needed_inputs=frozenset(needed), space=space)

    @staticmethod
    def of_attention(space: BlockSpace) -> "Recomputation":
        """Attention alone, whose inputs stay saved."""
        attention = frozenset(node.op.id for node in space.ops if node.op.is_attention)
        return Recomputation(ops=attention, needed_inputs=frozenset(), space=space)

    def repeats_redistribution(self, edge: TensorEdge) -> bool:
        """Whether the tensor of an edge is redistributed once more: its consumer, or one behind its shared node, needs
        it in the backward."""
        if self.needed_inputs is None:
            return True
        if edge.target in (INPUT_NODE, OUTPUT_NODE):
            return False
        node = self.space.op_node(edge.target)
        if node is None:
            return any(
                self.repeats_redistribution(other) for other in self.space.tensor_edges if other.source == edge.target
            )
        assert edge.input_index is not None
        return (node.op.id, edge.input_index) in self.needed_inputs
