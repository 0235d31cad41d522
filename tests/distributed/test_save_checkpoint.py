"""Saving a checkpoint: where it fails on one rank, all ranks get one error, and what is complete stays loadable."""

from pathlib import Path

import msgspec
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
