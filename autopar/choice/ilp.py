"""The pairwise choice problem as an integer program: PuLP model, HiGHS as solver, CBC as a second opinion.

    variables    s_v[P]      binary            node v takes choice P                                      (_add_nodes)
                 e_uv[G,H]   in [0, 1]         edge (u, v) has u in group G and v in group H              (_add_edge)
    minimise     sum_v cost_v . s_v + sum_(u,v) cost_uv . e_uv                                            (build)
    subject to   one_v:        sum_P s_v[P] = 1                         for every node v                  (_add_nodes)
                 first_uv_G:   sum_H e_uv[G,H] = sum_(P in G) s_u[P]    for every edge and group of u     (_add_marginals)
                 second_uv_H:  sum_G e_uv[G,H] = sum_(Q in H) s_v[Q]    for every edge and group of v     (_add_marginals)
                 row_r:        sum usage_rv . s_v + sum usage_ruv . e_uv <= limit_r  for every row r      (_add_rows)

The marginals are equalities and infinite entries are removed, not priced: that is the local marginal polytope, so the
relaxation is nearly integral, and integral ``s`` forces integral ``e`` (Koster, van Hoesel, Kolen 1998; Werner 2007).
So ``e`` may be continuous, and is for CBC. HiGHS 1.15.1 gets it declared integer: with continuous ``e`` its presolve
called a wrong point optimal on 8 of 21,500 small random problems with usage rows, with integer ``e`` on none of 32,000
(checked by brute force), and the public instances B and G take the same time either way.
Choices of a node whose costs and usages over an edge are equal form a *group* there and share edge variables, which
changes neither the optimum nor the relaxation (``group_equal_slices``).

Numbers are scaled before the solver sees them, since its tolerances are absolute: costs are counted from the sum of the
minima and in units that make a known solution's cost ``SCALED_COST``; a row is counted from its least usage and in
units that make the rest of its limit ``SCALED_LIMIT``. Every solution is rounded and re-scored by ``evaluate``.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import highspy
import numpy as np
import pulp

from autopar.choice.evaluate import LIMIT_TOLERANCE, evaluate
from autopar.choice.highs import solve_highs
from autopar.choice.presolve import (
    GAP_TOLERANCE,
    ROUNDING,
    Bools,
    alive_choices,
    cost_magnitude,
    greedy_cost,
    group_equal_slices,
    largest_cost_range,
    merge_parallel_edges,
    sum_of_least_costs,
    tighten_row,
    without_unlimited_rows,
)
from autopar.choice.problem import Edge, Problem, Row, Solution, SolveStatus

IlpSolver = Literal["highs", "cbc"]
SCALED_COST = 1e4
SCALED_LIMIT = 1e4
ROW_TIGHTENINGS = (0.0, 1e-9, 1e-7)
"""Shares of a row's limit by which it is lowered, tried in turn when rounding makes a solution exceed it."""


def solve_ilp(
    problem: Problem,
    *,
    solver: IlpSolver = "highs",
    time_limit_s: float | None = None,
    warm_start: Sequence[int] | None = None,
    cutoff: float | None = None,
) -> Solution:
    """Solve to proved optimality (relative gap ``GAP_TOLERANCE``) or until the time limit.

    ``warm_start`` is a feasible choice per node (HiGHS starts from it; CBC ignores it). ``cutoff`` is a cost known to be
    reachable: choices and pairs that alone exceed it are removed, and "infeasible" then means that nothing costs at
    most ``cutoff``. A time limit gives "feasible" with the best solution and bound so far, or "failed" when none was
    found. A bound above the cost of a feasible point is an error of the solver: it is dropped, and nothing counts as
    proved.
    """
    start = time.perf_counter()
    problem = without_unlimited_rows(problem)
    if warm_start is not None:
        verdict = evaluate(problem, warm_start)
        if verdict.is_feasible:
            cutoff = verdict.cost if cutoff is None else min(cutoff, verdict.cost)
        else:
            warm_start = None
    bound = -math.inf
    for tightening in ROW_TIGHTENINGS:
        elapsed = time.perf_counter() - start
        left_s = None if time_limit_s is None else max(0.1, time_limit_s - elapsed)
        outcome = _solve_once(problem, solver, left_s, warm_start, cutoff, tightening)
        if tightening == 0.0:
            bound = outcome.bound
        if outcome.status not in ("optimal", "feasible") or evaluate(problem, outcome.choices).is_feasible:
            break
    seconds = time.perf_counter() - start
    is_solved = outcome.status in ("optimal", "feasible") and evaluate(problem, outcome.choices).is_feasible
    choices = outcome.choices if is_solved else ()
    cost = evaluate(problem, choices).cost if is_solved else math.inf
    if warm_start is not None and (not is_solved or evaluate(problem, warm_start).cost < cost):
        is_solved, choices = True, tuple(warm_start)
        cost = evaluate(problem, choices).cost
    if not is_solved:
        infeasible = outcome.status == "infeasible" and tightening == 0.0
        status: SolveStatus = "infeasible" if infeasible else "failed"
        return Solution(
            status=status, choices=(), cost=math.inf, lower_bound=math.inf if infeasible else bound, seconds=seconds
        )
    tolerance = max(2 * GAP_TOLERANCE * abs(cost), outcome.tolerance)
    tolerance += ROUNDING * cost_magnitude(problem.costs, problem.edges)
    if bound > cost + tolerance:
        bound = -math.inf
    proved = cost - bound <= tolerance
    return Solution(
        status="optimal" if proved else "feasible",
        choices=choices,
        cost=cost,
        lower_bound=min(bound, cost),
        seconds=seconds,
    )


