"""Bounds and good choices where elimination is too wide: mini-buckets, then descent.

A bucket whose table would have more than ``max_cells`` cells is split: its factors are put into groups of narrow scope,
and the node is eliminated from each by itself, as if every group could choose for it. That only lowers the optimum, so
what remains is a bound. The groups of a node v are first made to agree as far as constants allow: with the
min-marginals m_g(x_v) of group g and their mean m,

    group g gets m(x_v) - m_g(x_v) more                                                 (terms that sum to zero)

Choices are read back with the groups of a node added up again, and then improved node by node until no single change
is better. Dechter and Rish, "Mini-buckets", Journal of the ACM 50 (2003); the terms are those of Ihler et al., "Join-graph
based cost-shifting schemes", UAI 2012.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from autopar.choice.elimination import (
    Eliminator,
    Factor,
    Ints,
    Scope,
    WidthError,
    align_to_scope,
    count_prices,
    sum_by_slab,
)
from autopar.choice.problem import Floats

MAX_EXACT_CELLS = 300_000
"""Of the table of an exact elimination, for one price: many are eliminated at once."""
MAX_GROUP_CELLS = 1 << 14
"""Of the table of a group, for one price: above it bounds get better slowly, and tables of all groups are kept."""
MAX_SWEEPS = 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MiniBucketTable:
    """``values`` (P, choices of the kept nodes ...): no solution is below; ``inf`` where there is none.
    ``factors``: of each node what it was eliminated from, in the order they leave."""

    values: Floats
    structure: "MiniBuckets"
    eliminated_factors: tuple[tuple[int, tuple[Factor, ...]], ...]
    node_costs: Sequence[Floats]
    edge_costs: Sequence[Floats]

    def backtrack_all(self) -> Ints:
        """Good choices at every cell of ``values`` at once, (nodes, *values.shape)."""
        shape = self.values.shape
        cells = [index.reshape(-1) for index in np.indices(shape)]
        choices = np.zeros((len(self.node_costs), cells[0].size), np.int32)
        for node, index in zip(self.structure.query_nodes, cells[1:], strict=True):
            choices[node] = index
        for node, factors in reversed(self.eliminated_factors):
            costs = np.zeros((cells[0].size, self.structure.num_choices[node]))
            for factor in factors:
                values = np.moveaxis(factor.values, factor.scope.index(node) + 1, -1)
                costs += self._look_up(values, cells[0], *(choices[other] for other in factor.scope if other != node))
            choices[node] = costs.argmin(axis=1)
        self._descend_by_coordinate(choices, cells[0])
        return choices.reshape((len(self.node_costs), *shape))

    def _descend_by_coordinate(self, choices: Ints, price_indices: Ints) -> None:
        """Change nodes one by one where that lowers the cost, until nothing does."""
        near: list[list[Floats]] = [[] for _ in self.node_costs]
        others: list[list[int]] = [[] for _ in self.node_costs]
        for (first, second), costs in zip(self.structure.edges, self.edge_costs, strict=True):
            near[first].append(costs.transpose(0, 2, 1))
            others[first].append(second)
            near[second].append(costs)
            others[second].append(first)
        free = {node for node, count in enumerate(self.structure.num_choices) if count > 1} - set(
            self.structure.query_nodes
        )
        waiting = set(free)
        for _ in range(MAX_SWEEPS):
            for node in sorted(waiting):
                waiting.discard(node)
                costs = self._look_up(self.node_costs[node], price_indices)
                for table, other in zip(near[node], others[node], strict=True):
                    costs = costs + self._look_up(table, price_indices, choices[other])
                best = costs.argmin(axis=1)
                cells = np.arange(len(price_indices))
                better = costs[cells, best] < costs[cells, choices[node]]
                if better.any():
                    choices[node] = np.where(better, best, choices[node])
                    waiting |= free.intersection(others[node])
            if not waiting:
                return

    @staticmethod
    def _look_up(table: Floats, price_indices: Ints, *choices: Ints) -> Floats:
        """The entries of a table of (1 or P, choices ...) at some rows and choices, all choices of what is left out."""
        return np.asarray(table[(price_indices if table.shape[0] > 1 else np.zeros_like(price_indices), *choices)])


class MiniBuckets:
    """The structure of one graph; the same interface as `Eliminator`, with bounds for optima."""

    def __init__(
        self,
        num_choices: tuple[int, ...],
        edges: tuple[tuple[int, int], ...],
        query_nodes: tuple[int, ...],
        order: Sequence[int],
        *,
        max_cells: int = MAX_GROUP_CELLS,
    ) -> None:
        """``order``: in which the nodes leave that have a choice and are not kept."""
        self.num_choices, self.edges, self.query_nodes, self.order, self.max_cells = (
            num_choices,
            edges,
            query_nodes,
            order,
            max_cells,
        )
        self._step_of_node = {node: at for at, node in enumerate((*order, *query_nodes))}

    def solve(self, node_costs: Sequence[Floats], edge_costs: Sequence[Floats]) -> MiniBucketTable:
        """As `Eliminator.solve`."""
        waiting: dict[int, list[Factor]] = {node: [] for node in self.order}
        kept: list[Factor] = []

        def send(factor: Factor) -> None:
            """To the first of its nodes to leave."""
            first = min(
                (node for node in factor.scope if node not in self.query_nodes),
                key=self._step_of_node.__getitem__,
                default=None,
            )
            (kept if first is None else waiting[first]).append(factor)

        nodes = [(node,) for node in range(len(self.num_choices))]
        for scope, values in zip((*nodes, *self.edges), (*node_costs, *edge_costs), strict=True):
            send(self._without_fixed(scope, values))
        left: list[tuple[int, tuple[Factor, ...]]] = []
        for node in self.order:
            factors = waiting.pop(node)
            left.append((node, tuple(factors)))
            groups = self._partition_factors(factors)
            if len(groups) > 1:
                groups = self._match_min_marginals(node, groups)
            for group in groups:
                rest = self._joint_scope(group, without=node)
                send(self._minimise_onto(group, rest, node))
        values = np.zeros(
            (count_prices(node_costs, edge_costs), *(self.num_choices[node] for node in self.query_nodes))
        )
        for factor in kept:
            values += align_to_scope(factor, self.query_nodes)
        return MiniBucketTable(
            values=values, structure=self, eliminated_factors=tuple(left), node_costs=node_costs, edge_costs=edge_costs
        )

    def _without_fixed(self, scope: Scope, values: Floats) -> Factor:
        """A factor over the nodes that have a choice, or are kept."""
        fixed = tuple(axis for axis, node in enumerate(scope, 1) if node not in self._step_of_node)
        return Factor(tuple(node for node in scope if node in self._step_of_node), values.squeeze(fixed))

    def _joint_scope(self, factors: Sequence[Factor], without: int | None = None) -> Scope:
        nodes = {node for factor in factors for node in factor.scope} - {without}
        return tuple(sorted(nodes, key=self._step_of_node.__getitem__))

    def _partition_factors(self, factors: Sequence[Factor]) -> list[list[Factor]]:
        """The widest first, each into the group that it widens least, or a new one."""
        found: list[list[Factor]] = []

        def cells(group: Sequence[Factor]) -> int:
            return math.prod(self.num_choices[node] for node in self._joint_scope(group))

        for factor in sorted(factors, key=lambda factor: -cells([factor])):
            able = [group for group in found if cells([*group, factor]) <= self.max_cells]
            if able:
                min(able, key=lambda group: cells([*group, factor]) / cells(group)).append(factor)
            else:
                found.append([factor])
        return found

    def _match_min_marginals(self, node: int, groups: list[list[Factor]]) -> list[list[Factor]]:
        """The groups with terms that make their min-marginals of ``node`` equal."""
        marginals = [self._minimise_onto(group, (node,)).values for group in groups]
        mean = sum(marginals) / len(groups)
        with np.errstate(invalid="ignore"):
            shifts = [np.where(np.isfinite(mean), mean - marginal, 0.0) for marginal in marginals]
        return [[*group, Factor((node,), shift)] for group, shift in zip(groups, shifts, strict=True)]

    def _minimise_onto(self, group: Sequence[Factor], target: Scope, eliminated_node: int | None = None) -> Factor:
        """The least of the sum of a group's factors over all nodes but ``rest``."""
        gone = (
            [eliminated_node]
            if eliminated_node is not None
            else [one for one in self._joint_scope(group) if one not in target]
        )
        scope = (*target, *gone)
        shape = (max(factor.values.shape[0] for factor in group), *(self.num_choices[one] for one in scope))
        out = np.empty(shape[: 1 + len(target)])
        axes = tuple(range(1 + len(target), 1 + len(scope)))
        for slab, joined in sum_by_slab([align_to_scope(factor, scope) for factor in group], shape):
            out[slab] = joined.min(axis=axes)
        return Factor(target, out)


@lru_cache(maxsize=512)
def make_eliminator(
    num_choices: tuple[int, ...], edges: tuple[tuple[int, int], ...], query_nodes: tuple[int, ...] = ()
) -> Eliminator | MiniBuckets:
    """Exact where no table needs more than ``EXACT_CELLS`` cells, else bounds. Many meshes and micro-batch sizes give a
    block the same choices, so what was made is kept."""
    try:
        return Eliminator(num_choices, edges, query_nodes, max_cells=MAX_EXACT_CELLS)
    except WidthError as error:
        return MiniBuckets(num_choices, edges, query_nodes, error.order)
