"""`Trainer.state_dict` and `load_state_dict`: a restored trainer goes on exactly as the one it was taken from."""

from pathlib import Path

import msgspec
import pytest
import torch
from torch.distributed.checkpoint import load, save

from autopar.core.errors import CheckpointError
from autopar.core.plan import Plan
from autopar.runtime.apply import build_trainer
from autopar.runtime.stored_parameters import OptimizerFactory
from autopar.runtime.trainer import Trainer
from tests.distributed import parity
from tests.distributed.checkpoint_runs import SEED
from tests.distributed.plans import layout_plan
from tests.distributed.pool import Pool
from tests.distributed.random_models import random_workload

Batch = dict[str, torch.Tensor]
Case = tuple[str, int, str]
"""The optimizer, the steps before its state is saved, and the way by which it is restored."""
LR = 3e-3
OPTIMIZERS: dict[str, OptimizerFactory] = {
    "AdamW": lambda masters: torch.optim.AdamW(masters, lr=1e-2),
    "NAdam": lambda masters: torch.optim.NAdam(masters, lr=1e-2),
    "SGD": lambda masters: torch.optim.SGD(masters, lr=1e-2, momentum=0.9, dampening=0.5),
    "SGD without momentum": lambda masters: torch.optim.SGD(masters, lr=1e-2),
    "Rprop": lambda masters: torch.optim.Rprop(masters, lr=1e-2),
}


def made(plan_json: bytes, optimizer: str, lr: float) -> tuple[Trainer, Batch]:
    plan = msgspec.json.decode(plan_json, type=Plan)
    workload = random_workload(SEED)
    model = parity.real_model(workload, SEED)
    trainer = build_trainer(plan, model, optimizer=OPTIMIZERS[optimizer], workload=workload, mode="reference")
    assert trainer.optimizer is not None
    trainer.optimizer.param_groups[0]["lr"] = lr
    return trainer, parity.random_batch(workload, plan.global_batch, SEED, 12)


def masters_after(trainer: Trainer, batch: Batch, num_steps: int) -> list[torch.Tensor]:
    for _ in range(num_steps):
        trainer.step(batch)
    return [parameter.master.detach().clone() for parameter in trainer.trained_parameters()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def restored_by(way: str, source: Trainer, target: Trainer, path: str, num_steps: int) -> None:
    """Bring the state of one trainer to another, by a checkpoint at a path or in memory."""
    if way == "memory":
        return target.load_state_dict(source.state_dict())
    entries, file = target.state_dict(), f"{path}/step-{num_steps}"
    if way == "Trainer.save":
        source.save(path, num_steps)
    else:
        save(source.state_dict(), checkpoint_id=file)
    if way == "Trainer.load":
        (Path(path) / "latest").write_text(f"step-{num_steps}")
        target.load(path)
        assert target.optimizer is not None
        target.optimizer.param_groups[0]["lr"] = LR  # which torch's checkpoint does not have in optimizer.json
    else:
        load(entries, checkpoint_id=file)
        target.load_state_dict(entries)
    return None


def restore(plan_json: bytes, folder: str, cases: list[Case]) -> list[Case]:
    """The cases in which the restored trainer does not go on as the saved one."""
    wrong = []
    for optimizer, num_steps, way in cases:
        source, batch = made(plan_json, optimizer, LR)
        masters_after(source, batch, num_steps)
        target, _ = made(plan_json, optimizer, 1e-2)
        if way == "torch, into a trained one":
            masters_after(target, batch, 1)
        restored_by(way, source, target, str(Path(folder) / f"{optimizer} {num_steps} {way}"), num_steps)
        has_steps = target.num_steps == num_steps
        if not has_steps or not same(masters_after(target, batch, 2), masters_after(source, batch, 2)):
            wrong.append((optimizer, num_steps, way))
    return wrong


FAST: list[Case] = [
    ("AdamW", 2, "torch"),
    ("AdamW", 2, "Trainer.save"),
    ("AdamW", 0, "Trainer.load"),
    ("SGD", 0, "torch, into a trained one"),
]
WAYS = ("torch", "torch, into a trained one", "memory", "Trainer.save", "Trainer.load")
SLOW: list[Case] = [(optimizer, num_steps, way) for optimizer in OPTIMIZERS for num_steps in (0, 2) for way in WAYS]


@pytest.mark.parametrize("cases", [FAST, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["fast", "slow"])
def test_a_restored_trainer_goes_on_as_the_saved_one(cases: list[Case], pool: Pool, tmp_path: Path) -> None:
    plan = layout_plan(random_workload(SEED), "dp=2,mbs=1,zero=1")
    assert pool.run(plan.gpus, restore, msgspec.json.encode(plan), str(tmp_path), cases) == [[], []]


def restore_loss_scale(plan_json: bytes) -> tuple[int, float]:
    source, _ = made(plan_json, "AdamW", 1e-2)
    target, _ = made(plan_json, "AdamW", 1e-2)
    assert source.loss_scale is not None
    source.loss_scale.factor, source.loss_scale.good_steps = 128.0, 17
    target.load_state_dict(source.state_dict())
    assert target.loss_scale is not None
    return target.loss_scale.good_steps, target.loss_scale.factor


def test_the_loss_scale_is_restored(pool: Pool) -> None:
    plan = layout_plan(random_workload(SEED), "dp=1,mbs=4", dtype="fp16", cluster="p3.16xlarge")
    assert pool.run(1, restore_loss_scale, msgspec.json.encode(plan)) == [(17, 128.0)]


def refuse(plan_json: bytes) -> dict[str, str]:
    """The error by what is wrong with the state_dict."""
    trainer, batch = made(plan_json, "AdamW", 1e-2)
    other, _ = made(plan_json, "AdamW", 1e-2)
    masters_after(trainer, batch, 1)
    before = masters_after(other, batch, 0)
    good = trainer.state_dict()
    name = next(name for name, entries in good["optimizer"].items() if entries)
    first, *_ = good["optimizer"][name]
    without = {key: entry for key, entry in good["optimizer"][name].items() if key != first}
    bad = {
        "no training": {key: good[key] for key in ("model", "optimizer")},
        "more": {**good, "epoch": 3},
        "a weight less": {**good, "model": {key: entry for key, entry in good["model"].items() if key != name}},
        "another weight": {**good, "model": {**good["model"], "other": good["model"][name]}},
        "no state": {**good, "optimizer": {**good["optimizer"], name: without}},
        "plain": {**good, "model": {**good["model"], name: torch.zeros(good["model"][name].shape)}},
    }
    found = {}
    for case, entries in bad.items():
        try:
            trainer.load_state_dict(entries)
            found[case] = "none"
        except CheckpointError as error:
            found[case] = str(error).replace(name, "NAME").replace(first, "KEY")
        assert same(masters_after(other, batch, 0), before)
    return found


def test_what_is_not_restored_is_refused_by_name(pool: Pool) -> None:
    plan = layout_plan(random_workload(SEED), "dp=2,mbs=1,zero=1")
    first, second = pool.run(2, refuse, msgspec.json.encode(plan))
    prefix, suffix = "cannot load the state_dict: rank 0: ", "; nothing was loaded"
    assert first == second
    assert first == {
        case: f"{prefix}{fault}{suffix}"
        for case, fault in {
            "no training": "training is missing",
            "more": "epoch would not be restored",
            "a weight less": "model.NAME is missing",
            "another weight": "model.other would not be restored",
            "no state": "optimizer.NAME.KEY is missing",
            "plain": "model.NAME is not one of the tensors of state_dict()",
        }.items()
    }
