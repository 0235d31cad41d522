"""Re-scores any solution of the pairwise choice problem, and shares no code with the solvers.

    cost    = sum_v cost_v[x_v] + sum_(u,v) cost_uv[x_u, x_v]                                             (evaluate)
    usage_r = sum_v usage_rv[x_v] + sum_(u,v) usage_ruv[x_u, x_v]      violated where usage_r > limit_r   (evaluate)

Sums are exact (``math.fsum``), so a verdict does not depend on the order of nodes and edges.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autopar.choice.problem import Problem

LIMIT_TOLERANCE = 1e-12
"""Share of a limit by which usage may exceed it: only what rounding the usages themselves can cause (0.1 bytes of
80 GB)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the choices cost. ``usages`` has one entry per row of the problem, in the row's unit; ``violated_rows``
    names the rows whose usage exceeds the limit."""

    cost: float
    usages: tuple[float, ...]
    violated_rows: tuple[str, ...]

    @property
    def is_feasible(self) -> bool:
        """Whether no forbidden choice or pair is taken and no limit exceeded."""
        return math.isfinite(self.cost) and not self.violated_rows


def evaluate(problem: Problem, choices: Sequence[int]) -> Verdict:
    """Score one choice per node; ``ValueError`` when there is not exactly one choice in range per node.

    Worked example: two nodes with costs (1, 4) and (2, 3), a pair cost of 10 when both take choice 0, and a row of
    limit 5 where choice 0 of either node uses 3. Choices (0, 0) cost 1 + 2 + 10 = 13 and use 6 > 5: violated. Choices
    (0, 1) cost 1 + 3 + 0 = 4 and use 3: feasible.
    """
    if len(choices) != len(problem.costs):
        raise ValueError(f"{len(choices)} choices for {len(problem.costs)} nodes")
    for node, choice in enumerate(choices):
        if not 0 <= choice < len(problem.costs[node]):
            raise ValueError(f"choice {choice} of node {node}, which has {len(problem.costs[node])} choices")
    costs = [float(values[choice]) for values, choice in zip(problem.costs, choices, strict=True)]
    costs += [float(edge.costs[choices[edge.first], choices[edge.second]]) for edge in problem.edges]
    usages: list[float] = []
    violated: list[str] = []
    for row in problem.rows:
        used = [float(usage[choices[node]]) for node, usage in row.usage.items()]
        for position, pair_usage in row.edge_usage.items():
            edge = problem.edges[position]
            used.append(float(pair_usage[choices[edge.first], choices[edge.second]]))
        usages.append(math.fsum(used))
        if usages[-1] > row.limit + LIMIT_TOLERANCE * abs(row.limit):
            violated.append(row.name)
    return Verdict(cost=math.fsum(costs), usages=tuple(usages), violated_rows=tuple(violated))
