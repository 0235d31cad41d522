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

from autopar.cost.compute_time import gradient_products_s, op_seconds
from autopar.cost.execution_model import ExecutionModel
from autopar.cost.fusion import NOTHING, Saving
from autopar.cost.redistribution_time import MeshLinks
from autopar.graph.ir import Graph, GraphProfile, Op, Value
from autopar.intra.block_space import OpNode
from autopar.intra.op_workspace import overwritten_values, passing_bytes, scratch_bytes
from autopar.intra.recompute import Kept
from autopar.intra.saved_memory import LocalSizes
from autopar.rules.axis_options import Option
from autopar.rules.placement_pair import PlacementPair, forward_placements

Floats = NDArray[np.float64]
FORWARD, CORE_FORWARD, BACKWARD, SAVED, CORE_SAVED, BOUNDARY, WORKSPACE, AGAIN, BESIDE = range(9)
NUM_METRICS = 9
Savers: TypeAlias = dict[int, tuple[tuple[tuple[int, ...], bool], ...]]
"""Op of the graph -> the memories that it is the first to keep: the positions (inputs, then outputs) of the values that
share each, and whether selective recomputation frees it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OpPrice:
    """(strategies, metrics); ``kept_bytes`` (strategies, 2) are the bytes of tensors in SAVED and CORE_SAVED,
    ``whole[position]`` (strategies,) whether they count all that the op reads at a position, for the positions that are
    counted, ``inside_s`` (strategies, 2) the seconds of FORWARD and BACKWARD that the op exchanges by itself,
    ``products_s`` the backward products of a linear op, its input's gradient and its weight's."""

    metrics: Floats
    kept_bytes: Floats
    whole: dict[int, NDArray[np.bool_]]
    inside_s: Floats
    products_s: tuple[Floats, Floats] | None


def degrees_of(
    node: OpNode, chosen: Sequence[tuple[Option, ...]], sizes: Sequence[int], data: Option, data_ranks: int
) -> dict[int, Floats]:
    """Label -> what each strategy and the data axis divide it by, (strategies,)."""
    degrees = {label: np.full(len(chosen), float(data_ranks)) for label in data.labels[:1]}
    for at, options in enumerate(chosen):
        for option, size in zip(options, sizes, strict=True):
            for label in option.labels[:1]:
                degrees.setdefault(label, np.ones(len(chosen)))[at] *= size
    every = (data, *(option for options in chosen for option in options))
    twins = {label: option.labels for option in every for label in option.labels[:1]}
    for first, labels in twins.items():
        for label in labels[1:]:
            if any(label == known for known, _ in node.rule.roles):
                degrees[label] = degrees[first]
    return degrees


def first_keeper(graph: Graph, profile: GraphProfile, savers: Savers) -> dict[int, int]:
    """Value whose memory is kept -> the first op of the graph that keeps it."""
    return {
        profile.owners[(*(op := graph.ops[number]).inputs, *op.outputs)[positions[0]]]: number
        for number, memories in savers.items()
        for positions, _ in memories
    }


class OpMetrics:
    """Of one block. ``savers``: op -> the memories that it is the first to keep (`inter.blocks`); ``core`` are
    attentions, ``again`` and ``selective`` the ops that full and selective recomputation run again, ``kept`` what the
    latter keeps (None: all but the insides of attention)."""

    def __init__(
        self,
        local: LocalSizes,
        profile: GraphProfile,
        links: MeshLinks,
        whole: MeshLinks,
        execution: ExecutionModel,
        fused: dict[int, Saving],
        savers: Savers,
        *,
        core: frozenset[int],
        again: frozenset[int],
        selective: frozenset[int],
        kept: Kept | None,
    ) -> None:
        self.local, self.graph, self.profile = local, local.graph, profile
        self.device, self.sizes, self.whole = links.cluster.device, links.sizes, whole
        self.execution, self.fused, self.savers = execution, fused, savers
        self._core, self._again, self._selective, self._kept = core, again, selective, kept
        self._keepers = frozenset(first_keeper(local.graph, profile, savers))
        self._overwritten = overwritten_values(local.graph, profile)

    def of(self, node: OpNode, chosen: tuple[tuple[Option, ...], ...], data: Option) -> OpPrice:
        """Under each strategy; ``data`` is what the data axis does to it."""
        op, profile = node.op, self.profile.ops[node.op.id]
        metrics = np.zeros((len(chosen), NUM_METRICS))
        degrees = degrees_of(node, chosen, self.sizes, data, self.local.data)
        forward, backward = op_seconds(
            self.graph,
            op,
            node.rule,
            profile,
            self.local.micro_batch,
            degrees,
            self.device,
            self.execution,
            self.fused.get(op.id, NOTHING),
        )
        products = None
        if self.sizes:
            products = gradient_products_s(
                self.graph, op, node.rule, profile, self.local.micro_batch, degrees, self.device, len(chosen)
            )
        is_core = op.id in self._core
        redone = op.id in self._selective
        metrics[:, CORE_FORWARD if redone else FORWARD] += forward
        metrics[:, BACKWARD] += backward
        ways = [CORE_FORWARD if redone else FORWARD, BACKWARD]
        computed = metrics[:, ways]
        self._add_inside(node, chosen, data, metrics, ways[0])
        inside = metrics[:, ways] - computed
        if op.id in self._again:
            metrics[:, AGAIN] = metrics[:, FORWARD] + metrics[:, CORE_FORWARD]
        values = [self.graph.values[value] for value in (*op.inputs, *op.outputs)]
        data_pairs = (*data.inputs, *data.outputs)
        tensors = np.zeros((len(chosen), 2))
        whole = {
            position: np.zeros(len(chosen), np.bool_)
            for positions, _ in self.savers.get(op.id, ())
            for position in positions
        }
        ranks = (self.local.data, *self.sizes)
        for at, options in enumerate(chosen):
            pairs = [tuple(option.inputs[i] for option in options) for i in range(len(op.inputs))] + [
                tuple(option.outputs[i] for option in options) for i in range(len(op.outputs))
            ]
            for positions, core in self.savers.get(op.id, ()):
                charged, apart = self._charged([(values[i], pairs[i], data_pairs[i]) for i in positions])
                tensors[at, int(core)] += charged
                for position in positions:
                    whole[position][at] = apart
            internal = float(sum(math.prod(shape) * item for shape, item in profile.saved_internal))
            if is_core and self.execution.attn == "math":  # its log-sum-exp's place is taken by the scores
                internal = math.prod(self._scores(op)) * self.execution.software.math_attention_bytes_per_score
            grows = any(self.graph.batch.grows(size) for shape, _ in profile.saved_internal for size in shape)
            kept_shapes = [self._scores(op)] if is_core and self.execution.attn == "math" else []
            kept_shapes = kept_shapes or [shape for shape, _ in profile.saved_internal]
            scale = self.graph.batch.growth(kept_shapes, self.local.micro_batch)
            share = math.prod(  # statistics over the batch are whole where the batch is cut
                size
                for option, size in zip((data, *options), ranks, strict=True)
                if option.sharded and (grows or not self.graph.batch.grows(option.size))
            )
            freed = is_core if self._kept is None else op.id not in self._kept.ops
            metrics[at, CORE_SAVED if freed else SAVED] += internal * scale / share
            if self._kept is not None and op.id in self._kept.ops:
                metrics[at, BESIDE] += sum(
                    self._local_bytes(self.graph.values[value], pairs[len(op.inputs) + i], data.outputs[i])
                    for i, value in enumerate(op.outputs)
                    if self.profile.owners[value] not in self._keepers
                )
            work = math.prod(size for option, size in zip((data, *options), ranks, strict=True) if option.sharded)
            metrics[at, WORKSPACE] = passing_bytes(
                self.graph,
                self.profile,
                op,
                self._keepers,
                self._overwritten,
                [self._local_bytes(*placed) for placed in zip(values, pairs, data_pairs, strict=True)],
                [position for position in node.parameters if values[position].requires_grad],
                scratch_bytes(self.graph, self.profile, op, self.execution, is_core, self.local.micro_batch, work),
            )
        metrics[:, [SAVED, CORE_SAVED]] += tensors
        return OpPrice(metrics=metrics, kept_bytes=tensors, whole=whole, inside_s=inside, products_s=products)

    def _charged(self, views: Sequence[tuple[Value, Sequence[PlacementPair], PlacementPair]]) -> tuple[float, bool]:
        """What views of one memory, as an op reads them, save at least: views placed alike all of the memory, if it was
        made so, and every other its own part, as it was redistributed. And whether that is the part of each. A view has
        pairs on the inner axes and one on the data axis."""
        owner = self.profile.owners[views[0][0].id]
        parts = [self._local_bytes(*view) for view in views]
        placed = [(forward_placements(pairs), data) for _, pairs, data in views]
        least = sum(parts)
        for first, ((value, *_), here) in enumerate(zip(views, placed, strict=True)):
            moved = sum(part for part, other in zip(parts, placed, strict=True) if other != here)
            if placed.index(here) == first:
                least = min(least, self.local.share(owner, value.id, here[0], here[1].forward) + moved)
        return least, least >= sum(parts) * (1 - 1e-9)

    def _scores(self, op: Op) -> tuple[int, ...]:
        """Shape of the scores of a materialised attention, (b, h, q, k)."""
        query, key = (self.graph.values[value].shape for value in op.inputs[:2])
        return (*query[:-1], key[-2])

    def _add_inside(
        self, node: OpNode, chosen: tuple[tuple[Option, ...], ...], data: Option, metrics: Floats, forward: int
    ) -> None:
        """What the op exchanges by itself, over the axes that cut its label; ``forward`` is the metric of its forward."""
        inside = node.rule.inside
        if inside is None:
            return
        sizes = (self.local.data, *self.sizes)
        for at, options in enumerate(chosen):
            every = (data, *options)
            axes = tuple(axis for axis, option in enumerate(every) if option.inside and sizes[axis] > 1)
            if axes:
                share = math.prod(
                    size
                    for option, size in zip(every, sizes, strict=True)
                    if option.sharded and not option.inside and set(option.labels) & set(inside.labels)
                )
                for metric, size in (
                    *((forward, size) for size in inside.forward_bytes),
                    *((BACKWARD, size) for size in inside.backward_bytes),
                ):
                    scale = self.local.micro_batch / self.graph.batch.traced if self.graph.batch.grows(size) else 1.0
                    held = size * scale / share
                    metrics[at, metric] += float(self.whole.collective_s("all_reduce", held, axes))

    def _local_bytes(self, value: Value, pairs: Sequence[PlacementPair], data: PlacementPair) -> float:
        """Bytes of a value on the rank that stores most; ``data`` is the data axis's pair."""
        return self.local.num_bytes(value.id, forward_placements(pairs), data.forward)
