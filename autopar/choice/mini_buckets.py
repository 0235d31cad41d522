"""Bounds and good choices where elimination is too wide: mini-buckets, then coordinate descent.

Where the table that eliminates node v would have more than ``max_cells`` cells, its factors are partitioned into groups g
of narrow scope N_g (_partition_factors), and v is eliminated from each alone, as if it had a choice of its own in each:

    sum_g min_(x_v) F_g(x_v, x_N_g)  <=  min_(x_v) sum_g F_g(x_v, x_N_g)       F_g: sum of the factors of g     (solve)

so what remains in the end is a lower bound. Before that, costs are shifted between the groups of v until all have the
same min-marginals of v, which tightens the bound and adds zero in sum:

    m_g(x_v) = min_(x_N_g) F_g,    m = mean of m_g over g,    F_g += m(x_v) - m_g(x_v)         (_match_min_marginals)

Choices are read back with the sum of all groups of a node (backtrack_all), and then improved node by node until no
single change is better (_descend_by_coordinate). Dechter and Rish, "Mini-buckets", Journal of the ACM 50 (2003); the
shifts are those of Ihler et al., "Join-graph based cost-shifting schemes", UAI 2012.
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
"""Cells of the largest table of an exact elimination, for one price: many prices are eliminated at once."""
MAX_GROUP_CELLS = 1 << 14
"""Cells of the largest table of a group, for one price: above it bounds improve slowly, and the tables of all groups
stay in memory."""
MAX_SWEEPS = 20
"""Of coordinate descent."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MiniBucketTable:
    """``values`` is (P, choices of the query nodes ...): a lower bound on every solution, inf only where there is none.
    ``eliminated_factors``: the nodes in elimination order, each with the factors it was eliminated from."""

    values: Floats
    structure: "MiniBuckets"
    eliminated_factors: tuple[tuple[int, tuple[Factor, ...]], ...]
    node_costs: Sequence[Floats]
    edge_costs: Sequence[Floats]

    def backtrack_all(self) -> Ints:
        """Good choices at every cell of ``values``, (nodes, *values.shape)."""
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
        """Change the choices (nodes, cells) of one node at a time where that lowers the cost, until no change does or
        for ``MAX_SWEEPS``."""
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
        """The entries of a table (1 or P, choices ...) at prices and leading choices (cells,); trailing axes stay."""
        return np.asarray(table[(price_indices if table.shape[0] > 1 else np.zeros_like(price_indices), *choices)])


