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
from autopar.intra.backward_overlap import Hiding
from autopar.intra.block_space import BlockSpace, Flow
from autopar.intra.op_metrics import Savers
from autopar.intra.saved_memory import LocalSizes, is_gathered
from autopar.rules.placement_pair import PlacementPair, forward_placements

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Policy = Literal["choice", "always", "never"]
"""Whether keeping inputs as cut is chosen by price; what linear ops always do, and nothing else (Megatron-LM); or what
no op does (PyTorch's own tensor parallelism)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Regather:
    """Of one flow; tables are (sources, targets). ``always``: pairs that are gathered again whatever the price, which
    the flow's backward seconds include. ``choice_s``: what the backward costs more where it is a choice, inf where it
    is none, and ``freed_bytes`` what is not kept then. ``whole_bytes`` (targets,) is what the backward of the
    ``readers`` (nodes) holds."""

    always: Bools
    choice_s: Floats
    freed_bytes: Floats
    whole_bytes: Floats
    readers: tuple[int, ...]

    @property
    def is_choice(self) -> bool:
        return bool(np.isfinite(self.choice_s).any())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Side:
    """The states at one end of a flow, and the data axis's pair there. The last ``num_again`` are those of a hub whose
    readers save it sharded."""

    states: Sequence[tuple[PlacementPair, ...]]
    data: PlacementPair
    num_again: int = 0


class Regathers:
    """Of one block. What the ``savers`` keep is charged to them."""

    def __init__(
        self,
        space: BlockSpace,
        profile: GraphProfile,
        savers: Savers,
        local: LocalSizes,
        hiding: Hiding,
        policy: Policy,
    ) -> None:
        self.space, self.local, self.hiding, self.policy = space, local, hiding, policy
        self._first_hub = 2 + len(space.ops)
        self._keeps = {(node.op.id, at) for node in space.ops for at in profile.ops[node.op.id].saved_inputs}
        self._charged = {
            (node.op.id, at)
            for node in space.ops
            for positions, _ in savers.get(node.op.id, ())
            for at in positions
            if at < len(node.op.inputs)
        }
        self._readers: dict[int, list[Flow]] = {}
        for flow in space.flows:
            if flow.source >= self._first_hub:
                self._readers.setdefault(flow.source, []).append(flow)
        self._whole: dict[tuple[int, int], Bools] = {}
        self.of_flow: dict[int, Regather] = {}
        self.saved_bytes: dict[int, Floats] = {}

    def charge(self, op: int, whole: Mapping[int, Bools]) -> None:
        """What an op of the graph is charged for: under which of its strategies for all of the value at a position."""
        self._whole |= {(op, position): strategies for position, strategies in whole.items()}

    def at_hub(self, hub: int) -> bool:
        """Whether keeping the hub's value as cut is a choice: an op that reads it from there is charged for it."""
        return self.policy == "choice" and any(self._is_charged(flow) for flow in self._readers.get(hub, ()))

    def add(self, at: int, source: Side, target: Side, forward: Floats, backward: Floats) -> tuple[Floats, Floats]:
        """Forward and backward seconds of flow number ``at``, with what it gathers again."""
        flow = self.space.flows[at]
        made, read = ([forward_placements(pairs) for pairs in side.states] for side in (source, target))
        apart = np.array([[one != other and is_gathered(one, other) for other in read] for one in made])
        apart &= source.data.without_size == target.data.without_size
        backward = self.hiding.gradient_s(flow, target.states, apart, backward)
        if source.num_again and self._is_charged(flow):
            same = np.array([[one == other for other in read] for one in made]) & (source.data == target.data)
            same[: -source.num_again] = False
            self.saved_bytes[at] = np.where(same, -self._bytes(flow, target), 0.0)
            forward = np.where(same & ~self._charged_whole(flow), np.inf, forward)
        keepers = self._keepers(flow)
        if self.policy == "never" or not keepers or source.num_again or not (apart.any() or target.num_again):
            return forward, backward
        again_s = self.hiding.again_s(flow, target.states, forward)
        kept_cut, whole = self._bytes(flow, source)[:, None], self._bytes(flow, target)
        always, choice_s = np.zeros_like(apart), np.full_like(forward, np.inf)
        if self.policy == "always":
            always = apart
        elif target.num_again:
            again_states = np.arange(len(target.states)) >= len(target.states) - target.num_again
            forward = np.where(again_states & ~apart, np.inf, forward)
            always = apart & again_states
            self.saved_bytes[at] = np.where(always, kept_cut, 0.0)
        elif flow.target < self._first_hub and self._is_charged(flow):
            choice_s = np.where(apart & (whole > kept_cut) & self._charged_whole(flow), again_s, np.inf)
        if always.any() or np.isfinite(choice_s).any():
            self.of_flow[at] = Regather(
                always=always,
                choice_s=choice_s,
                freed_bytes=np.where(np.isfinite(choice_s), whole - kept_cut, 0.0),
                whole_bytes=whole,
                readers=keepers,
            )
        return forward, backward + np.where(always, again_s, 0.0)

    def _is_charged(self, flow: Flow) -> bool:
        return self._position(flow) in self._charged

    def _charged_whole(self, flow: Flow) -> Bools:
        """(targets,) whether a charged op is charged for all of what the flow brings, so that all can be given back."""
        position = self._position(flow)
        assert position is not None
        return self._whole[position]

    def _position(self, flow: Flow) -> tuple[int, int] | None:
        if flow.input is None or not 2 <= flow.target < self._first_hub:
            return None
        return self.space.ops[flow.target - 2].op.id, flow.input

    def _keepers(self, flow: Flow) -> tuple[int, ...]:
        """The nodes that keep what the flow brings, itself or through its hub."""
        flows = self._readers.get(flow.target, ()) if flow.target >= self._first_hub else (flow,)
        return tuple(
            one.target
            for one in flows
            if self._position(one) in self._keeps and (self.policy != "always" or self._is_linear(one.target))
        )

    def _is_linear(self, node: int) -> bool:
        op = self.space.ops[node - 2]
        return op.rule.compute == "matmul" and bool(op.parameters)

    def _bytes(self, flow: Flow, side: Side) -> Floats:
        """(states,) bytes of the value on a rank."""
        return np.array(
            [self.local.num_bytes(flow.value, forward_placements(pairs), side.data.forward) for pairs in side.states]
        )
