"""Faults end every rank with a message that says what to do, and none hangs."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import torch
import torch.distributed as dist

from autopar.core.errors import AutoparError, UsageError
from autopar.core.plan import Plan
from autopar.runtime.agreement import check_world
from autopar.runtime.apply import build_trainer
from tests.distributed import parity
from tests.distributed.checkpoint_runs import read_whole
from tests.distributed.plans import layout_plan
from tests.distributed.pool import Pool
from tests.distributed.random_models import random_workload

ROOT = Path(__file__).resolve().parents[2]
SEED = 6


def check(plans: list[bytes]) -> str:
    plan = msgspec.json.decode(plans[dist.get_rank() % len(plans)], type=Plan)
    try:
        check_world(plan)
    except UsageError as error:
        return str(error)
    return ""


def test_world_of_another_size(pool: Pool) -> None:
    plan = layout_plan(random_workload(SEED), "dp=4,mbs=1")
    for message in pool.run(2, check, [msgspec.json.encode(plan)]):
        assert message == "the plan is for 4 ranks, the world has 2: start 4 ranks, or make a plan for 2"


def test_differing_plans(pool: Pool) -> None:
    plan = layout_plan(random_workload(SEED), "dp=2,mbs=1")
    other = msgspec.structs.replace(plan, schedule="gpipe")
    for message in pool.run(2, check, [msgspec.json.encode(plan), msgspec.json.encode(other)]):
        assert message.startswith("the ranks have different plans: rank 0 has ")
        assert "rank 1 has " in message


def come(plan_json: bytes) -> str:
    """Rank 1 does not."""
    started = time.monotonic()
    try:
        if dist.get_rank() == 1:
            time.sleep(6)
        else:
            check_world(msgspec.json.decode(plan_json, type=Plan), timeout_s=2)
    except AutoparError as error:
        return f"{time.monotonic() - started < 6} {error}"
    return ""


def test_a_rank_that_does_not_come(pool: Pool) -> None:
    plan = layout_plan(random_workload(SEED), "dp=4,mbs=1")
    messages = pool.run(4, come, msgspec.json.encode(plan))
    assert "Ranks 1 failed" in messages[0]
    for rank in (0, 2, 3):
        assert messages[rank].startswith(f"True rank {rank} waited 2 s for the other ranks")


def run_until_alone(plan_json: bytes) -> str:
    """Rank 1 dies in its third step; what the others say."""
    plan = msgspec.json.decode(plan_json, type=Plan)
    workload = random_workload(SEED)
    trainer = build_trainer(
        plan,
        parity.real_model(workload, SEED),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
        workload=workload,
        mode="reference",
    )
    batch = parity.random_batch(workload, plan.global_batch, SEED, 12)
    try:
        for step in range(5):
            if dist.get_rank() == 1 and step == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            trainer.step(batch)
    except AutoparError as error:
        return str(error)
    return "finished"


@pytest.mark.slow
def test_killed_rank() -> None:
    plan = layout_plan(random_workload(SEED), "dp=2,tp=2,mbs=1")
    pool = Pool(4)
    started = time.monotonic()
    try:
        messages = pool.run_survivors(4, run_until_alone, msgspec.json.encode(plan), dead=1)
    finally:
        pool.close()
    assert time.monotonic() - started < 60
    for rank, message in messages.items():
        assert message.startswith(f"rank {rank} lost the connection to another rank in step 3")


SAVER = """
import sys, msgspec, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from tests.distributed.checkpoint_runs import trainer_and_batch
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
trainer, batch = trainer_and_batch(open(sys.argv[2], "rb").read())
for step in range(1, 1000):
    trainer.step(batch)
    trainer.save(sys.argv[3], step)
    print(step, flush=True)
"""


@pytest.mark.slow
def test_kill_during_save(tmp_path: Path) -> None:
    """SIGKILL at a random moment of a loop of saves: the newest complete checkpoint can be read, and is the last or later."""
    plan_file = tmp_path / "plan.json"
    plan_file.write_bytes(msgspec.json.encode(layout_plan(random_workload(SEED), "dp=1,mbs=4")))
    draw = random.Random(0)
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        words = [sys.executable, "-c", SAVER, str(ROOT), str(plan_file), str(folder)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        last = 0
        for line in process.stdout:
            last = int(line)
            if last == 3:
                break
        time.sleep(draw.uniform(0, 0.2))
        process.kill()
        process.wait()
        process.stdout.close()
        assert int((folder / "latest").read_text().removeprefix("step-")) >= last
        assert any(name.startswith("optimizer.") for name in read_whole(str(folder)))
