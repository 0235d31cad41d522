"""Prices on usage: Lagrangian bounds by elimination, feasible choices by repair, and the solve that combines all.

    L(price) = min_x cost(x) + sum_r price_r * (usage_r(x) - limit_r)  <=  optimum, for every price >= 0
                                                                                            (LagrangianRelaxation.solve)
    dual optimum = max_(price >= 0) L(price)                             (_maximise_along_line, _ascend_by_subgradients)
    a choice k of v with  min_marginal_v(k; price) - sum_r price_r * limit_r > incumbent's cost
    is in no better solution and is dropped                                                             (filter_choices)

Along one direction of prices L is maximised exactly, by intersecting the lines of known solutions (Handler and Zang, "A
dual algorithm for the constrained shortest path problem", Networks 10, 1980). Several rows start from that and climb by
subgradient steps of many lengths in one batch (Held, Wolfe, Crowder 1974). The ILP closes the remaining gap on the
filtered problem (``solve_exactly``).
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autopar.choice.elimination import Eliminator, WidthError
from autopar.choice.evaluate import evaluate
from autopar.choice.ilp import solve_ilp
from autopar.choice.local_search import repair_and_improve
from autopar.choice.presolve import (
    GAP_TOLERANCE,
    ROUNDING,
    cost_magnitude,
    row_scale,
    usage_magnitude,
    without_unlimited_rows,
)
from autopar.choice.problem import Edge, Floats, Problem, Row, Solution, SolveStatus

MAX_LINE_STEPS = 40
MAX_ASCENT_STEPS = 40
STEP_LENGTHS = 2.0 ** np.arange(-5, 3)
"""In Polyak steps; all are tried in one batch."""
MAX_ELIMINATED_CELLS = 20_000_000
"""Of the largest table; above it the many eliminations of a price search take longer than an ILP."""


class LagrangianRelaxation:
    """A problem whose rows are priced into the costs; prices are (P, rows), in cost per unit of usage. ``WidthError``
    when elimination needs a table above ``max_cells``."""

    def __init__(self, problem: Problem, *, max_cells: int = MAX_ELIMINATED_CELLS) -> None:
        self.problem = problem
        self.limits = np.array([row.limit for row in problem.rows])
        self.row_scales = np.array([row_scale(row) for row in problem.rows])
        self.cost_rounding = ROUNDING * cost_magnitude(problem.costs, problem.edges)
        self.usage_roundings = ROUNDING * np.array([usage_magnitude(row) for row in problem.rows])
        self._eliminator, self._edge_positions = Eliminator.of_problem(problem, max_cells=max_cells)

    def solve(self, prices: Floats, *, with_costs: bool = True) -> tuple[Floats, list[tuple[int, ...]]]:
        """``L(price)`` (P,) and its minimiser for each price; inf and an empty tuple where nothing is feasible. Without
        ``with_costs`` finite costs count as zero: the least priced excess alone."""
        nodes, edges = self._priced_costs(prices, with_costs=with_costs)
        table = self._eliminator.solve(nodes, edges)
        values = np.broadcast_to(table.values, (len(prices),))
        choices = [
            table.backtrack(at if len(table.values) > 1 else 0) if math.isfinite(value) else ()
            for at, value in enumerate(values)
        ]
        return values - prices @ self.limits, choices

    def min_marginal_bounds(self, prices: Floats) -> list[Floats]:
        """For every node (choices,): the largest lower bound, over the prices, on any solution that takes the choice."""
        nodes, edges = self._priced_costs(prices, with_costs=True)
        marginals = self._eliminator.min_marginals(nodes, edges)
        rounding = self.cost_rounding + prices @ (self.usage_roundings + ROUNDING * np.abs(self.limits))
        constant = (prices @ self.limits + rounding)[:, None]
        return [np.max(marginal - constant, axis=0) for marginal in marginals]

    def _priced_costs(self, prices: Floats, *, with_costs: bool) -> tuple[list[Floats], list[Floats]]:
        """Costs plus priced usages of all nodes and of the eliminator's edges, (1 or P, choices ...)."""

        def base(costs: Floats) -> Floats:
            return (costs if with_costs else np.where(np.isfinite(costs), 0.0, np.inf))[None]

        nodes = [base(costs) for costs in self.problem.costs]
        edges = {at: base(self.problem.edges[at].costs) for at in self._edge_positions}
        for number, row in enumerate(self.problem.rows):
            price = prices[:, number]
            if not price.any():
                continue
            for node, usage in row.usage.items():
                nodes[node] = nodes[node] + price[:, None] * usage
            for position, pair_usage in row.edge_usage.items():
                if position in edges:
                    edges[position] = edges[position] + price[:, None, None] * pair_usage
        return nodes, [edges[at] for at in self._edge_positions]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DualOutcome:
    """Outcome of the price search: the best feasible choices with the best bound, and the prices (P, rows) of the best
    bounds for filtering, the best first."""

    solution: Solution
    prices: Floats


