"""What an op costs under each of its strategies, in metrics per micro-batch:

FORWARD, CORE_FORWARD    seconds; CORE is what selective recomputation redoes: attention, or more (`again`)
BACKWARD                 seconds
SAVED, CORE_SAVED        bytes kept for the backward by one micro-batch; CORE is what selective recomputation frees
BESIDE                   bytes that selective recomputation keeps and nothing else does
BOUNDARY                 bytes of the block's inputs, which is all that full recomputation keeps
AGAIN                    seconds of the forward that full recomputation repeats
WORKSPACE                bytes an op holds while it runs (a maximum over ops, never a sum)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from autopar.cost.compute_time import ShardedOp, gradient_products_s, op_seconds
from autopar.cost.execution_model import ExecutionModel
from autopar.cost.fusion import NO_SAVINGS, FusionSavings
from autopar.cost.redistribution_time import MeshLinks
from autopar.graph.ir import Graph, GraphProfile, Op, Value
from autopar.intra.block_space import OpNode
from autopar.intra.op_workspace import find_overwritten_owners, scratch_bytes, workspace_bytes
from autopar.intra.recompute import SelectiveSaved
from autopar.intra.saved_memory import LocalBytes
from autopar.rules.axis_options import AxisOption
from autopar.rules.placement_pair import PlacementPair, forward_placements

Floats = NDArray[np.float64]
(
    FORWARD,
    SELECTIVE_FORWARD,
    BACKWARD,
    SAVED,
    SELECTIVE_FREED,
    INPUT_SAVED,
    WORKSPACE,
    FULL_RECOMPUTE,
    SELECTIVE_ONLY_SAVED,
) = range(9)
NUM_OP_METRICS = 9
ChargedMemories: TypeAlias = dict[int, tuple[tuple[tuple[int, ...], bool], ...]]
"""Op of the graph -> the memories that it is the first to keep: the positions (inputs, then outputs) of the values that
share each, and whether selective recomputation frees it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StrategyMetrics:
    """(strategies, metrics); ``kept_bytes`` (strategies, 2) are the bytes of tensors in SAVED and CORE_SAVED,
    ``whole[position]`` (strategies,) whether they count all that the op reads at a position, for the positions that are
    counted, ``inside_s`` (strategies, 2) the seconds of FORWARD and BACKWARD that the op exchanges by itself,
    ``products_s`` the backward products of a linear op, its input's gradient and its weight's."""

    metrics: Floats
    saved_bytes: Floats
    is_fully_charged: dict[int, NDArray[np.bool_]]
    internal_collective_s: Floats
    gradient_products_s: tuple[Floats, Floats] | None


def label_degrees(
    node: OpNode,
    strategies: Sequence[tuple[AxisOption, ...]],
    inner_sizes: Sequence[int],
    data_option: AxisOption,
    data_ranks: int,
) -> dict[int, Floats]:
    """Label -> what each strategy and the data axis divide it by, (strategies,)."""
    degrees = {label: np.full(len(strategies), float(data_ranks)) for label in data_option.labels[:1]}
    for at, options in enumerate(strategies):
        for option, size in zip(options, inner_sizes, strict=True):
            for label in option.labels[:1]:
                degrees.setdefault(label, np.ones(len(strategies)))[at] *= size
    every = (data_option, *(option for options in strategies for option in options))
    twins = {label: option.labels for option in every for label in option.labels[:1]}
    for first, labels in twins.items():
        for label in labels[1:]:
            if any(label == known for known, _ in node.rule.roles):
                degrees[label] = degrees[first]
    return degrees


def find_first_savers(graph: Graph, profile: GraphProfile, charged_memories: ChargedMemories) -> dict[int, int]:
    """Value whose memory is kept -> the first op of the graph that keeps it."""
    return {
        profile.storage_owner[(*(op := graph.ops[number]).inputs, *op.outputs)[positions[0]]]: number
        for number, memories in charged_memories.items()
        for positions, _ in memories
    }


