"""What may be chosen: the strategies of an op, the placements of a shared value, and those at a block's boundary."""

import itertools
from collections.abc import Callable, Sequence

from autopar.graph.ir import Value
from autopar.intra.block_mesh import BlockMesh
from autopar.intra.block_space import FIRST_OP_NODE, BlockSpace, OpNode
from autopar.rules.axis_options import AxisOption
from autopar.rules.dim_factors import DimFactor
from autopar.rules.op_sharding_rule import OpShardingRule
from autopar.rules.placement_pair import PARTIAL_GRADIENT, PARTIAL_VALUE, REPLICATED, PlacementPair

MIN_UNEVEN_ELEMENTS = 64
"""A dim of a matmul or an element-wise op may be sharded unevenly k ways from 64 k elements on (1.6 % imbalance)."""
BOUNDARY_ROLES = ("B", "S", "R")
"""Named boundary placements of an axis: sharded along the batch, sharded along the second dim (sequence or channels),
replicated."""

OptionFilter = Callable[[int, OpNode, AxisOption], bool]
"""(inner axis, op, option) -> whether the op may take the option on the axis."""


class StrategyEnumerator:
    """Enumerates the choices of one block on one mesh."""

    def __init__(self, space: BlockSpace, mesh: BlockMesh, option_filter: OptionFilter | None) -> None:
        self.space, self.graph, self.inner_sizes, self.option_filter = (
            space,
            space.graph,
            mesh.inner_sizes,
            option_filter,
        )
        self.local_batch, self.micro_batch = mesh.local_batch, mesh.micro_batch

    def op_strategies(self, node: OpNode) -> tuple[tuple[AxisOption, ...], ...]:
        """The strategies of an op, each an option per inner axis, under which every rank has full samples and shards of
        equal size (long dims of matmuls and element-wise ops: nearly equal). Where there is none: the op's first
        option on every axis."""
        data = self.space.data_axis.op_options[node.index - FIRST_OP_NODE]
        per_axis = []
        for axis in range(len(self.inner_sizes)):
            options = [o for o in node.options if self.option_filter is None or self.option_filter(axis, node, o)]
            per_axis.append(options or list(node.options[:1]))
        even = [options for options in itertools.product(*per_axis) if self._shards_evenly(node, options, data)]
        return tuple(even) or ((node.options[0],) * len(self.inner_sizes),)

    def _shards_evenly(self, node: OpNode, strategy: tuple[AxisOption, ...], data_option: AxisOption) -> bool:
        """Whether a strategy leaves every rank full samples and shards of (nearly) equal size."""
        degrees: dict[tuple[tuple[int, ...], int], int] = {}
        for option, size in zip(strategy, self.inner_sizes, strict=True):
            if option.is_sharded:
                key = (option.labels, option.max_shards)
                degrees[key] = degrees.get(key, 1) * size
        for (labels, size), degree in degrees.items():
            grows = self.graph.batch.is_proportional(size)
            samples = self.local_batch if data_option.labels == labels else self.micro_batch
            if grows and (size * samples) % self.graph.batch.traced_size:
                return False
            elements = self.graph.batch.scale(size, samples)
            if elements % degree and (
                grows or elements < MIN_UNEVEN_ELEMENTS * degree or not _may_be_uneven(node.rule, labels)
            ):
                return False
        return True

    def shared_placements(
        self, pairs: Sequence[PlacementPair], *, with_regather: bool
    ) -> tuple[tuple[tuple[PlacementPair, ...], ...], int]:
        """The placements of a shared value, each one of ``pairs`` per inner axis, in which no rank is without an
        element; and how many of the last ones are regathered ones.

        ``with_regather`` adds a second copy of each placement that an all-gather replicates: in it consumers save the
        value as it is sharded, and regather it in the backward (`regather`).
        """
        placements = []
        for placement in itertools.product(pairs, repeat=len(self.inner_sizes)):
            degrees: dict[DimFactor, int] = {}
            for pair, size in zip(placement, self.inner_sizes, strict=True):
                if pair.factor is not None:
                    degrees[pair.factor] = degrees.get(pair.factor, 1) * size
            if all(factor.size >= degree for factor, degree in degrees.items()):
                placements.append(placement)
        regathered = [
            placement
            for placement in placements
            if with_regather
            and PARTIAL_GRADIENT in placement
            and REPLICATED not in placement
            and PARTIAL_VALUE not in placement
        ]
        return (*placements, *regathered), len(regathered)

    def boundary_placement(self, value: Value, roles: Sequence[str]) -> tuple[PlacementPair, ...]:
        """The pairs of a block input or output, one per inner axis, under a named boundary placement.

        A value without the named dim is replicated with a Partial gradient, a scalar is Partial. A dim is sharded as
        long as every rank gets an element, and unevenly by the last axis alone; else the value is replicated.
        """
        pairs: list[PlacementPair] = []
        extents = [self.graph.batch.scale(size, self.local_batch) for size in value.shape]
        for role, degree in zip(roles, self.inner_sizes, strict=True):
            dim = {"B": 0, "S": 1}.get(role)
            pair = REPLICATED
            if dim is not None:
                pair = PARTIAL_GRADIENT if value.requires_grad else REPLICATED
                if not value.shape:
                    pair = PARTIAL_VALUE
                elif dim < len(value.shape) - (1 if dim else 0) and (
                    dim or self.graph.batch.is_proportional(value.shape[0])
                ):
                    chunk = -(-extents[dim] // degree)
                    if (degree - 1) * chunk < extents[dim]:
                        pair = self._outermost_atom(value, dim) or pair
                        extents[dim] = chunk if extents[dim] % degree == 0 else 0
                    else:
                        pair = REPLICATED
            pairs.append(pair)
        return tuple(pairs)

    def _outermost_atom(self, value: Value, dim: int) -> PlacementPair | None:
        """The pair that shards the outermost factor of a dim; of several such factors, the largest."""
        factors = [pair.factor for pair in self.space.pairs.get(value.id, ()) if pair.factor is not None]
        outermost = [factor for factor in factors if (factor.dim, factor.split_factor) == (dim, 1)]
        return PlacementPair.sharded(max(outermost, key=lambda factor: factor.size)) if outermost else None


def _may_be_uneven(rule: OpShardingRule, labels: tuple[int, ...]) -> bool:
    """Whether the labels are one dim of a matmul or an element-wise op, or a dim that a view leaves as it is. Heads, and
    dims that a view merges or splits, must be sharded evenly."""
    if not rule.view_groups:
        return len(labels) == 1 and rule.compute in ("matmul", "memory")
    return any((*ins, *outs) == labels and len(ins) == len(outs) == 1 for ins, outs in rule.view_groups)
