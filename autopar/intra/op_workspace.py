"""Temporary bytes while one op runs, besides saved tensors: the larger of its forward and its backward.

    forward     inputs and outputs whose memory no op saves for the backward (what is saved is in SAVED), + kernels
    backward    gradients of outputs and of inputs, each memory once, + gradients of parameters, + kernels

Kernels allocate and free memory of their own: a cross entropy the gradient of the log-probabilities, as large as the
logits; materialised attention the raw scores in its forward, and in its backward the gradients of the scores and of the
probabilities.
"""

from collections.abc import Sequence

from autopar.graph.ir import Graph, Op
from autopar.intra.priced_model import PricedModel


def score_shape(graph: Graph, op: Op) -> tuple[int, ...]:
    """Shape of the scores of a materialised attention, (batch, heads, queries, keys)."""
    query, key = (graph.values[value].shape for value in op.inputs[:2])
    return (*query[:-1], key[-2])


class WorkspaceCounter:
    """The workspace of ops of one graph at one micro-batch. ``saved_owners``: values whose memory some op saves."""

    def __init__(self, graph: Graph, model: PricedModel, saved_owners: frozenset[int], micro_batch: int) -> None:
        self.graph, self.model, self.saved_owners, self.micro_batch = graph, model, saved_owners, micro_batch
        owner = model.profile.storage_owner
        self._overwritten_owners = frozenset(
            owner[op.inputs[at]] for op in graph.ops for at in model.profile.ops[op.id].overwritten_inputs
        )
        """Values whose gradients are written into their saved memory."""

    def num_bytes(
        self, op: Op, local_bytes: Sequence[float], trained_parameters: Sequence[int], num_shards: float
    ) -> float:
        """Bytes on the rank that stores most. ``local_bytes`` are those of the op's inputs, then outputs, there;
        ``trained_parameters`` the positions of the inputs that are trained; a rank computes one of ``num_shards``
        parts."""
        forward: dict[int, float] = {}
        backward: dict[int, float] = {}
        for at, number in enumerate((*op.inputs, *op.outputs)):
            value, owner = self.graph.values[number], self.model.profile.storage_owner[number]
            if value.kind != "activation":
                continue
            size = local_bytes[at]
            if owner not in self.saved_owners:
                forward[owner] = max(forward.get(owner, 0.0), size)
            if value.requires_grad and owner not in self._overwritten_owners:
                backward[owner] = max(backward.get(owner, 0.0), size)
        gradients = sum(local_bytes[at] for at in trained_parameters)
        kernels = self._kernel_bytes(op, num_shards)
        return max(sum(forward.values()) + kernels[0], sum(backward.values()) + gradients + kernels[1])

    def _kernel_bytes(self, op: Op, num_shards: float) -> tuple[float, float]:
        """What the kernels of one of ``num_shards`` parts of an op allocate besides its outputs, forward and
        backward."""
        if op.is_attention and self.model.execution.attn == "math":
            scores = self._score_bytes(op, num_shards)
            return scores, 2.0 * scores
        profile = self.model.profile.ops[op.id]
        shapes = (self.graph.values[value].shape for value in (*op.inputs, *op.outputs))
        scale = self.graph.batch.bytes_factor(shapes, self.micro_batch) / num_shards
        return profile.forward_workspace_bytes * scale, profile.backward_workspace_bytes * scale

    def _score_bytes(self, op: Op, num_shards: float) -> float:
        """Local bytes of one tensor of attention scores, in the type of the query."""
        scores = 1.0
        for size in score_shape(self.graph, op):
            scores *= self.graph.batch.scale(size, self.micro_batch)
        return scores * self.graph.values[op.inputs[0]].itemsize / num_shards