@dataclass(frozen=True, slots=True)
class _SolverOutcome:
    """What the solver returned, not yet re-scored; ``bound`` and ``tolerance``, twice the gap at which the solver was
    told to stop, are in the problem's own unit of cost."""

    status: SolveStatus
    choices: tuple[int, ...]
    bound: float
    tolerance: float = 0.0


def _solve_once(
    problem: Problem,
    solver: IlpSolver,
    time_limit_s: float | None,
    warm_start: Sequence[int] | None,
    cutoff: float | None,
    tightening: float,
) -> _SolverOutcome:
    """Presolve, build and run once, with every row's limit lowered by the share ``tightening``."""
    if not problem.costs:
        return _SolverOutcome("optimal", (), 0.0)
    edges, rows = merge_parallel_edges(problem)
    rows = tuple(tighten_row(row, tightening) for row in rows)
    alive = alive_choices(problem.costs, edges, rows, cutoff)
    if alive is None:
        return _SolverOutcome("infeasible", (), math.inf)
    edge_category = pulp.LpInteger if solver == "highs" else pulp.LpContinuous
    model = _IlpBuilder(problem, edges, rows, alive, cutoff=cutoff, edge_category=edge_category).build()
    if model is None:
        return _SolverOutcome("infeasible", (), math.inf)
    if solver == "highs":
        return _run_highs(model, time_limit_s, warm_start)
    return _run_cbc(model, time_limit_s)


# --- the model


@dataclass(frozen=True, slots=True)
class _EdgeVariable:
    """``e_uv[G,H]``: ``variable`` is 1 where node ``first`` takes one of ``first_choices`` (G) and node ``second`` one
    of ``second_choices`` (H)."""

    variable: Any
    first: int
    first_choices: frozenset[int]
    second: int
    second_choices: frozenset[int]


@dataclass(frozen=True, slots=True)
class _IlpModel:
    """``node_variables[v]`` are the (choice, variable) of node v. A solution's cost is ``cost_shift`` + scaled objective
    / ``cost_scale``; ``scaled_gap`` is the absolute gap at which the solver may stop."""

    program: pulp.LpProblem
    node_variables: tuple[tuple[tuple[int, Any], ...], ...]
    edge_variables: tuple[_EdgeVariable, ...]
    cost_shift: float
    cost_scale: float
    scaled_gap: float


