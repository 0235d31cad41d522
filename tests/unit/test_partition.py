"""The outer search against exhaustive enumeration of every partition by simulated time."""

import itertools
import math
import random
from collections.abc import Iterator

import numpy as np
import pytest

from autopar.core.errors import UsageError
from autopar.inter.branch_and_bound import search_pipelines
from autopar.inter.pipeline_problem import PipelineProblem, StageTimeTable
from autopar.inter.stage_span import SubmeshStage
from autopar.pipeline.simulate import StageTimes, simulate


class Case:
    """A random small pipeline: times, memory by micro-batches in flight, transfers between submesh classes."""

    def __init__(self, seed: int, *, identical: bool = False) -> None:
        rng = random.Random(seed)
        self.schedule = rng.choice(["1f1b", "1f1b", "gpipe"])
        self.num_blocks, self.num_devices = rng.randint(1, 6), rng.randint(1, 6)
        self.num_microbatches = rng.choice([1, 2, 3, 5, 8, 30])
        self.sizes = tuple(rng.choice([1, 1, 2, 3, 4]) for _ in range(rng.randint(1, 4)))
        self.max_stages = rng.choice([None, None, 2, 3])
        L, K = self.num_blocks, len(self.sizes)
        work = [1.0 if identical else rng.uniform(0.3, 1.5) for _ in range(L)]
        speed = [size ** rng.uniform(0.6, 1.0) for size in self.sizes]
        self.forward = np.full((L + 1, L + 1, K), np.inf)
        self.backward, self.step = self.forward.copy(), self.forward.copy()
        self.room = np.zeros((L + 1, L + 1, K))
        self.slower_lean = rng.choice([0.0, 0.05])
        for i, j, k in itertools.product(range(L + 1), range(L + 1), range(K)):
            if i < j:
                total = sum(work[i:j]) / speed[k]
                self.forward[i, j, k] = total * (1 if identical else rng.uniform(0.9, 1.1))
                self.backward[i, j, k] = 2 * total * (1 if identical else rng.uniform(0.9, 1.1))
                self.step[i, j, k] = rng.choice([0.0, 1.0]) * total
                self.room[i, j, k] = rng.choice([1, 2, 3, 8, 30]) * self.sizes[k] / (j - i)
        self.transfer = rng.choice([0.0, 0.1, 1.0])
        self.crossing = np.array([[rng.random() for _ in range(K)] for _ in range(K)])
        self.truncate_known = rng.random() < 0.5

    def table(self, in_flight: int) -> StageTimeTable:
        allowed = self.room >= in_flight
        # Not monotone on purpose: a leaner choice is slower for each micro-batch and cheaper for each step.
        lean = 1.0 + self.slower_lean * (in_flight % 3)
        return StageTimeTable(
            forward_s=np.where(allowed, self.forward * lean, np.inf),
            backward_s=np.where(allowed, self.backward, np.inf),
            step_s=np.where(allowed, self.step / lean, np.inf),
        )

    def evaluate(self, stages: tuple[SubmeshStage, ...]) -> float:
        times = []
        for index, (i, j, k) in enumerate(stages):
            place = len(stages) - index
            in_flight = min(place, self.num_microbatches) if self.schedule == "1f1b" else self.num_microbatches
            table = self.table(in_flight)
            assert math.isfinite(table.forward_s[i, j, k]), "a stage that does not fit was proposed"
            after = stages[index + 1][2] if index + 1 < len(stages) else k
            before = stages[index - 1][2]
            times.append(
                StageTimes(
                    forward_s=float(table.forward_s[i, j, k]),
                    backward_s=float(table.backward_s[i, j, k]),
                    step_s=float(table.step_s[i, j, k]),
                    transfer_forward_s=self.transfer * float(self.crossing[k, after]),
                    transfer_backward_s=self.transfer * float(self.crossing[before, k]),
                )
            )
        return simulate(self.schedule, times, self.num_microbatches).step_time_s

    def partitions(self) -> Iterator[tuple[SubmeshStage, ...]]:
        L, limit = self.num_blocks, self.max_stages or self.num_blocks
        for count in range(1, min(L, limit) + 1):
            for inner in itertools.combinations(range(1, L), count - 1):
                boundaries = (0, *inner, L)
                for classes in itertools.product(range(len(self.sizes)), repeat=count):
                    if sum(self.sizes[k] for k in classes) != self.num_devices:
                        continue
                    stages = tuple(SubmeshStage(boundaries[n], boundaries[n + 1], classes[n]) for n in range(count))
                    in_flight = [
                        min(count - n, self.num_microbatches) if self.schedule == "1f1b" else self.num_microbatches
                        for n in range(count)
                    ]
                    if all(self.room[stage] >= number for stage, number in zip(stages, in_flight, strict=True)):
                        yield stages

    def problem(self, **changes) -> PipelineProblem:
        fields = {
            "num_blocks": self.num_blocks,
            "num_devices": self.num_devices,
            "num_microbatches": self.num_microbatches,
            "submesh_sizes": self.sizes,
            "stage_times": self.table,
            "schedule": self.schedule,
            "max_stages": self.max_stages,
        }
        if self.truncate_known:
            least = 2 * self.transfer * float(self.crossing.min())
            fields["stage_boundary_s"] = np.full(self.num_blocks + 1, least)
        return PipelineProblem(**(fields | changes))


