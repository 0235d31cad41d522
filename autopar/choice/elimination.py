"""Min-plus variable elimination: the exact optimum of a pairwise problem without rows, for many prices in one batch.

Eliminating node v with live neighbours N replaces every table that mentions v by one table over N,

    message_v[x_N] = min_(x_v) sum of the tables that mention v                                        (_eliminate)

until only the ``keep`` nodes are left; what remains is the optimum for every choice of the kept nodes. The argmins are
stored, so the choices are read back in reverse order (``Table.backtrack``). Passing messages back down the same tree
gives, for every node and choice, the optimum given that choice (``min_marginals``). Dechter, "Bucket elimination",
Artificial Intelligence 113 (1999); Kask et al., "Unifying tree decompositions for reasoning in graphical models", 2005.

A leading axis of every table is the price p: with ``cost_v + price_p * usage_v`` as node costs, P Lagrangian prices are
eliminated at once. Work and memory are exponential in the width of the elimination order, which is 2 on transformer
blocks; an order that would need a table above ``max_cells`` raises ``WidthError`` and the caller falls back to the ILP, or to
bounds (`mini_buckets`).

Exact reductions: nodes with one choice leave the graph (their edges become node costs), parallel edges are added, edges
that are zero everywhere can be left out (``Eliminator.of``).
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.choice.problem import Floats, Problem

Ints = NDArray[np.integer]
Scope = tuple[int, ...]  # nodes, in elimination order, kept nodes last

MAX_TABLE_CELLS = 200_000_000  # of the largest table, for one price
SLAB_CELLS = 1 << 17  # tables are joined in slabs of about 2 MB, which stay in the cache


class WidthError(Exception):
    """The elimination needs a table of ``cells`` cells, above the limit, in the best ``order`` of nodes found: solve this
    problem with the ILP, or bound it (`mini_buckets`)."""

    def __init__(self, cells: int, max_cells: int, order: Scope) -> None:
        super().__init__(f"elimination needs a table of {cells} cells, more than {max_cells}: use the ILP")
        self.cells, self.order = cells, order


@dataclass(frozen=True, slots=True)
class Factor:
    """A table over ``scope``; ``values`` is (1 or P, choices of scope...)."""

    scope: Scope
    values: Floats


@dataclass(frozen=True, slots=True)
class _EliminationStep:
    """One elimination step: ``node`` leaves, ``rest`` are its live neighbours in the order of their own elimination."""

    node: int
    neighbours: Scope


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EliminationTable:
    """``values`` is (P, choices of keep[0], choices of keep[1], ...): the optimum for each price and choice of the kept
    nodes, ``inf`` where there is none. ``argmins[i]`` is (1 or P, choices of the rest...) of the i-th node to leave."""

    values: Floats
    query_nodes: Scope
    num_nodes: int
    steps: tuple[_EliminationStep, ...]
    argmins: tuple[Ints, ...]

    def backtrack(self, price_index: int, query_choices: Sequence[int] = ()) -> tuple[int, ...]:
        """The choices of all nodes at ``values[price, *kept_choices]``; ``ValueError`` where that is infeasible."""
        if not math.isfinite(self.values[(price_index, *query_choices)]):
            raise ValueError(f"no feasible choices at price {price_index} with kept nodes at {tuple(query_choices)}")
        choices = [0] * self.num_nodes
        for node, choice in zip(self.query_nodes, query_choices, strict=True):
            choices[node] = int(choice)
        for bucket, argmin in zip(reversed(self.steps), reversed(self.argmins), strict=True):
            row = price_index if argmin.shape[0] > 1 else 0
            choices[bucket.node] = int(argmin[(row, *(choices[other] for other in bucket.neighbours))])
        return tuple(choices)

    def backtrack_all(self) -> Ints:
        """Choices at every cell of ``values`` at once, (nodes, *values.shape); arbitrary where ``values`` is inf."""
        shape = self.values.shape
        cells = [index.reshape(-1) for index in np.indices(shape)]
        choices = np.zeros((self.num_nodes, cells[0].size), np.int32)
        for node, index in zip(self.query_nodes, cells[1:], strict=True):
            choices[node] = index
        for bucket, argmin in zip(reversed(self.steps), reversed(self.argmins), strict=True):
            row = cells[0] if argmin.shape[0] > 1 else np.zeros_like(cells[0])
            choices[bucket.node] = argmin[(row, *(choices[other] for other in bucket.neighbours))]
        return choices.reshape((self.num_nodes, *shape))


class Eliminator:
    """The structure of one graph, prepared once: the elimination order depends on choices and edges, not on costs.

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
        assert len(set(query_nodes)) == len(query_nodes), "a node is kept once"
        assert all(count > 0 for count in num_choices), "a node has a choice at least"
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
            raise WidthError(order.max_cells, max_cells, tuple(bucket.node for bucket in order.steps))
        folded = tuple(node for node in range(len(num_choices)) if node not in neighbours)
        self._steps = (*order.steps, *(_EliminationStep(node, ()) for node in folded))
        self._step_of_node = {bucket.node: at for at, bucket in enumerate(self._steps)}
        self._step_of_node |= {node: len(self._steps) + at for at, node in enumerate(query_nodes)}
        self._choice_dtype = np.int16 if max(num_choices, default=0) <= np.iinfo(np.int16).max else np.int32

    @staticmethod
    def of_problem(
        problem: Problem, query_nodes: tuple[int, ...] = (), *, max_cells: int = MAX_TABLE_CELLS
    ) -> "tuple[Eliminator, Scope]":
        """The eliminator of a problem's graph without edges that cost and use nothing, and the positions in
        ``problem.edges`` of the edges it does want, in order."""
        priced = {position for row in problem.rows for position, usage in row.edge_usage.items() if usage.any()}
        wanted = tuple(at for at, edge in enumerate(problem.edges) if at in priced or edge.costs.any())
        pairs = tuple((problem.edges[at].first, problem.edges[at].second) for at in wanted)
        return Eliminator(tuple(map(len, problem.costs)), pairs, query_nodes, max_cells=max_cells), wanted

    def solve(self, node_costs: Sequence[Floats], edge_costs: Sequence[Floats]) -> EliminationTable:
        """Optimum for every price and choice of the kept nodes.

        ``node_costs[v]`` is (P, choices of v) and ``edge_costs[e]`` (P, choices of first, choices of second), all in
        one unit; a leading 1 instead of P says that the term does not depend on the price, which saves work.
        """
        num_prices = count_prices(node_costs, edge_costs)
        waiting = self._factors_by_step(node_costs, edge_costs)
        argmins: list[Ints] = []
        for at, bucket in enumerate(self._steps):
            message, argmin = self._eliminate(bucket, waiting[at])
            argmins.append(argmin)
            waiting[self._receiving_step(bucket)].append(message)
            waiting[at] = []
        kept = [factor for factors in waiting for factor in factors]
        values = np.zeros((num_prices, *(self.num_choices[node] for node in self.query_nodes)))
        for factor in kept:
            values += align_to_scope(factor, self.query_nodes)
        return EliminationTable(
            values=values,
            query_nodes=self.query_nodes,
            num_nodes=len(self.num_choices),
            steps=self._steps,
            argmins=tuple(argmins),
        )

    def min_marginals(self, node_costs: Sequence[Floats], edge_costs: Sequence[Floats]) -> tuple[Floats, ...]:
        """For every node (P, choices): the optimum given that choice, ``inf`` where it cannot be completed.

        Upward pass as in ``solve``, then ``down_v[x_N]`` = min of the parent's tables without v's message, and
        ``marginal_v[x_v] = min_(x_N) (tables of v + down_v)``. Needs ``keep`` to be empty.
        """
        assert not self.query_nodes, "min-marginals are those of the whole problem"
        num_prices = count_prices(node_costs, edge_costs)
        buckets = self._steps
        inbox = self._factors_by_step(node_costs, edge_costs)
        senders: list[list[int]] = [[-1] * len(factors) for factors in inbox]
        for at, bucket in enumerate(buckets):
            message, _ = self._eliminate(bucket, inbox[at], with_argmin=False)
            inbox[self._receiving_step(bucket)].append(message)
            senders[self._receiving_step(bucket)].append(at)
        roots = inbox[len(buckets)]
        downs: dict[int, Factor] = {}
        for sender, others in zip(senders[len(buckets)], _leave_one_out(roots), strict=True):
            downs[sender] = Factor((), sum((factor.values for factor in others), np.zeros(num_prices)))
        marginals: list[Floats] = [np.zeros((num_prices, count)) for count in self.num_choices]
        for at in reversed(range(len(buckets))):
            bucket = buckets[at]
            scope = (*bucket.neighbours, bucket.node)
            factors = [*inbox[at], downs[at]]
            marginals[bucket.node] = self._minimise_onto(scope, factors, (bucket.node,), num_prices)
            for number, (sender, others) in enumerate(zip(senders[at], _leave_one_out(factors), strict=False)):
                if sender >= 0:
                    target = inbox[at][number].scope
                    downs[sender] = Factor(target, self._minimise_onto(scope, others, target, num_prices))
        return tuple(marginals)

    def _receiving_step(self, step: _EliminationStep) -> int:
        """Where a message goes: the bucket of the first of its nodes to leave, or the end when all are kept."""
        positions = [self._step_of_node[node] for node in step.neighbours]
        return min([len(self._steps), *positions])

    def _factors_by_step(self, node_costs: Sequence[Floats], edge_costs: Sequence[Floats]) -> list[list[Factor]]:
        """Every cost as a factor, in the list of the bucket that eliminates it first; the last list is the kept one.
        Parallel edges are added, and an edge to a folded node becomes a factor over its other end."""
        assert len(node_costs) == len(self.num_choices), "one cost vector a node"
        assert len(edge_costs) == len(self.edges), "one cost table an edge"
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
        """``message[x_rest] = min_(x_node) sum of factors``, and the argmin, slab by slab."""
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
        """``min`` of the sum of factors over every node of ``scope`` outside ``target``: (P, choices of target...)."""
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
    steps: tuple[_EliminationStep, ...]
    max_cells: int
    total_cells: int


