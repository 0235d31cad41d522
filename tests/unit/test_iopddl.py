"""Public sharding problems with published optima, solved as problems of our own ILP: the figures are the contest's."""

import itertools
import random

import pytest

from autopar.choice.evaluate import evaluate
from autopar.choice.lagrangian import solve_exactly
from tests.iopddl import maximal_live_sets, path_of, read_problem


@pytest.mark.parametrize(("letter", "optimum"), [pytest.param("B", 532843.0, marks=pytest.mark.slow), ("G", 217039.0)])
def test_public_instance_is_proved_optimal(letter: str, optimum: float) -> None:
    if not path_of(letter).exists():
        pytest.skip("the public instances are not beside this checkout")
    problem = read_problem(path_of(letter))
    solution = solve_exactly(problem, time_limit_s=60)
    assert solution.status == "optimal"
    assert solution.cost == pytest.approx(optimum, rel=1e-9)
    assert solution.lower_bound == pytest.approx(optimum, rel=1e-6)
    verdict = evaluate(problem, solution.choices)
    assert verdict.is_feasible
    assert verdict.cost == solution.cost


def test_maximal_live_sets_are_those_of_every_moment() -> None:
    rng = random.Random(0)
    for _ in range(200):
        pairs = [(rng.randrange(8), rng.randrange(8)) for _ in range(rng.randrange(1, 8))]
        intervals = [(min(pair), max(pair)) for pair in pairs]
        moments = {frozenset(n for n, (low, high) in enumerate(intervals) if low <= time < high) for time in range(8)}
        expected = {live for live in moments if live and not any(live < other for other in moments)}
        found = [live for _, live in maximal_live_sets(intervals)]
        assert set(found) == expected, intervals
        assert all(not live < other for live, other in itertools.permutations(found, 2))