class OpPricer:
    """Of one block. ``savers``: op -> the memories that it is the first to keep (`inter.blocks`); ``core`` are
    attentions, ``again`` and ``selective`` the ops that full and selective recomputation run again, ``kept`` what the
    latter keeps (None: all but the insides of attention)."""

    def __init__(
        self,
        local_bytes: LocalBytes,
        profile: GraphProfile,
        inner_links: MeshLinks,
        mesh_links: MeshLinks,
        execution: ExecutionModel,
        fusion_savings: dict[int, FusionSavings],
        charged_memories: ChargedMemories,
        *,
        attention_ops: frozenset[int],
        full_recompute_ops: frozenset[int],
        selective_recompute_ops: frozenset[int],
        selective_saved: SelectiveSaved | None,
    ) -> None:
        self.local_bytes, self.graph, self.profile = local_bytes, local_bytes.graph, profile
        self.device, self.inner_sizes, self.mesh_links = inner_links.cluster.device, inner_links.sizes, mesh_links
        self.execution, self.fusion_savings, self.charged_memories = execution, fusion_savings, charged_memories
        self._attention_ops, self._full_recompute_ops, self._selective_recompute_ops, self._selective_saved = (
            attention_ops,
            full_recompute_ops,
            selective_recompute_ops,
            selective_saved,
        )
        self._saved_owners = frozenset(find_first_savers(local_bytes.graph, profile, charged_memories))
        self._overwritten_owners = find_overwritten_owners(local_bytes.graph, profile)

    def price(
        self, node: OpNode, strategies: tuple[tuple[AxisOption, ...], ...], data_option: AxisOption
    ) -> StrategyMetrics:
        """Under each strategy; ``data`` is what the data axis does to it."""
        op, profile = node.op, self.profile.ops[node.op.id]
        metrics = np.zeros((len(strategies), NUM_OP_METRICS))
        degrees = label_degrees(node, strategies, self.inner_sizes, data_option, self.local_bytes.data_ranks)
        sharded = ShardedOp(
            graph=self.graph,
            op=op,
            rule=node.rule,
            profile=profile,
            local_batch=self.local_bytes.micro_batch,
            degrees=degrees,
        )
        savings = self.fusion_savings.get(op.id, NO_SAVINGS)
        forward, backward = op_seconds(sharded, self.device, self.execution, savings)
        products = None
        if self.inner_sizes:
            products = gradient_products_s(sharded, self.device, len(strategies))
        is_core = op.id in self._attention_ops
        redone = op.id in self._selective_recompute_ops
        metrics[:, SELECTIVE_FORWARD if redone else FORWARD] += forward
        metrics[:, BACKWARD] += backward
        ways = [SELECTIVE_FORWARD if redone else FORWARD, BACKWARD]
        computed = metrics[:, ways]
        self._add_internal_collectives(node, strategies, data_option, metrics, ways[0])
        inside = metrics[:, ways] - computed
        if op.id in self._full_recompute_ops:
            metrics[:, FULL_RECOMPUTE] = metrics[:, FORWARD] + metrics[:, SELECTIVE_FORWARD]
        values = [self.graph.values[value] for value in (*op.inputs, *op.outputs)]
        data_pairs = (*data_option.inputs, *data_option.outputs)
        tensors = np.zeros((len(strategies), 2))
        whole = {
            position: np.zeros(len(strategies), np.bool_)
            for positions, _ in self.charged_memories.get(op.id, ())
            for position in positions
        }
        ranks = (self.local_bytes.data_ranks, *self.inner_sizes)
        for at, options in enumerate(strategies):
            pairs = [tuple(option.inputs[i] for option in options) for i in range(len(op.inputs))] + [
                tuple(option.outputs[i] for option in options) for i in range(len(op.outputs))
            ]
            for positions, core in self.charged_memories.get(op.id, ()):
                charged, apart = self._charged_bytes([(values[i], pairs[i], data_pairs[i]) for i in positions])
                tensors[at, int(core)] += charged
                for position in positions:
                    whole[position][at] = apart
            internal = float(sum(math.prod(shape) * item for shape, item in profile.saved_internal_tensors))
            if is_core and self.execution.attn == "math":  # its log-sum-exp's place is taken by the scores
                internal = math.prod(self._score_shape(op)) * self.execution.software.math_attention_bytes_per_score
            grows = any(
                self.graph.batch.is_proportional(size) for shape, _ in profile.saved_internal_tensors for size in shape
            )
            kept_shapes = [self._score_shape(op)] if is_core and self.execution.attn == "math" else []
            kept_shapes = kept_shapes or [shape for shape, _ in profile.saved_internal_tensors]
            scale = self.graph.batch.bytes_factor(kept_shapes, self.local_bytes.micro_batch)
            share = math.prod(  # statistics over the batch are whole where the batch is cut
                size
                for option, size in zip((data_option, *options), ranks, strict=True)
                if option.is_sharded and (grows or not self.graph.batch.is_proportional(option.max_shards))
            )
            freed = is_core if self._selective_saved is None else op.id not in self._selective_saved.saved_ops
            metrics[at, SELECTIVE_FREED if freed else SAVED] += internal * scale / share
            if self._selective_saved is not None and op.id in self._selective_saved.saved_ops:
                metrics[at, SELECTIVE_ONLY_SAVED] += sum(
                    self._pair_bytes(self.graph.values[value], pairs[len(op.inputs) + i], data_option.outputs[i])
                    for i, value in enumerate(op.outputs)
                    if self.profile.storage_owner[value] not in self._saved_owners
                )
            work = math.prod(
                size for option, size in zip((data_option, *options), ranks, strict=True) if option.is_sharded
            )
            metrics[at, WORKSPACE] = workspace_bytes(
                self.graph,
                self.profile,
                op,
                self._saved_owners,
                self._overwritten_owners,
                [self._pair_bytes(*placed) for placed in zip(values, pairs, data_pairs, strict=True)],
                [position for position in node.parameter_inputs if values[position].requires_grad],
                scratch_bytes(
                    self.graph, self.profile, op, self.execution, is_core, self.local_bytes.micro_batch, work
                ),
            )
        metrics[:, [SAVED, SELECTIVE_FREED]] += tensors
        return StrategyMetrics(
            metrics=metrics,
            saved_bytes=tensors,
            is_fully_charged=whole,
            internal_collective_s=inside,
            gradient_products_s=products,
        )

    def _charged_bytes(
        self, views: Sequence[tuple[Value, Sequence[PlacementPair], PlacementPair]]
    ) -> tuple[float, bool]:
        """What views of one memory, as an op reads them, save at least: views placed alike all of the memory, if it was
        made so, and every other its own part, as it was redistributed. And whether that is the part of each. A view has
        pairs on the inner axes and one on the data axis."""
        owner = self.profile.storage_owner[views[0][0].id]
        parts = [self._pair_bytes(*view) for view in views]
        placed = [(forward_placements(pairs), data) for _, pairs, data in views]
        least = sum(parts)
        for first, ((value, *_), here) in enumerate(zip(views, placed, strict=True)):
            moved = sum(part for part, other in zip(parts, placed, strict=True) if other != here)
            if placed.index(here) == first:
                least = min(least, self.local_bytes.owner_bytes(owner, value.id, here[0], here[1].forward) + moved)
        return least, least >= sum(parts) * (1 - 1e-9)

    def _score_shape(self, op: Op) -> tuple[int, ...]:
        """Shape of the scores of a materialised attention, (b, h, q, k)."""
        query, key = (self.graph.values[value].shape for value in op.inputs[:2])
        return (*query[:-1], key[-2])

    def _add_internal_collectives(
        self,
        node: OpNode,
        strategies: tuple[tuple[AxisOption, ...], ...],
        data_option: AxisOption,
        metrics: Floats,
        forward_metric: int,
    ) -> None:
        """What the op exchanges by itself, over the axes that cut its label; ``forward`` is the metric of its forward."""
        inside = node.rule.kernel_collectives
        if inside is None:
            return
        sizes = (self.local_bytes.data_ranks, *self.inner_sizes)
        for at, options in enumerate(strategies):
            every = (data_option, *options)
            axes = tuple(
                axis for axis, option in enumerate(every) if option.runs_kernel_collectives and sizes[axis] > 1
            )
            if axes:
                share = math.prod(
                    size
                    for option, size in zip(every, sizes, strict=True)
                    if option.is_sharded
                    and not option.runs_kernel_collectives
                    and set(option.labels) & set(inside.labels)
                )
                for metric, size in (
                    *((forward_metric, size) for size in inside.forward_bytes),
                    *((BACKWARD, size) for size in inside.backward_bytes),
                ):
                    scale = (
                        self.local_bytes.micro_batch / self.graph.batch.traced_size
                        if self.graph.batch.is_proportional(size)
                        else 1.0
                    )
                    held = size * scale / share
                    metrics[at, metric] += float(self.mesh_links.collective_s("all_reduce", held, axes))

    def _pair_bytes(self, value: Value, pairs: Sequence[PlacementPair], data_pair: PlacementPair) -> float:
        """Bytes of a value on the rank that stores most; ``data`` is the data axis's pair."""
        return self.local_bytes.num_bytes(value.id, forward_placements(pairs), data_pair.forward)