def _greedy_order(
    neighbours: dict[int, set[int]], num_choices: tuple[int, ...], query_nodes: tuple[int, ...], *, by_fill: bool
) -> _EliminationOrder:
    """Greedy order: least fill-in first (ties by table size), or smallest table first. Kept nodes never leave."""
    graph = {node: set(others) for node, others in neighbours.items()}

    def key(node: int) -> tuple[int, int, int]:
        near = graph[node]
        cells = math.prod(num_choices[other] for other in near) * num_choices[node]
        if not by_fill:
            return cells, len(near), node
        fill = sum(1 for one, two in itertools.combinations(near, 2) if two not in graph[one])
        return fill, cells, node

    left = {node: key(node) for node in graph if node not in query_nodes}
    steps: list[tuple[int, set[int]]] = []
    max_cells, work = math.prod(num_choices[node] for node in query_nodes), 0
    while left:
        node = min(left, key=left.__getitem__)
        del left[node]
        near = graph.pop(node)
        cells = math.prod(num_choices[other] for other in near) * num_choices[node]
        max_cells, work = max(max_cells, cells), work + cells
        for other in near:
            graph[other] |= near
            graph[other] -= {node, other}
        touched = near.union(*(graph[other] for other in near)) if by_fill else near
        for other in touched & left.keys():
            left[other] = key(other)
        steps.append((node, near))
    leaves_at = {node: at for at, (node, _) in enumerate(steps)} | {
        node: len(steps) + at for at, node in enumerate(query_nodes)
    }
    buckets = tuple(_EliminationStep(node, tuple(sorted(near, key=leaves_at.__getitem__))) for node, near in steps)
    return _EliminationOrder(buckets, max_cells, work)