class MiniBuckets:
    """The elimination order of one graph; the interface of `Eliminator`, with bounds in place of optima."""

    def __init__(
        self,
        num_choices: tuple[int, ...],
        edges: tuple[tuple[int, int], ...],
        query_nodes: tuple[int, ...],
        order: Sequence[int],
        *,
        max_cells: int = MAX_GROUP_CELLS,
    ) -> None:
        """``order``: the elimination order of the nodes that have several choices and are not query nodes."""
        self.num_choices, self.edges, self.query_nodes, self.order, self.max_cells = (
            num_choices,
            edges,
            query_nodes,
            order,
            max_cells,
        )
        self._step_of_node = {node: at for at, node in enumerate((*order, *query_nodes))}

    def solve(self, node_costs: Sequence[Floats], edge_costs: Sequence[Floats]) -> MiniBucketTable:
        """A lower bound for every price and choice of the query nodes; costs are those of `Eliminator.solve`."""
        waiting: dict[int, list[Factor]] = {node: [] for node in self.order}
        of_query_nodes: list[Factor] = []

        def send(factor: Factor) -> None:
            """To the first of its nodes to be eliminated."""
            first = min(
                (node for node in factor.scope if node not in self.query_nodes),
                key=self._step_of_node.__getitem__,
                default=None,
            )
            (of_query_nodes if first is None else waiting[first]).append(factor)

        nodes = [(node,) for node in range(len(self.num_choices))]
        for scope, values in zip((*nodes, *self.edges), (*node_costs, *edge_costs), strict=True):
            send(self._without_fixed(scope, values))
        eliminated: list[tuple[int, tuple[Factor, ...]]] = []
        for node in self.order:
            factors = waiting.pop(node)
            eliminated.append((node, tuple(factors)))
            groups = self._partition_factors(factors)
            if len(groups) > 1:
                groups = self._match_min_marginals(node, groups)
            for group in groups:
                send(self._minimise_onto(group, self._joint_scope(group, without=node), node))
        values = np.zeros(
            (count_prices(node_costs, edge_costs), *(self.num_choices[node] for node in self.query_nodes))
        )
        for factor in of_query_nodes:
            values += align_to_scope(factor, self.query_nodes)
        return MiniBucketTable(
            values=values,
            structure=self,
            eliminated_factors=tuple(eliminated),
            node_costs=node_costs,
            edge_costs=edge_costs,
        )

    def _without_fixed(self, scope: Scope, values: Floats) -> Factor:
        """A table as a factor over those of its nodes that have several choices or are query nodes."""
        fixed = tuple(axis for axis, node in enumerate(scope, 1) if node not in self._step_of_node)
        return Factor(tuple(node for node in scope if node in self._step_of_node), values.squeeze(fixed))

    def _joint_scope(self, factors: Sequence[Factor], without: int | None = None) -> Scope:
        """The nodes of all factors, in elimination order."""
        nodes = {node for factor in factors for node in factor.scope} - {without}
        return tuple(sorted(nodes, key=self._step_of_node.__getitem__))

    def _partition_factors(self, factors: Sequence[Factor]) -> list[list[Factor]]:
        """Groups of at most ``max_cells`` cells (one factor alone may have more): factors join, the widest first, the
        group that they widen least, or else a new one."""
        groups: list[list[Factor]] = []

        def cells(group: Sequence[Factor]) -> int:
            return math.prod(self.num_choices[node] for node in self._joint_scope(group))

        for factor in sorted(factors, key=lambda factor: -cells([factor])):
            fitting = [group for group in groups if cells([*group, factor]) <= self.max_cells]
            if fitting:
                min(fitting, key=lambda group: cells([*group, factor]) / cells(group)).append(factor)
            else:
                groups.append([factor])
        return groups

    def _match_min_marginals(self, node: int, groups: list[list[Factor]]) -> list[list[Factor]]:
        """The groups, each with a factor over ``node`` that makes their min-marginals of it equal."""
        marginals = [self._minimise_onto(group, (node,)).values for group in groups]
        mean = sum(marginals) / len(groups)
        with np.errstate(invalid="ignore"):
            shifts = [np.where(np.isfinite(mean), mean - marginal, 0.0) for marginal in marginals]
        return [[*group, Factor((node,), shift)] for group, shift in zip(groups, shifts, strict=True)]

    def _minimise_onto(self, group: Sequence[Factor], target: Scope, eliminated_node: int | None = None) -> Factor:
        """The minimum of the sum of a group's factors, over ``eliminated_node`` or else all nodes outside ``target``."""
        others = (
            [eliminated_node]
            if eliminated_node is not None
            else [node for node in self._joint_scope(group) if node not in target]
        )
        scope = (*target, *others)
        shape = (max(factor.values.shape[0] for factor in group), *(self.num_choices[node] for node in scope))
        out = np.empty(shape[: 1 + len(target)])
        axes = tuple(range(1 + len(target), 1 + len(scope)))
        for slab, joined in sum_by_slab([align_to_scope(factor, scope) for factor in group], shape):
            out[slab] = joined.min(axis=axes)
        return Factor(target, out)


@lru_cache(maxsize=512)
def make_eliminator(
    num_choices: tuple[int, ...], edges: tuple[tuple[int, int], ...], query_nodes: tuple[int, ...] = ()
) -> Eliminator | MiniBuckets:
    """Exact where no table needs more than ``MAX_EXACT_CELLS`` cells, else bounds. Cached, since a block has the same
    choices on many meshes and micro-batch sizes."""
    try:
        return Eliminator(num_choices, edges, query_nodes, max_cells=MAX_EXACT_CELLS)
    except WidthError as error:
        return MiniBuckets(num_choices, edges, query_nodes, error.order)
