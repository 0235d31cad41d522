"""What passes while an op of a block runs: memory beside what micro-batches keep, counted from the program's
placements.

Forward, an op's tensors that no op of the model keeps, each memory once; backward, the gradients of its activations
(each memory once) and of its parameters; both with what its kernels allocate for themselves. Materialised attention
allocates its scores forward, and the gradients of scores and of probabilities backward.
"""

from math import prod

from autopar.core.placement import parse_placements
from autopar.core.plan import OpPlan
from autopar.graph.ir import Graph, Op
from autopar.judge.context import BlockContext, shape_at


def num_attention_scores(graph: Graph, op: Op, micro_batch: int) -> int:
    """How many scores an attention has."""
    query, key = graph.values[op.inputs[0]].shape, graph.values[op.inputs[1]].shape
    return prod(shape_at(graph, (*query[:-1], key[-2]), micro_batch))


def op_workspace_bytes(context: BlockContext, op: Op, planned: OpPlan, num_shards: int) -> float:
    """Bytes on the fullest rank, of which it does one of ``shards`` parts."""
    graph, profile = context.model.graph, context.model.profile
    ahead: dict[int, float] = {}
    back: dict[int, float] = {}
    weights = 0.0
    for value, text in zip((*op.inputs, *op.outputs), (*planned.inputs, *planned.outputs), strict=True):
        tensor, owner = graph.values[value], profile.storage_owner[value]
        size = float(context.local_bytes(value, parse_placements(text)))
        if tensor.kind == "parameter" and tensor.requires_grad:
            weights += size
        if tensor.kind != "activation":
            continue
        if owner not in context.model.saved_owners:
            ahead[owner] = max(ahead.get(owner, 0.0), size)
        if tensor.requires_grad and owner not in context.model.overwritten_owners:
            back[owner] = max(back.get(owner, 0.0), size)
    ran = profile.ops[op.id]
    part = (
        graph.batch.bytes_factor((graph.values[v].shape for v in (*op.inputs, *op.outputs)), context.micro_batch)
        / num_shards
    )
    own = (ran.forward_workspace_bytes * part, ran.backward_workspace_bytes * part)
    if context.materialises_scores(op):
        scores = num_attention_scores(graph, op, context.micro_batch) * graph.values[op.inputs[0]].itemsize / num_shards
        own = (scores, 2 * scores)
    return max(sum(ahead.values()) + own[0], sum(back.values()) + weights + own[1])
