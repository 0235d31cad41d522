"""The mix of frontier points over a stage's blocks, against enumeration of every mix."""

import itertools
import math

import numpy as np
import pytest

from autopar.inter.block_pricer import StageMesh
from autopar.inter.fastest_choice import fastest_feasible
from autopar.inter.stage_choice import StageFrontier, sum_totals
from autopar.inter.stage_ilp import best_frontier_mix
from autopar.inter.stage_pricing import StagePricing
from autopar.intra import block_totals as tt
from autopar.intra.block_totals import memory_bytes

NUM_MICROBATCHES = 4
PRICING = StagePricing(
    num_microbatches=NUM_MICROBATCHES,
    overlap_contention=0.0,
    microbatch_loop_s=0.0,
    step_loop_s=0.0,
    budget_bytes=math.inf,
    fixed_bytes=2.0**30,
)


def amortised_s(totals):
    """Seconds per micro-batch with its share of the step, reductions overlapped with the backward."""
    reduction_s = np.maximum(totals[..., tt.STEP_OVERLAPPABLE] - totals[..., tt.BACKWARD], 0.0)
    step_s = reduction_s + totals[..., tt.STEP_EXPOSED]
    return totals[..., tt.FORWARD] + totals[..., tt.BACKWARD] + step_s / NUM_MICROBATCHES


def random_points(seed: int) -> tuple[StageFrontier, int, float]:
    rng = np.random.default_rng(seed)
    numbers = tuple(int(n) for n in rng.integers(1, 5, rng.integers(1, 4)))
    totals = rng.uniform(0.1, 1.0, (len(numbers), 4, 2, tt.NUM_TOTALS))
    totals[rng.random(totals.shape[:3]) < 0.1] = np.inf
    points = StageFrontier(
        mesh=StageMesh(data_size=2, inner_sizes=()),
        variants=tuple(range(len(numbers))),
        num_blocks=numbers,
        refs=tuple((0, row) for row in range(4)),
        totals=totals,
    )
    return points, int(rng.integers(1, 4)), float(sum(numbers) * rng.uniform(0.8, 2.5))


def every_mix(points: StageFrontier, boundary: int):
    per_column = [
        [
            counts
            for counts in itertools.product(range(number + 1), repeat=totals.shape[0])
            if sum(counts) == number
            and all(not count or np.isfinite(totals[p, boundary]).all() for p, count in enumerate(counts))
        ]
        for number, totals in zip(points.num_blocks, points.totals, strict=True)
    ]
    for mix in itertools.product(*per_column):
        yield sum_totals(
            [
                (totals[p, boundary], float(count))
                for totals, counts in zip(points.totals, mix, strict=True)
                for p, count in enumerate(counts)
                if count
            ]
        )


@pytest.mark.parametrize("seed", range(40))
def test_the_program_finds_the_best_of_all_mixes(seed):
    points, in_flight, room = random_points(seed)
    for boundary in range(2):
        fitting = [t for t in every_mix(points, boundary) if memory_bytes(t, in_flight) <= room]
        expected = min((float(amortised_s(totals)) for totals in fitting), default=math.inf)
        found = best_frontier_mix(points, PRICING, in_flight, room, boundary)
        quick = fastest_feasible(points, PRICING, in_flight, room, boundary)
        if math.isinf(expected):
            assert found is None
            assert quick is None
            continue
        assert found is not None
        assert found.amortised_s == pytest.approx(expected, rel=1e-6)
        assert found.memory_bytes <= room + PRICING.fixed_bytes
        if quick is not None:
            assert quick.amortised_s >= expected * (1 - 1e-9)
            assert quick.memory_bytes <= room + PRICING.fixed_bytes
        taken = {column: sum(count for _, count in mix) for column, mix in found.choice.mixes}
        assert taken == dict(zip(points.variants, points.num_blocks, strict=True))
