"""What an op costs under each of its strategies, in metrics per micro-batch:

FORWARD, SELECTIVE_FORWARD   seconds of the forward: of ops that selective recomputation leaves, and of those that it
                             repeats (attention, or more: `recompute`)
BACKWARD                     seconds of the backward
SAVED, SELECTIVE_FREED       bytes saved for the backward: those that selective recomputation saves too, and those it
                             frees
SELECTIVE_ONLY_SAVED         bytes that only selective recomputation saves
INPUT_SAVED                  bytes of the block's inputs, which is all that full recomputation saves
FULL_RECOMPUTE               seconds of the forward that full recomputation repeats
WORKSPACE                    temporary bytes while the op runs (a maximum over ops, never a sum)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.cost.compute_time import ShardedOp, gradient_products_s, op_seconds
from autopar.cost.fusion import NO_SAVINGS
from autopar.graph.ir import Op, Value
from autopar.intra.block_mesh import BlockMesh
from autopar.intra.block_space import OpNode
from autopar.intra.local_bytes import LocalBytes
from autopar.intra.op_workspace import WorkspaceCounter, score_shape
from autopar.intra.priced_model import PricedModel
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
_View = tuple[Value, tuple[PlacementPair, ...], PlacementPair]
"""A tensor as an op reads or makes it: with a pair per inner axis, and one on the data axis."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StrategyMetrics:
    """Of one op, by strategy. ``metrics`` is (strategies, NUM_OP_METRICS).

    ``saved_bytes`` (strategies, 2) are the bytes of tensors in SAVED and SELECTIVE_FREED. ``is_fully_charged`` maps a
    position among inputs, then outputs, whose memory the op is charged for, to (strategies,) whether it is charged for
    all of that tensor. ``internal_collective_s`` (strategies, 2) are the seconds of the op's own collectives in its
    forward and in BACKWARD. ``gradient_products_s``, of a linear op: (strategies,) seconds of the matmul for its
    input's gradient, and of that for its weight's.
    """

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
    """Label of the op's rule -> (strategies,) the number of shards that each strategy and the data axis make of it."""
    degrees = {label: np.full(len(strategies), float(data_ranks)) for label in data_option.labels[:1]}
    for at, options in enumerate(strategies):
        for option, size in zip(options, inner_sizes, strict=True):
            for label in option.labels[:1]:
                degrees.setdefault(label, np.ones(len(strategies)))[at] *= size
    every = (data_option, *(option for options in strategies for option in options))
    labels_of_first = {label: option.labels for option in every for label in option.labels[:1]}
    for first, labels in labels_of_first.items():
        for label in labels[1:]:
            if any(label == known for known, _ in node.rule.roles):
                degrees[label] = degrees[first]
    return degrees


