"""The pairwise choice problem as an integer program: PuLP model, HiGHS as solver, CBC as a second opinion.

    variables    s_v[P]      binary            node v takes choice P                                    (_build_nodes)
                 e_uv[G,H]   in [0, 1]         edge (u, v) has u in group G and v in group H            (_build_edge)
    minimise     sum_v cost_v . s_v + sum_(u,v) cost_uv . e_uv                                          (_build)
    subject to   one_v:        sum_P s_v[P] = 1                         for every node v                (_build_nodes)
                 first_uv_G:   sum_H e_uv[G,H] = sum_(P in G) s_u[P]    for every edge and group of u   (_build_edge)
                 second_uv_H:  sum_G e_uv[G,H] = sum_(Q in H) s_v[Q]    for every edge and group of v   (_build_edge)
                 row_r:        sum usage_rv . s_v + sum usage_ruv . e_uv <= limit_r  for every row r    (_build_rows)

The marginals are equalities and infinite entries are removed, not priced: that is the local marginal polytope, so the
relaxation is nearly integral, and integral ``s`` forces integral ``e`` (Koster, van Hoesel, Kolen 1998; Werner 2007).
So ``e`` may be continuous, and is for CBC. HiGHS 1.15.1 gets it declared integer: with continuous ``e`` its presolve
called a wrong point optimal on 8 of 21,500 small random problems with memory rows, with integer ``e`` on none of 32,000
(brute force as judge), and the public instances B and G take the same time either way.
Choices whose rows of an edge table are alike form a *group* and share edge variables: strategies that place a tensor
alike are one state there, which changes neither the optimum nor the relaxation.

Numbers are scaled before the solver sees them, since its tolerances are absolute: costs are counted from the sum of the
minima and in units that make a known solution's cost ``SCALED_COST``; a row is counted from its least usage and in
units that make what is left of its limit ``SCALED_LIMIT``. Every solution is rounded and re-scored by the judge.
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
    Bools,
    alive_choices,
    greedy_cost,
    group_equal_slices,
    largest_cost_range,
    merge_parallel_edges,
    sum_of_least_costs,
    tighten_row,
)
from autopar.choice.problem import Edge, Floats, Problem, Row, Solution, SolveStatus

IlpSolver = Literal["highs", "cbc"]
SCALED_COST = 1e4
SCALED_LIMIT = 1e4
ROW_TIGHTENINGS = (0.0, 1e-9, 1e-7)  # of a row's limit, tried in turn when rounding makes a solution break a row


def solve_ilp(
    problem: Problem,
    *,
    solver: IlpSolver = "highs",
    time_limit_s: float | None = None,
    warm_start: Sequence[int] | None = None,
    cutoff: float | None = None,
) -> Solution:
    """Solve to proved optimality (relative gap ``GAP_TOLERANCE``) or until the time limit.

    ``warm_start`` is a feasible choice per node (HiGHS starts from it; CBC does not need it). ``cutoff`` is a cost
    known to be reachable: terms that alone exceed it are removed, and with it "infeasible" means that nothing costs at
    most ``cutoff``. A time limit gives "feasible" with the best solution and bound so far, or "failed" when none was
    found. A bound above the cost of a feasible point is the solver's fault: it is dropped and nothing counts as proved.
    """
    start = time.perf_counter()
    if warm_start is not None:
        verdict = evaluate(problem, warm_start)
        if verdict.is_feasible:
            cutoff = verdict.cost if cutoff is None else min(cutoff, verdict.cost)
        else:
            warm_start = None
    bound = -math.inf
    for tighten in ROW_TIGHTENINGS:
        elapsed = time.perf_counter() - start
        left_s = None if time_limit_s is None else max(0.1, time_limit_s - elapsed)
        outcome = _solve_once(problem, solver, left_s, warm_start, cutoff, tighten)
        if tighten == 0.0:
            bound = outcome.bound
        if outcome.status not in ("optimal", "feasible") or evaluate(problem, outcome.choices).is_feasible:
            break
    seconds = time.perf_counter() - start
    found = outcome.status in ("optimal", "feasible") and evaluate(problem, outcome.choices).is_feasible
    choices = outcome.choices if found else ()
    cost = evaluate(problem, choices).cost if found else math.inf
    if warm_start is not None and (not found or evaluate(problem, warm_start).cost < cost):
        found, choices = True, tuple(warm_start)
        cost = evaluate(problem, choices).cost
    if not found:
        infeasible = outcome.status == "infeasible" and tighten == 0.0
        status: SolveStatus = "infeasible" if infeasible else "failed"
        return Solution(
            status=status, choices=(), cost=math.inf, lower_bound=math.inf if infeasible else bound, seconds=seconds
        )
    tolerance = max(2 * GAP_TOLERANCE * abs(cost), outcome.tolerance)
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
    """What the solver said, not yet judged; ``bound`` and ``tolerance``, the gap at which the solver was told to stop,
    are in the problem's own unit of cost."""

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
    if not problem.costs:
        return _SolverOutcome("optimal", (), 0.0)
    edges, rows = merge_parallel_edges(problem)
    rows = tuple(tighten_row(row, tightening) for row in rows)
    alive = alive_choices(problem.costs, edges, rows, cutoff)
    if alive is None:
        return _SolverOutcome("infeasible", (), math.inf)
    model = _build_model(
        problem, edges, rows, alive, cutoff, pulp.LpInteger if solver == "highs" else pulp.LpContinuous
    )
    if model is None:
        return _SolverOutcome("infeasible", (), math.inf)
    if solver == "highs":
        return _run_highs(model, time_limit_s, warm_start)
    return _run_cbc(model, time_limit_s)


