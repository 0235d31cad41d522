"""Workspace of an op: memory that lives only while it runs, besides what micro-batches save, counted from the program's
placements.

Forward, an op's tensors that no op of the model saves, each memory once; backward, the gradients of its activations (each
memory once) and of its parameters; both with what its kernels allocate for themselves. Materialised attention allocates
its scores forward, and the gradients of scores and of probabilities backward.
"""

from math import prod

from autopar.core.placement import parse_placements
from autopar.core.plan import OpPlan
from autopar.graph.ir import Graph, Op
from autopar.judge.context import BlockContext, shape_at


def num_attention_scores(graph: Graph, op: Op, micro_batch: int) -> int:
    """How many scores an attention has at ``micro_batch`` samples, over all ranks."""
    query, key = graph.values[op.inputs[0]].shape, graph.values[op.inputs[1]].shape
    return prod(shape_at(graph, (*query[:-1], key[-2]), micro_batch))


def op_workspace_bytes(context: BlockContext, op: Op, planned: OpPlan, num_shards: int) -> float:
    """Bytes on the fullest rank, which does one of ``num_shards`` parts of the op's work."""
    graph, model = context.model.graph, context.model
    forward_bytes: dict[int, float] = {}  # by the value that owns the memory
    gradient_bytes: dict[int, float] = {}
    weight_gradient_bytes = 0.0
    for value, text in zip((*op.inputs, *op.outputs), (*planned.inputs, *planned.outputs), strict=True):
        tensor, owner = graph.values[value], model.profile.storage_owner[value]
        size = float(context.local_bytes(value, parse_placements(text)))
        if tensor.kind == "parameter" and tensor.requires_grad:
            weight_gradient_bytes += size
        if tensor.kind != "activation":
            continue
        if owner not in model.saved_owners:
            forward_bytes[owner] = max(forward_bytes.get(owner, 0.0), size)
        if tensor.requires_grad and owner not in model.overwritten_owners:
            gradient_bytes[owner] = max(gradient_bytes.get(owner, 0.0), size)
    profile, shapes = model.profile.ops[op.id], (graph.values[v].shape for v in (*op.inputs, *op.outputs))
    scale = graph.batch.bytes_factor(shapes, context.micro_batch) / num_shards
    scratch_bytes = (profile.forward_workspace_bytes * scale, profile.backward_workspace_bytes * scale)
    if context.materialises_scores(op):
        scores = num_attention_scores(graph, op, context.micro_batch)
        scores_bytes = scores * graph.values[op.inputs[0]].itemsize / num_shards
        scratch_bytes = (scores_bytes, 2 * scores_bytes)
    return max(
        sum(forward_bytes.values()) + scratch_bytes[0],
        sum(gradient_bytes.values()) + weight_gradient_bytes + scratch_bytes[1],
    )