class _IlpBuilder:
    """Writes one presolved problem down: its ``alive`` choices, merged ``edges`` and ``rows``. With a ``cutoff``, pairs
    that alone cost more are left out."""

    def __init__(
        self,
        problem: Problem,
        edges: tuple[Edge, ...],
        rows: tuple[Row, ...],
        alive: list[Bools],
        *,
        cutoff: float | None,
        edge_category: str,
    ) -> None:
        self.problem, self.edges, self.rows, self.alive, self.edge_category = problem, edges, rows, alive, edge_category
        self.shift = sum_of_least_costs(problem.costs, edges, alive)
        reference = cutoff if cutoff is not None else greedy_cost(problem.costs, edges, alive)
        spread = reference - self.shift
        largest = largest_cost_range(problem.costs, edges, alive)
        self.scale = SCALED_COST / (spread if spread > 1e-6 * largest else largest or 1.0)
        self.scaled_gap = max(GAP_TOLERANCE * abs(reference) * self.scale, 1e-9)
        self.cutoff_room = math.inf
        if cutoff is not None:
            rounding = ROUNDING * cost_magnitude(problem.costs, edges)
            self.cutoff_room = (spread + GAP_TOLERANCE * abs(reference) + rounding) * self.scale
        self.program = pulp.LpProblem("choices", pulp.LpMinimize)
        self.objective: dict[Any, float] = {}
        self.node_variables: list[dict[int, Any]] = []
        self.row_coefficients: list[dict[Any, float]] = [{} for _ in rows]
        self.least_usages: list[list[float]] = [[] for _ in rows]
        """Of each row, the least usage of every node and edge."""

    def build(self) -> _IlpModel | None:
        """The model; None where no choices satisfy some row."""
        self._add_nodes()
        self._add_node_usages()
        edge_variables = [
            variable for position, edge in enumerate(self.edges) for variable in self._add_edge(position, edge)
        ]
        if not self._add_rows():
            return None
        self.program.setObjective(pulp.LpAffineExpression(self.objective))
        return _IlpModel(
            self.program,
            tuple(tuple(variables.items()) for variables in self.node_variables),
            tuple(edge_variables),
            self.shift,
            self.scale,
            self.scaled_gap,
        )

    def _add_nodes(self) -> None:
        """``s_v[P]`` and ``one_v``. A node with one choice left has a variable too, which its edges refer to."""
        for node, (costs, mask) in enumerate(zip(self.problem.costs, self.alive, strict=True)):
            variables = {
                int(choice): self.program.add_variable(f"s_{node}_{choice}", lowBound=0, upBound=1, cat=pulp.LpInteger)
                for choice in np.flatnonzero(mask)
            }
            least = float(costs[mask].min())
            self.objective.update(
                (variable, (float(costs[choice]) - least) * self.scale) for choice, variable in variables.items()
            )
            total = pulp.LpAffineExpression(dict.fromkeys(variables.values(), 1.0))
            self.program.addConstraint(pulp.LpConstraint(total, pulp.LpConstraintEQ, f"one_{node}", 1.0))
            self.node_variables.append(variables)

    def _add_node_usages(self) -> None:
        for row, coefficients, least_usages in zip(self.rows, self.row_coefficients, self.least_usages, strict=True):
            for node, usage in row.usage.items():
                least = min(float(usage[choice]) for choice in self.node_variables[node])
                least_usages.append(least)
                for choice, variable in self.node_variables[node].items():
                    if usage[choice] > least:
                        coefficients[variable] = float(usage[choice]) - least

    def _add_edge(self, position: int, edge: Edge) -> list[_EdgeVariable]:
        """``e_uv[G,H]``, what they cost and use, and their marginals."""
        usages = {at: row.edge_usage[position] for at, row in enumerate(self.rows) if position in row.edge_usage}
        block = np.ix_(self.alive[edge.first], self.alive[edge.second])
        tables = np.stack([edge.costs[block], *(usage[block] for usage in usages.values())])
        first_groups = group_equal_slices(tables.transpose(1, 0, 2))
        second_groups = group_equal_slices(tables.transpose(2, 0, 1))
        costs = tables[0][np.ix_([group[0] for group in first_groups], [group[0] for group in second_groups])]
        least = float(costs.min())
        first_choices = self._choices_of_groups(edge.first, first_groups)
        second_choices = self._choices_of_groups(edge.second, second_groups)
        least_of_row = {at: float(usage[block].min()) for at, usage in usages.items()}
        for at, lowest in least_of_row.items():
            self.least_usages[at].append(lowest)
        by_first: list[dict[Any, float]] = [{} for _ in first_groups]
        by_second: list[dict[Any, float]] = [{} for _ in second_groups]
        name = f"{edge.first}_{edge.second}"
        made: list[_EdgeVariable] = []
        for one, two in zip(*np.nonzero((costs - least) * self.scale <= min(self.cutoff_room, 1e300)), strict=True):
            variable = self.program.add_variable(f"e_{name}_{one}_{two}", lowBound=0, upBound=1, cat=self.edge_category)
            self.objective[variable] = (float(costs[one, two]) - least) * self.scale
            by_first[one][variable] = 1.0
            by_second[two][variable] = 1.0
            made.append(_EdgeVariable(variable, edge.first, first_choices[one], edge.second, second_choices[two]))
            for number, (at, lowest) in enumerate(least_of_row.items(), 1):
                used = float(tables[number][first_groups[one][0], second_groups[two][0]]) - lowest
                if used > 0:
                    self.row_coefficients[at][variable] = used
        self._add_marginals(f"first_{name}", edge.first, by_first, first_choices)
        self._add_marginals(f"second_{name}", edge.second, by_second, second_choices)
        return made

    def _choices_of_groups(self, node: int, groups: list[list[int]]) -> list[frozenset[int]]:
        """The choices of a node in each group of positions among its alive choices."""
        choices = list(self.node_variables[node])
        return [frozenset(choices[position] for position in group) for group in groups]

    def _add_marginals(
        self, name: str, node: int, marginals: list[dict[Any, float]], groups: list[frozenset[int]]
    ) -> None:
        """``first_uv_G`` or ``second_uv_H``: by group, its edge variables sum to the node's variables."""
        for number, (coefficients, group) in enumerate(zip(marginals, groups, strict=True)):
            coefficients.update((self.node_variables[node][choice], -1.0) for choice in group)
            expression = pulp.LpAffineExpression(coefficients)
            self.program.addConstraint(pulp.LpConstraint(expression, pulp.LpConstraintEQ, f"{name}_{number}", 0.0))

    def _add_rows(self) -> bool:
        """``row_r``; a variable that alone exceeds the rest of the limit is fixed to zero. False when the least usages
        exceed a limit."""
        for number, (row, used_by, least) in enumerate(
            zip(self.rows, self.row_coefficients, self.least_usages, strict=True)
        ):
            left = row.limit - math.fsum(least)
            if left < -LIMIT_TOLERANCE * abs(row.limit):
                return False
            left = max(left, 0.0)
            tolerance = LIMIT_TOLERANCE * abs(row.limit)
            fitting = {variable: used for variable, used in used_by.items() if used <= left + tolerance}
            for variable in used_by.keys() - fitting.keys():
                variable.upBound = 0
            unit = SCALED_LIMIT / max(left, tolerance, 1e-300)
            if fitting:
                expression = pulp.LpAffineExpression({variable: used * unit for variable, used in fitting.items()})
                self.program.addConstraint(
                    pulp.LpConstraint(expression, pulp.LpConstraintLE, f"row_{number}", left * unit)
                )
        return True