# --- the model


@dataclass(frozen=True, slots=True)
class _IlpModel:
    """``nodes[v]`` are (choice, its variable); ``edge_values`` gives every edge variable with the choices of its two
    groups; cost = shift + scaled objective / scale."""

    program: pulp.LpProblem
    node_variables: tuple[tuple[tuple[int, Any], ...], ...]
    edge_variables: tuple[tuple[Any, int, frozenset[int], int, frozenset[int]], ...]
    cost_shift: float
    cost_scale: float
    scaled_gap: float


def _build_model(
    problem: Problem,
    edges: tuple[Edge, ...],
    rows: tuple[Row, ...],
    alive: list[Bools],
    cutoff: float | None,
    edge_category: str,
) -> _IlpModel | None:
    shift = sum_of_least_costs(problem.costs, edges, alive)
    reference = cutoff if cutoff is not None else greedy_cost(problem.costs, edges, alive)
    spread = reference - shift
    largest = largest_cost_range(problem.costs, edges, alive)
    scale = SCALED_COST / (spread if spread > 1e-6 * largest else largest or 1.0)
    program = pulp.LpProblem("choices", pulp.LpMinimize)
    objective: dict[Any, float] = {}
    variables = _build_nodes(program, problem, alive, scale, objective)
    row_terms: list[dict[Any, float]] = [{} for _ in rows]
    least_usage = _add_node_usage(rows, variables, row_terms)
    room = math.inf if cutoff is None else (spread + GAP_TOLERANCE * abs(reference)) * scale
    edge_variables: list[tuple[Any, int, frozenset[int], int, frozenset[int]]] = []
    for position, edge in enumerate(edges):
        usages = {at: row.edge_usage[position] for at, row in enumerate(rows) if position in row.edge_usage}
        edge_variables += _build_edge(
            program, edge_category, edge, usages, alive, variables, scale, room, objective, row_terms, least_usage
        )
    if not _build_rows(program, rows, row_terms, least_usage):
        return None
    program.setObjective(pulp.LpAffineExpression(objective))
    nodes = tuple(tuple(of.items()) for of in variables)
    gap = max(GAP_TOLERANCE * abs(reference) * scale, 1e-9)
    return _IlpModel(program, nodes, tuple(edge_variables), shift, scale, gap)


