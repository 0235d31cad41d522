"""The pairwise choice problem with memory rows: what elimination, the ILP and the judge all speak about.

    minimise   sum_v cost_v[x_v] + sum_(u,v) cost_uv[x_u, x_v]
    subject to sum_v usage_rv[x_v] + sum_(u,v) usage_ruv[x_u, x_v] <= limit_r     for every row r

``numpy.inf`` in a cost forbids the choice or the pair. Parallel edges add up. Costs are seconds and usages bytes in
autopar; the public IOPDDL instances use the same class with their own units.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Edge:
    """A pair term between nodes ``first`` and ``second``; ``costs`` is (choices of first, choices of second)."""

    first: int
    second: int
    costs: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """A memory row: ``usage`` maps a node to its bytes per choice; ``edge_usage`` an edge's position in
    ``Problem.edges`` to its bytes per pair; their sum may not exceed ``limit``."""

    name: str
    usage: dict[int, Floats]
    limit: float
    edge_usage: dict[int, Floats] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """``costs[v]`` are node v's costs, one per choice; ``names[v]`` says what v is, for people and constraint names."""

    costs: tuple[Floats, ...]
    edges: tuple[Edge, ...]
    rows: tuple[Row, ...] = ()
    names: tuple[str, ...] = ()


SolveStatus = Literal["optimal", "feasible", "infeasible", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """A typed outcome. ``choices`` is one choice per node and ``cost`` their cost (both empty/inf unless optimal or
    feasible); ``bound`` is a proved lower bound; ``seconds`` is wall time."""

    status: SolveStatus
    choices: tuple[int, ...]
    cost: float
    lower_bound: float
    seconds: float

    @property
    def gap(self) -> float:
        """Relative distance of the cost from the bound, 0 when proved."""
        return 0.0 if self.status == "optimal" else (self.cost - self.lower_bound) / max(abs(self.cost), 1e-300)