# --- running it


def _run_highs(model: _IlpModel, time_limit_s: float | None, warm_start: Sequence[int] | None) -> _SolverOutcome:
    """Optimal only where both PuLP and HiGHS say so: PuLP alone calls the best solution at a time limit optimal."""
    start = None if warm_start is None else _start_values(model, warm_start)
    program = model.program
    options = {"mip_feasibility_tolerance": 1e-7, "primal_feasibility_tolerance": 1e-8}
    solve_highs(program, start, timeLimit=time_limit_s, gapRel=0.0, gapAbs=model.scaled_gap, **options)
    info = program.solverModel.getInfo()
    bound = model.cost_shift + info.mip_dual_bound / model.cost_scale
    model_status = program.solverModel.getModelStatus()
    if program.status == pulp.LpStatusInfeasible:
        return _SolverOutcome("infeasible", (), math.inf)
    has_solution = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    if program.status != pulp.LpStatusOptimal or not has_solution:
        return _SolverOutcome("failed", (), bound)
    proved = program.sol_status == pulp.LpSolutionOptimal and model_status == highspy.HighsModelStatus.kOptimal
    return _SolverOutcome(
        "optimal" if proved else "feasible", _round_choices(model), bound, 2 * model.scaled_gap / model.cost_scale
    )


def _run_cbc(model: _IlpModel, time_limit_s: float | None) -> _SolverOutcome:
    """CBC passes no bound to PuLP: one is known only when CBC proves optimality."""
    program = model.program
    cbc = pulp.COIN_CMD(
        path=pulp.PULP_CBC_CMD.pulp_cbc_path, msg=False, timeLimit=time_limit_s, gapRel=0.0, gapAbs=model.scaled_gap
    )
    program.solve(cbc)
    if program.status == pulp.LpStatusInfeasible:
        return _SolverOutcome("infeasible", (), math.inf)
    if program.status != pulp.LpStatusOptimal:
        return _SolverOutcome("failed", (), -math.inf)
    if program.sol_status != pulp.LpSolutionOptimal:
        return _SolverOutcome("feasible", _round_choices(model), -math.inf)
    bound = model.cost_shift + (pulp.value(program.objective) - model.scaled_gap) / model.cost_scale
    return _SolverOutcome("optimal", _round_choices(model), bound, 2 * model.scaled_gap / model.cost_scale)


def _start_values(model: _IlpModel, choices: Sequence[int]) -> dict[str, float]:
    """Every variable's value, by name, of a choice per node."""
    values: dict[str, float] = {}
    for taken, variables in zip(choices, model.node_variables, strict=True):
        values.update((variable.name, float(choice == taken)) for choice, variable in variables)
    for edge in model.edge_variables:
        is_taken = choices[edge.first] in edge.first_choices and choices[edge.second] in edge.second_choices
        values[edge.variable.name] = float(is_taken)
    return values


def _round_choices(model: _IlpModel) -> tuple[int, ...]:
    """The choice with the largest value of each node: binaries come back as 0.9999999."""
    return tuple(max(variables, key=lambda item: item[1].varValue)[0] for variables in model.node_variables)