def _build_nodes(
    program: pulp.LpProblem, problem: Problem, alive: list[Bools], scale: float, objective: dict[Any, float]
) -> list[dict[int, Any]]:
    """``s_v[P]`` and ``one_v``. A node with one choice left gets a variable too: it is what its edges speak of."""
    variables: list[dict[int, Any]] = []
    for node, (costs, mask) in enumerate(zip(problem.costs, alive, strict=True)):
        choices = [int(choice) for choice in np.flatnonzero(mask)]
        of = {
            choice: program.add_variable(f"s_{node}_{choice}", lowBound=0, upBound=1, cat=pulp.LpInteger)
            for choice in choices
        }
        least = float(costs[mask].min())
        objective.update((of[choice], (float(costs[choice]) - least) * scale) for choice in choices)
        total = pulp.LpAffineExpression(dict.fromkeys(of.values(), 1.0))
        program.addConstraint(pulp.LpConstraint(total, pulp.LpConstraintEQ, f"one_{node}", 1.0))
        variables.append(of)
    return variables


def _add_node_usage(
    rows: tuple[Row, ...], variables: list[dict[int, Any]], row_coefficients: list[dict[Any, float]]
) -> list[list[float]]:
    least_usage: list[list[float]] = []
    for row, terms in zip(rows, row_coefficients, strict=True):
        found: list[float] = []
        for node, usage in row.usage.items():
            least = min(float(usage[choice]) for choice in variables[node])
            found.append(least)
            for choice, variable in variables[node].items():
                if usage[choice] > least:
                    terms[variable] = float(usage[choice]) - least
        least_usage.append(found)
    return least_usage


def _build_edge(
    program: pulp.LpProblem,
    category: str,
    edge: Edge,
    usages: dict[int, Floats],
    alive: list[Bools],
    variables: list[dict[int, Any]],
    scale: float,
    cutoff_room: float,
    objective: dict[Any, float],
    row_coefficients: list[dict[Any, float]],
    least_usage: list[list[float]],
) -> list[tuple[Any, int, frozenset[int], int, frozenset[int]]]:
    """``e_uv[G,H]``, ``first_uv_G`` and ``second_uv_H``; pairs that alone cost more than ``room`` are left out."""
    block = np.ix_(alive[edge.first], alive[edge.second])
    tables = np.stack([edge.costs[block], *(usage[block] for usage in usages.values())])
    first_of = group_equal_slices(tables.transpose(1, 0, 2))
    second_of = group_equal_slices(tables.transpose(2, 0, 1))
    costs = tables[0][np.ix_([group[0] for group in first_of], [group[0] for group in second_of])]
    least = float(costs.min())
    name = f"{edge.first}_{edge.second}"
    members = [
        (edge.first, [frozenset(_choices_at(variables[edge.first], group)) for group in first_of]),
        (edge.second, [frozenset(_choices_at(variables[edge.second], group)) for group in second_of]),
    ]
    by_first: list[dict[Any, float]] = [{} for _ in first_of]
    by_second: list[dict[Any, float]] = [{} for _ in second_of]
    made: list[tuple[Any, int, frozenset[int], int, frozenset[int]]] = []
    minima = {at: float(usage[block].min()) for at, usage in usages.items()}
    for at, lowest in minima.items():
        least_usage[at].append(lowest)
    for one, two in zip(*np.nonzero((costs - least) * scale <= min(cutoff_room, 1e300)), strict=True):
        variable = program.add_variable(f"e_{name}_{one}_{two}", lowBound=0, upBound=1, cat=category)
        objective[variable] = (float(costs[one, two]) - least) * scale
        by_first[one][variable] = 1.0
        by_second[two][variable] = 1.0
        made.append((variable, edge.first, members[0][1][one], edge.second, members[1][1][two]))
        for number, (at, lowest) in enumerate(minima.items(), 1):
            used = float(tables[number][first_of[one][0], second_of[two][0]]) - lowest
            if used > 0:
                row_coefficients[at][variable] = used
    for side, marginals, (node, groups) in zip(("first", "second"), (by_first, by_second), members, strict=True):
        for number, (terms, group) in enumerate(zip(marginals, groups, strict=True)):
            terms.update((variables[node][choice], -1.0) for choice in group)
            expression = pulp.LpAffineExpression(terms)
            program.addConstraint(pulp.LpConstraint(expression, pulp.LpConstraintEQ, f"{side}_{name}_{number}", 0.0))
    return made


