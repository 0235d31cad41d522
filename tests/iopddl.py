"""Reads the public ASPLOS'25 IOPDDL sharding problems as problems of our own solvers.

A node is live in a half-open interval of time and its choice uses memory only then; at every time the live usages sum
to at most one limit. A time whose live set is a subset of another's cannot be the one that breaks, so only maximal live
sets become rows. Costs of 1e18 are forbidden choices.
"""

import gzip
import json
from pathlib import Path

import numpy as np

from autopar.choice.problem import Edge, Problem, Row

FORBIDDEN = 1e18
FOLDER = Path(__file__).resolve().parents[1] / ".." / "shared" / "iopddl"


def path_of(letter: str) -> Path:
    """The file of instance "A", "B", ...; it may be absent."""
    return FOLDER / f"asplos-2025-iopddl-{letter}.json.gz"


def maximal_live_sets(intervals: list[tuple[int, int]]) -> list[tuple[int, frozenset[int]]]:
    """(time, live nodes) of the maximal live sets, in order of time; intervals are half-open, ``lo == hi`` never lives.

    Sets grow where intervals start and shrink where they end, so a set is maximal among its neighbours in time exactly
    when the next change after it is an end and the last before it a start.

    >>> [(time, sorted(live)) for time, live in maximal_live_sets([(0, 4), (1, 2), (3, 5), (0, 0)])]
    [(1, [0, 1]), (3, [0, 2])]
    """
    starts: dict[int, list[int]] = {}
    ends: dict[int, list[int]] = {}
    for node, (low, high) in enumerate(intervals):
        if low < high:
            starts.setdefault(low, []).append(node)
            ends.setdefault(high, []).append(node)
    live: set[int] = set()
    found: list[tuple[int, frozenset[int]]] = []
    grown_at: int | None = None
    for time in sorted(starts.keys() | ends.keys()):
        if time in ends and grown_at is not None:
            found.append((grown_at, frozenset(live)))
            grown_at = None
        live.difference_update(ends.get(time, ()))
        if time in starts:
            live.update(starts[time])
            grown_at = time
    return found


def read_problem(path: Path) -> Problem:
    """The problem of one ``.json.gz`` file; one row per maximal live set that could break the limit at all."""
    with gzip.open(path) as file:
        data = json.load(file)["problem"]
    costs = tuple(_costs(values) for values in data["nodes"]["costs"])
    usages = [np.array(values, float) for values in data["nodes"]["usages"]]
    edges = tuple(
        Edge(first=first, second=second, costs=_costs(values).reshape(len(costs[first]), len(costs[second])))
        for (first, second), values in zip(data["edges"]["nodes"], data["edges"]["costs"], strict=True)
    )
    limit = float(data["usage_limit"])
    rows = tuple(
        Row(name=f"time_{time}", usage={node: usages[node] for node in sorted(live)}, limit=limit)
        for time, live in maximal_live_sets([(low, high) for low, high in data["nodes"]["intervals"]])
        if sum(usages[node].max() for node in live) > limit
    )
    return Problem(costs=costs, edges=edges, rows=rows)


def _costs(values: list[float]) -> np.ndarray:
    costs = np.array(values, float)
    return np.where(costs >= FORBIDDEN, np.inf, costs)
