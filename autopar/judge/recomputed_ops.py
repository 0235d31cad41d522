"""What a block's backward computes a second time, as far as collectives show it.

The backward reads what autograd keeps of each op: inputs, outputs, tensors of its insides (the op's profile). A
parameter that is cut at rest is gathered again where the backward reads it. Under full recomputation only the block's
inputs stay (torch's selective checkpoint keeps the results of some ops, too), and an op runs again when the backward
reads its results or insides, or another op that runs again reads them; so do the moves on the way, and the exchanges
inside the op. What the block hands on as it was made stays for the next block of its stage. The last product of a
transformer block, whose sum goes into the residual stream, does not run again: nothing reads it.
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
    """``ops`` and ``routes`` that run again in the backward, and the ``parameters`` that it reads."""

    ops: frozenset[int]
    paths: tuple[RedistributionPath, ...]
    parameters_read: frozenset[int]


def find_recomputation(
    context: BlockContext, redistributions: BlockRedistributions, communicating: frozenset[int]
) -> BackwardRecomputation:
    """Ops that are ``exchanging`` inside are kernels written out, and a dropout's mask follows from indices: for their
    insides alone they read no more than their backward does. Without selective recomputation by operation all that
    attention did not make stays, and it moves nothing."""
    graph, profile, block = context.model.graph, context.model.profile, context.block
    ops = {op.id: op for op in graph.ops[block.first_op : block.end_op]}
    maker = {value: op.id for op in ops.values() for value in op.outputs}
    handed_on = _outputs_placed_as_made(graph, block, context.program) & context.outputs_read_later
    full = context.program.recompute == "full" or context.selective is not None
    kept = context.selective.saved_ops if context.selective is not None else frozenset()
    found: dict[int, bool] = {}  # whether the op's results are read, or its insides alone
    routes: set[int] = set()
    parameters: set[int] = set()
    stack: list[int] = []

    def mark_recomputed(op: int, *, results: bool) -> None:
        known = op in kept or (op in found and (found[op] or not results))
        if full and not known and not context.model.parameter_free.issuperset(ops[op].outputs):
            found[op] = results
            stack.append(op)

    def mark_read(op: int, at: int) -> None:
        value = ops[op].inputs[at]
        if graph.values[profile.storage_owner[value]].kind == "parameter":  # itself, or a view of it
            parameters.add(profile.storage_owner[value])
        if full:
            routes.update(redistributions.paths_to.get((op, at), ()))
            if value in maker and value not in handed_on:
                mark_recomputed(maker[value], results=True)

    for op in ops.values():
        ran = profile.ops[op.id]
        for at in ran.saved_inputs:
            mark_read(op.id, at)
        if not handed_on.issuperset(op.outputs[at] for at in ran.saved_outputs):
            mark_recomputed(op.id, results=True)
        elif ran.saved_internal_tensors:
            mark_recomputed(op.id, results=False)
    while stack:
        op_id = stack.pop()
        insides = (op_id in communicating or dropout_probability(ops[op_id]) > 0) and not found[op_id]
        for at in profile.ops[op_id].saved_inputs if insides else range(len(ops[op_id].inputs)):
            mark_read(op_id, at)
    return BackwardRecomputation(
        ops=frozenset(found),
        paths=tuple(redistributions.forward_paths[at] for at in sorted(routes)),
        parameters_read=frozenset(parameters),
    )


def _outputs_placed_as_made(graph: Graph, block: Block, program: BlockProgram) -> frozenset[int]:
    """Values that lie where the block ends as their op leaves them."""
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