def _choices_at(variables: dict[int, Any], positions: list[int]) -> list[int]:
    choices = list(variables)
    return [choices[position] for position in positions]


def _build_rows(
    program: pulp.LpProblem,
    rows: tuple[Row, ...],
    row_coefficients: list[dict[Any, float]],
    least_usage: list[list[float]],
) -> bool:
    """``row_r``; what alone uses more than is left is fixed to zero. False when a row cannot hold at all."""
    for number, (row, terms, least) in enumerate(zip(rows, row_coefficients, least_usage, strict=True)):
        if math.isinf(row.limit) and row.limit > 0:
            continue
        left = row.limit - math.fsum(least)
        if left < -LIMIT_TOLERANCE * abs(row.limit):
            return False
        left = max(left, 0.0)
        tolerance = LIMIT_TOLERANCE * abs(row.limit)
        fitting = {variable: used for variable, used in terms.items() if used <= left + tolerance}
        for variable in terms.keys() - fitting.keys():
            variable.upBound = 0
        unit = SCALED_LIMIT / max(left, tolerance, 1e-300)
        if fitting:
            expression = pulp.LpAffineExpression({variable: used * unit for variable, used in fitting.items()})
            program.addConstraint(pulp.LpConstraint(expression, pulp.LpConstraintLE, f"row_{number}", left * unit))
    return True


# --- running it


def _run_highs(model: _IlpModel, time_limit_s: float | None, warm_start: Sequence[int] | None) -> _SolverOutcome:
    start = None if warm_start is None else _start_values(model, warm_start)
    program = model.program
    options = {"mip_feasibility_tolerance": 1e-7, "primal_feasibility_tolerance": 1e-8}
    solve_highs(program, start, timeLimit=time_limit_s, gapRel=0.0, gapAbs=model.scaled_gap, **options)
    info = program.solverModel.getInfo()
    bound = model.cost_shift + info.mip_dual_bound / model.cost_scale
    said = program.solverModel.getModelStatus()
    if program.status == pulp.LpStatusInfeasible:
        return _SolverOutcome("infeasible", (), math.inf)
    has_solution = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    if program.status != pulp.LpStatusOptimal or not has_solution:
        return _SolverOutcome("failed", (), bound)
    proved = program.sol_status == pulp.LpSolutionOptimal and said == highspy.HighsModelStatus.kOptimal
    return _SolverOutcome(
        "optimal" if proved else "feasible", _round_choices(model), bound, 2 * model.scaled_gap / model.cost_scale
    )


def _run_cbc(model: _IlpModel, time_limit_s: float | None) -> _SolverOutcome:
    """CBC does not hand its bound to PuLP: it is known only when CBC proves optimality."""
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


def _start_values(model: _IlpModel, choices: Sequence[int]) -> dict[str, float] | None:
    values: dict[str, float] = {}
    for choice, of in zip(choices, model.node_variables, strict=True):
        values.update((variable.name, float(number == choice)) for number, variable in of)
    for variable, first, group, second, other in model.edge_variables:
        values[variable.name] = float(choices[first] in group and choices[second] in other)
    return values


def _round_choices(model: _IlpModel) -> tuple[int, ...]:
    """The choice with the largest value of each node: binaries come back as 0.9999999."""
    return tuple(max(of, key=lambda item: item[1].varValue)[0] for of in model.node_variables)
