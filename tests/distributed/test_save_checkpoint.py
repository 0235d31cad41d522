"""Saving a checkpoint: where it fails on one rank, all ranks get one error, and what is complete stays loadable."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from autopar.core.errors import AutoparError
from autopar.runtime.trainer import Trainer
from tests.distributed.checkpoint_runs import SEED, trainer_and_batch
from tests.distributed.plans import layout_plan
from tests.distributed.pool import Pool
from tests.distributed.random_models import random_workload


def save_error(trainer: Trainer, folder: Path, step: int) -> str:
    """The error of a save, "" where there is none."""
    try:
        trainer.save(folder, step)
    except AutoparError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def save_where_it_fails(plan_json: bytes, folder: str) -> dict[str, tuple[str, int]]:
    """By case: the error of saving step 2, and the step that can be loaded afterwards (-1: none)."""
    trainer, batch = trainer_and_batch(plan_json)
    trainer.step(batch)
    rank, root, found = dist.get_rank(), Path(folder), {}
    if rank == 0:
        (root / "file").write_text("")
    for case in (
        "other names",
        "occupied name",
        "occupied temporary name",
        "rank 0 cannot write",
        "rank 1 cannot write",
    ):
        own = root / case
        trainer.save(own, 1)
        if rank == 0:
            if case == "other names":
                for name in ("step-best", "step-", "step-03", "step-5-final", "step-9.bak"):
                    (own / name).mkdir()
                (own / "step-7").write_text("not a folder")
            if case == "occupied name":
                (own / "step-2").write_text("not a checkpoint")
            if case == "occupied temporary name":
                (own / ".step-2.tmp").write_text("not a checkpoint")
        dist.barrier()
        cannot_write = case == f"rank {rank} cannot write"
        error = save_error(trainer, root / "file" / "below" if cannot_write else own, 2)
        found[case] = error, trainer.load(own)
    found["different steps"] = save_error(trainer, root / "other names", 3 + rank), trainer.load(root / "other names")
    found["negative step"] = save_error(trainer, root / "other names", -1), trainer.load(root / "other names")
    return found


def test_a_save_that_fails_on_one_rank_is_the_same_error_on_all(pool: Pool, tmp_path: Path) -> None:
    plan = layout_plan(random_workload(SEED), "dp=2,mbs=1,zero=1")
    first, second = pool.run(2, save_where_it_fails, msgspec.json.encode(plan), str(tmp_path))
    assert first == second
    assert first.pop("other names") == ("", 2)
    assert first.pop("negative step")[0].startswith("UsageError: ")
    assert {path.name for path in (tmp_path / "other names").iterdir()} == {
        *("latest", "step-1", "step-2"),
        *("step-best", "step-", "step-03", "step-5-final", "step-9.bak", "step-7"),
    }
    for case, (error, loadable_step) in first.items():
        assert error.startswith("CheckpointError: "), (case, error)
        assert "\n" not in error, case
        assert loadable_step == (2 if case == "different steps" else 1), case
    assert "step-2: rank 0: " in first["rank 0 cannot write"][0]
    assert "step-2: rank 1: " in first["rank 1 cannot write"][0]
    assert "rank 0 saves step 3, rank 1 saves step 4" in first["different steps"][0]
    assert (tmp_path / "occupied name" / "step-2").read_text() == "not a checkpoint"


def record_states(folder: Path, copies: Path) -> Callable[[], None]:
    """Copy a folder whenever a file or folder in it is about to be renamed or removed: what a process that is killed
    there leaves. Returns what ends it."""
    is_active, count = True, 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal is_active, count
        if is_active and event in ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree") and folder.exists():
            is_active = False
            shutil.copytree(folder, copies / str(count))
            is_active, count = True, count + 1

    def end() -> None:
        nonlocal is_active
        is_active = False

    sys.addaudithook(hook)
    return end


def save_one_step_twice(plan_json: bytes, folder: str) -> tuple[int, list[tuple[int, bool, bool, int]]]:
    """The number of states in which an interrupted second save leaves a folder; and for each the step it loads, whether
    that is the first or the second checkpoint, and the step loaded after another save."""
    trainer, batch = trainer_and_batch(plan_json)
    root, copies = Path(folder) / "checkpoints", Path(folder) / "copies"
    trainer.step(batch)
    trainer.save(root, 1)
    trainer.step(batch)
    trainer.save(root, 2)
    first = trainer.trained_parameters()[0].master.detach().clone()
    trainer.step(batch)
    second = trainer.trained_parameters()[0].master.detach().clone()
    end = record_states(root, copies)
    trainer.save(root, 2)
    end()
    found = []
    for copy in [*copies.iterdir(), root]:
        step, loaded = trainer.load(copy), trainer.trained_parameters()[0].master.detach().clone()
        trainer.save(copy, 2)
        after = trainer.load(copy)
        assert torch.equal(trainer.trained_parameters()[0].master, loaded)
        assert {path.name for path in copy.iterdir() if path.is_dir()} == {"step-1", "step-2"}
        trainer.save(copy, 3)
        found.append((step, torch.equal(loaded, first), torch.equal(loaded, second), after))
    return len(list(copies.iterdir())), found


def test_a_step_that_is_saved_twice_is_loadable_at_every_moment(pool: Pool, tmp_path: Path) -> None:
    plan = layout_plan(random_workload(SEED), "dp=1,mbs=4")
    ((count, found),) = pool.run(1, save_one_step_twice, msgspec.json.encode(plan), str(tmp_path))
    assert count >= 3
    for step, is_first, is_second, after in found:
        assert (step, after) == (2, 2)
        assert is_first != is_second
    assert found[-1] == (2, False, True, 2)
