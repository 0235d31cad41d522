"""The pairwise choice problem with usage limits, which all solvers take and ``evaluate`` scores.

    minimise   sum_v cost_v[x_v] + sum_(u,v) cost_uv[x_u, x_v]
    subject to sum_v usage_rv[x_v] + sum_(u,v) usage_ruv[x_u, x_v] <= limit_r     for every row r

x_v is the choice of node v, u and v are the ends of an edge. ``numpy.inf`` in a cost forbids the choice or the pair.
Parallel edges add up. All costs are in one unit, and what a row uses in another: seconds and bytes in autopar, units of
their own in the public IOPDDL instances.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Edge:
    """The cost of a pair: ``costs`` is (choices of node ``first``, choices of node ``second``)."""

    first: int
    second: int
    costs: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """A limit on usage, named for messages: ``usage`` maps a node to (choices,) what each choice uses, ``edge_usage`` an
    edge, by its position in ``Problem.edges``, to (choices of first, choices of second); their sum may not exceed
    ``limit``."""

    name: str
    usage: dict[int, Floats]
    limit: float
    edge_usage: dict[int, Floats] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """``costs[v]`` is (choices of v,); ``names[v]`` says what node v is, for people, and may be left out."""

    costs: tuple[Floats, ...]
    edges: tuple[Edge, ...]
    rows: tuple[Row, ...] = ()
    names: tuple[str, ...] = ()


SolveStatus = Literal["optimal", "feasible", "infeasible", "failed"]
"""Proved optimal; feasible, with a bound; proved infeasible; or nothing found and nothing proved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """A typed outcome. ``choices`` has one choice per node, which cost ``cost``: () and inf unless the status is
    "optimal" or "feasible". ``lower_bound`` is proved; ``seconds`` is wall time."""

    status: SolveStatus
    choices: tuple[int, ...]
    cost: float
    lower_bound: float
    seconds: float

    @property
    def gap(self) -> float:
        """(cost - lower bound) / cost, 0 when proved optimal."""
        return 0.0 if self.status == "optimal" else (self.cost - self.lower_bound) / max(abs(self.cost), 1e-300)
