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
from autopar.intra.block_space import IN, OUT, BlockSpace, Flow


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What selective recomputation by operation keeps: ``ops`` (ids) keep their results and insides, ``memories`` are the
    values whose memory stays, ``inputs`` those of them that blocks read and none of these ops makes."""

    ops: frozenset[int]
    memories: frozenset[int]
    inputs: frozenset[int]

    @staticmethod
    def of(graph: Graph, profile: GraphProfile, blocks: Sequence[Block], execution: ExecutionModel) -> "Kept":
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
        made = {profile.owners[value] for op in ops for value in graph.ops[op].outputs}
        read = {profile.owners[value] for block in blocks for value in block.inputs}
        return Kept(ops=frozenset(ops), memories=frozenset(made | read), inputs=frozenset(read - made))


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """``ops`` (ids) run again, ``reads`` are (op, input position) of values that must be there again; ``None``: all."""

    ops: frozenset[int]
    reads: frozenset[tuple[int, int]] | None
    space: BlockSpace

    @staticmethod
    def of(space: BlockSpace, profile: GraphProfile, *, whole: bool, stay: frozenset[int] = frozenset()) -> "Again":
        """``whole``: all of it; else what the backward reads and no op of ``stay`` has kept."""
        ops = {node.op.id: node.op for node in space.ops}
        if whole:
            return Again(ops=frozenset(ops), reads=None, space=space)
        maker = {value: op.id for op in ops.values() for value in op.outputs}
        handed_on = frozenset(space.block.outputs)
        found: set[int] = set()
        reads: set[tuple[int, int]] = set()
        stack: list[int] = []

        def run(op: int) -> None:
            if op not in found and op not in stay:
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
            if kept.saved_internal or any(op.outputs[at] not in handed_on for at in kept.saved_outputs):
                run(op.id)
        while stack:
            op_id = stack.pop()
            for at in range(len(ops[op_id].inputs)):
                read(op_id, at)
        return Again(ops=frozenset(found), reads=frozenset(reads), space=space)

    @staticmethod
    def of_attention(space: BlockSpace, core: frozenset[int]) -> "Again":
        """Attention alone, whose inputs stay."""
        return Again(ops=core & frozenset(node.op.id for node in space.ops), reads=frozenset(), space=space)

    def moves(self, flow: Flow) -> bool:
        """Whether the value of a flow is moved again: an op behind it, or behind its hub, reads it again."""
        if self.reads is None:
            return True
        first_hub = 2 + len(self.space.ops)
        if flow.target in (IN, OUT):
            return False
        if flow.target >= first_hub:
            return any(self.moves(other) for other in self.space.flows if other.source == flow.target)
        assert flow.input is not None
        return (self.space.ops[flow.target - 2].op.id, flow.input) in self.reads
