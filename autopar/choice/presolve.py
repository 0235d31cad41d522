"""Presolve: exact reductions before the integer program is built, and the magnitudes that its scaling needs.

alive     node v may take choice P unless                                                            (alive_choices)
          over some edge every alive choice of the other end forbids it,
          it exceeds the limit of some row although all other nodes and edges use their least,  (_drop_row_violators)
          or cost_v[P] - min cost_v exceeds the cutoff less the sum of all least costs;
          repeated until nothing changes
groups    choices with equal costs and usages over an edge                                      (group_equal_slices)
merging   one edge per pair of nodes                                                          (merge_parallel_edges)
"""

import math

import numpy as np
from numpy.typing import NDArray

from autopar.choice.evaluate import LIMIT_TOLERANCE
from autopar.choice.problem import Edge, Floats, Problem, Row

Bools = NDArray[np.bool_]
GAP_TOLERANCE = 1e-9
"""Relative gap at which a solution counts as proved optimal."""
ROUNDING = 1e-14
"""Share of the largest terms of a sum by which rounding may change it: of some 100 terms, 100 * 2^-53."""


def without_unlimited_rows(problem: Problem) -> Problem:
    """The problem without rows whose limit is infinite."""
    rows = tuple(row for row in problem.rows if row.limit != math.inf)
    return Problem(costs=problem.costs, edges=problem.edges, rows=rows, names=problem.names)


def cost_magnitude(costs: tuple[Floats, ...], edges: tuple[Edge, ...]) -> float:
    """The sum of the largest finite cost, by absolute value, of every node and edge."""
    return math.fsum(_largest(table) for table in (*costs, *(edge.costs for edge in edges)))


def usage_magnitude(row: Row) -> float:
    """The sum of the largest usage, by absolute value, of every node and edge."""
    return math.fsum(_largest(table) for table in (*row.usage.values(), *row.edge_usage.values()))


def _largest(table: Floats) -> float:
    """The largest finite absolute value; 0 without one."""
    return float(np.abs(table[np.isfinite(table)]).max(initial=0.0))


def row_scale(row: Row) -> float:
    """The unit in which excess over a row's limit counts: the limit, or, where that is about 0, the usages; 1 without."""
    magnitude = usage_magnitude(row)
    return (abs(row.limit) if abs(row.limit) > ROUNDING * magnitude else magnitude) or 1.0


def merge_parallel_edges(problem: Problem) -> tuple[tuple[Edge, ...], tuple[Row, ...]]:
    """One edge per pair of nodes, costs and usages added; edges that cost and use nothing are dropped."""
    costs: dict[tuple[int, int], Floats] = {}
    usages: list[dict[tuple[int, int], Floats]] = [{} for _ in problem.rows]

    def add(table: dict[tuple[int, int], Floats], edge: Edge, values: Floats) -> None:
        pair = (edge.first, edge.second) if edge.first < edge.second else (edge.second, edge.first)
        values = values if edge.first < edge.second else values.T
        table[pair] = table[pair] + values if pair in table else values

    for edge in problem.edges:
        add(costs, edge, edge.costs)
    for row, table in zip(problem.rows, usages, strict=True):
        for position, usage in row.edge_usage.items():
            add(table, problem.edges[position], usage)
    merged = [pair for pair, values in costs.items() if values.any() or any(pair in table for table in usages)]
    position_of = {pair: position for position, pair in enumerate(merged)}
    rows = tuple(
        Row(
            name=row.name,
            usage=row.usage,
            limit=row.limit,
            edge_usage={position_of[pair]: values for pair, values in table.items()},
        )
        for row, table in zip(problem.rows, usages, strict=True)
    )
    return tuple(Edge(first=pair[0], second=pair[1], costs=costs[pair]) for pair in merged), rows


def tighten_row(row: Row, tightening: float) -> Row:
    """The row with its limit lowered by the share ``tightening`` of it."""
    limit = row.limit - tightening * abs(row.limit)
    return Row(name=row.name, usage=row.usage, limit=limit, edge_usage=row.edge_usage)