def solve_lagrangian(problem: Problem, relaxation: LagrangianRelaxation | None = None) -> Solution:
    """The best feasible choices found by prices and repair, with the Lagrangian bound; "optimal" only when they meet.

    "failed": no feasible choices were found, which proves nothing; "infeasible" is proved. ``WidthError`` when the
    problem is too wide for elimination. A ``relaxation`` is that of ``problem``, whose limits are then all finite.
    """
    return search_prices(problem if relaxation else without_unlimited_rows(problem), relaxation).solution


def solve_exactly(problem: Problem, time_limit_s: float | None = None) -> Solution:
    """Exact: elimination when no row binds, else prices, then the ILP on the choices that prices did not rule out. A
    problem too wide for elimination goes to the ILP at once.

    The time limit bounds both; the price search takes milliseconds to a second. The outcome is "optimal" (relative gap
    below ``GAP_TOLERANCE``), "feasible" with its gap, "infeasible", or "failed" (time is up and nothing was found).
    """
    start = time.perf_counter()
    problem = without_unlimited_rows(problem)
    try:
        relaxation = LagrangianRelaxation(problem)
    except WidthError:
        return solve_ilp(problem, time_limit_s=time_limit_s)
    dual = search_prices(problem, relaxation, None if time_limit_s is None else start + time_limit_s)
    found = dual.solution
    if found.status in ("optimal", "infeasible"):
        return found
    left_s = None if time_limit_s is None else max(0.1, time_limit_s - (time.perf_counter() - start))
    if found.status == "failed":
        finished = solve_ilp(problem, time_limit_s=left_s)
        choices, bound = finished.choices, max(finished.lower_bound, found.lower_bound)
        status = finished.status
    else:
        reduced, remaining = filter_choices(problem, relaxation, dual.prices, found.cost)
        start_choices = [int(np.searchsorted(of, choice)) for of, choice in zip(remaining, found.choices, strict=True)]
        finished = solve_ilp(reduced, time_limit_s=left_s, warm_start=start_choices)
        choices = tuple(int(of[choice]) for of, choice in zip(remaining, finished.choices, strict=True))
        bound, status = max(finished.lower_bound, found.lower_bound), finished.status
    cost = evaluate(problem, choices).cost if status in ("optimal", "feasible") else math.inf
    if status == "feasible" and cost - bound <= GAP_TOLERANCE * abs(cost) + relaxation.cost_rounding:
        status = "optimal"
    return Solution(
        status=status, choices=choices, cost=cost, lower_bound=min(bound, cost), seconds=time.perf_counter() - start
    )


def filter_choices(
    problem: Problem, relaxation: LagrangianRelaxation, prices: Floats, incumbent_cost: float
) -> tuple[Problem, list[np.ndarray]]:
    """The problem without the choices whose bound at some of the ``prices`` exceeds the incumbent's cost, and by node its
    remaining choices, ascending. No solution that costs at most as much as the incumbent is lost."""
    ceiling = incumbent_cost + GAP_TOLERANCE * abs(incumbent_cost) + relaxation.cost_rounding
    remaining = [np.flatnonzero(bounds <= ceiling) for bounds in relaxation.min_marginal_bounds(prices)]
    return restrict_choices(problem, remaining), remaining


def restrict_choices(problem: Problem, remaining: Sequence[np.ndarray]) -> Problem:
    """The problem in which node v has only the choices ``remaining[v]``, renumbered in that order."""
    edges = tuple(
        Edge(
            first=edge.first,
            second=edge.second,
            costs=edge.costs[np.ix_(remaining[edge.first], remaining[edge.second])],
        )
        for edge in problem.edges
    )
    rows = tuple(
        Row(
            name=row.name,
            usage={node: usage[remaining[node]] for node, usage in row.usage.items()},
            limit=row.limit,
            edge_usage={
                at: usage[np.ix_(remaining[problem.edges[at].first], remaining[problem.edges[at].second])]
                for at, usage in row.edge_usage.items()
            },
        )
        for row in problem.rows
    )
    costs = tuple(costs[of] for costs, of in zip(problem.costs, remaining, strict=True))
    return Problem(costs=costs, edges=edges, rows=rows, names=problem.names)


