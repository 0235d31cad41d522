"""What may be chosen: the strategies of an op, the states of a shared value, the placements at a block's boundary."""

import itertools
from collections.abc import Callable, Sequence

from autopar.graph.ir import Value
from autopar.intra.block_space import BlockSpace, OpNode
from autopar.rules.axis_options import AxisOption
from autopar.rules.dim_factors import DimFactor
from autopar.rules.op_sharding_rule import OpShardingRule
from autopar.rules.placement_pair import PARTIAL_GRADIENT, PARTIAL_VALUE, REPLICATED, PlacementPair

MIN_UNEVEN_ELEMENTS = (
    64  # a plain dim may be cut unevenly into k pieces when it has at least 64 k elements (1.6 % imbalance)
)
BOUNDARY_ROLES = (
    "B",
    "S",
    "R",
)  # named boundary placements of an axis: batch, second dim (sequence or channels), replicated

OptionFilter = Callable[[int, OpNode, AxisOption], bool]


class StrategyEnumerator:
    """Of one block on inner axes of ``sizes`` ranks, ``data`` ranks of ``local_batch`` samples each; ``allowed`` says
    which options an op may take on an axis."""

    def __init__(
        self,
        space: BlockSpace,
        inner_sizes: tuple[int, ...],
        local_batch: int,
        data_ranks: int,
        option_filter: OptionFilter | None,
    ) -> None:
        self.space, self.graph, self.inner_sizes, self.option_filter = space, space.graph, inner_sizes, option_filter
        self.local_batch, self.micro_batch = local_batch, local_batch * data_ranks

    def op_strategies(self, node: OpNode) -> tuple[tuple[AxisOption, ...], ...]:
        """The strategies of an op, an option per inner axis, that leave every rank whole samples and even parts (or,
        of long plain dims, nearly even ones); the first option throughout where nothing else does."""
        data = self.space.data_axis.op_options[node.index - 2]
        per_axis = []
        for axis in range(len(self.inner_sizes)):
            options = [o for o in node.options if self.option_filter is None or self.option_filter(axis, node, o)]
            per_axis.append(options or list(node.options[:1]))
        found = [chosen for chosen in itertools.product(*per_axis) if self._shards_evenly(node, chosen, data)]
        return tuple(found) or ((node.options[0],) * len(self.inner_sizes),)

    def _shards_evenly(self, node: OpNode, strategy: tuple[AxisOption, ...], data_option: AxisOption) -> bool:
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
            whole = self.graph.batch.scale(size, samples)
            if whole % degree and (
                grows or whole < MIN_UNEVEN_ELEMENTS * degree or not _may_be_uneven(node.rule, labels)
            ):
                return False
        return True

    def shared_placements(
        self, pairs: Sequence[PlacementPair], *, with_regather: bool
    ) -> tuple[tuple[tuple[PlacementPair, ...], ...], int]:
        """The states of a shared value: a pair per inner axis, of dims with an element for every part. How many come
        last that are states once more, in which readers save it as it was sharded and regather it (``regathers``)."""
        found = []
        for state in itertools.product(pairs, repeat=len(self.inner_sizes)):
            degrees: dict[DimFactor, int] = {}
            for pair, size in zip(state, self.inner_sizes, strict=True):
                if pair.atom is not None:
                    degrees[pair.atom] = degrees.get(pair.atom, 1) * size
            if all(atom.size >= degree for atom, degree in degrees.items()):
                found.append(state)
        regathered = [
            state
            for state in found
            if with_regather and PARTIAL_GRADIENT in state and REPLICATED not in state and PARTIAL_VALUE not in state
        ]
        return (*found, *regathered), len(regathered)

    def boundary_placement(self, value: Value, roles: Sequence[str]) -> tuple[PlacementPair, ...]:
        """The state of ``value`` under a named boundary placement; a value without the dim is replicated (its gradient
        partial), a scalar partial. A dim is sharded as long as every rank gets something, and unevenly by the last axis
        alone; else the value is replicated."""
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
        """Of the pairs of a value that shard the first atom of a dim, that of the largest."""
        atoms = [pair.atom for pair in self.space.pairs.get(value.id, ()) if pair.atom is not None]
        first = [atom for atom in atoms if (atom.dim, atom.split_factor) == (dim, 1)]
        return PlacementPair.sharded(max(first, key=lambda atom: atom.size)) if first else None


def _may_be_uneven(rule: OpShardingRule, labels: tuple[int, ...]) -> bool:
    """Whether the labels are one dim of a matmul or an element-wise op, or a dim that a view leaves as it is: heads,
    and dims that a view merges or splits, have to be cut evenly."""
    if not rule.view_groups:
        return len(labels) == 1 and rule.compute in ("matmul", "memory")
    return any((*ins, *outs) == labels and len(ins) == len(outs) == 1 for ins, outs in rule.view_groups)
