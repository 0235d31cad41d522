"""Inputs that are saved sharded and regathered in the backward.

A linear op under tensor parallelism reads its input unsharded where the ops before it are sequence-parallel. Autograd
would save the gathered tensor (r bytes); saving its shard (m bytes) frees r - m bytes for a second all-gather, most of
which overlaps with the op's own gradient matmuls (`backward_overlap`). Megatron-LM always does so (Korthikanti et al.,
2022, section 4.2.2); here it is a choice, priced pair by pair so that elimination stays exact:

    one consumer        each pair of the edge takes the cheaper of the two
    several consumers   the shared node has each such placement twice; the edge into the second costs the regather and
                        m bytes, the edge out of it to the op that is charged for the tensor refunds r

It is a choice only where an op is charged for all of what it reads (`op_metrics`): views of one memory with equal
placements are charged for that memory once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from autopar.intra.backward_overlap import BackwardOverlap
from autopar.intra.block_space import BlockSpace, TensorEdge
from autopar.intra.edge_tables import EdgeEnd
from autopar.intra.local_bytes import LocalBytes
from autopar.intra.priced_model import PricedModel
from autopar.intra.saved_memory import is_gathered
from autopar.rules.placement_pair import forward_placements

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
RegatherPolicy = Literal["choice", "always", "never"]
"""Whether saving inputs sharded is chosen by price ("choice"); is what linear ops always do, and no other op
("always": Megatron-LM); or what no op does ("never": PyTorch's own tensor parallelism)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EdgeRegather:
    """What may be regathered of one edge; tables are (choices of source, choices of target).

    ``is_forced``: pairs that are regathered whatever the price, which the edge's backward seconds include.
    ``optional_s``: seconds that a regather adds to the backward where it is a choice, inf where it is none, and
    ``freed_bytes`` what is not saved then. ``gathered_bytes`` (targets,) are in memory while the backward of
    ``saving_nodes`` runs.
    """

    is_forced: Bools
    optional_s: Floats
    freed_bytes: Floats
    gathered_bytes: Floats
    saving_nodes: tuple[int, ...]

    @property
    def is_optional(self) -> bool:
        """Whether some pair is free to regather or not."""
        return bool(np.isfinite(self.optional_s).any())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PricedEdge:
    """Seconds of an edge with its regather, and the bytes that a pair adds to SAVED (None: none); tables as in
    `EdgeRegather`."""

    forward_s: Floats
    backward_s: Floats
    saved_bytes: Floats | None = None
    regather: EdgeRegather | None = None


class RegatherTables:
    """Adds regathers to the edges of one block. ``fully_charged`` maps an (op id, input position) whose memory the op is
    charged for to (strategies,) whether it is charged for all of that tensor."""

    def __init__(
        self,
        space: BlockSpace,
        model: PricedModel,
        local_bytes: LocalBytes,
        overlap: BackwardOverlap,
        *,
        policy: RegatherPolicy,
        fully_charged: Mapping[tuple[int, int], Bools],
    ) -> None:
        self.space, self.local_bytes, self.overlap, self.policy = space, local_bytes, overlap, policy
        profile = model.profile
        self._saved_inputs = {(node.op.id, at) for node in space.ops for at in profile.ops[node.op.id].saved_inputs}
        self._fully_charged = fully_charged
        self._consumers = space.shared_consumers()

    def is_optional_at(self, shared_node: int) -> bool:
        """Whether saving a shared node's value sharded is a choice: one of its consumers is charged for it."""
        return self.policy == "choice" and any(self._is_charged(edge) for edge in self._consumers.get(shared_node, ()))

    def price_edge(
        self, edge: TensorEdge, source: EdgeEnd, target: EdgeEnd, forward_s: Floats, backward_s: Floats
    ) -> PricedEdge:
        """An edge that redistributes in ``forward_s`` and ``backward_s`` (sources, targets), with what overlaps of its
        backward and what is regathered."""
        made, taken = ([forward_placements(pairs) for pairs in end.placements] for end in (source, target))
        gathers = np.array([[one != other and is_gathered(one, other) for other in taken] for one in made])
        gathers &= source.data.without_size == target.data.without_size
        backward_s = self.overlap.exposed_gradient_s(edge, target.placements, gathers, backward_s)
        if source.num_regathered:
            if not self._is_charged(edge):
                return PricedEdge(forward_s=forward_s, backward_s=backward_s)
            is_same = np.array([[one == other for other in taken] for one in made]) & (source.data == target.data)
            is_same[: -source.num_regathered] = False
            return PricedEdge(
                forward_s=np.where(is_same & ~self._is_fully_charged(edge), np.inf, forward_s),
                backward_s=backward_s,
                saved_bytes=np.where(is_same, -self._placement_bytes(edge, target), 0.0),
            )
        priced = PricedEdge(forward_s=forward_s, backward_s=backward_s)
        if self.policy == "never" or not (gathers.any() or target.num_regathered):
            return priced
        return self._with_regather(edge, source, target, gathers, priced)

    def _with_regather(
        self, edge: TensorEdge, source: EdgeEnd, target: EdgeEnd, gathers: Bools, priced: PricedEdge
    ) -> PricedEdge:
        """An edge of which consumers that save its value may save it sharded, as ``source`` has it. ``gathers``: its
        pairs that all-gather."""
        saving_nodes = self._saving_nodes(edge)
        if not saving_nodes:
            return priced
        forward_s, saved_bytes = priced.forward_s, None
        regather_s = self.overlap.exposed_regather_s(edge, target.placements, forward_s)
        sharded_bytes, gathered_bytes = (
            self._placement_bytes(edge, source)[:, None],
            self._placement_bytes(edge, target),
        )
        is_forced, optional_s = np.zeros_like(gathers), np.full_like(forward_s, np.inf)
        if self.policy == "always":
            is_forced = gathers
        elif target.num_regathered:
            regathered = np.arange(len(target.placements)) >= len(target.placements) - target.num_regathered
            forward_s = np.where(regathered & ~gathers, np.inf, forward_s)
            is_forced = gathers & regathered
            saved_bytes = np.where(is_forced, sharded_bytes, 0.0)
        elif edge.target < self.space.first_shared_node and self._is_charged(edge):
            is_optional = gathers & (gathered_bytes > sharded_bytes) & self._is_fully_charged(edge)
            optional_s = np.where(is_optional, regather_s, np.inf)
        regather = None
        if is_forced.any() or np.isfinite(optional_s).any():
            regather = EdgeRegather(
                is_forced=is_forced,
                optional_s=optional_s,
                freed_bytes=np.where(np.isfinite(optional_s), gathered_bytes - sharded_bytes, 0.0),
                gathered_bytes=gathered_bytes,
                saving_nodes=saving_nodes,
            )
        backward_s = priced.backward_s + np.where(is_forced, regather_s, 0.0)
        return PricedEdge(forward_s=forward_s, backward_s=backward_s, saved_bytes=saved_bytes, regather=regather)

    def _is_charged(self, edge: TensorEdge) -> bool:
        return self._op_input(edge) in self._fully_charged

    def _is_fully_charged(self, edge: TensorEdge) -> Bools:
        """(targets,) whether a charged consumer is charged for all of the edge's value, so that all can be refunded."""
        op_input = self._op_input(edge)
        assert op_input is not None
        return self._fully_charged[op_input]

    def _op_input(self, edge: TensorEdge) -> tuple[int, int] | None:
        """(op id, input position) where an edge ends in an op."""
        node = self.space.op_node(edge.target)
        return None if node is None or edge.input_index is None else (node.op.id, edge.input_index)

    def _saving_nodes(self, edge: TensorEdge) -> tuple[int, ...]:
        """The ops (nodes) that save an edge's value, its target or the consumers of its shared node."""
        is_shared = edge.target >= self.space.first_shared_node
        edges = self._consumers.get(edge.target, ()) if is_shared else (edge,)
        return tuple(
            one.target
            for one in edges
            if self._op_input(one) in self._saved_inputs and (self.policy != "always" or self._is_linear(one.target))
        )

    def _is_linear(self, node: int) -> bool:
        op = self.space.op_node(node)
        return op is not None and op.rule.compute == "matmul" and bool(op.parameter_inputs)

    def _placement_bytes(self, edge: TensorEdge, end: EdgeEnd) -> Floats:
        """(choices of the end's node,) bytes of the edge's value on the rank that stores most."""
        return np.array([self.local_bytes.pair_bytes(edge.value, pairs, end.data) for pairs in end.placements])