# --- the search over prices


class _PriceSearch:
    """The state of a search over prices: the incumbent (best feasible choices), the best lower bound, the (L, prices)
    tried, and every distinct minimiser with its cost and its (rows,) usage minus limit."""

    def __init__(self, problem: Problem, relaxation: LagrangianRelaxation, deadline: float | None) -> None:
        self.problem = problem
        self.relaxation = relaxation
        self.deadline = deadline
        self.incumbent_cost = math.inf
        self.incumbent: tuple[int, ...] = ()
        self.lower_bound = -math.inf
        self.tried_prices: list[tuple[float, Floats]] = []
        self.minimisers: dict[tuple[int, ...], tuple[float, Floats]] = {}

    def evaluate_prices(self, prices: Floats) -> tuple[Floats, list[tuple[float, Floats]]]:
        """L at (P, rows) prices, and the (cost, usage minus limit) of each minimiser."""
        values, minimisers = self.relaxation.solve(prices)
        points = [self.record(each) for each, value in zip(minimisers, values, strict=True) if math.isfinite(value)]
        for value, price in zip(values, prices, strict=True):
            self.tried_prices.append((float(value), price))
            self.lower_bound = max(self.lower_bound, float(value))
        return values, points

    def record(self, choices: tuple[int, ...]) -> tuple[float, Floats]:
        """The (cost, usage minus limit) of choices, which become the incumbent where they are feasible and cheaper."""
        if choices not in self.minimisers:
            verdict = evaluate(self.problem, choices)
            self.minimisers[choices] = (verdict.cost, np.array(verdict.usages) - self.relaxation.limits)
            if verdict.is_feasible and verdict.cost < self.incumbent_cost:
                self.incumbent_cost, self.incumbent = verdict.cost, choices
        return self.minimisers[choices]

    @property
    def is_finished(self) -> bool:
        """Whether the incumbent is proved optimal or the deadline has passed."""
        return self.is_proved or (self.deadline is not None and time.perf_counter() > self.deadline)

    @property
    def is_proved(self) -> bool:
        """Whether the incumbent's cost meets the lower bound."""
        tolerance = GAP_TOLERANCE * abs(self.incumbent_cost) + self.relaxation.cost_rounding
        return math.isfinite(self.incumbent_cost) and self.incumbent_cost - self.lower_bound <= tolerance

    def best_prices(self, count: int) -> Floats:
        """The ``count`` tried prices with the largest L, the largest first."""
        best = sorted(self.tried_prices, key=lambda item: -item[0])[:count]
        return np.array([price for _, price in best]).reshape(len(best), len(self.relaxation.limits))


def search_prices(
    problem: Problem, relaxation: LagrangianRelaxation | None = None, deadline: float | None = None
) -> DualOutcome:
    """Maximise the Lagrangian bound and look for feasible choices until it is met or ``deadline``, a ``perf_counter``
    time, has passed. Limits must be finite (``without_unlimited_rows``)."""
    start = time.perf_counter()
    assert all(math.isfinite(row.limit) for row in problem.rows), (
        "drop rows without a limit first (without_unlimited_rows)"
    )
    relaxation = relaxation or LagrangianRelaxation(problem)
    search = _PriceSearch(problem, relaxation, deadline)
    num_rows = len(problem.rows)
    free, points = search.evaluate_prices(np.zeros((1, num_rows)))
    if not math.isfinite(free[0]) or not _is_each_row_satisfiable(problem, relaxation, search):
        return _dual_outcome(search, start, "infeasible")
    if not search.is_finished:
        weights = 1.0 / relaxation.row_scales
        _maximise_along_line(search, weights * (points[0][1] > 0))
        if num_rows > 1 and not search.is_finished:
            _maximise_along_line(search, weights)
            _ascend_by_subgradients(search)
        _repair_minimisers(search)
    return _dual_outcome(search, start, None)


