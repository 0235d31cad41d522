"""Min-plus variable elimination: the exact optimum of a pairwise problem without rows, for many prices in one batch.

Eliminating node v, whose neighbours not yet eliminated are N, replaces every table over v by one table over N,

    message_v[x_N] = min_(x_v) sum of the tables over v                                                (_eliminate)

until only the *query nodes* are left: the sum of their tables is the optimum for every choice of theirs. The argmins are
stored, and the choices of the other nodes read back in reverse order (``backtrack``, ``backtrack_all``). Passing
messages back down the same tree, from parent w = the node whose elimination consumes message_v, gives the optimum given
any choice of any node:

    down_v[x_N]       = min over all but x_N of (tables over w but message_v, + down_w)             (min_marginals)
    marginal_v[x_v]   = min_(x_N) (tables over v + down_v)                                          (min_marginals)

Dechter, "Bucket elimination", Artificial Intelligence 113 (1999); Kask et al., "Unifying tree decompositions for
reasoning in graphical models", 2005.

A leading axis of every table is the price p: with ``cost_v + price_p * usage_v`` as node costs, P Lagrangian prices are
eliminated at once. Work and memory are exponential in the width of the elimination order, which is 2 on transformer
blocks. Where the order needs a table above ``max_cells``, ``WidthError`` is raised: use the ILP, or bounds
(`mini_buckets`).

Exact reductions: nodes with one choice leave the graph (their edges become node costs), parallel edges are added, edges
that are zero everywhere can be left out (``Eliminator.of_problem``).
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.choice.problem import Floats, Problem

Ints = NDArray[np.integer]
Scope = tuple[int, ...]
"""Nodes in elimination order, query nodes last."""

MAX_TABLE_CELLS = 200_000_000
"""Cells of the largest table, for one price."""
SLAB_CELLS = 1 << 17
"""Tables are added in slabs of about this many cells, which stay in the cache."""


class WidthError(Exception):
    """Elimination needs a table of ``cells`` cells, above the limit, in the best ``order`` of nodes found: solve the
    problem with the ILP, or bound it (`mini_buckets`)."""

    def __init__(self, cells: int, max_cells: int, order: Scope) -> None:
        super().__init__(
            f"elimination needs a table of {cells} cells, above the limit of {max_cells}: "
            "use the ILP (solve_ilp), or MiniBuckets for a bound"
        )
        self.cells, self.order = cells, order


@dataclass(frozen=True, slots=True)
class Factor:
    """A table over ``scope``; ``values`` is (1 or P, choices of scope ...)."""

    scope: Scope
    values: Floats


@dataclass(frozen=True, slots=True)
class _EliminationStep:
    """The elimination of ``node``; ``neighbours`` are those not yet eliminated, in the order of their elimination."""

    node: int
    neighbours: Scope


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EliminationTable:
    """``values`` is (P, choices of query_nodes[0], choices of query_nodes[1], ...): the optimum for each price and
    choice of the query nodes, inf where nothing is feasible. ``argmins[i]`` is (1 or P, choices of the neighbours ...):
    the choice of the node of ``steps[i]``."""

    values: Floats
    query_nodes: Scope
    num_nodes: int
    steps: tuple[_EliminationStep, ...]
    argmins: tuple[Ints, ...]

    def backtrack(self, price_index: int, query_choices: Sequence[int] = ()) -> tuple[int, ...]:
        """The choices of all nodes at ``values[price_index, *query_choices]``; ValueError where that is infeasible."""
        if not math.isfinite(self.values[(price_index, *query_choices)]):
            raise ValueError(f"no feasible choices for price {price_index} with query nodes at {tuple(query_choices)}")
        choices = [0] * self.num_nodes
        for node, choice in zip(self.query_nodes, query_choices, strict=True):
            choices[node] = int(choice)
        for step, argmin in zip(reversed(self.steps), reversed(self.argmins), strict=True):
            row = price_index if argmin.shape[0] > 1 else 0
            choices[step.node] = int(argmin[(row, *(choices[other] for other in step.neighbours))])
        return tuple(choices)

    def backtrack_all(self) -> Ints:
        """The choices at every cell of ``values``, (nodes, *values.shape); arbitrary where ``values`` is inf."""
        shape = self.values.shape
        cells = [index.reshape(-1) for index in np.indices(shape)]
        choices = np.zeros((self.num_nodes, cells[0].size), np.int32)
        for node, index in zip(self.query_nodes, cells[1:], strict=True):
            choices[node] = index
        for step, argmin in zip(reversed(self.steps), reversed(self.argmins), strict=True):
            row = cells[0] if argmin.shape[0] > 1 else np.zeros_like(cells[0])
            choices[step.node] = argmin[(row, *(choices[other] for other in step.neighbours))]
        return choices.reshape((self.num_nodes, *shape))


class Eliminator:
    """The elimination order of one graph, prepared once: it depends on numbers of choices and on edges, not on costs.
    ``edges`` are pairs of nodes.

    >>> eliminator = Eliminator((2, 2), ((0, 1),))
    >>> node_costs, pair_costs = [np.array([[0.0, 1.0]]), np.array([[0.0, 5.0]])], np.array([[[9.0, 0.0], [0.0, 0.0]]])
    >>> table = eliminator.solve(node_costs, [pair_costs])
    >>> float(table.values[0]), table.backtrack(0)
    (1.0, (1, 0))
    """

    def __init__(
        self,
        num_choices: tuple[int, ...],
        edges: tuple[tuple[int, int], ...],
        query_nodes: tuple[int, ...] = (),
        *,
        max_cells: int = MAX_TABLE_CELLS,
    ) -> None:
        assert len(set(query_nodes)) == len(query_nodes), "query nodes are distinct"
        assert all(count > 0 for count in num_choices), "every node has at least one choice"
        assert all(first != second for first, second in edges), "an edge joins two different nodes"
        self.num_choices = num_choices
        self.edges = edges
        self.query_nodes = query_nodes
        neighbours: dict[int, set[int]] = {
            node: set() for node, count in enumerate(num_choices) if count > 1 or node in query_nodes
        }
        for first, second in edges:
            if first in neighbours and second in neighbours:
                neighbours[first].add(second)
                neighbours[second].add(first)
        orders = [_greedy_order(neighbours, num_choices, query_nodes, by_fill=by_fill) for by_fill in (True, False)]
        order = min(orders, key=lambda candidate: candidate.total_cells)
        self.max_table_cells = order.max_cells
        if order.max_cells > max_cells:
            raise WidthError(order.max_cells, max_cells, tuple(step.node for step in order.steps))
        folded = tuple(node for node in range(len(num_choices)) if node not in neighbours)
        self._steps = (*order.steps, *(_EliminationStep(node, ()) for node in folded))
        self._step_of_node = {step.node: at for at, step in enumerate(self._steps)}
        self._step_of_node |= {node: len(self._steps) + at for at, node in enumerate(query_nodes)}
        self._choice_dtype = np.int16 if max(num_choices, default=0) <= np.iinfo(np.int16).max else np.int32

    @staticmethod
    def of_problem(
        problem: Problem, query_nodes: tuple[int, ...] = (), *, max_cells: int = MAX_TABLE_CELLS
    ) -> "tuple[Eliminator, Scope]":
        """The eliminator of a problem's graph without the edges that cost and use nothing, and the positions in
        ``problem.edges`` of its edges, ascending."""
        priced = {position for row in problem.rows for position, usage in row.edge_usage.items() if usage.any()}
        wanted = tuple(at for at, edge in enumerate(problem.edges) if at in priced or edge.costs.any())
        pairs = tuple((problem.edges[at].first, problem.edges[at].second) for at in wanted)
        return Eliminator(tuple(map(len, problem.costs)), pairs, query_nodes, max_cells=max_cells), wanted

    def solve(self, node_costs: Sequence[Floats], edge_costs: Sequence[Floats]) -> EliminationTable:
        """The optimum for every price and choice of the query nodes.

        ``node_costs[v]`` is (P, choices of v) and ``edge_costs[e]`` (P, choices of first, choices of second), all in
        one unit; a leading 1 instead of P says that a table does not depend on the price, which saves work.
        """
        num_prices = count_prices(node_costs, edge_costs)
        waiting = self._factors_by_step(node_costs, edge_costs)
        argmins: list[Ints] = []
        for at, step in enumerate(self._steps):
            message, argmin = self._eliminate(step, waiting[at])
            argmins.append(argmin)
            waiting[self._receiving_step(step)].append(message)
            waiting[at] = []
        values = np.zeros((num_prices, *(self.num_choices[node] for node in self.query_nodes)))
        for factor in itertools.chain.from_iterable(waiting):
            values += align_to_scope(factor, self.query_nodes)
        return EliminationTable(
            values=values,
            query_nodes=self.query_nodes,
            num_nodes=len(self.num_choices),
            steps=self._steps,
            argmins=tuple(argmins),
        )

    def min_marginals(self, node_costs: Sequence[Floats], edge_costs: Sequence[Floats]) -> tuple[Floats, ...]:
        """For every node (P, choices): the optimum given that choice, inf where it cannot be completed. Costs are as in
        ``solve``; there may be no query nodes."""
        assert not self.query_nodes, "min-marginals need an eliminator without query nodes"
        num_prices = count_prices(node_costs, edge_costs)
        steps = self._steps
        inbox = self._factors_by_step(node_costs, edge_costs)
        senders: list[list[int]] = [[-1] * len(factors) for factors in inbox]
        for at, step in enumerate(steps):
            message, _ = self._eliminate(step, inbox[at], with_argmin=False)
            inbox[self._receiving_step(step)].append(message)
            senders[self._receiving_step(step)].append(at)
        roots = inbox[len(steps)]
        downs: dict[int, Factor] = {}
        for sender, others in zip(senders[len(steps)], _leave_one_out(roots), strict=True):
            downs[sender] = Factor((), sum((factor.values for factor in others), np.zeros(num_prices)))
        marginals: list[Floats] = [np.zeros((num_prices, count)) for count in self.num_choices]
        for at in reversed(range(len(steps))):
            step = steps[at]
            scope = (*step.neighbours, step.node)
            factors = [*inbox[at], downs[at]]
            marginals[step.node] = self._minimise_onto(scope, factors, (step.node,), num_prices)
            for number, (sender, others) in enumerate(zip(senders[at], _leave_one_out(factors), strict=False)):
                if sender >= 0:
                    target = inbox[at][number].scope
                    downs[sender] = Factor(target, self._minimise_onto(scope, others, target, num_prices))
        return tuple(marginals)

    def _receiving_step(self, step: _EliminationStep) -> int:
        """The step that consumes a step's message: that of the first of its nodes to be eliminated, or the number of
        steps where all are query nodes."""
        positions = [self._step_of_node[node] for node in step.neighbours]
        return min([len(self._steps), *positions])

    def _factors_by_step(self, node_costs: Sequence[Floats], edge_costs: Sequence[Floats]) -> list[list[Factor]]:
        """Every cost table as a factor, in the list of the first step that eliminates one of its nodes; the last list is
        of factors over query nodes alone. Parallel edges are added, and an edge to a node with one choice becomes a
        factor over its other end."""
        assert len(node_costs) == len(self.num_choices), "one cost vector per node"
        assert len(edge_costs) == len(self.edges), "one cost table per edge"
        pairs: dict[Scope, Floats] = {}
        for node, costs in enumerate(node_costs):
            assert costs.shape[1:] == (self.num_choices[node],), f"costs {costs.shape} of node {node}"
            pairs[(node,)] = costs
        for (first, second), costs in zip(self.edges, edge_costs, strict=True):
            assert costs.shape[1:] == (self.num_choices[first], self.num_choices[second]), f"edge {first}, {second}"
            flip = self._step_of_node[first] > self._step_of_node[second]
            scope: Scope = (second, first) if flip else (first, second)
            values = costs.transpose(0, 2, 1) if flip else costs
            single = [axis for axis, node in enumerate(scope, 1) if self.num_choices[node] == 1]
            values = values.reshape([size for axis, size in enumerate(values.shape) if axis not in single])
            scope = tuple(node for node in scope if self.num_choices[node] > 1)
            pairs[scope] = pairs[scope] + values if scope in pairs else values
        waiting: list[list[Factor]] = [[] for _ in range(len(self._steps) + 1)]
        for scope, values in pairs.items():
            at = min([len(self._steps), *(self._step_of_node[node] for node in scope)])
            waiting[at].append(Factor(scope, values))
        return waiting

    def _eliminate(
        self, step: _EliminationStep, factors: list[Factor], *, with_argmin: bool = True
    ) -> tuple[Factor, Ints]:
        """``message[x_neighbours] = min_(x_node) sum of factors``, and the argmin (empty unless wanted), slab by slab."""
        scope = (*step.neighbours, step.node)
        sizes = tuple(self.num_choices[node] for node in scope)
        num_prices = max(factor.values.shape[0] for factor in factors)
        message = np.empty((num_prices, *sizes[:-1]))
        argmin: Ints = np.empty(message.shape if with_argmin else (0,), self._choice_dtype)
        aligned = [align_to_scope(factor, scope) for factor in factors]
        for slab, joined in sum_by_slab(aligned, (num_prices, *sizes)):
            if with_argmin:
                best = joined.argmin(axis=-1)
                argmin[slab] = best
                message[slab] = np.take_along_axis(joined, best[..., None], axis=-1)[..., 0]
            else:
                message[slab] = joined.min(axis=-1)
        return Factor(step.neighbours, message), argmin

    def _minimise_onto(self, scope: Scope, factors: list[Factor], target: Scope, num_prices: int) -> Floats:
        """The minimum of the sum of factors over every node of ``scope`` outside ``target``: (P, choices of target ...)."""
        sizes = (num_prices, *(self.num_choices[node] for node in scope))
        left = tuple(node for node in scope if node in target)
        gone = tuple(axis for axis, node in enumerate(scope, 1) if node not in target)
        out = np.full((num_prices, *(self.num_choices[node] for node in left)), np.inf)
        aligned = [align_to_scope(factor, scope) for factor in factors]
        for slab, joined in sum_by_slab(aligned, sizes):
            part = joined.min(axis=gone)
            view = out[slab] if len(slab) == 2 and scope[0] in target else out[slab[0]]
            np.minimum(view, part, out=view)
        return out.transpose(0, *(left.index(node) + 1 for node in target))


@dataclass(frozen=True, slots=True)
class _EliminationOrder:
    """Steps, with the cells of their largest table and of all tables, for one price."""

    steps: tuple[_EliminationStep, ...]
    max_cells: int
    total_cells: int


def _greedy_order(
    neighbours: dict[int, set[int]], num_choices: tuple[int, ...], query_nodes: tuple[int, ...], *, by_fill: bool
) -> _EliminationOrder:
    """Greedy order of all nodes but the query nodes: least fill-in first (ties by table size), or smallest table
    first."""
    graph = {node: set(others) for node, others in neighbours.items()}

    def key(node: int) -> tuple[int, int, int]:
        near = graph[node]
        cells = math.prod(num_choices[other] for other in near) * num_choices[node]
        if not by_fill:
            return cells, len(near), node
        fill = sum(1 for one, two in itertools.combinations(near, 2) if two not in graph[one])
        return fill, cells, node

    keys = {node: key(node) for node in graph if node not in query_nodes}
    eliminated: list[tuple[int, set[int]]] = []
    max_cells, total_cells = math.prod(num_choices[node] for node in query_nodes), 0
    while keys:
        node = min(keys, key=keys.__getitem__)
        del keys[node]
        near = graph.pop(node)
        cells = math.prod(num_choices[other] for other in near) * num_choices[node]
        max_cells, total_cells = max(max_cells, cells), total_cells + cells
        for other in near:
            graph[other] |= near
            graph[other] -= {node, other}
        touched = near.union(*(graph[other] for other in near)) if by_fill else near
        for other in touched & keys.keys():
            keys[other] = key(other)
        eliminated.append((node, near))
    position = {node: at for at, (node, _) in enumerate(eliminated)} | {
        node: len(eliminated) + at for at, node in enumerate(query_nodes)
    }
    ordered = tuple(_EliminationStep(node, tuple(sorted(near, key=position.__getitem__))) for node, near in eliminated)
    return _EliminationOrder(ordered, max_cells, total_cells)


def count_prices(node_costs: Sequence[Floats], edge_costs: Sequence[Floats]) -> int:
    """P, the common leading length of all tables that depend on the price; 1 where none does."""
    counts = {costs.shape[0] for costs in itertools.chain(node_costs, edge_costs)} - {1}
    assert len(counts) <= 1, f"cost tables disagree about the number of prices: {sorted(counts)}"
    return counts.pop() if counts else 1


def align_to_scope(factor: Factor, scope: Scope) -> Floats:
    """The factor's values as a view that broadcasts over (P, choices of scope ...)."""
    axes = sorted(range(len(factor.scope)), key=lambda axis: scope.index(factor.scope[axis]))
    values = factor.values.transpose(0, *(axis + 1 for axis in axes))
    sizes = dict(zip((factor.scope[axis] for axis in axes), values.shape[1:], strict=True))
    return values.reshape(values.shape[0], *(sizes.get(node, 1) for node in scope))


