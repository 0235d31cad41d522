"""Bytes that pass while one op runs, beside what micro-batches keep: the larger of its forward and its backward.

    forward     inputs and results whose memory no op keeps for the backward (what is kept is in SAVED) + scratch
    backward    gradients of results and of inputs, each memory once, + gradients of parameters + scratch

Scratch is what the op's own kernels allocate and free again: a cross entropy's gradient of log-probabilities, as large
as the logits; of materialised attention the raw scores forward, and backward the gradients of scores and of
probabilities.
"""

from collections.abc import Sequence

from autopar.cost.execution_model import ExecutionModel
from autopar.graph.ir import Graph, GraphProfile, Op


def find_overwritten_owners(graph: Graph, profile: GraphProfile) -> frozenset[int]:
    """Values in whose kept memory their gradients are written."""
    return frozenset(
        profile.storage_owner[op.inputs[at]] for op in graph.ops for at in profile.ops[op.id].overwritten_inputs
    )


def score_bytes(graph: Graph, op: Op, micro_batch: int, num_shards: float) -> float:
    """Bytes that one tensor of attention scores (b, h, q, k) takes on a rank, in the type of the query."""
    query, key = graph.values[op.inputs[0]], graph.values[op.inputs[1]]
    scores = 1.0
    for size in (*query.shape[:-1], key.shape[-2]):
        scores *= graph.batch.scale(size, micro_batch)
    return scores * query.itemsize / num_shards


def workspace_bytes(
    graph: Graph,
    profile: GraphProfile,
    op: Op,
    saved_owners: frozenset[int],
    overwritten_owners: frozenset[int],
    local_bytes: Sequence[float],
    trained_parameters: Sequence[int],
    scratch: tuple[float, float],
) -> float:
    """``keepers``: values whose memory some op keeps, ``overwritten``: those whose gradients are written there;
    ``local_bytes`` are those of its inputs, then outputs, on the fullest rank; ``parameters``: positions of the trained
    ones; ``scratch``: local bytes, forward and backward."""
    forward: dict[int, float] = {}
    backward: dict[int, float] = {}
    for at, number in enumerate((*op.inputs, *op.outputs)):
        value, owner = graph.values[number], profile.storage_owner[number]
        if value.kind != "activation":
            continue
        size = local_bytes[at]
        if owner not in saved_owners:
            forward[owner] = max(forward.get(owner, 0.0), size)
        if value.requires_grad and owner not in overwritten_owners:
            backward[owner] = max(backward.get(owner, 0.0), size)
    gradients = sum(local_bytes[at] for at in trained_parameters)
    return max(sum(forward.values()) + scratch[0], sum(backward.values()) + gradients + scratch[1])


def scratch_bytes(
    graph: Graph,
    profile: GraphProfile,
    op: Op,
    execution: ExecutionModel,
    is_attention: bool,
    micro_batch: int,
    num_shards: float,
) -> tuple[float, float]:
    """What an op of which a rank does one of ``shards`` parts allocates beside its results, forward and backward."""
    ran = profile.ops[op.id]
    if is_attention and execution.attn == "math":
        scores = score_bytes(graph, op, micro_batch, num_shards)
        return scores, 2.0 * scores
    scale = (
        graph.batch.bytes_factor((graph.values[v].shape for v in (*op.inputs, *op.outputs)), micro_batch) / num_shards
    )
    return ran.forward_workspace_bytes * scale, ran.backward_workspace_bytes * scale