def count_prices(node_costs: Sequence[Floats], edge_costs: Sequence[Floats]) -> int:
    counts = {costs.shape[0] for costs in itertools.chain(node_costs, edge_costs)} - {1}
    assert len(counts) <= 1, f"terms disagree about the number of prices: {sorted(counts)}"
    return counts.pop() if counts else 1


def align_to_scope(factor: Factor, scope: Scope) -> Floats:
    """The factor's values as a view that broadcasts over (P, choices of scope...)."""
    axes = sorted(range(len(factor.scope)), key=lambda axis: scope.index(factor.scope[axis]))
    values = factor.values.transpose(0, *(axis + 1 for axis in axes))
    sizes = dict(zip((factor.scope[axis] for axis in axes), values.shape[1:], strict=True))
    return values.reshape(values.shape[0], *(sizes.get(node, 1) for node in scope))


def _slabs(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Cut (P, first, ..., last) along P and ``first`` into parts of about ``SLAB_CELLS``; never along the last axis."""
    inner = math.prod(shape[1:])
    if len(shape) == 2 or inner <= SLAB_CELLS:
        step = max(1, SLAB_CELLS // inner)
        yield from ((slice(at, at + step),) for at in range(0, shape[0], step))
        return
    step = max(1, SLAB_CELLS * shape[1] // inner)
    for price in range(shape[0]):
        yield from ((slice(price, price + 1), slice(at, at + step)) for at in range(0, shape[1], step))


def _merge_tables(tables: list[Floats], shape: tuple[int, ...]) -> list[Floats]:
    """The same sum with fewer tables: one that lies inside another, smaller than the whole, is added to it there."""
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
    """Every slab of ``shape`` with the sum of the broadcastable tables over it; the buffer is reused by the next."""
    tables = _merge_tables(tables, shape)
    buffer: Floats | None = None
    for slab in _slabs(shape):
        size = tuple(len(range(*cut.indices(length))) for cut, length in zip(slab, shape, strict=False))
        size += shape[len(slab) :]
        parts = [
            table[tuple(cut if length > 1 else slice(None) for cut, length in zip(slab, table.shape, strict=False))]
            for table in tables
        ]
        if buffer is None or buffer.shape != size:
            buffer = np.empty(size)
        np.add(parts[0], parts[1] if len(parts) > 1 else 0.0, out=buffer)
        for part in parts[2:]:
            buffer += part
        yield slab, buffer


def _leave_one_out(factors: list[Factor]) -> Iterator[list[Factor]]:
    """For each factor, the list of the others. Summing again rather than subtracting keeps inf and huge costs exact."""
    return (factors[:at] + factors[at + 1 :] for at in range(len(factors)))
