"""Exact reductions before the ILP is written down, and the sizes its scaling needs.

A choice leaves when no partner allows it over some edge, when it breaks a row though all else uses its least, or when
it alone exceeds a cutoff; each is repeated until nothing changes (``alive_choices``). Rows of an edge table with equal
content are one group (``equal_lines``).
"""

import math

import numpy as np
from numpy.typing import NDArray

from autopar.choice.evaluate import LIMIT_TOLERANCE
from autopar.choice.problem import Edge, Floats, Problem, Row

Bools = NDArray[np.bool_]
GAP_TOLERANCE = 1e-9  # relative gap at which a solution counts as proved


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
    wanted = [pair for pair, values in costs.items() if values.any() or any(pair in table for table in usages)]
    position_of = {pair: position for position, pair in enumerate(wanted)}
    rows = tuple(
        Row(
            name=row.name,
            usage=row.usage,
            limit=row.limit,
            edge_usage={position_of[pair]: values for pair, values in table.items()},
        )
        for row, table in zip(problem.rows, usages, strict=True)
    )
    return tuple(Edge(first=pair[0], second=pair[1], costs=costs[pair]) for pair in wanted), rows


def tighten_row(row: Row, tightening: float) -> Row:
    limit = row.limit - tightening * abs(row.limit)
    return Row(name=row.name, usage=row.usage, limit=limit, edge_usage=row.edge_usage)


def alive_choices(
    costs: tuple[Floats, ...], edges: tuple[Edge, ...], rows: tuple[Row, ...], cutoff: float | None
) -> list[Bools] | None:
    """The choices that no single node, edge, row or the cutoff forbids; ``None`` when a node has none left."""
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
            room = cutoff - sum_of_least_costs(costs, edges, alive) + GAP_TOLERANCE * abs(cutoff)
            for values, mask in zip(costs, alive, strict=True):
                mask &= values - values[mask].min() <= room
    return alive if all(mask.any() for mask in alive) else None


def _drop_row_violators(row: Row, edges: tuple[Edge, ...], alive: list[Bools]) -> None:
    """Drop the choices that break the row even when all else uses its least."""
    least = {node: float(usage[alive[node]].min()) for node, usage in row.usage.items()}
    pairs = [
        usage[np.ix_(alive[edges[at].first], alive[edges[at].second])].min() for at, usage in row.edge_usage.items()
    ]
    slack = row.limit + LIMIT_TOLERANCE * abs(row.limit) - math.fsum([*least.values(), *pairs])
    for node, usage in row.usage.items():
        alive[node] &= usage - least[node] <= slack


def _alive_block(edge: Edge, alive: list[Bools]) -> Floats:
    return edge.costs[np.ix_(alive[edge.first], alive[edge.second])]


def sum_of_least_costs(costs: tuple[Floats, ...], edges: tuple[Edge, ...], alive: list[Bools]) -> float:
    """The sum of every term's least cost: the origin of scaled costs, and a bound by itself."""
    nodes = [float(values[mask].min()) for values, mask in zip(costs, alive, strict=True)]
    return math.fsum(nodes + [float(_alive_block(edge, alive).min()) for edge in edges])


def largest_cost_range(costs: tuple[Floats, ...], edges: tuple[Edge, ...], alive: list[Bools]) -> float:
    """The largest finite cost of any term, counted from that term's least."""
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
    """A cost of the right size, of choices taken node by node; only scales the objective, so rows are ignored."""
    near: list[list[tuple[int, Floats]]] = [[] for _ in costs]
    for edge in edges:
        near[edge.second].append((edge.first, edge.costs))
        near[edge.first].append((edge.second, edge.costs.T))
    taken: dict[int, int] = {}
    total = 0.0
    for node, values in enumerate(costs):
        given = np.where(alive[node], values, np.inf)
        for other, table in near[node]:
            if other in taken:
                given = given + table[taken[other]]
        if not np.isfinite(given.min()):
            given = np.where(alive[node], values, np.inf)
        taken[node] = int(given.argmin())
        total += float(given.min())
    return total