class OpPricer:
    """Prices the ops of one block on one mesh. The op ids say what full and selective recomputation recompute."""

    def __init__(
        self,
        model: PricedModel,
        mesh: BlockMesh,
        local_bytes: LocalBytes,
        *,
        saved_owners: frozenset[int],
        full_recompute_ops: frozenset[int],
        selective_recompute_ops: frozenset[int],
    ) -> None:
        """``saved_owners``: the values (ids) whose memory some op of the graph saves."""
        self.model, self.mesh, self.local_bytes, self.graph = model, mesh, local_bytes, local_bytes.graph
        self._full_recompute_ops, self._selective_recompute_ops = full_recompute_ops, selective_recompute_ops
        self._saved_owners = saved_owners
        self._workspace = WorkspaceCounter(self.graph, model, saved_owners, mesh.micro_batch)

    def price(
        self, node: OpNode, strategies: tuple[tuple[AxisOption, ...], ...], data_option: AxisOption
    ) -> StrategyMetrics:
        """The metrics of an op under each strategy; ``data_option`` is its option on the data axis."""
        metrics = np.zeros((len(strategies), NUM_OP_METRICS))
        internal_s, products_s = self._add_seconds(node, strategies, data_option, metrics)
        op, memories = node.op, self.model.charged_memories.get(node.op.id, ())
        values = [self.graph.values[value] for value in (*op.inputs, *op.outputs)]
        trained = [position for position in node.parameter_inputs if values[position].requires_grad]
        charged_bytes = np.zeros((len(strategies), 2))
        fully_charged = {
            position: np.zeros(len(strategies), np.bool_) for positions, _ in memories for position in positions
        }
        internal_bytes, internal_grows = self._internal_saved(op)
        internal_metric = SELECTIVE_FREED if self._frees_internal(op) else SAVED
        data_pairs = (*data_option.inputs, *data_option.outputs)
        for at, options in enumerate(strategies):
            views = list(zip(values, _pairs_by_tensor(options, len(values)), data_pairs, strict=True))
            for positions, is_freed in memories:
                charged, is_full = self._charged_bytes([views[position] for position in positions])
                charged_bytes[at, int(is_freed)] += charged
                for position in positions:
                    fully_charged[position][at] = is_full
            every = (data_option, *options)
            metrics[at, internal_metric] += internal_bytes / self._internal_shards(every, internal_grows)
            metrics[at, SELECTIVE_ONLY_SAVED] += self._selective_only_bytes(op, views[len(op.inputs) :])
            metrics[at, WORKSPACE] = self._workspace.num_bytes(
                op,
                [self.local_bytes.pair_bytes(value.id, pairs, data) for value, pairs, data in views],
                trained,
                math.prod(size for option, size in zip(every, self.mesh.sizes, strict=True) if option.is_sharded),
            )
        metrics[:, [SAVED, SELECTIVE_FREED]] += charged_bytes
        return StrategyMetrics(
            metrics=metrics,
            saved_bytes=charged_bytes,
            is_fully_charged=fully_charged,
            internal_collective_s=internal_s,
            gradient_products_s=products_s,
        )

    def _add_seconds(
        self, node: OpNode, strategies: tuple[tuple[AxisOption, ...], ...], data_option: AxisOption, metrics: Floats
    ) -> tuple[Floats, tuple[Floats, Floats] | None]:
        """Add the seconds of FORWARD or SELECTIVE_FORWARD, BACKWARD and FULL_RECOMPUTE; returns
        ``internal_collective_s`` and ``gradient_products_s`` of `StrategyMetrics`."""
        op, mesh = node.op, self.mesh
        profile = self.model.profile.ops[op.id]
        degrees = label_degrees(node, strategies, mesh.inner_sizes, data_option, mesh.data_ranks)
        sharded = ShardedOp(
            graph=self.graph,
            op=op,
            rule=node.rule,
            profile=profile,
            local_batch=mesh.micro_batch,
            degrees=degrees,
        )
        savings = self.model.fusion_savings.get(op.id, NO_SAVINGS)
        forward, backward = op_seconds(sharded, mesh.device, self.model.execution, savings)
        products = None
        if mesh.inner_sizes:
            products = gradient_products_s(sharded, mesh.device, len(strategies))
        forward_metric = SELECTIVE_FORWARD if op.id in self._selective_recompute_ops else FORWARD
        metrics[:, forward_metric] += forward
        metrics[:, BACKWARD] += backward
        computed = metrics[:, [forward_metric, BACKWARD]]
        self._add_internal_collectives(node, strategies, data_option, metrics, forward_metric)
        if op.id in self._full_recompute_ops:
            metrics[:, FULL_RECOMPUTE] = metrics[:, FORWARD] + metrics[:, SELECTIVE_FORWARD]
        return metrics[:, [forward_metric, BACKWARD]] - computed, products

    def _add_internal_collectives(
        self,
        node: OpNode,
        strategies: tuple[tuple[AxisOption, ...], ...],
        data_option: AxisOption,
        metrics: Floats,
        forward_metric: int,
    ) -> None:
        """Add the seconds of the op's own collectives, over the axes that shard the label its rule names, to
        ``forward_metric`` and BACKWARD."""
        collectives = node.rule.kernel_collectives
        if collectives is None:
            return
        sizes, batch = self.mesh.sizes, self.graph.batch
        for at, options in enumerate(strategies):
            every = (data_option, *options)
            axes = tuple(
                axis for axis, option in enumerate(every) if option.runs_kernel_collectives and sizes[axis] > 1
            )
            if not axes:
                continue
            num_shards = math.prod(
                size
                for option, size in zip(every, sizes, strict=True)
                if option.is_sharded
                and not option.runs_kernel_collectives
                and set(option.labels) & set(collectives.labels)
            )
            for metric, size in (
                *((forward_metric, size) for size in collectives.forward_bytes),
                *((BACKWARD, size) for size in collectives.backward_bytes),
            ):
                scale = self.mesh.micro_batch / batch.traced_size if batch.is_proportional(size) else 1.0
                local = size * scale / num_shards
                metrics[at, metric] += float(self.mesh.mesh_links.collective_s("all_reduce", local, axes))

    def _charged_bytes(self, views: Sequence[_View]) -> tuple[float, bool]:
        """The least that an op saves of one memory of which it reads ``views``, and whether it is as much as each of
        them alone.

        Views placed alike save all of the memory as it was made; every other view saves its own local bytes, as it was
        redistributed.
        """
        owner = self.model.profile.storage_owner[views[0][0].id]
        parts = [self.local_bytes.pair_bytes(value.id, pairs, data) for value, pairs, data in views]
        placed = [(forward_placements(pairs), data) for _, pairs, data in views]
        least = sum(parts)
        for first, ((value, *_), here) in enumerate(zip(views, placed, strict=True)):
            redistributed = sum(part for part, other in zip(parts, placed, strict=True) if other != here)
            if placed.index(here) == first:
                owned = self.local_bytes.owner_bytes(owner, value.id, here[0], here[1].forward)
                least = min(least, owned + redistributed)
        return least, least >= sum(parts) * (1 - 1e-9)

    def _materialises_scores(self, op: Op) -> bool:
        return op.is_attention and self.model.execution.attn == "math"

    def _internal_saved(self, op: Op) -> tuple[float, bool]:
        """Bytes of the internal tensors that an op saves for the micro-batch, unsharded, and whether one of them grows
        with the batch. Materialised attention saves scores instead of their log-sum-exp."""
        saved, batch = self.model.profile.ops[op.id].saved_internal_tensors, self.graph.batch
        shapes = [shape for shape, _ in saved]
        num_bytes = float(sum(math.prod(shape) * itemsize for shape, itemsize in saved))
        if self._materialises_scores(op):
            shapes = [score_shape(self.graph, op)]
            num_bytes = math.prod(shapes[0]) * self.model.execution.software.math_attention_bytes_per_score
        grows = any(batch.is_proportional(size) for shape, _ in saved for size in shape)
        return num_bytes * batch.bytes_factor(shapes, self.mesh.micro_batch), grows

    def _internal_shards(self, options: Sequence[AxisOption], grows: bool) -> int:
        """The number of shards of an op's internal tensors. Statistics over the batch, which do not grow with it, are
        replicated where the batch is sharded."""
        return math.prod(
            size
            for option, size in zip(options, self.mesh.sizes, strict=True)
            if option.is_sharded and (grows or not self.graph.batch.is_proportional(option.max_shards))
        )

    def _frees_internal(self, op: Op) -> bool:
        """Whether selective recomputation frees the internal tensors of an op."""
        saved = self.model.selective_saved
        return op.is_attention if saved is None else op.id not in saved.saved_ops

    def _selective_only_bytes(self, op: Op, outputs: Sequence[_View]) -> float:
        """Local bytes of the outputs of an op that selective recomputation saves and that no op saves otherwise."""
        saved = self.model.selective_saved
        if saved is None or op.id not in saved.saved_ops:
            return 0.0
        return sum(
            self.local_bytes.pair_bytes(value.id, pairs, data)
            for value, pairs, data in outputs
            if self.model.profile.storage_owner[value.id] not in self._saved_owners
        )


def _pairs_by_tensor(options: Sequence[AxisOption], num_tensors: int) -> list[tuple[PlacementPair, ...]]:
    """Of every input, then output, of an op: its pair on each inner axis."""
    if not options:
        return [()] * num_tensors
    return list(zip(*((*option.inputs, *option.outputs) for option in options), strict=True))
