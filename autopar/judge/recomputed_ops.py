"""Which ops and redistributions of a block its backward recomputes, and which parameters it reads.

The backward reads what autograd saves of each op: inputs, outputs, internal tensors (the op's profile). A parameter that
is stored sharded is gathered a second time where the backward reads it.

Under full recomputation only the block's inputs are saved (torch's selective checkpoint also saves the results of some
ops). An op is recomputed when the backward reads its result or a tensor saved inside it, or when another recomputed op
reads its result; the redistributions that lead there and the collectives inside the op are then issued a second time. A
block output that its op leaves in the placement in which the next block of the stage reads it stays saved there. The last
product of a transformer block, whose result goes into the residual stream, is not recomputed: nothing reads it.
"""

from dataclasses import dataclass

from autopar.core.plan import BlockProgram
from autopar.graph.ir import Block, Graph
from autopar.graph.random_ops import dropout_probability
from autopar.judge.block_redistributions import BlockRedistributions
from autopar.judge.context import BlockContext
from autopar.judge.redistribution_path import RedistributionPath


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardRecomputation:
    """What the backward recomputes: ``ops``, and ``paths`` of redistributions. ``parameters_read``: the parameters that it
    reads."""

    ops: frozenset[int]
    paths: tuple[RedistributionPath, ...]
    parameters_read: frozenset[int]


def find_recomputation(
    context: BlockContext, redistributions: BlockRedistributions, communicating: frozenset[int]
) -> BackwardRecomputation:
    """What the backward of a block recomputes. ``communicating``: ops that issue collectives inside.

    These are written out as several kernels, and a dropout's mask follows from indices: recomputed for their internal
    tensors alone, both read no more than their backward does. Selective recomputation of attention alone recomputes
    nothing else and redistributes nothing: ``ops`` and ``paths`` are empty."""
    graph, profile, block = context.model.graph, context.model.profile, context.block
    ops = {op.id: op for op in graph.ops[block.first_op : block.end_op]}
    maker = {value: op.id for op in ops.values() for value in op.outputs}
    saved_by_next = _outputs_placed_as_made(graph, block, context.program) & context.outputs_read_later
    full = context.program.recompute == "full" or context.selective is not None
    saved_ops = context.selective.saved_ops if context.selective is not None else frozenset()
    recomputed: dict[int, bool] = {}  # op -> whether its results are read, or its internal tensors alone
    paths: set[int] = set()
    parameters: set[int] = set()
    stack: list[int] = []

    def mark_recomputed(op: int, *, results: bool) -> None:
        """Unless it is known: an op whose ``results`` (else: internal tensors) the backward reads."""
        is_known = op in saved_ops or (op in recomputed and (recomputed[op] or not results))
        if full and not is_known and not context.model.parameter_free.issuperset(ops[op].outputs):
            recomputed[op] = results
            stack.append(op)

    def mark_read(op: int, position: int) -> None:
        """Input ``position`` of an op, which the backward reads."""
        value = ops[op].inputs[position]
        if graph.values[profile.storage_owner[value]].kind == "parameter":  # itself, or a view of it
            parameters.add(profile.storage_owner[value])
        if full:
            paths.update(redistributions.paths_to.get((op, position), ()))
            if value in maker and value not in saved_by_next:
                mark_recomputed(maker[value], results=True)

    for op in ops.values():
        op_profile = profile.ops[op.id]
        for position in op_profile.saved_inputs:
            mark_read(op.id, position)
        if not saved_by_next.issuperset(op.outputs[position] for position in op_profile.saved_outputs):
            mark_recomputed(op.id, results=True)
        elif op_profile.saved_internal_tensors:
            mark_recomputed(op.id, results=False)
    while stack:
        op_id = stack.pop()
        reads_saved_only = (op_id in communicating or dropout_probability(ops[op_id]) > 0) and not recomputed[op_id]
        for position in profile.ops[op_id].saved_inputs if reads_saved_only else range(len(ops[op_id].inputs)):
            mark_read(op_id, position)
    return BackwardRecomputation(
        ops=frozenset(recomputed),
        paths=tuple(redistributions.forward_paths[index] for index in sorted(paths)),
        parameters_read=frozenset(parameters),
    )


def _outputs_placed_as_made(graph: Graph, block: Block, program: BlockProgram) -> frozenset[int]:
    """Outputs of the block that are placed at its end as their op leaves them."""
    shared = {planned.name: planned.placement for planned in program.shared}
    made = {
        value: text
        for op, planned in zip(graph.ops[block.first_op : block.end_op], program.ops, strict=True)
        for value, text in zip(op.outputs, planned.outputs, strict=True)
    }
    return frozenset(
        value
        for value, planned in zip(block.outputs, program.outputs, strict=True)
        if made[value] == planned.placement == shared.get(graph.values[value].name, planned.placement)
    )