def _dual_outcome(search: _PriceSearch, start: float, status: SolveStatus | None) -> DualOutcome:
    """What a search that began at ``start`` has found; its status follows from that unless it is given."""
    if status is None:
        status = "failed" if math.isinf(search.incumbent_cost) else "optimal" if search.is_proved else "feasible"
    bound = math.inf if status == "infeasible" else min(search.lower_bound, search.incumbent_cost)
    solution = Solution(
        status=status,
        choices=search.incumbent,
        cost=search.incumbent_cost,
        lower_bound=bound,
        seconds=time.perf_counter() - start,
    )
    return DualOutcome(solution=solution, prices=search.best_prices(6))


def _is_each_row_satisfiable(problem: Problem, relaxation: LagrangianRelaxation, search: _PriceSearch) -> bool:
    """Whether some choices satisfy each row by itself; those that use least are recorded as candidates."""
    if search.is_finished or not problem.rows:
        return True
    least, minimisers = relaxation.solve(np.diag(np.ones(len(problem.rows))), with_costs=False)
    for choices in minimisers:
        search.record(choices)
    slack = GAP_TOLERANCE * np.abs(relaxation.limits) + relaxation.usage_roundings
    return bool(np.all(least <= slack))


def _maximise_along_line(search: _PriceSearch, direction: Floats) -> None:
    """Maximise L along ``price = t * direction``, t >= 0: exact in at most as many steps as the frontier has points.

    Choices with (cost, excess) are a line cost + t * excess, and L is the lowest line. From one line with excess > 0
    and one without, evaluate L where the two meet, and replace the one on the new line's side, until L meets them
    there.
    """
    if not direction.any():
        return
    lines = [(cost, float(direction @ excess)) for cost, excess in search.minimisers.values()]
    over = [line for line in lines if line[1] > 0]
    under = [line for line in lines if line[1] <= 0]
    if not over:
        return
    if not under:
        _, minimisers = search.relaxation.solve(direction[None], with_costs=False)
        cost, excess = search.record(minimisers[0])
        under = [(cost, float(direction @ excess))]
        if under[0][1] > 0:
            return  # no choices satisfy these rows together: L is unbounded, and the ILP proves it
    low, high = min(over), min(under)
    for _ in range(MAX_LINE_STEPS):
        at = (high[0] - low[0]) / (low[1] - high[1])
        if at <= 0 or search.is_finished:
            return
        meeting = low[0] + at * low[1]
        values, points = search.evaluate_prices(at * direction[None])
        line = (points[0][0], float(direction @ points[0][1]))
        if values[0] >= meeting - 1e-12 * abs(meeting) or line in (low, high):
            return
        low, high = (line, high) if line[1] > 0 else (low, line)


def _ascend_by_subgradients(search: _PriceSearch) -> None:
    """Subgradient ascent on the prices of several rows: from the best so far, steps of all ``STEP_LENGTHS`` in one
    batch."""
    scale = 1.0 / search.relaxation.row_scales  # steps are equal in prices per limit
    price = search.best_prices(1)[0]
    values, points = search.evaluate_prices(price[None])
    best, gradient = float(values[0]), points[0][1]
    stalled, shrink = 0, 1.0
    for _ in range(MAX_ASCENT_STEPS):
        if search.is_finished or stalled >= 6:
            return
        step = gradient * scale * scale
        step = np.where((price <= 0) & (step < 0), 0.0, step)
        norm = float(step @ gradient)
        if norm <= 0:
            return
        target = search.incumbent_cost if math.isfinite(search.incumbent_cost) else best + 0.1 * max(abs(best), 1e-12)
        polyak = max(target - best, 0.0) / norm
        prices = np.maximum(price + (shrink * STEP_LENGTHS * polyak)[:, None] * step, 0.0)
        values, points = search.evaluate_prices(prices)
        top = int(values.argmax())
        if values[top] > best + 1e-9 * abs(best):
            best, price, gradient, stalled = float(values[top]), prices[top], points[top][1], 0
        else:  # at a kink: mix in the subgradient of the shortest step, which points back from the other side
            gradient, shrink, stalled = 0.5 * (gradient + points[0][1]), shrink * 0.5, stalled + 1


def _repair_minimisers(search: _PriceSearch) -> None:
    """Repair and improve the minimisers that cost least at the best prices."""
    price = search.best_prices(1)[0]
    order = sorted(
        search.minimisers,
        key=lambda choices: search.minimisers[choices][0] + float(price @ search.minimisers[choices][1]),
    )
    for choices in order[:8]:
        if search.is_finished:
            return
        better = repair_and_improve(search.problem, choices)
        if better is not None:
            search.record(better)
