"""Random models under random plans: whatever placements a plan names, the numbers are those of one process; and
plans that the planner itself writes list the collectives that run."""

from functools import partial

import msgspec
import pytest

from autopar.core.plan import Plan
from autopar.runtime.count_collectives import collective_differences, counts_of_stages
from tests.distributed import parity
from tests.distributed.once import workload_of
from tests.distributed.parity_models import MODELS
from tests.distributed.pool import Pool
from tests.distributed.random_models import random_workload
from tests.distributed.random_plans import random_plan
from tests.distributed.random_searches import searched_plan

TOLERANCE = 1e-9  # in fp64, where a wrong addend shows and rounding does not


def check_seed(pool: Pool, seed: int, mode: str) -> None:
    plan: Plan = random_plan(random_workload(seed), seed)
    source = partial(random_workload, seed)
    found = pool.run(plan.gpus, parity.check_gradients, source, msgspec.json.encode(plan), mode, 12, seed, True)
    loss, parameter, error = parity.worst(found)
    assert loss <= TOLERANCE, f"seed {seed}: loss is off by {loss:.1e}"
    assert error <= TOLERANCE, f"seed {seed}: gradient of {parameter} is off by {error:.1e}"


@pytest.mark.parametrize("seed", [*range(1, 4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 4))])
def test_random_plan(pool: Pool, seed: int) -> None:
    check_seed(pool, seed, "reference" if seed % 2 else "lowered")


def test_groups_across_an_uneven_shard_communicate_other_bytes(pool: Pool) -> None:
    """Seed 279 shards 15 rows over two ranks, so that the groups of the other axis gather 8 and 7 of them."""
    check_seed(pool, 279, "lowered")


def check_example(pool: Pool, name: str, seed: int, mode: str) -> None:
    """A real model under a random plan, all in fp64."""
    one = MODELS[name]
    plan = random_plan(one.workload(), seed, batch=one.batch)
    found = pool.run(
        plan.gpus, parity.check_gradients, one.workload, msgspec.json.encode(plan), mode, one.classes, seed, True
    )
    loss, parameter, error = parity.worst(found)
    assert loss <= TOLERANCE, f"{name}, seed {seed}: loss is off by {loss:.1e}"
    assert error <= TOLERANCE, f"{name}, seed {seed}: gradient of {parameter} is off by {error:.1e}"


def check_search(pool: Pool, seed: int) -> None:
    """A plan that the planner wrote: the numbers of one process, and the collectives that it lists."""
    source = partial(random_workload, seed)
    plan = searched_plan(workload_of(source), seed)
    found = pool.run(plan.gpus, parity.check_gradients, source, msgspec.json.encode(plan), "lowered", 12, seed, True)
    loss, parameter, error = parity.worst(found)
    assert loss <= TOLERANCE, f"seed {seed}: loss is off by {loss:.1e}"
    assert error <= TOLERANCE, f"seed {seed}: gradient of {parameter} is off by {error:.1e}"
    assert (
        collective_differences(counts_of_stages([each.ran for each in found], plan), plan, plan.estimate.collectives)
        == ()
    )


@pytest.mark.parametrize("seed", [1015, 1023])
def test_random_search(pool: Pool, seed: int) -> None:
    check_search(pool, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1250))
def test_random_searches(pool: Pool, seed: int) -> None:
    check_search(pool, seed)


@pytest.mark.parametrize(("name", "seed"), [("llama", 2), pytest.param("moe", 1, marks=pytest.mark.slow)])
def test_random_plan_of_an_example(pool: Pool, name: str, seed: int) -> None:
    check_example(pool, name, seed, "reference")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("seed", range(10, 20))
def test_random_plans_of_examples(pool: Pool, name: str, seed: int) -> None:
    check_example(pool, name, seed, "lowered" if seed % 3 == 0 else "reference")


def check_steps(pool: Pool, seed: int, mode: str) -> None:
    """Three AdamW steps, every second seed with clipping: masters, the weights that ops use, running statistics."""
    plan: Plan = random_plan(random_workload(seed), seed)
    source = partial(random_workload, seed)
    clip = 0.5 if seed % 2 else None
    found = pool.run(plan.gpus, parity.check_training, source, msgspec.json.encode(plan), mode, 12, seed, clip)
    loss, parameter, error = parity.worst(found)
    assert loss <= 1e-10, f"seed {seed}: loss is off by {loss:.1e}"
    assert error <= 1e-10, f"seed {seed}: {parameter} is off by {error:.1e}"


@pytest.mark.parametrize("seed", [*range(20, 23), 439])  # 439: parameters gathered over one axis after the other
def test_random_steps(pool: Pool, seed: int) -> None:
    check_steps(pool, seed, "reference")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(400, 450))
def test_random_steps_many(pool: Pool, seed: int) -> None:
    check_steps(pool, seed, "lowered" if seed % 4 else "reference")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lowered", "reference"])
@pytest.mark.parametrize("seed", range(100, 320))
def test_random_plans(pool: Pool, seed: int, mode: str) -> None:
    check_seed(pool, seed, mode)
