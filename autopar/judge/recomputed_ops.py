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
from autopar.graph.random_ops import drop_probability
from autopar.judge.block_redistributions import Moves
from autopar.judge.context import Case
from autopar.judge.judge_mesh import Route


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """``ops`` and ``routes`` that run again in the backward, and the ``parameters`` that it reads."""

    ops: frozenset[int]
    routes: tuple[Route, ...]
    parameters: frozenset[int]


def again(case: Case, moved: Moves, exchanging: frozenset[int]) -> Again:
    """Ops that are ``exchanging`` inside are kernels written out, and a dropout's mask follows from indices: for their
    insides alone they read no more than their backward does. Without selective recomputation by operation all that
    attention did not make stays, and it moves nothing."""
    graph, profile, block = case.ground.graph, case.ground.profile, case.block
    ops = {op.id: op for op in graph.ops[block.first_op : block.end_op]}
    maker = {value: op.id for op in ops.values() for value in op.outputs}
    handed_on = _handed_on(graph, block, case.program) & case.read_on
    full = case.program.recompute == "full" or case.selected is not None
    kept = case.selected.ops if case.selected is not None else frozenset()
    found: dict[int, bool] = {}  # whether the op's results are read, or its insides alone
    routes: set[int] = set()
    parameters: set[int] = set()
    stack: list[int] = []

    def run(op: int, *, results: bool) -> None:
        known = op in kept or (op in found and (found[op] or not results))
        if full and not known and not case.ground.free.issuperset(ops[op].outputs):
            found[op] = results
            stack.append(op)

    def read(op: int, at: int) -> None:
        value = ops[op].inputs[at]
        if graph.values[profile.owners[value]].kind == "parameter":  # itself, or a view of it
            parameters.add(profile.owners[value])
        if full:
            routes.update(moved.ways.get((op, at), ()))
            if value in maker and value not in handed_on:
                run(maker[value], results=True)

    for op in ops.values():
        ran = profile.ops[op.id]
        for at in ran.saved_inputs:
            read(op.id, at)
        if not handed_on.issuperset(op.outputs[at] for at in ran.saved_outputs):
            run(op.id, results=True)
        elif ran.saved_internal:
            run(op.id, results=False)
    while stack:
        op_id = stack.pop()
        insides = (op_id in exchanging or drop_probability(ops[op_id]) > 0) and not found[op_id]
        for at in profile.ops[op_id].saved_inputs if insides else range(len(ops[op_id].inputs)):
            read(op_id, at)
    return Again(
        ops=frozenset(found), routes=tuple(moved.forward[at] for at in sorted(routes)), parameters=frozenset(parameters)
    )


def _handed_on(graph: Graph, block: Block, program: BlockProgram) -> frozenset[int]:
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
