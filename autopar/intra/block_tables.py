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
from autopar.choice.mini_buckets import MiniBuckets, make_eliminator
from autopar.core.placement import REPLICATE
from autopar.cost.compute_time import host_calls
from autopar.cost.execution_model import ExecutionModel
from autopar.cost.fusion import FusionSavings
from autopar.cost.redistribution_time import MeshLinks
from autopar.graph.ir import GraphProfile, Value
from autopar.intra.backward_overlap import BackwardOverlap
from autopar.intra.block_space import INPUT_NODE, OUTPUT_NODE, BlockSpace, OpNode
from autopar.intra.op_metrics import (
    INPUT_SAVED,
    NUM_OP_METRICS,
    SELECTIVE_ONLY_SAVED,
    ChargedMemories,
    OpPricer,
    find_first_savers,
)
from autopar.intra.recompute import Recomputation, SelectiveSaved
from autopar.intra.redistribution_tables import RedistributionTables
from autopar.intra.regather import EdgeEnd, EdgeRegather, RegatherPolicy, RegatherTables
from autopar.intra.saved_memory import LocalBytes, SavedMemoryCounter
from autopar.intra.strategies import BOUNDARY_ROLES, OptionFilter, StrategyEnumerator
from autopar.rules.axis_options import AxisOption
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
    data_ranks: int
    strategies: tuple[tuple[tuple[AxisOption, ...], ...], ...]
    boundary_roles: tuple[tuple[str, ...], ...]
    node_metrics: tuple[Floats, ...]
    edges: tuple[tuple[int, int, Floats, Floats], ...]
    parameter_uses: tuple[tuple[tuple[Value, tuple[tuple[int, tuple[int, ...]], ...]], ...], ...]
    repeated_parameter_uses: frozenset[tuple[int, int]]
    shared_placements: tuple[tuple[tuple[PlacementPair, ...], ...], ...]
    regathers: dict[int, EdgeRegather]
    edge_saved_bytes: dict[int, Floats]
    boundary_pairs: dict[int, tuple[tuple[PlacementPair, ...], ...]]
    op_saved_bytes: tuple[Floats, ...]
    internal_collective_s: tuple[Floats, ...]
    saved_memory: SavedMemoryCounter
    launch_s: tuple[float, float, float, float]
    repeated_by_full: tuple[bool, ...]
    repeated_by_selective: tuple[bool, ...]
    sync_s: tuple[tuple[float, float], ...]
    overlap_contention: float
    blocking_launches: bool
    eliminator: Eliminator | MiniBuckets


