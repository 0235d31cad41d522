"""Elimination, prices and the ILP against brute force, and against each other where brute force ends."""

import itertools
import math
import time
from collections import Counter
from functools import partial

import numpy as np
import pytest

from autopar.choice.elimination import Eliminator, WidthError
from autopar.choice.evaluate import evaluate
from autopar.choice.ilp import solve_ilp
from autopar.choice.lagrangian import (
    LagrangianRelaxation,
    filter_choices,
    search_prices,
    solve_exactly,
    solve_lagrangian,
)
from autopar.choice.problem import Edge, Floats, Problem, Row

Rng = np.random.Generator


def random_problem(rng: Rng, *, rows: int, forbidden: float = 0.15) -> Problem:
    """Two to five nodes of one to four choices, parallel edges included, in units from microseconds to 1e6."""
    num_nodes = int(rng.integers(2, 6))
    sizes = [int(size) for size in rng.integers(1, 5, num_nodes)]
    unit = 10.0 ** rng.integers(-6, 7)
    edges = []
    for _ in range(int(rng.integers(0, 7))):
        first, second = (int(node) for node in rng.choice(num_nodes, 2, replace=False))
        costs = rng.integers(0, 20, (sizes[first], sizes[second])) * unit
        costs[rng.random(costs.shape) < forbidden] = np.inf
        edges.append(Edge(first=first, second=second, costs=costs))
    made = []
    for number in range(rows):
        usage = {node: rng.integers(0, 50, size) * 1e9 for node, size in enumerate(sizes) if rng.random() < 0.9}
        pairs = {at: rng.integers(0, 20, edge.costs.shape) * 1e9 for at, edge in enumerate(edges) if rng.random() < 0.3}
        tables = [*usage.values(), *pairs.values()]
        least, most = sum(table.min() for table in tables), sum(table.max() for table in tables)
        limit = float(least + rng.uniform(0.15, 0.6) * (most - least))
        made.append(Row(name=f"memory_{number}", usage=usage, limit=limit, edge_usage=pairs))
    costs = tuple(rng.integers(0, 20, size) * unit for size in sizes)
    return Problem(costs=costs, edges=tuple(edges), rows=tuple(made))


def brute_force(problem: Problem, *, rows: bool = True) -> float:
    """The least cost over all choices, summed here one by one; inf when nothing is allowed."""
    best = math.inf
    for choices in itertools.product(*(range(len(costs)) for costs in problem.costs)):
        cost = sum(costs[choice] for costs, choice in zip(problem.costs, choices, strict=True))
        cost += sum(edge.costs[choices[edge.first], choices[edge.second]] for edge in problem.edges)
        if cost < best and (not rows or all(_used(problem, row, choices) <= row.limit for row in problem.rows)):
            best = float(cost)
    return best


def _used(problem: Problem, row: Row, choices: tuple[int, ...]) -> float:
    pairs = [(problem.edges[at], usage) for at, usage in row.edge_usage.items()]
    return sum(usage[choices[node]] for node, usage in row.usage.items()) + sum(
        usage[choices[edge.first], choices[edge.second]] for edge, usage in pairs
    )


def close(one: float, two: float) -> bool:
    return one == two or abs(one - two) <= 1e-9 * max(abs(one), abs(two))


def memory_block(rng: Rng, *, num_nodes: int = 24, size: int = 8, limit_share: float = 0.3) -> Problem:
    """A chain with skips, treewidth 2, as a transformer block has; dearer choices use less memory."""
    edges = [(node, node + 1) for node in range(num_nodes - 1)] + [
        (node, node + 2) for node in range(0, num_nodes - 2, 2)
    ]
    costs = tuple(np.sort(rng.random(size)) * 1e-3 for _ in range(num_nodes))
    usage = {node: np.sort(rng.random(size))[::-1] * 1e9 for node in range(num_nodes)}
    most = sum(values.max() for values in usage.values())
    return Problem(
        costs=costs,
        edges=tuple(Edge(first=a, second=b, costs=rng.random((size, size)) * 2e-4) for a, b in edges),
        rows=(Row(name="memory", usage=usage, limit=limit_share * most),),
    )


# --- the judge, worked by hand