def alive_choices(
    costs: tuple[Floats, ...], edges: tuple[Edge, ...], rows: tuple[Row, ...], cutoff: float | None
) -> list[Bools] | None:
    """By node (choices,) whether no node, edge, row or the cutoff alone forbids a choice; None when a node has none
    left. A ``cutoff`` is a cost known to be reachable."""
    alive = [np.isfinite(values) for values in costs]
    count = -1
    while count != (count := sum(int(mask.sum()) for mask in alive)):
        for edge in edges:
            finite = np.isfinite(edge.costs)
            alive[edge.first] &= (finite & alive[edge.second]).any(axis=1)
            alive[edge.second] &= (finite & alive[edge.first][:, None]).any(axis=0)
        for row in rows:
            if not all(mask.any() for mask in alive):
                return None
            _drop_row_violators(row, edges, alive)
        if not all(mask.any() for mask in alive):
            return None
        if cutoff is not None:
            tolerance = GAP_TOLERANCE * abs(cutoff) + ROUNDING * cost_magnitude(costs, edges)
            room = cutoff - sum_of_least_costs(costs, edges, alive) + tolerance
            for values, mask in zip(costs, alive, strict=True):
                mask &= values - values[mask].min() <= room
    return alive if all(mask.any() for mask in alive) else None


def _drop_row_violators(row: Row, edges: tuple[Edge, ...], alive: list[Bools]) -> None:
    """Drop the choices that exceed the row's limit even when all other nodes and edges use their least."""
    least = {node: float(usage[alive[node]].min()) for node, usage in row.usage.items()}
    pairs = [
        usage[np.ix_(alive[edges[at].first], alive[edges[at].second])].min() for at, usage in row.edge_usage.items()
    ]
    slack = row.limit + LIMIT_TOLERANCE * abs(row.limit) - math.fsum([*least.values(), *pairs])
    for node, usage in row.usage.items():
        alive[node] &= usage - least[node] <= slack


def _alive_block(edge: Edge, alive: list[Bools]) -> Floats:
    """The costs of an edge's alive pairs."""
    return edge.costs[np.ix_(alive[edge.first], alive[edge.second])]


def sum_of_least_costs(costs: tuple[Floats, ...], edges: tuple[Edge, ...], alive: list[Bools]) -> float:
    """The sum of the least alive cost of every node and edge: a lower bound, from which scaled costs are counted."""
    nodes = [float(values[mask].min()) for values, mask in zip(costs, alive, strict=True)]
    return math.fsum(nodes + [float(_alive_block(edge, alive).min()) for edge in edges])


def largest_cost_range(costs: tuple[Floats, ...], edges: tuple[Edge, ...], alive: list[Bools]) -> float:
    """The largest difference between the finite alive costs of one node or edge."""
    blocks = [values[mask] for values, mask in zip(costs, alive, strict=True)]
    blocks += [_alive_block(edge, alive) for edge in edges]
    return max((float(block[np.isfinite(block)].max() - block.min()) for block in blocks), default=0.0)


def group_equal_slices(slices: Floats) -> list[list[int]]:
    """Positions along the first axis with equal content, in order of first appearance."""
    groups: dict[bytes, list[int]] = {}
    for at, line in enumerate(np.ascontiguousarray(slices) + 0.0):  # adding 0.0 turns -0.0 into 0.0
        groups.setdefault(line.tobytes(), []).append(at)
    return list(groups.values())


def greedy_cost(costs: tuple[Floats, ...], edges: tuple[Edge, ...], alive: list[Bools]) -> float:
    """The cost of choices taken greedily node by node, for the magnitude of a solution's cost; rows are ignored."""
    near: list[list[tuple[int, Floats]]] = [[] for _ in costs]
    for edge in edges:
        near[edge.second].append((edge.first, edge.costs))
        near[edge.first].append((edge.second, edge.costs.T))
    taken: dict[int, int] = {}
    total = 0.0
    for node, values in enumerate(costs):
        alone = np.where(alive[node], values, np.inf)
        with_taken = alone
        for other, table in near[node]:
            if other in taken:
                with_taken = with_taken + table[taken[other]]
        if not np.isfinite(with_taken.min()):
            with_taken = alone
        taken[node] = int(with_taken.argmin())
        total += float(with_taken.min())
    return total
