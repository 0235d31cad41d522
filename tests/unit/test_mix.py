"""The mix of frontier points over a stage's blocks, against enumeration of every mix."""

import itertools
import math

import numpy as np
import pytest

from autopar.inter.block_pricer import StageMesh
from autopar.inter.stage_choice import StageFrontier, fastest_feasible, memory_bytes, sum_totals
from autopar.inter.stage_ilp import best_frontier_mix
from autopar.intra import block_totals as tt


class Prices:
    """Stage totals priced as a stage is, with 1 GiB of fixed share."""

    num_microbatches = 4

    def times_s(self, totals):
        step = (
            np.maximum(totals[..., tt.STEP_OVERLAPPABLE] - totals[..., tt.BACKWARD], 0.0) + totals[..., tt.STEP_EXPOSED]
        )
        return totals[..., tt.FORWARD], totals[..., tt.BACKWARD], step

    def amortised_s(self, totals):
        forward, backward, step = self.times_s(totals)
        return forward + backward + step / self.num_microbatches

    def fixed_bytes(self):
        return 2.0**30


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
    prices = Prices()
    for boundary in range(2):
        fitting = [t for t in every_mix(points, boundary) if memory_bytes(t, in_flight) <= room]
        expected = min((float(prices.amortised_s(totals)) for totals in fitting), default=math.inf)
        found = best_frontier_mix(points, prices, in_flight, room, boundary, prices.num_microbatches, 0.0)
        quick = fastest_feasible(points, prices, in_flight, room, boundary)
        if math.isinf(expected):
            assert found is None
            assert quick is None
            continue
        assert found is not None
        assert found.amortised_s == pytest.approx(expected, rel=1e-6)
        assert found.memory_bytes <= room + prices.fixed_bytes()
        if quick is not None:
            assert quick.amortised_s >= expected * (1 - 1e-9)
            assert quick.memory_bytes <= room + prices.fixed_bytes()
        taken = {column: sum(count for _, count in mix) for column, mix in found.choice.mixes}
        assert taken == dict(zip(points.variants, points.num_blocks, strict=True))
