"""What is priced is what runs: the collectives of a step, counted on real ranks, are those that the plan lists."""

import msgspec
import pytest

from autopar.runtime.tally import differences, of_all_ranks
from tests.distributed import parity
from tests.distributed.pool import Pool
from tests.distributed.test_parity import MATRIX, MODELS, make_plan


def check(pool: Pool, name: str, shape: str, zero: int, recompute: str) -> None:
    one = MODELS[name]
    by_sequence = name not in ("moe", "wide-resnet")
    plan = make_plan(one.workload(), shape, zero, recompute, one.batch, by_sequence)
    found = pool.run(plan.gpus, parity.count_collectives, one.workload, msgspec.json.encode(plan), one.classes)
    assert differences(of_all_ranks(found, plan), plan, plan.estimate.collectives) == ()


SAMPLE = [("gpt-tied", "dp2tp2", 3, "full"), ("wide-resnet", "dp2", 1, "none"), ("t5", "gpipe", 0, "none")]


@pytest.mark.parametrize("point", SAMPLE, ids="-".join(("%s",) * 4).__mod__)
def test_collectives_sample(pool: Pool, point: tuple[str, str, int, str]) -> None:
    check(pool, *point)


@pytest.mark.slow
@pytest.mark.parametrize("point", MATRIX, ids="-".join(("%s",) * 4).__mod__)
def test_collectives(pool: Pool, point: tuple[str, str, int, str]) -> None:
    check(pool, *point)