def _slabs(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Slabs of about ``SLAB_CELLS`` cells of an array (P, first, ..., last), split along P and ``first``, never along the
    last axis."""
    inner = math.prod(shape[1:])
    if len(shape) == 2 or inner <= SLAB_CELLS:
        step = max(1, SLAB_CELLS // inner)
        yield from ((slice(at, at + step),) for at in range(0, shape[0], step))
        return
    step = max(1, SLAB_CELLS * shape[1] // inner)
    for price in range(shape[0]):
        yield from ((slice(price, price + 1), slice(at, at + step)) for at in range(0, shape[1], step))


def _merge_tables(tables: list[Floats], shape: tuple[int, ...]) -> list[Floats]:
    """Tables with the same broadcast sum, but fewer: one that broadcasts into another, itself smaller than ``shape``, is
    added to that."""
    merged: list[Floats] = []
    for table in sorted(tables, key=lambda table: table.size, reverse=True):
        for at, other in enumerate(merged):
            same = table.shape == other.shape
            if same or (other.shape != shape and np.broadcast_shapes(table.shape, other.shape) == other.shape):
                merged[at] = other + table
                break
        else:
            merged.append(table)
    return merged


def sum_by_slab(tables: list[Floats], shape: tuple[int, ...]) -> Iterator[tuple[tuple[slice, ...], Floats]]:
    """Every slab of ``shape`` with the sum of the broadcastable tables over it, in one buffer that the next slab
    overwrites."""
    tables = _merge_tables(tables, shape)
    buffer: Floats | None = None
    for slab in _slabs(shape):
        size = tuple(len(range(*part.indices(length))) for part, length in zip(slab, shape, strict=False))
        size += shape[len(slab) :]
        parts = [
            table[tuple(axis if length > 1 else slice(None) for axis, length in zip(slab, table.shape, strict=False))]
            for table in tables
        ]
        if buffer is None or buffer.shape != size:
            buffer = np.empty(size)
        np.add(parts[0], parts[1] if len(parts) > 1 else 0.0, out=buffer)
        for part in parts[2:]:
            buffer += part
        yield slab, buffer


def _leave_one_out(factors: list[Factor]) -> Iterator[list[Factor]]:
    """For each factor, the list of the others: their sum is exact with inf and huge costs, where subtracting the factor
    from the sum of all is not."""
    return (factors[:at] + factors[at + 1 :] for at in range(len(factors)))
