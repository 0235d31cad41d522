"""Prices of a block on one mesh: seconds and bytes for every choice of every node and every pair, before any weighing.

The mesh is (data axis, inner axes ...). What the data axis does to an op is given (`data_axis`): mostly it cuts the
batch, so that a block's prices follow from ``local_batch`` alone, and are made as for one data rank. On each inner axis
every op chooses an option freely; a *strategy* of an op is an option per inner axis. What nodes cost is counted in `op_metrics`.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.choice.elimination import Eliminator
from autopar.choice.mini_buckets import MiniBuckets, eliminator
from autopar.core.placement import REPLICATE
from autopar.cost.compute_time import host_calls
from autopar.cost.execution_model import ExecutionModel
from autopar.cost.fusion import Saving
from autopar.cost.redistribution_time import MeshLinks
from autopar.graph.ir import GraphProfile, Value
from autopar.intra.backward_overlap import Hiding
from autopar.intra.block_space import IN, OUT, BlockSpace, OpNode
from autopar.intra.op_metrics import BESIDE, BOUNDARY, NUM_METRICS, OpMetrics, Savers, first_keeper
from autopar.intra.recompute import Again, Kept
from autopar.intra.redistribution_tables import Moves
from autopar.intra.regather import Policy, Regather, Regathers, Side
from autopar.intra.saved_memory import CopyCounter, LocalSizes
from autopar.intra.strategies import ROLES, Allowed, Strategies
from autopar.rules.axis_options import Option
from autopar.rules.dim_factors import without_size
from autopar.rules.placement_pair import PARTIAL_GRADIENT, REPLICATED, PlacementPair, forward_placements

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockTables:
    """Of a block at ``local_batch`` samples on each of ``data`` ranks. ``strategies[at]`` of ``space.ops[at]``:
    (options per inner axis). ``states[n]``: placements of boundary or hub node n's values, and ``boundary_pairs``
    those of a block input or output under each boundary placement. ``kept[at]`` are the bytes of tensors that SAVED and
    CORE_SAVED price for op ``at``, (strategies, 2); ``copies`` counts what a solution really keeps instead;
    ``inside_s[at]`` are the seconds of FORWARD and BACKWARD that it exchanges by itself. ``node_metrics[n]`` is
    (choices, metrics), ``edges`` are (node, node, (choices, choices) forward seconds, the same backward).
    ``parameter_uses[at]`` lists, for op ``at``, (value, per strategy: local elements, axes with a partial gradient);
    axes count the data axis as 0, inner axes from 1. ``regathers`` are the gathers that backward may repeat, by edge,
    ``saved_bytes`` what pairs of an edge add to SAVED. ``again`` are the (op, number) of uses of a parameter that an
    earlier op of the block uses, and stores, alike. ``host_s`` are the seconds that the host takes to launch the
    forward, what selective recomputation launches of it again, the backward, and what full recomputation launches
    again; ``moved_again`` are the edges whose value full recomputation moves again, ``moved_selectively`` those of
    selective. A move adds ``sync_s``, forward and backward per edge, as ranks wait for the slowest host. Communication
    behind compute costs ``contention`` of the shorter of the two (1: nothing overlaps); ``blocking`` launches add to
    what the device computes. ``eliminator`` is made for the edges."""

    space: BlockSpace
    local_batch: int
    data: int
    strategies: tuple[tuple[tuple[Option, ...], ...], ...]
    boundaries: tuple[tuple[str, ...], ...]
    node_metrics: tuple[Floats, ...]
    edges: tuple[tuple[int, int, Floats, Floats], ...]
    parameter_uses: tuple[tuple[tuple[Value, tuple[tuple[int, tuple[int, ...]], ...]], ...], ...]
    again: frozenset[tuple[int, int]]
    hub_states: tuple[tuple[tuple[PlacementPair, ...], ...], ...]
    regathers: dict[int, Regather]
    saved_bytes: dict[int, Floats]
    boundary_pairs: dict[int, tuple[tuple[PlacementPair, ...], ...]]
    kept: tuple[Floats, ...]
    inside_s: tuple[Floats, ...]
    copies: CopyCounter
    host_s: tuple[float, float, float, float]
    moved_again: tuple[bool, ...]
    moved_selectively: tuple[bool, ...]
    sync_s: tuple[tuple[float, float], ...]
    contention: float
    blocking: bool
    eliminator: Eliminator | MiniBuckets


class TableBuilder:
    """Builds the tables of one block for one inner mesh and local batch; ``links`` are the inner axes' links,
    ``whole`` those of all axes, the data axis of ``data`` ranks first. ``data`` may be one wherever the block is
    plain."""

    def __init__(
        self,
        space: BlockSpace,
        profile: GraphProfile,
        savers: Savers,
        core: frozenset[int],
        local_batch: int,
        links: MeshLinks,
        execution: ExecutionModel,
        whole: MeshLinks,
        allowed: Allowed | None = None,
        fused: dict[int, Saving] | None = None,
        data: int = 1,
        as_megatron: bool = False,
        kept: Kept | None = None,
    ) -> None:
        """``as_megatron``: linear ops keep a gathered input as it was cut, and gather it again in the backward, and
        attention that is computed again leaves its result (Korthikanti et al., 2022, sections 4.2.2 and 5). ``kept``:
        what selective recomputation keeps; None: all but the insides of attention (``core``)."""
        self._as_megatron = as_megatron
        assert data in (1, whole.sizes[0])
        self.data, self.micro_batch = data, local_batch * data
        hiding = self._hiding = Hiding(
            space,
            links.cluster.overlap_contention,
            everywhere=execution.overlap and not execution.blocking,
            where_gathered=as_megatron and not execution.blocking,
        )
        self.space, self.profile, self.local_batch = space, profile, local_batch
        self.links, self.execution, self.whole = links, execution, whole
        self.graph, self.sizes = space.graph, links.sizes
        self.core = core
        self._first_keeper = first_keeper(space.graph, profile, savers)
        self._again = Again.of(space, profile, whole=execution.whole_checkpoint)
        self._kept = kept
        self._selective = (
            Again.of_attention(space, core) if kept is None else Again.of(space, profile, whole=False, stay=kept.ops)
        )
        self.local = LocalSizes(space, self.sizes, local_batch, data)
        self._op_metrics = OpMetrics(
            self.local,
            profile,
            links,
            whole,
            execution,
            fused or {},
            savers,
            core=core,
            again=self._again.ops,
            selective=self._selective.ops,
            kept=kept,
        )
        self._choices = Strategies(space, self.sizes, local_batch, data, allowed)
        self._moves = Moves(links, whole, data, self.local)
        policy: Policy = "choice" if not as_megatron else "always" if kept is None else "never"
        self._regathers = Regathers(space, profile, savers, self.local, hiding, policy)

    def build(self) -> BlockTables:
        strategies = tuple(self._choices.of_op(node) for node in self.space.ops)
        hubs = [self._choices.of_hub(hub.pairs, regathers=self._regathers.at_hub(hub.node)) for hub in self.space.hubs]
        hub_states = tuple(states for states, _ in hubs)
        boundaries = tuple(itertools.product(ROLES, repeat=len(self.sizes)))
        metrics = [np.zeros((len(boundaries), NUM_METRICS)) for _ in (IN, OUT)]
        for flow_value in self.space.block.inputs:
            if flow_value in self.space.pairs:
                value, owner = self.graph.values[flow_value], self.profile.owners[flow_value]
                beside = self._kept is not None and owner in self._kept.inputs and owner not in self._first_keeper
                for at, roles in enumerate(boundaries):
                    pairs = self._choices.at_boundary(value, roles)
                    saved = self._local_bytes(value, pairs, self.space.data_axis.ends[value.id])
                    metrics[IN][at, [BOUNDARY, BESIDE]] += saved, saved * beside
        calls = np.zeros(4)
        prices = []
        for node, chosen, data in zip(self.space.ops, strategies, self.space.data_axis.options, strict=True):
            prices.append(self._op_metrics.of(node, chosen, data))
            self._hiding.add(node.node, chosen, prices[-1].products_s)
            self._regathers.charge(node.op.id, prices[-1].whole)
            is_core = node.op.id in self.core
            forward, backward = host_calls(node.op, self.profile.ops[node.op.id], self.execution, is_core)
            again, selective = (node.op.id in found.ops for found in (self._again, self._selective))
            calls += forward, forward * selective, backward, forward * again
        calls[[0, 2, 3]] += self.execution.software.fixed_calls
        if self._kept is not None:
            calls[1] += self.execution.software.fixed_calls
        metrics += [price.metrics for price in prices]
        metrics += [np.zeros((len(states), NUM_METRICS)) for states in hub_states]
        boundary_pairs = {
            value: tuple(self._choices.at_boundary(self.graph.values[value], roles) for roles in boundaries)
            for value in (*self.space.block.inputs, *self.space.block.outputs)
        }
        sides = self._sides(strategies, hubs, boundaries)
        edges = (*self._edges(sides), *self._alike(strategies))
        return BlockTables(
            space=self.space,
            local_batch=self.local_batch,
            data=self.data,
            strategies=strategies,
            boundaries=boundaries,
            node_metrics=tuple(metrics),
            edges=edges,
            parameter_uses=tuple(
                self._parameter_uses(node, chosen) for node, chosen in zip(self.space.ops, strategies, strict=True)
            ),
            again=frozenset((at, number) for _, _, at, number in self._repeated()),
            hub_states=hub_states,
            regathers=self._regathers.of_flow,
            saved_bytes=self._regathers.saved_bytes,
            boundary_pairs=boundary_pairs,
            kept=tuple(price.kept_bytes for price in prices),
            inside_s=tuple(price.inside_s for price in prices),
            copies=CopyCounter(
                self.space,
                self.profile,
                self._first_keeper,
                self.core,
                strategies,
                boundary_pairs,
                self.local,
                {flow: one.readers for flow, one in self._regathers.of_flow.items()},
                self._as_megatron,
                None if self._kept is None else self._kept.memories,
            ),
            host_s=tuple(float(count * self.links.cluster.device.launch_s) for count in calls),  # type: ignore[arg-type]
            moved_again=self._moved_by(self._again, len(edges)),
            moved_selectively=self._moved_by(self._selective, len(edges)),
            sync_s=(*self._sync_s(), *((0.0, 0.0) for _ in edges[len(self.space.flows) :])),
            contention=self.links.cluster.overlap_contention if self.execution.overlap else 1.0,
            blocking=self.execution.blocking,
            eliminator=eliminator(
                tuple(len(choices) for choices in metrics),
                tuple((source, target) for source, target, _, _ in edges),
                keep=(IN, OUT),
            ),
        )

    def _moved_by(self, again: Again, num_edges: int) -> tuple[bool, ...]:
        """Per edge whether its value is moved again; edges beyond the flows move nothing."""
        found = [again.moves(flow) for flow in self.space.flows]
        return (*found, *(False for _ in range(num_edges - len(found))))

    def _sync_s(self) -> tuple[tuple[float, float], ...]:
        """Per flow what its move, forward and backward, waits for the slowest host: of all ranks where the data axis
        moves, else of those of the inner axes."""
        each = self.execution.software.collective_calls * self.links.cluster.device.launch_s
        inner = math.prod(self.sizes)
        found = []
        for flow in self.space.flows:
            source = self._data_pair(flow.value, flow.source, flow.output, True)
            target = self._data_pair(flow.value, flow.target, flow.input, False)
            changes = [
                one != REPLICATE and without_size(one) != without_size(other)
                for one, other in ((source.forward, target.forward), (target.gradient, source.gradient))
            ]
            found.append(tuple(each * ((self.data if changed else 1) * inner - 1) for changed in changes))
        return tuple(found)  # type: ignore[arg-type]

    def _data_pair(self, value: int, node: int, position: int | None, outgoing: bool) -> PlacementPair:
        """The data axis's pair of a value at one end of a flow."""
        given, first_hub = self.space.data_axis, 2 + len(self.space.ops)
        if node in (IN, OUT):
            return given.ends[value]
        if node >= first_hub:
            return given.hubs[node - first_hub]
        assert position is not None
        option = given.options[node - 2]
        return (option.outputs if outgoing else option.inputs)[position]

    def _local_bytes(self, value: Value, pairs: Sequence[PlacementPair], data: PlacementPair) -> float:
        """Bytes of a value on the rank that stores most; ``data`` is the data axis's pair."""
        return self.local.num_bytes(value.id, forward_placements(pairs), data.forward)

    def _repeated(self) -> list[tuple[int, int, int, int]]:
        """(op, number) of the first use of a parameter and (op, number) of each later one in the block."""
        first: dict[int, tuple[int, int]] = {}
        found = []
        for at, node in enumerate(self.space.ops):
            for number, position in enumerate(node.parameters):
                value = node.op.inputs[position]
                if value in first:
                    found.append((*first[value], at, number))
                else:
                    first[value] = (at, number)
        return found

    def _alike(
        self, strategies: Sequence[tuple[tuple[Option, ...], ...]]
    ) -> tuple[tuple[int, int, Floats, Floats], ...]:
        """Edges that let ops of the block use a parameter in one placement only."""
        edges = []
        for first, number, second, again in self._repeated():
            if first == second:
                continue
            sides = [
                [
                    tuple(option.inputs[self.space.ops[at].parameters[which]] for option in options)
                    for options in strategies[at]
                ]
                for at, which in ((first, number), (second, again))
            ]
            apart = np.array([[0.0 if one == other else np.inf for other in sides[1]] for one in sides[0]])
            if apart.any():
                edges.append((2 + first, 2 + second, apart, np.zeros_like(apart)))
        return tuple(edges)

    def _parameter_uses(
        self, node: OpNode, chosen: tuple[tuple[Option, ...], ...]
    ) -> tuple[tuple[Value, tuple[tuple[int, tuple[int, ...]], ...]], ...]:
        uses = []
        for position in node.parameters:
            value = self.graph.values[node.op.inputs[position]]
            per_strategy = []
            for options in chosen:
                pairs = [option.inputs[position] for option in options]
                elements = round(self._local_bytes(value, pairs, REPLICATED) / value.itemsize)
                data = PARTIAL_GRADIENT if value.id in self.space.data_axis.summed else REPLICATED
                axes = tuple(axis for axis, pair in enumerate((data, *pairs)) if pair == PARTIAL_GRADIENT)
                per_strategy.append((elements, axes))
            uses.append((value, tuple(per_strategy)))
        return tuple(uses)

    def _sides(
        self,
        strategies: Sequence[tuple[tuple[Option, ...], ...]],
        hubs: Sequence[tuple[tuple[tuple[PlacementPair, ...], ...], int]],
        boundaries: Sequence[tuple[str, ...]],
    ) -> list[tuple[Side, Side]]:
        """The states of each flow's value at both ends."""
        first_hub = 2 + len(strategies)
        found = []
        for flow in self.space.flows:
            sides = []
            for node, position, outgoing in (
                (flow.source, flow.output, True),
                (flow.target, flow.input, False),
            ):
                states: Sequence[tuple[PlacementPair, ...]]
                num_again = 0
                if node in (IN, OUT):
                    value = self.graph.values[flow.value]
                    states = [self._choices.at_boundary(value, roles) for roles in boundaries]
                elif node >= first_hub:
                    states, num_again = hubs[node - first_hub]
                else:
                    assert position is not None
                    states = [
                        tuple((o.outputs if outgoing else o.inputs)[position] for o in options)
                        for options in strategies[node - 2]
                    ]
                data = self._data_pair(flow.value, node, position, outgoing)
                sides.append(Side(states=states, data=data, num_again=num_again))
            found.append((sides[0], sides[1]))
        return found

    def _edges(self, sides: Sequence[tuple[Side, Side]]) -> tuple[tuple[int, int, Floats, Floats], ...]:
        edges = []
        for at, (flow, (source, target)) in enumerate(zip(self.space.flows, sides, strict=True)):
            value = self.graph.values[flow.value]
            forward, backward = self._moves.seconds(value, source.states, target.states, source.data, target.data)
            if flow.target == OUT:  # a whole scalar becomes a sum for nothing: zeros on all ranks but the first
                states, data = (source.states, target.states), (source.data, target.data)
                forward = self._moves.into_sums(value, states, data, forward)
            edges.append((flow.source, flow.target, *self._regathers.add(at, source, target, forward, backward)))
        return tuple(edges)