class BlockTableBuilder:
    """Builds the tables of one block for one inner mesh and local batch; ``links`` are the inner axes' links,
    ``whole`` those of all axes, the data axis of ``data`` ranks first. ``data`` may be one wherever the block is
    plain."""

    def __init__(
        self,
        space: BlockSpace,
        profile: GraphProfile,
        charged_memories: ChargedMemories,
        attention_ops: frozenset[int],
        local_batch: int,
        inner_links: MeshLinks,
        execution: ExecutionModel,
        mesh_links: MeshLinks,
        option_filter: OptionFilter | None = None,
        fusion_savings: dict[int, FusionSavings] | None = None,
        data_ranks: int = 1,
        as_megatron: bool = False,
        selective_saved: SelectiveSaved | None = None,
    ) -> None:
        """``as_megatron``: linear ops keep a gathered input as it was cut, and gather it again in the backward, and
        attention that is computed again leaves its result (Korthikanti et al., 2022, sections 4.2.2 and 5). ``kept``:
        what selective recomputation keeps; None: all but the insides of attention (``core``)."""
        self._as_megatron = as_megatron
        assert data_ranks in (1, mesh_links.sizes[0])
        self.data_ranks, self.micro_batch = data_ranks, local_batch * data_ranks
        hiding = self._overlap = BackwardOverlap(
            space,
            inner_links.cluster.overlap_contention,
            all_input_gradients=execution.overlap and not execution.blocking_launches,
            gathered_inputs=as_megatron and not execution.blocking_launches,
        )
        self.space, self.profile, self.local_batch = space, profile, local_batch
        self.inner_links, self.execution, self.mesh_links = inner_links, execution, mesh_links
        self.graph, self.inner_sizes = space.graph, inner_links.sizes
        self.attention_ops = attention_ops
        self._first_savers = find_first_savers(space.graph, profile, charged_memories)
        self._full_recomputation = Recomputation.of_block(space, profile, whole_block=execution.recomputes_whole_block)
        self._selective_saved = selective_saved
        self._selective_recomputation = (
            Recomputation.of_attention(space, attention_ops)
            if selective_saved is None
            else Recomputation.of_block(space, profile, whole_block=False, saved_ops=selective_saved.saved_ops)
        )
        self.local_bytes = LocalBytes(space, self.inner_sizes, local_batch, data_ranks)
        self._op_pricer = OpPricer(
            self.local_bytes,
            profile,
            inner_links,
            mesh_links,
            execution,
            fusion_savings or {},
            charged_memories,
            attention_ops=attention_ops,
            full_recompute_ops=self._full_recomputation.ops,
            selective_recompute_ops=self._selective_recomputation.ops,
            selective_saved=selective_saved,
        )
        self._enumerator = StrategyEnumerator(space, self.inner_sizes, local_batch, data_ranks, option_filter)
        self._redistribution = RedistributionTables(inner_links, mesh_links, data_ranks, self.local_bytes)
        policy: RegatherPolicy = "choice" if not as_megatron else "always" if selective_saved is None else "never"
        self._regathers = RegatherTables(space, profile, charged_memories, self.local_bytes, hiding, policy)

    def build(self) -> BlockTables:
        strategies = tuple(self._enumerator.op_strategies(node) for node in self.space.ops)
        hubs = [
            self._enumerator.shared_placements(hub.pairs, with_regather=self._regathers.is_optional_at(hub.index))
            for hub in self.space.shared_nodes
        ]
        hub_states = tuple(states for states, _ in hubs)
        boundaries = tuple(itertools.product(BOUNDARY_ROLES, repeat=len(self.inner_sizes)))
        metrics = [np.zeros((len(boundaries), NUM_OP_METRICS)) for _ in (INPUT_NODE, OUTPUT_NODE)]
        for flow_value in self.space.block.inputs:
            if flow_value in self.space.pairs:
                value, owner = self.graph.values[flow_value], self.profile.storage_owner[flow_value]
                beside = (
                    self._selective_saved is not None
                    and owner in self._selective_saved.input_owners
                    and owner not in self._first_savers
                )
                for at, roles in enumerate(boundaries):
                    pairs = self._enumerator.boundary_placement(value, roles)
                    saved = self._pair_bytes(value, pairs, self.space.data_axis.boundary_pairs[value.id])
                    metrics[INPUT_NODE][at, [INPUT_SAVED, SELECTIVE_ONLY_SAVED]] += saved, saved * beside
        calls = np.zeros(4)
        prices = []
        for node, chosen, data in zip(self.space.ops, strategies, self.space.data_axis.op_options, strict=True):
            prices.append(self._op_pricer.price(node, chosen, data))
            self._overlap.add_products(node.index, chosen, prices[-1].gradient_products_s)
            self._regathers.set_charges(node.op.id, prices[-1].is_fully_charged)
            is_core = node.op.id in self.attention_ops
            forward, backward = host_calls(node.op, self.profile.ops[node.op.id], self.execution, is_core)
            again, selective = (
                node.op.id in found.ops for found in (self._full_recomputation, self._selective_recomputation)
            )
            calls += forward, forward * selective, backward, forward * again
        calls[[0, 2, 3]] += self.execution.software.fixed_calls
        if self._selective_saved is not None:
            calls[1] += self.execution.software.fixed_calls
        metrics += [price.metrics for price in prices]
        metrics += [np.zeros((len(states), NUM_OP_METRICS)) for states in hub_states]
        boundary_pairs = {
            value: tuple(self._enumerator.boundary_placement(self.graph.values[value], roles) for roles in boundaries)
            for value in (*self.space.block.inputs, *self.space.block.outputs)
        }
        sides = self._edge_ends(strategies, hubs, boundaries)
        edges = (*self._tensor_edge_tables(sides), *self._same_placement_edges(strategies))
        return BlockTables(
            space=self.space,
            local_batch=self.local_batch,
            data_ranks=self.data_ranks,
            strategies=strategies,
            boundary_roles=boundaries,
            node_metrics=tuple(metrics),
            edges=edges,
            parameter_uses=tuple(
                self._parameter_uses(node, chosen) for node, chosen in zip(self.space.ops, strategies, strict=True)
            ),
            repeated_parameter_uses=frozenset((at, number) for _, _, at, number in self._repeated_uses()),
            shared_placements=hub_states,
            regathers=self._regathers.by_edge,
            edge_saved_bytes=self._regathers.edge_saved_bytes,
            boundary_pairs=boundary_pairs,
            op_saved_bytes=tuple(price.saved_bytes for price in prices),
            internal_collective_s=tuple(price.internal_collective_s for price in prices),
            saved_memory=SavedMemoryCounter(
                self.space,
                self.profile,
                self._first_savers,
                self.attention_ops,
                strategies,
                boundary_pairs,
                self.local_bytes,
                {flow: one.saving_nodes for flow, one in self._regathers.by_edge.items()},
                self._as_megatron,
                None if self._selective_saved is None else self._selective_saved.saved_owners,
            ),
            launch_s=tuple(float(count * self.inner_links.cluster.device.launch_s) for count in calls),  # type: ignore[arg-type]
            repeated_by_full=self._repeated_edges(self._full_recomputation, len(edges)),
            repeated_by_selective=self._repeated_edges(self._selective_recomputation, len(edges)),
            sync_s=(*self._sync_s(), *((0.0, 0.0) for _ in edges[len(self.space.tensor_edges) :])),
            overlap_contention=self.inner_links.cluster.overlap_contention if self.execution.overlap else 1.0,
            blocking_launches=self.execution.blocking_launches,
            eliminator=make_eliminator(
                tuple(len(choices) for choices in metrics),
                tuple((source, target) for source, target, _, _ in edges),
                query_nodes=(INPUT_NODE, OUTPUT_NODE),
            ),
        )

    def _repeated_edges(self, recomputation: Recomputation, num_edges: int) -> tuple[bool, ...]:
        """Per edge whether its value is moved again; edges beyond the flows move nothing."""
        found = [recomputation.repeats_redistribution(flow) for flow in self.space.tensor_edges]
        return (*found, *(False for _ in range(num_edges - len(found))))

    def _sync_s(self) -> tuple[tuple[float, float], ...]:
        """Per flow what its move, forward and backward, waits for the slowest host: of all ranks where the data axis
        moves, else of those of the inner axes."""
        each = self.execution.software.collective_calls * self.inner_links.cluster.device.launch_s
        inner = math.prod(self.inner_sizes)
        found = []
        for flow in self.space.tensor_edges:
            source = self._data_pair(flow.value, flow.source, flow.output_index, True)
            target = self._data_pair(flow.value, flow.target, flow.input_index, False)
            changes = [
                one != REPLICATE and without_size(one) != without_size(other)
                for one, other in ((source.forward, target.forward), (target.gradient, source.gradient))
            ]
            found.append(tuple(each * ((self.data_ranks if changed else 1) * inner - 1) for changed in changes))
        return tuple(found)  # type: ignore[arg-type]

    def _data_pair(self, value: int, node: int, position: int | None, outgoing: bool) -> PlacementPair:
        """The data axis's pair of a value at one end of a flow."""
        given, first_hub = self.space.data_axis, 2 + len(self.space.ops)
        if node in (INPUT_NODE, OUTPUT_NODE):
            return given.boundary_pairs[value]
        if node >= first_hub:
            return given.shared_pairs[node - first_hub]
        assert position is not None
        option = given.op_options[node - 2]
        return (option.outputs if outgoing else option.inputs)[position]

    def _pair_bytes(self, value: Value, pairs: Sequence[PlacementPair], data_pair: PlacementPair) -> float:
        """Bytes of a value on the rank that stores most; ``data`` is the data axis's pair."""
        return self.local_bytes.num_bytes(value.id, forward_placements(pairs), data_pair.forward)

    def _repeated_uses(self) -> list[tuple[int, int, int, int]]:
        """(op, number) of the first use of a parameter and (op, number) of each later one in the block."""
        first: dict[int, tuple[int, int]] = {}
        found = []
        for at, node in enumerate(self.space.ops):
            for number, position in enumerate(node.parameter_inputs):
                value = node.op.inputs[position]
                if value in first:
                    found.append((*first[value], at, number))
                else:
                    first[value] = (at, number)
        return found

    def _same_placement_edges(
        self, strategies: Sequence[tuple[tuple[AxisOption, ...], ...]]
    ) -> tuple[tuple[int, int, Floats, Floats], ...]:
        """Edges that let ops of the block use a parameter in one placement only."""
        edges = []
        for first, number, second, again in self._repeated_uses():
            if first == second:
                continue
            sides = [
                [
                    tuple(option.inputs[self.space.ops[at].parameter_inputs[which]] for option in options)
                    for options in strategies[at]
                ]
                for at, which in ((first, number), (second, again))
            ]
            apart = np.array([[0.0 if one == other else np.inf for other in sides[1]] for one in sides[0]])
            if apart.any():
                edges.append((2 + first, 2 + second, apart, np.zeros_like(apart)))
        return tuple(edges)

    def _parameter_uses(
        self, node: OpNode, strategies: tuple[tuple[AxisOption, ...], ...]
    ) -> tuple[tuple[Value, tuple[tuple[int, tuple[int, ...]], ...]], ...]:
        uses = []
        for position in node.parameter_inputs:
            value = self.graph.values[node.op.inputs[position]]
            per_strategy = []
            for options in strategies:
                pairs = [option.inputs[position] for option in options]
                elements = round(self._pair_bytes(value, pairs, REPLICATED) / value.itemsize)
                data = PARTIAL_GRADIENT if value.id in self.space.data_axis.partial_gradient_parameters else REPLICATED
                axes = tuple(axis for axis, pair in enumerate((data, *pairs)) if pair == PARTIAL_GRADIENT)
                per_strategy.append((elements, axes))
            uses.append((value, tuple(per_strategy)))
        return tuple(uses)

    def _edge_ends(
        self,
        strategies: Sequence[tuple[tuple[AxisOption, ...], ...]],
        shared_placements: Sequence[tuple[tuple[tuple[PlacementPair, ...], ...], int]],
        boundary_roles: Sequence[tuple[str, ...]],
    ) -> list[tuple[EdgeEnd, EdgeEnd]]:
        """The states of each flow's value at both ends."""
        first_hub = 2 + len(strategies)
        found = []
        for flow in self.space.tensor_edges:
            sides = []
            for node, position, outgoing in (
                (flow.source, flow.output_index, True),
                (flow.target, flow.input_index, False),
            ):
                states: Sequence[tuple[PlacementPair, ...]]
                num_again = 0
                if node in (INPUT_NODE, OUTPUT_NODE):
                    value = self.graph.values[flow.value]
                    states = [self._enumerator.boundary_placement(value, roles) for roles in boundary_roles]
                elif node >= first_hub:
                    states, num_again = shared_placements[node - first_hub]
                else:
                    assert position is not None
                    states = [
                        tuple((o.outputs if outgoing else o.inputs)[position] for o in options)
                        for options in strategies[node - 2]
                    ]
                data = self._data_pair(flow.value, node, position, outgoing)
                sides.append(EdgeEnd(placements=states, data=data, num_regathered=num_again))
            found.append((sides[0], sides[1]))
        return found

    def _tensor_edge_tables(
        self, edge_ends: Sequence[tuple[EdgeEnd, EdgeEnd]]
    ) -> tuple[tuple[int, int, Floats, Floats], ...]:
        edges = []
        for at, (flow, (source, target)) in enumerate(zip(self.space.tensor_edges, edge_ends, strict=True)):
            value = self.graph.values[flow.value]
            forward, backward = self._redistribution.forward_backward_s(
                value, source.placements, target.placements, source.data, target.data
            )
            if flow.target == OUTPUT_NODE:  # a whole scalar becomes a sum for nothing: zeros on all ranks but the first
                states, data = (source.placements, target.placements), (source.data, target.data)
                forward = self._redistribution.into_partial_s(value, states, data, forward)
            edges.append((flow.source, flow.target, *self._regathers.add_edge(at, source, target, forward, backward)))
        return tuple(edges)