def test_judge_sums_and_names_the_broken_row() -> None:
    pair = np.array([[10.0, 0.0], [0.0, np.inf]])
    problem = Problem(
        costs=(np.array([1.0, 4.0]), np.array([2.0, 3.0])),
        edges=(Edge(first=0, second=1, costs=pair),),
        rows=(
            Row(
                name="stage memory",
                usage={0: np.array([3.0, 0.0]), 1: np.array([3.0, 0.0])},
                limit=5.0,
                edge_usage={0: np.array([[0.5, 0.0], [0.0, 0.0]])},
            ),
        ),
    )
    both = evaluate(problem, (0, 0))  # 1 + 2 + 10; 3 + 3 + 0.5
    assert (both.cost, both.usages, both.violated_rows, both.is_feasible) == (13.0, (6.5,), ("stage memory",), False)
    good = evaluate(problem, (0, 1))  # 1 + 3 + 0; 3
    assert (good.cost, good.usages, good.violated_rows, good.is_feasible) == (4.0, (3.0,), (), True)
    assert not evaluate(problem, (1, 1)).is_feasible  # a forbidden pair
    for wrong in [(0,), (0, 2), (-1, 0)]:
        with pytest.raises(ValueError, match="choice"):
            evaluate(problem, wrong)


# --- elimination


def random_cost_tables(rng: Rng) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...], list[Floats], list[Floats]]:
    """Sizes, edges and integer costs for three prices, some of them the same for every price."""
    num_nodes = int(rng.integers(2, 7))
    sizes = tuple(int(size) for size in rng.integers(1, 5, num_nodes))
    edges = tuple(
        (int(one), int(two))
        for one, two in (rng.choice(num_nodes, 2, replace=False) for _ in range(int(rng.integers(0, 9))))
    )
    nodes = [rng.integers(0, 20, (rng.choice([1, 3]), size)).astype(float) for size in sizes]
    nodes[0] = np.broadcast_to(nodes[0], (3, sizes[0]))
    pairs = [rng.integers(0, 20, (rng.choice([1, 3]), sizes[one], sizes[two])).astype(float) for one, two in edges]
    for table in pairs:
        table[rng.random(table.shape) < 0.2] = np.inf
    return sizes, edges, nodes, pairs


def cost_of_choices(
    edges: tuple[tuple[int, int], ...], nodes: list[Floats], pairs: list[Floats], price: int, choices: tuple[int, ...]
) -> float:
    costs_of_parts = [costs[price % len(costs), choice] for costs, choice in zip(nodes, choices, strict=True)]
    for (one, two), costs in zip(edges, pairs, strict=True):
        costs_of_parts.append(costs[price % len(costs), choices[one], choices[two]])
    return float(sum(costs_of_parts))


def test_elimination_and_min_marginals_are_brute_force() -> None:
    rng = np.random.default_rng(7)
    for _ in range(150):
        sizes, edges, nodes, pairs = random_cost_tables(rng)
        keep = tuple(int(node) for node in rng.permutation(len(sizes))[: rng.integers(0, min(len(sizes), 3) + 1)])
        table = Eliminator(sizes, edges, keep).solve(nodes, pairs)
        every = table.backtrack_all()
        marginals = Eliminator(sizes, edges).min_marginals(nodes, pairs)
        for price in range(3):
            cost_of = partial(cost_of_choices, edges, nodes, pairs, price)
            best = np.full(tuple(sizes[node] for node in keep), np.inf)
            given = [np.full(size, np.inf) for size in sizes]
            for choices in itertools.product(*map(range, sizes)):
                cost = cost_of(choices)
                cell = tuple(choices[node] for node in keep)
                best[cell] = min(best[cell], cost)
                for node, choice in enumerate(choices):
                    given[node][choice] = min(given[node][choice], cost)
            assert np.array_equal(table.values[price], best)
            assert all(np.array_equal(marginal[price], one) for marginal, one in zip(marginals, given, strict=True))
            for cell in np.ndindex(best.shape):
                if math.isinf(best[cell]):
                    with pytest.raises(ValueError, match="no feasible"):
                        table.backtrack(price, cell)
                    continue
                choices = table.backtrack(price, cell)
                assert cost_of(choices) == best[cell]
                assert tuple(choices[node] for node in keep) == cell
                assert cost_of(tuple(int(choice) for choice in every[(slice(None), price, *cell)])) == best[cell]


