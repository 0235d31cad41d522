"""What passes while an op of a block runs: memory beside what micro-batches keep, counted from the program's
placements.

Forward, an op's tensors that no op of the model keeps, each memory once; backward, the gradients of its activations
(each memory once) and of its parameters; both with what its kernels allocate for themselves. Materialised attention
allocates its scores forward, and the gradients of scores and of probabilities backward.
"""

from math import prod

from autopar.graph.ir import Graph, Op
from autopar.graph.profile import GraphProfile
from autopar.inter.judge_ops import sizes_at
from autopar.inter.judge_routes import Mesh
from autopar.plan.mesh import parse_placements
from autopar.plan.plan import OpPlan


def kept_anywhere(graph: Graph, profile: GraphProfile) -> tuple[frozenset[int], frozenset[int]]:
    """Values whose memory some op keeps for its backward, and those of them whose gradient is written into it."""
    found: set[int] = set()
    reused: set[int] = set()
    for op in graph.ops:
        ran, tensors = profile.ops[op.id], (*op.inputs, *op.outputs)
        for at in (*ran.saved_inputs, *(len(op.inputs) + i for i in ran.saved_outputs)):
            owner = profile.owners[tensors[at]]
            if graph.values[owner].kind not in ("parameter", "buffer"):
                found.add(owner)
        reused.update(profile.owners[op.inputs[at]] for at in ran.overwritten)
    return frozenset(found), frozenset(reused)


def whole_scores(graph: Graph, op: Op, micro_batch: int) -> int:
    """How many scores an attention has."""
    query, key = graph.values[op.inputs[0]].shape, graph.values[op.inputs[1]].shape
    return prod(sizes_at(graph, (*query[:-1], key[-2]), micro_batch))


def passing(
    graph: Graph,
    profile: GraphProfile,
    op: Op,
    planned: OpPlan,
    mesh: Mesh,
    micro_batch: int,
    stays: frozenset[int],
    reused: frozenset[int],
    shards: int,
    materialised: bool,
) -> float:
    """Bytes on the fullest rank, of which it does one of ``shards`` parts; ``stays`` and ``reused``: see
    ``kept_anywhere``."""
    ahead: dict[int, float] = {}
    back: dict[int, float] = {}
    weights = 0.0
    for value, text in zip((*op.inputs, *op.outputs), (*planned.inputs, *planned.outputs), strict=True):
        tensor, owner = graph.values[value], profile.owners[value]
        shape = tensor.shape if tensor.kind in ("parameter", "buffer") else sizes_at(graph, tensor.shape, micro_batch)
        size = float(mesh.local_bytes(shape, tensor.itemsize, parse_placements(text)))
        if tensor.kind == "parameter" and tensor.requires_grad:
            weights += size
        if tensor.kind != "activation":
            continue
        if owner not in stays:
            ahead[owner] = max(ahead.get(owner, 0.0), size)
        if tensor.requires_grad and owner not in reused:
            back[owner] = max(back.get(owner, 0.0), size)
    ran = profile.ops[op.id]
    part = graph.batch.growth((graph.values[v].shape for v in (*op.inputs, *op.outputs)), micro_batch) / shards
    own = (ran.forward_scratch_bytes * part, ran.backward_scratch_bytes * part)
    if materialised:
        scores = whole_scores(graph, op, micro_batch) * graph.values[op.inputs[0]].itemsize / shards
        own = (scores, 2 * scores)
    return max(sum(ahead.values()) + own[0], sum(back.values()) + weights + own[1])
