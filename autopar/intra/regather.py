"""Inputs that were gathered and are kept as they were cut: the backward gathers them again.

A linear op under tensor parallelism reads its input whole where the ops before it are cut by sequence. Autograd would
keep the whole copy (r bytes); keeping what was gathered (m bytes) frees r - m for a second gather, most of it behind
the op's own products (`intra.hiding`). Megatron-LM always does (Korthikanti et al., 2022, section 4.2.2); here it is a
choice, priced pair by pair so that elimination stays exact:

    one reader         each pair of the edge takes the cheaper of the two
    several readers    the hub has states once more in which they keep it as cut: the way to such a state costs the
                       second gather and m, the way on to the op that is charged for the copy gives its r back

It is a choice only where an op is charged for all of what it reads (`op_metrics`): views of one memory that lie alike
are charged for that memory once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from autopar.graph.ir import GraphProfile
from autopar.intra.backward_overlap import BackwardOverlap
from autopar.intra.block_space import BlockSpace, TensorEdge
from autopar.intra.op_metrics import ChargedMemories
from autopar.intra.saved_memory import LocalBytes, is_gathered
from autopar.rules.placement_pair import PlacementPair, forward_placements

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
RegatherPolicy = Literal["choice", "always", "never"]
"""Whether keeping inputs as cut is chosen by price; what linear ops always do, and nothing else (Megatron-LM); or what
no op does (PyTorch's own tensor parallelism)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EdgeRegather:
    """Of one flow; tables are (sources, targets). ``always``: pairs that are gathered again whatever the price, which
    the flow's backward seconds include. ``choice_s``: what the backward costs more where it is a choice, inf where it
    is none, and ``freed_bytes`` what is not kept then. ``whole_bytes`` (targets,) is what the backward of the
    ``readers`` (nodes) holds."""

    is_forced: Bools
    optional_s: Floats
    freed_bytes: Floats
    gathered_bytes: Floats
    saving_nodes: tuple[int, ...]

    @property
    def is_optional(self) -> bool:
        return bool(np.isfinite(self.optional_s).any())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EdgeEnd:
    """The states at one end of a flow, and the data axis's pair there. The last ``num_again`` are those of a hub whose
    readers save it sharded."""

    placements: Sequence[tuple[PlacementPair, ...]]
    data: PlacementPair
    num_regathered: int = 0


class RegatherTables:
    """Of one block. What the ``savers`` keep is charged to them."""

    def __init__(
        self,
        space: BlockSpace,
        profile: GraphProfile,
        charged_memories: ChargedMemories,
        local_bytes: LocalBytes,
        overlap: BackwardOverlap,
        policy: RegatherPolicy,
    ) -> None:
        self.space, self.local_bytes, self.overlap, self.policy = space, local_bytes, overlap, policy
        self._first_shared = 2 + len(space.ops)
        self._saved_inputs = {(node.op.id, at) for node in space.ops for at in profile.ops[node.op.id].saved_inputs}
        self._charged_inputs = {
            (node.op.id, at)
            for node in space.ops
            for positions, _ in charged_memories.get(node.op.id, ())
            for at in positions
            if at < len(node.op.inputs)
        }
        self._consumers: dict[int, list[TensorEdge]] = {}
        for flow in space.tensor_edges:
            if flow.source >= self._first_shared:
                self._consumers.setdefault(flow.source, []).append(flow)
        self._fully_charged: dict[tuple[int, int], Bools] = {}
        self.by_edge: dict[int, EdgeRegather] = {}
        self.edge_saved_bytes: dict[int, Floats] = {}

    def set_charges(self, op: int, is_fully_charged: Mapping[int, Bools]) -> None:
        """What an op of the graph is charged for: under which of its strategies for all of the value at a position."""
        self._fully_charged |= {(op, position): strategies for position, strategies in is_fully_charged.items()}

    def is_optional_at(self, shared_node: int) -> bool:
        """Whether keeping the hub's value as cut is a choice: an op that reads it from there is charged for it."""
        return self.policy == "choice" and any(self._is_charged(flow) for flow in self._consumers.get(shared_node, ()))

    def add_edge(
        self, edge_index: int, source: EdgeEnd, target: EdgeEnd, forward_s: Floats, backward_s: Floats
    ) -> tuple[Floats, Floats]:
        """Forward and backward seconds of flow number ``at``, with what it gathers again."""
        flow = self.space.tensor_edges[edge_index]
        made, read = ([forward_placements(pairs) for pairs in side.placements] for side in (source, target))
        apart = np.array([[one != other and is_gathered(one, other) for other in read] for one in made])
        apart &= source.data.without_size == target.data.without_size
        backward_s = self.overlap.exposed_gradient_s(flow, target.placements, apart, backward_s)
        if source.num_regathered and self._is_charged(flow):
            same = np.array([[one == other for other in read] for one in made]) & (source.data == target.data)
            same[: -source.num_regathered] = False
            self.edge_saved_bytes[edge_index] = np.where(same, -self._placement_bytes(flow, target), 0.0)
            forward_s = np.where(same & ~self._is_fully_charged(flow), np.inf, forward_s)
        keepers = self._saving_nodes(flow)
        if self.policy == "never" or not keepers or source.num_regathered or not (apart.any() or target.num_regathered):
            return forward_s, backward_s
        again_s = self.overlap.exposed_regather_s(flow, target.placements, forward_s)
        kept_cut, whole = self._placement_bytes(flow, source)[:, None], self._placement_bytes(flow, target)
        always, choice_s = np.zeros_like(apart), np.full_like(forward_s, np.inf)
        if self.policy == "always":
            always = apart
        elif target.num_regathered:
            again_states = np.arange(len(target.placements)) >= len(target.placements) - target.num_regathered
            forward_s = np.where(again_states & ~apart, np.inf, forward_s)
            always = apart & again_states
            self.edge_saved_bytes[edge_index] = np.where(always, kept_cut, 0.0)
        elif flow.target < self._first_shared and self._is_charged(flow):
            choice_s = np.where(apart & (whole > kept_cut) & self._is_fully_charged(flow), again_s, np.inf)
        if always.any() or np.isfinite(choice_s).any():
            self.by_edge[edge_index] = EdgeRegather(
                is_forced=always,
                optional_s=choice_s,
                freed_bytes=np.where(np.isfinite(choice_s), whole - kept_cut, 0.0),
                gathered_bytes=whole,
                saving_nodes=keepers,
            )
        return forward_s, backward_s + np.where(always, again_s, 0.0)

    def _is_charged(self, edge: TensorEdge) -> bool:
        return self._op_input(edge) in self._charged_inputs

    def _is_fully_charged(self, edge: TensorEdge) -> Bools:
        """(targets,) whether a charged op is charged for all of what the flow brings, so that all can be given back."""
        position = self._op_input(edge)
        assert position is not None
        return self._fully_charged[position]

    def _op_input(self, edge: TensorEdge) -> tuple[int, int] | None:
        if edge.input_index is None or not 2 <= edge.target < self._first_shared:
            return None
        return self.space.ops[edge.target - 2].op.id, edge.input_index

    def _saving_nodes(self, edge: TensorEdge) -> tuple[int, ...]:
        """The nodes that keep what the flow brings, itself or through its hub."""
        flows = self._consumers.get(edge.target, ()) if edge.target >= self._first_shared else (edge,)
        return tuple(
            one.target
            for one in flows
            if self._op_input(one) in self._saved_inputs and (self.policy != "always" or self._is_linear(one.target))
        )

    def _is_linear(self, node: int) -> bool:
        op = self.space.ops[node - 2]
        return op.rule.compute == "matmul" and bool(op.parameter_inputs)

    def _placement_bytes(self, edge: TensorEdge, end: EdgeEnd) -> Floats:
        """(states,) bytes of the value on a rank."""
        return np.array(
            [
                self.local_bytes.num_bytes(edge.value, forward_placements(pairs), end.data.forward)
                for pairs in end.placements
            ]
        )