def test_elimination_in_slabs_is_the_minimum_of_the_whole_table() -> None:
    """Tables of 60**3 cells are split over prices and along the first node; here the sum over all is one array."""
    rng = np.random.default_rng(3)
    sizes, edges = (60, 60, 60, 2), ((0, 1), (1, 2), (0, 2), (2, 3))
    nodes = [rng.random((3, size)) for size in sizes]
    pairs = [rng.random((1, sizes[one], sizes[two])) for one, two in edges]
    eliminated = Eliminator(sizes, edges, (3,)).solve(nodes, pairs)
    marginals = Eliminator(sizes, edges).min_marginals(nodes, pairs)
    a, b, c, d = (costs[:, :, None, None, None] for costs in nodes)
    whole = a + b.transpose(0, 2, 1, 3, 4) + pairs[0][:, :, :, None, None]
    whole = whole + c.transpose(0, 2, 3, 1, 4) + pairs[1][:, None, :, :, None] + pairs[2][:, :, None, :, None]
    whole = whole + d.transpose(0, 2, 3, 4, 1) + pairs[3][:, None, None, :, :]
    np.testing.assert_allclose(eliminated.values, whole.min(axis=(1, 2, 3)), rtol=1e-12)
    for node in range(4):
        others = tuple(axis + 1 for axis in range(4) if axis != node)
        np.testing.assert_allclose(marginals[node], whole.min(axis=others), rtol=1e-12)


def test_too_wide_a_problem_is_a_typed_error_and_solve_falls_back_to_the_ilp() -> None:
    rng = np.random.default_rng(0)
    pairs = tuple(itertools.combinations(range(12), 2))
    with pytest.raises(WidthError, match="ILP"):
        Eliminator((10,) * 12, pairs)
    edges = tuple(Edge(first=one, second=two, costs=rng.random((5, 5))) for one, two in pairs)
    clique = Problem(costs=(np.zeros(5),) * 12, edges=edges)
    with pytest.raises(WidthError):
        LagrangianRelaxation(clique)
    solution = solve_exactly(clique, time_limit_s=0.1)  # the ILP's answer, whatever it gets done in that time
    assert solution.status in ("optimal", "feasible", "failed")
    assert solution.lower_bound <= solution.cost


def test_a_block_sized_problem_is_eliminated_in_milliseconds() -> None:
    block = memory_block(np.random.default_rng(0), num_nodes=40, size=36)
    relaxation = LagrangianRelaxation(block)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        relaxation.solve(np.zeros((1, 1)))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.1  # about 5 ms; a loaded machine is not a failure


# --- the complete solver against brute force