@pytest.mark.parametrize("block", range(8))
def test_search_equals_exhaustive_enumeration(block):
    num_feasible = 0
    for seed in range(block * 100, block * 100 + 100):
        case = Case(seed, identical=seed % 4 == 0)
        expected = min(map(case.evaluate, case.partitions()), default=math.inf)
        result = search_pipelines(case.problem(), evaluate=case.evaluate)
        if math.isinf(expected):
            assert (result.status, result.incumbent, result.lower_bound_s) == ("infeasible", None, math.inf), seed
            continue
        num_feasible += 1
        assert result.status == "optimal", seed
        assert result.incumbent.step_time_s == pytest.approx(expected, rel=1e-12), seed
        assert case.evaluate(result.incumbent.stages) == result.incumbent.step_time_s
        assert result.lower_bound_s == pytest.approx(expected, rel=1e-11)
        assert result.gap == pytest.approx(0.0, abs=1e-11)
    assert num_feasible >= 40


def feasible_cases(count: int) -> list[tuple[Case, list[float]]]:
    cases = []
    for seed in itertools.count(1000):
        case = Case(seed)
        times = sorted(map(case.evaluate, case.partitions()))
        if len(times) >= 10:
            cases.append((case, times))
        if len(cases) == count:
            return cases
    raise AssertionError


def test_limits_leave_an_honest_bound():
    for case, times in feasible_cases(40):
        result = search_pipelines(case.problem(), evaluate=case.evaluate, max_evaluations=1)
        assert result.num_evaluated <= 1
        assert result.lower_bound_s <= times[0] * (1 + 1e-12)
        if result.incumbent is None:
            assert result.status == "failed"
        else:
            assert result.incumbent.step_time_s >= times[0] * (1 - 1e-12)
            assert result.status == ("optimal" if result.gap <= 1e-11 else "feasible")
    case, times = feasible_cases(1)[0]
    result = search_pipelines(case.problem(), evaluate=case.evaluate, deadline_s=-1.0)
    # A deadline that has passed still lets the first pipeline be evaluated.
    assert result.num_evaluated <= 1
    assert result.lower_bound_s <= times[0]


def test_the_tolerance_is_met_and_reported():
    for case, times in feasible_cases(40):
        result = search_pipelines(case.problem(), evaluate=case.evaluate, tolerance=0.05)
        assert result.status == "optimal"
        assert result.gap <= 0.05 + 1e-12
        assert result.lower_bound_s <= times[0] * (1 + 1e-12)
        assert result.incumbent.step_time_s * 0.95 <= times[0] * (1 + 1e-12)


def test_upper_bound_keeps_only_better_pipelines():
    for case, times in feasible_cases(40):
        result = search_pipelines(case.problem(upper_bound_s=times[0]), evaluate=case.evaluate)
        assert result.status == "infeasible"
        assert result.lower_bound_s == pytest.approx(times[0], rel=1e-11)
        result = search_pipelines(case.problem(upper_bound_s=times[0] * 1.01), evaluate=case.evaluate)
        assert result.incumbent.step_time_s == pytest.approx(times[0], rel=1e-12)


