"""Checkpoints: any plan loads any other's, bit for bit; an interrupted save leaves the one before."""

from pathlib import Path

import msgspec
import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import save as torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from autopar.runtime.checkpoint_shards import CheckpointShard
from tests.distributed import parity
from tests.distributed.checkpoint_runs import SEED, read_whole, trainer_and_batch
from tests.distributed.pool import Pool
from tests.distributed.random_models import random_workload
from tests.distributed.random_plans import random_plan


def train_and_save(plan_json: bytes, folder: str) -> None:
    trainer, batch = trainer_and_batch(plan_json)
    trainer.step(batch)
    trainer.step(batch)
    trainer.save(folder, 2)


def load_and_save(plan_json: bytes, source: str, target: str) -> int:
    trainer, _ = trainer_and_batch(plan_json)
    step = trainer.load(source)
    trainer.save(target, step)
    return step


def _pairs(first: int, count: int) -> list[tuple[int, int]]:
    return [(seed, seed + 50) for seed in range(first, first + count)]


def check_pair(pool: Pool, seeds: tuple[int, int], folder: Path) -> None:
    first, second = (random_plan(random_workload(SEED), seed) for seed in seeds)
    folders = [str(folder / name) for name in ("a", "b", "c")]
    pool.run(first.gpus, train_and_save, msgspec.json.encode(first), folders[0])
    steps = pool.run(second.gpus, load_and_save, msgspec.json.encode(second), folders[0], folders[1])
    pool.run(first.gpus, load_and_save, msgspec.json.encode(first), folders[1], folders[2])
    assert set(steps) == {2}
    one, two, three = (read_whole(name) for name in folders)
    assert any(name.endswith("exp_avg") for name in one)
    assert set(one) == set(two) == set(three)
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
        assert torch.equal(tensor, three[name]), name


@pytest.mark.parametrize("seeds", _pairs(0, 1))
def test_plan_to_plan(pool: Pool, seeds: tuple[int, int], tmp_path: Path) -> None:
    check_pair(pool, seeds, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", _pairs(10, 12))
def test_plans_to_plans(pool: Pool, seeds: tuple[int, int], tmp_path: Path) -> None:
    check_pair(pool, seeds, tmp_path)


def save_by_torch(folder: str) -> None:
    """What a trainer under FSDP2 saves with torch.distributed.checkpoint: shards, and objects of its own."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = fully_shard(parity.real_model(random_workload(SEED), SEED), mesh=mesh)
    weights = model.state_dict()
    states = {
        name: {"exp_avg": weight + 1, "exp_avg_sq": weight * weight, "step": torch.tensor(7.0)}
        for name, weight in weights.items()
    }
    objects = {"epoch": 3, "sampler": {"seeds": [1, 2]}, "group": [{"lr": 0.5, "betas": (0.9, 0.95)}]}
    torch_save({"model": weights, "optimizer": states, **objects}, checkpoint_id=Path(folder) / "step-7")
    if dist.get_rank() == 0:
        (Path(folder) / "latest").write_text("step-7")


def test_torch_to_plan(pool: Pool, tmp_path: Path) -> None:
    """A checkpoint that torch wrote, of FSDP2's shards, goes through a plan's parts bit for bit."""
    plan = random_plan(random_workload(SEED), 3)
    first, second = str(tmp_path / "torch"), str(tmp_path / "plan")
    pool.run(3, save_by_torch, first)
    steps = pool.run(plan.gpus, load_and_save, msgspec.json.encode(plan), first, second)
    assert set(steps) == {7}
    one, two = read_whole(first), read_whole(second)
    assert any(name.endswith("exp_avg_sq") for name in two)
    assert {name for name in two if name.startswith("model.")} == {name for name in one if name.startswith("model.")}
    for name, tensor in two.items():
        assert torch.equal(tensor, one[name]), name


def test_part_boxes() -> None:
    """Rows 0 1 4 5 of 8 are two boxes; the second begins at row 2 of the part."""
    local = torch.arange(8.0).view(4, 2)
    part = CheckpointShard(local, (8, 2), (torch.tensor([0, 1, 4, 5]), torch.arange(2)), True)
    chunks = part.__create_chunk_list__()
    assert [tuple(chunk.offsets) for chunk in chunks] == [(0, 0), (4, 0)]
    items = part.__create_write_items__("weight", part)
    assert torch.equal(part.__get_tensor_shard__(items[1].index), local[2:])