@pytest.mark.parametrize("seed", range(8))
def test_every_solver_is_brute_force(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    seen: Counter[str] = Counter()
    for number in range(50):
        problem = random_problem(rng, rows=int(rng.integers(1, 4)))
        best = brute_force(problem)
        seen["binding"] += best > brute_force(problem, rows=False)
        solutions = [solve_ilp(problem), solve_exactly(problem)]
        if number < 8:
            solutions.append(solve_ilp(problem, solver="cbc"))
        for solution in solutions:
            assert solution.status == ("infeasible" if math.isinf(best) else "optimal"), (number, solution)
            assert close(solution.cost, best)
            assert close(solution.lower_bound, best) or abs(solution.lower_bound - best) <= 1e-6 * abs(best)
            if solution.choices:
                assert evaluate(problem, solution.choices).is_feasible
        priced = solve_lagrangian(problem)
        seen[priced.status] += 1
        assert priced.lower_bound <= best * (1 + 1e-9)
        assert priced.cost >= best * (1 - 1e-9)
        assert priced.status != "optimal" or close(priced.cost, best)
        assert priced.status != "infeasible" or math.isinf(best)
        assert priced.status != "feasible" or evaluate(problem, priced.choices).is_feasible
    assert seen["binding"] >= 25, seen  # the rows mean something in most problems
    assert min(seen[status] for status in ("feasible", "optimal", "infeasible")) > 0, seen


def problem_around_zero(rng: Rng) -> Problem:
    """Costs of both signs whose optimum is 0 up to rounding, under rows whose limits are 0, infinite or small."""
    sizes = rng.integers(1, 5, int(rng.integers(2, 6)))
    pairs = [pair for pair in itertools.combinations(range(len(sizes)), 2) if rng.random() < 0.5]
    costs = tuple(rng.normal(size=size) * 1e-3 for size in sizes)
    edges = tuple(Edge(first=a, second=b, costs=rng.normal(size=(sizes[a], sizes[b])) * 1e-3) for a, b in pairs)
    rows = tuple(
        Row(
            name=f"row_{number}",
            usage={node: rng.integers(-1, 3, size).astype(float) for node, size in enumerate(sizes)},
            limit=float(rng.choice([0.0, 0.0, math.inf, 2.0])),
        )
        for number in range(int(rng.integers(1, 3)))
    )
    best = brute_force(Problem(costs=costs, edges=edges, rows=rows))
    shift = best if math.isfinite(best) else 0.0
    return Problem(costs=(costs[0] - shift, *costs[1:]), edges=edges, rows=rows)


def test_every_solver_is_brute_force_around_zero() -> None:
    """A relative gap of a cost of 0 allows no rounding, and a limit of 0 is no unit of excess."""
    rng = np.random.default_rng(31)
    seen: Counter[tuple[str, float]] = Counter()
    with np.errstate(all="raise", under="ignore"):
        for number in range(120):
            problem = problem_around_zero(rng)
            best = brute_force(problem)
            solutions = [solve_ilp(problem), solve_exactly(problem)]
            if number < 10:
                solutions.append(solve_ilp(problem, solver="cbc"))
            for solution in solutions:
                assert solution.status == ("infeasible" if math.isinf(best) else "optimal"), (number, solution)
                assert solution.cost == pytest.approx(best, abs=1e-12)
                assert solution.lower_bound <= best + 1e-12 or math.isinf(best)
            priced = solve_lagrangian(problem)
            assert priced.status != "optimal" or priced.cost == pytest.approx(best, abs=1e-12)
            assert priced.lower_bound <= best + 1e-12 or math.isinf(best)
            seen.update((solutions[0].status, row.limit) for row in problem.rows)
    assert {("optimal", 0.0), ("infeasible", 0.0), ("optimal", math.inf)} <= set(seen)


def test_the_filter_keeps_every_solution_up_to_the_incumbent() -> None:
    rng = np.random.default_rng(11)
    dropped = 0
    for _ in range(60):
        problem = random_problem(rng, rows=2)
        relaxation = LagrangianRelaxation(problem)
        dual = search_prices(problem, relaxation)
        if dual.solution.status != "feasible":
            continue
        reduced, remaining = filter_choices(problem, relaxation, dual.prices, dual.solution.cost)
        assert close(brute_force(reduced), brute_force(problem))
        dropped += sum(len(costs) - len(of) for costs, of in zip(problem.costs, remaining, strict=True))
    assert dropped > 0


@pytest.mark.parametrize("limit_share", [0.3, 0.4, 0.5])
def test_blocks_with_a_tight_row_highs_cbc_and_the_combined_solver_agree(limit_share: float) -> None:
    block = memory_block(np.random.default_rng(5), num_nodes=14, size=5, limit_share=limit_share)
    highs, cbc, combined = solve_ilp(block), solve_ilp(block, solver="cbc"), solve_exactly(block)
    assert {highs.status, cbc.status, combined.status} == {"optimal"}
    assert highs.cost == pytest.approx(cbc.cost, rel=1e-8)
    assert highs.cost == pytest.approx(combined.cost, rel=1e-8)
    free = solve_exactly(Problem(costs=block.costs, edges=block.edges))
    assert free.cost < highs.cost  # the row binds
    priced = solve_lagrangian(block)
    assert priced.lower_bound <= highs.cost <= priced.cost
    assert (priced.cost - priced.lower_bound) / priced.cost < 0.2


def test_exact_fit_in_bytes_is_feasible_and_one_byte_less_is_not() -> None:
    """Rows are compared in bytes even at 80 GB: the cheap choices use exactly the limit, to the byte."""
    usage = {node: np.array([16_000_000_001.0, 1_000_000.0]) for node in range(5)}
    costs = tuple(np.array([1e-3, 2e-3]) for _ in range(5))
    for limit, cost in [(80_000_000_005.0, 5e-3), (80_000_000_004.0, 6e-3)]:
        problem = Problem(costs=costs, edges=(), rows=(Row(name="memory", usage=usage, limit=limit),))
        for solution in [solve_ilp(problem), solve_exactly(problem)]:
            assert solution.status == "optimal"
            assert solution.cost == pytest.approx(cost)


# --- statuses


def test_infeasible_is_said_by_all() -> None:
    row = Row(name="memory", usage={0: np.array([2.0, 3.0]), 1: np.array([2.0, 5.0])}, limit=3.9)
    problem = Problem(costs=(np.zeros(2), np.zeros(2)), edges=(), rows=(row,))
    for solution in [
        solve_ilp(problem),
        solve_ilp(problem, solver="cbc"),
        solve_exactly(problem),
        solve_lagrangian(problem),
    ]:
        assert (solution.status, solution.choices, solution.cost) == ("infeasible", (), math.inf)


def test_rows_that_hold_alone_but_not_together_are_infeasible() -> None:
    one = Row(name="one", usage={0: np.array([0.0, 2.0])}, limit=1.0)
    two = Row(name="two", usage={0: np.array([2.0, 0.0])}, limit=1.0)
    problem = Problem(costs=(np.zeros(2), np.zeros(2)), edges=(), rows=(one, two))
    assert solve_exactly(problem).status == "infeasible"
    assert solve_ilp(problem, solver="cbc").status == "infeasible"
    assert solve_lagrangian(problem).status in ("failed", "infeasible")  # prices alone may prove nothing here


def test_time_limit_is_feasible_or_failed_and_never_called_optimal() -> None:
    """A clique of random costs is out of reach in the time given; PuLP would call its incumbent optimal."""
    rng = np.random.default_rng(1)
    size, num_nodes = 8, 16
    edges = tuple(
        Edge(first=one, second=two, costs=rng.random((size, size)))
        for one, two in itertools.combinations(range(num_nodes), 2)
    )
    clique = Problem(costs=(np.zeros(size),) * num_nodes, edges=edges)
    warm = solve_ilp(clique, time_limit_s=0.3, warm_start=(0,) * num_nodes)
    assert warm.status == "feasible"
    assert warm.lower_bound < warm.cost <= evaluate(clique, (0,) * num_nodes).cost
    assert warm.gap > 0.01
    cold = solve_ilp(clique, time_limit_s=0.3)
    assert cold.status in ("feasible", "failed")
    assert (cold.status == "feasible") == bool(cold.choices) == math.isfinite(cold.cost)
    cbc = solve_ilp(clique, solver="cbc", time_limit_s=1)
    assert cbc.status in ("feasible", "failed")
    assert cbc.lower_bound <= cbc.cost


def test_cutoff_and_warm_start_do_not_change_the_optimum() -> None:
    rng = np.random.default_rng(21)
    for _ in range(40):
        problem = random_problem(rng, rows=1)
        plain = solve_ilp(problem)
        if plain.status == "infeasible":
            continue
        for second in [
            solve_ilp(problem, warm_start=plain.choices),
            solve_ilp(problem, cutoff=plain.cost),
            solve_ilp(problem, cutoff=plain.cost * 1.5 + 1e-9),
        ]:
            assert second.status == "optimal"
            assert close(second.cost, plain.cost)


def test_a_problem_without_choice_is_its_own_optimum() -> None:
    for costs, cost in [((), 0.0), ((np.array([3.0]),), 3.0)]:
        for solution in [solve_exactly(Problem(costs=costs, edges=())), solve_ilp(Problem(costs=costs, edges=()))]:
            assert (solution.status, solution.cost, solution.choices) == ("optimal", cost, (0,) * len(costs))
    row = Row(name="memory", usage={0: np.array([2.0])}, limit=math.inf)
    assert solve_exactly(Problem(costs=(np.array([3.0]),), edges=(), rows=(row,))).status == "optimal"
