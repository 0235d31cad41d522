"""Makes the cost tables of a block on one mesh from what its parts cost.

The parts: `strategies` enumerates the choices, `op_metrics` prices ops, `redistribution_tables`, `backward_overlap` and
`regather` price edges, `parameter_uses` says what ops store, `saved_memory` counts what solutions save.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from autopar.choice.mini_buckets import make_eliminator
from autopar.cost.compute_time import host_calls
from autopar.intra.backward_overlap import BackwardOverlap
from autopar.intra.block_mesh import BlockMesh
from autopar.intra.block_space import INPUT_NODE, OUTPUT_NODE, BlockSpace
from autopar.intra.block_tables import BlockTables, LaunchSeconds
from autopar.intra.edge_tables import EdgeEnd, EdgeTable, edge_ends, synchronisation_s
from autopar.intra.local_bytes import LocalBytes
from autopar.intra.op_metrics import INPUT_SAVED, NUM_OP_METRICS, SELECTIVE_ONLY_SAVED, OpPricer, StrategyMetrics
from autopar.intra.parameter_uses import parameter_uses, repeated_parameter_uses, same_placement_edges
from autopar.intra.priced_model import PricedModel
from autopar.intra.recompute import Recomputation
from autopar.intra.redistribution_tables import RedistributionTables
from autopar.intra.regather import PricedEdge, RegatherPolicy, RegatherTables
from autopar.intra.saved_memory import SavedMemoryCounter
from autopar.intra.strategies import BOUNDARY_ROLES, OptionFilter, StrategyEnumerator
from autopar.rules.axis_options import AxisOption
from autopar.rules.placement_pair import PlacementPair

Floats = NDArray[np.float64]
Strategies = tuple[tuple[tuple[AxisOption, ...], ...], ...]


class BlockTableBuilder:
    """Builds the tables of one block on one mesh.

    ``as_megatron``: as Megatron-LM runs it. Linear ops save a gathered input sharded and regather it in the backward,
    and attention that is recomputed leaves its output saved (Korthikanti et al., 2022, sections 4.2.2 and 5).
    """

    def __init__(
        self,
        space: BlockSpace,
        model: PricedModel,
        mesh: BlockMesh,
        *,
        option_filter: OptionFilter | None,
        as_megatron: bool,
    ) -> None:
        self.space, self.model, self.mesh, self.as_megatron = space, model, mesh, as_megatron
        self._local_bytes = LocalBytes(space.graph, mesh)
        self._enumerator = StrategyEnumerator(space, mesh, option_filter)
        self._first_savers = model.first_savers(space.graph)
        profile, saved = model.profile, model.selective_saved
        self._full = Recomputation.of_block(space, profile, whole_block=model.execution.recomputes_whole_block)
        self._selective = (
            Recomputation.of_attention(space)
            if saved is None
            else Recomputation.of_block(space, profile, whole_block=False, saved_ops=saved.saved_ops)
        )

    def build(self) -> BlockTables:
        """The tables for all choices; ops without a feasible strategy have their first option (`StrategyEnumerator`)."""
        space, model, mesh = self.space, self.model, self.mesh
        strategies = tuple(self._enumerator.op_strategies(node) for node in space.ops)
        priced_ops = self._price_ops(strategies)
        regathers = self._regather_tables(strategies, priced_ops)
        shared = [
            self._enumerator.shared_placements(node.pairs, with_regather=regathers.is_optional_at(node.index))
            for node in space.shared_nodes
        ]
        boundary_roles = tuple(itertools.product(BOUNDARY_ROLES, repeat=len(mesh.inner_sizes)))
        boundary_pairs = {
            value: tuple(
                self._enumerator.boundary_placement(space.graph.values[value], roles) for roles in boundary_roles
            )
            for value in (*space.block.inputs, *space.block.outputs)
        }
        ends = edge_ends(space, strategies, shared, boundary_pairs)
        priced_edges = self._price_edges(ends, regathers)
        edges = (
            *(
                EdgeTable(edge.source, edge.target, priced.forward_s, priced.backward_s)
                for edge, priced in zip(space.tensor_edges, priced_edges, strict=True)
            ),
            *same_placement_edges(space, strategies),
        )
        num_other_edges = len(edges) - len(priced_edges)
        node_metrics = (
            self._input_metrics(boundary_pairs, len(boundary_roles)),
            np.zeros((len(boundary_roles), NUM_OP_METRICS)),
            *(priced.metrics for priced in priced_ops),
            *(np.zeros((len(placements), NUM_OP_METRICS)) for placements, _ in shared),
        )
        by_edge = {at: priced.regather for at, priced in enumerate(priced_edges) if priced.regather is not None}
        return BlockTables(
            space=space,
            local_batch=mesh.local_batch,
            data_ranks=mesh.data_ranks,
            strategies=strategies,
            boundary_roles=boundary_roles,
            boundary_pairs=boundary_pairs,
            shared_placements=tuple(placements for placements, _ in shared),
            node_metrics=node_metrics,
            op_saved_bytes=tuple(priced.saved_bytes for priced in priced_ops),
            saved_memory=SavedMemoryCounter(
                space,
                model,
                strategies,
                boundary_pairs,
                self._local_bytes,
                first_savers=self._first_savers,
                regather_consumers={at: regather.saving_nodes for at, regather in by_edge.items()},
                saves_attention_output=self.as_megatron,
            ),
            internal_collective_s=tuple(priced.internal_collective_s for priced in priced_ops),
            edges=edges,
            edge_saved_bytes={
                at: priced.saved_bytes for at, priced in enumerate(priced_edges) if priced.saved_bytes is not None
            },
            regathers=by_edge,
            repeated_by_full=self._repeated_edges(self._full, num_other_edges),
            repeated_by_selective=self._repeated_edges(self._selective, num_other_edges),
            sync_s=(*synchronisation_s(ends, mesh, model.execution), *[(0.0, 0.0)] * num_other_edges),
            parameter_uses=tuple(
                parameter_uses(space, node, chosen, self._local_bytes)
                for node, chosen in zip(space.ops, strategies, strict=True)
            ),
            repeated_parameter_uses=repeated_parameter_uses(space),
            launch_s=_launch_seconds(space, model, mesh, full=self._full, selective=self._selective),
            overlap_contention=mesh.inner_links.cluster.overlap_contention if model.execution.overlap else 1.0,
            blocking_launches=model.execution.blocking_launches,
            eliminator=make_eliminator(
                tuple(len(choices) for choices in node_metrics),
                tuple((edge.source, edge.target) for edge in edges),
                query_nodes=(INPUT_NODE, OUTPUT_NODE),
            ),
        )

    def _price_ops(self, strategies: Strategies) -> list[StrategyMetrics]:
        pricer = OpPricer(
            self.model,
            self.mesh,
            self._local_bytes,
            saved_owners=frozenset(self._first_savers),
            full_recompute_ops=self._full.ops,
            selective_recompute_ops=self._selective.ops,
        )
        data_options = self.space.data_axis.op_options
        return [pricer.price(*priced) for priced in zip(self.space.ops, strategies, data_options, strict=True)]

    def _regather_tables(self, strategies: Strategies, priced_ops: Sequence[StrategyMetrics]) -> RegatherTables:
        execution = self.model.execution
        overlap = BackwardOverlap(
            self.space,
            strategies,
            {
                node.index: priced.gradient_products_s
                for node, priced in zip(self.space.ops, priced_ops, strict=True)
                if priced.gradient_products_s is not None
            },
            overlap_contention=self.mesh.inner_links.cluster.overlap_contention,
            all_input_gradients=execution.overlap and not execution.blocking_launches,
            gathered_inputs=self.as_megatron and not execution.blocking_launches,
        )
        policy: RegatherPolicy = "choice"
        if self.as_megatron:
            policy = "always" if self.model.selective_saved is None else "never"
        fully_charged = {
            (node.op.id, position): by_strategy
            for node, priced in zip(self.space.ops, priced_ops, strict=True)
            for position, by_strategy in priced.is_fully_charged.items()
        }
        return RegatherTables(
            self.space, self.model, self._local_bytes, overlap, policy=policy, fully_charged=fully_charged
        )

    def _price_edges(self, ends: Sequence[tuple[EdgeEnd, EdgeEnd]], regathers: RegatherTables) -> list[PricedEdge]:
        """Of every tensor edge; ``ends`` are its two ends."""
        redistribution = RedistributionTables(self.mesh, self._local_bytes)
        found = []
        for edge, (source, target) in zip(self.space.tensor_edges, ends, strict=True):
            value = self.space.graph.values[edge.value]
            forward, backward = redistribution.forward_backward_s(
                value, source.placements, target.placements, source.data, target.data
            )
            if edge.target == OUTPUT_NODE:  # a scalar (the loss) may leave the block as Partial
                placements = (source.placements, target.placements)
                forward = redistribution.into_partial_s(value, placements, (source.data, target.data), forward)
            found.append(regathers.price_edge(edge, source, target, forward, backward))
        return found

    def _input_metrics(
        self, boundary_pairs: Mapping[int, Sequence[tuple[PlacementPair, ...]]], num_boundaries: int
    ) -> Floats:
        """(boundary placements, metrics) of the input node: the bytes of the block's inputs."""
        metrics = np.zeros((num_boundaries, NUM_OP_METRICS))
        selective_saved = self.model.selective_saved
        for value in self.space.block.inputs:
            if value not in self.space.pairs:
                continue
            owner = self.model.profile.storage_owner[value]
            is_selective_only = (
                selective_saved is not None
                and owner in selective_saved.input_owners
                and owner not in self._first_savers
            )
            data = self.space.data_axis.boundary_pairs[value]
            for boundary, pairs in enumerate(boundary_pairs[value]):
                saved = self._local_bytes.pair_bytes(value, pairs, data)
                metrics[boundary, [INPUT_SAVED, SELECTIVE_ONLY_SAVED]] += saved, saved * is_selective_only
        return metrics

    def _repeated_edges(self, recomputation: Recomputation, num_other_edges: int) -> tuple[bool, ...]:
        """By edge, whether a recomputation redistributes its tensor once more; other edges have no tensor."""
        repeated = (recomputation.repeats_redistribution(edge) for edge in self.space.tensor_edges)
        return (*repeated, *[False] * num_other_edges)


def _launch_seconds(
    space: BlockSpace, model: PricedModel, mesh: BlockMesh, *, full: Recomputation, selective: Recomputation
) -> LaunchSeconds:
    """What the host takes to launch the ops of a block, and to start each phase (``fixed_calls``)."""
    calls = np.zeros(len(LaunchSeconds._fields))
    for node in space.ops:
        op = node.op
        forward, backward = host_calls(op, model.profile.ops[op.id], model.execution, op.is_attention)
        calls += forward, forward * (op.id in selective.ops), backward, forward * (op.id in full.ops)
    fixed_calls = model.execution.software.fixed_calls
    calls += fixed_calls, 0.0 if model.selective_saved is None else fixed_calls, fixed_calls, fixed_calls
    return LaunchSeconds(*(float(count * mesh.device.launch_s) for count in calls))