def test_stage_times_are_asked_once_for_each_number_in_flight():
    asked = []

    def stage_times(in_flight: int) -> StageTimeTable:
        asked.append(in_flight)
        length = np.arange(7)[None, :, None] - np.arange(7)[:, None, None] + np.zeros((1, 1, 2))
        time = np.where(length > 0, length / np.array([1.0, 2.0]), np.inf)
        return StageTimeTable(forward_s=time, backward_s=2 * time, step_s=0 * length)

    problem = PipelineProblem(
        num_blocks=6, num_devices=6, num_microbatches=4, submesh_sizes=(1, 2), stage_times=stage_times
    )

    def evaluate(stages: tuple[SubmeshStage, ...]) -> float:
        even = [
            StageTimes(forward_s=(j - i) / (1 + k), backward_s=2 * (j - i) / (1 + k), step_s=0.0) for i, j, k in stages
        ]
        return simulate("1f1b", even, 4).step_time_s

    # One block a device everywhere: S even stages of 6/S devices take (B + S - 1) 3 s, the fewest stages being 3 of 2.
    result = search_pipelines(problem, evaluate=evaluate)
    assert asked == [1, 2, 3, 4]
    assert result.incumbent.step_time_s == pytest.approx((4 + 3 - 1) * 3.0)


def test_impossible_device_counts_are_infeasible():
    case = Case(1)
    odd = case.problem(num_devices=7, submesh_sizes=tuple(2 for _ in case.sizes))
    assert search_pipelines(odd, evaluate=case.evaluate).status == "infeasible"
    with pytest.raises(UsageError, match="interleaved"):
        case.problem(schedule="interleaved")


class Ways(Case):
    """Every stage has three variants, of which none is the best in all of forward, backward and step."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        rng = random.Random(seed + 1)
        self.max_stages = 3
        shape = self.forward.shape
        self.factors = [
            [np.array([rng.uniform(0.6, 1.6) for _ in range(math.prod(shape))]).reshape(shape) for _ in range(3)]
            for _ in range(3)
        ]

    def ways(self, in_flight: int) -> list[StageTimeTable]:
        table = self.table(in_flight)
        return [
            StageTimeTable(forward_s=table.forward_s * f, backward_s=table.backward_s * b, step_s=table.step_s * s)
            for f, b, s in self.factors
        ]

    def relaxed(self, in_flight: int) -> StageTimeTable:
        ways, B = self.ways(in_flight), self.num_microbatches
        forward = np.min([way.forward_s for way in ways], axis=0)
        through = np.min([way.forward_s + way.backward_s for way in ways], axis=0)
        return StageTimeTable(
            forward_s=forward,
            backward_s=through - np.where(np.isfinite(forward), forward, 0.0),
            step_s=np.min([way.step_s for way in ways], axis=0),
            busy_s=np.min([B * (way.forward_s + way.backward_s) + way.step_s for way in ways], axis=0),
        )

    def evaluate_best(self, stages: tuple[SubmeshStage, ...]) -> float:
        in_flight = [
            min(len(stages) - at, self.num_microbatches) if self.schedule == "1f1b" else self.num_microbatches
            for at in range(len(stages))
        ]
        best = math.inf
        for picked in itertools.product(range(3), repeat=len(stages)):
            times = []
            for at, (stage, way) in enumerate(zip(stages, picked, strict=True)):
                table = self.ways(in_flight[at])[way]
                times.append(
                    StageTimes(
                        forward_s=float(table.forward_s[stage]),
                        backward_s=float(table.backward_s[stage]),
                        step_s=float(table.step_s[stage]),
                        transfer_forward_s=0.0,
                        transfer_backward_s=0.0,
                    )
                )
            best = min(best, simulate(self.schedule, times, self.num_microbatches).step_time_s)
        return best


@pytest.mark.parametrize("block", range(4))
def test_relaxed_times_bound_every_way_to_run_the_stages(block):
    num_feasible = 0
    for seed in range(5000 + block * 20, 5000 + block * 20 + 20):
        case = Ways(seed)
        expected = min(map(case.evaluate_best, case.partitions()), default=math.inf)
        problem = case.problem(stage_times=case.relaxed, stage_boundary_s=None)
        result = search_pipelines(problem, evaluate=case.evaluate_best)
        assert result.lower_bound_s <= expected * (1 + 1e-12), seed
        if math.isfinite(expected):
            num_feasible += 1
            assert result.incumbent.step_time_s == pytest.approx(expected, rel=1e-12), seed
    assert num_feasible >= 5
