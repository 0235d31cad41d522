"""Checkpoints that are damaged, of another model or hostile: an error on every rank, a trainer as it was, nothing run."""

import contextlib
import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from autopar.core.errors import AutoparError
from autopar.runtime.trainer import Trainer
from tests.distributed.checkpoint_runs import SEED, trainer_and_batch
from tests.distributed.plans import layout_plan
from tests.distributed.pool import Pool
from tests.distributed.random_models import random_workload
from tests.hostile import Call

Damage = Callable[[Path], object]
MARKER = "marker"


def edited(change: Callable[[Metadata], object]) -> Damage:
    """The metadata changed as by another writer, which knows no SHA256SUMS."""

    def damage(path: Path) -> None:
        metadata = FileSystemReader(path).read_metadata()
        change(metadata)
        (path / ".metadata").write_bytes(pickle.dumps(metadata))
        (path / "SHA256SUMS").unlink()

    return damage


def hostile(path: Path) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(Call(os.system, f"touch {path.parent / MARKER}")))


def hostile_inside(path: Path) -> None:
    """All of it as it was, and a payload in what no reader of tensors needs."""
    edited(lambda metadata: setattr(metadata, "planner_data", Call(os.system, f"touch {path.parent / MARKER}")))(path)


def hostile_for_one_rank(path: Path) -> None:
    """Metadata of one rank, which torch reads where there is no other."""
    hostile(path)
    (path / ".metadata").rename(path / "__1.metadata")


def hostile_object(path: Path) -> None:
    """A weight that is an object according to the metadata: torch unpickles its bytes whatever they are."""
    stream = io.BytesIO()
    torch.save(Call(os.system, f"touch {path.parent / MARKER}"), stream)
    (path / "object.distcp").write_bytes(stream.getvalue())

    def change(metadata: Metadata) -> None:
        name = weight(metadata)
        metadata.state_dict_metadata[name] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex(name)] = _StorageInfo("object.distcp", 0, len(stream.getvalue()))

    edited(change)(path)


def hostile_tensor(path: Path) -> None:
    """A payload in the place of a tensor; torch refuses it, when it has loaded others."""
    stream = io.BytesIO()
    torch.save(Call(os.system, f"touch {path.parent / MARKER}"), stream)
    (path / "object.distcp").write_bytes(stream.getvalue())
    place = _StorageInfo("object.distcp", 0, len(stream.getvalue()))
    edited(lambda metadata: metadata.storage_data.update({box(metadata): place}))(path)


def weight(metadata: Metadata) -> str:
    return max(name for name in metadata.state_dict_metadata if name.startswith("model."))


def box(metadata: Metadata) -> MetadataIndex:
    return max(
        (index for index in metadata.storage_data if index.fqn == weight(metadata)), key=lambda index: index.offset
    )


def renamed(metadata: Metadata) -> None:
    name = weight(metadata)
    metadata.state_dict_metadata["model.other"] = metadata.state_dict_metadata.pop(name)
    for index in [index for index in metadata.storage_data if index.fqn == name]:
        metadata.storage_data[MetadataIndex("model.other", index.offset)] = metadata.storage_data.pop(index)


def shard(path: Path) -> Path:
    """The largest file of tensors."""
    return max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)


def flip(file: Path, at: float) -> None:
    """Change a bit at this share of a file."""
    content = bytearray(file.read_bytes())
    content[int(at * len(content))] ^= 1
    file.write_bytes(content)


def flip_weight(path: Path) -> None:
    """Change a bit of a number of a tensor."""
    place = FileSystemReader(path).read_metadata().storage_data
    info = max(place.values(), key=lambda info: info.length)
    file = path / info.relative_path
    flip(file, (info.offset + info.length / 2) / file.stat().st_size)


def truncate(file: Path, share: float) -> None:
    os.truncate(file, int(share * file.stat().st_size))


def digit(path: Path) -> None:
    """Another learning rate."""
    text = (path / "optimizer.json").read_text()
    assert "0.01" in text
    (path / "optimizer.json").write_text(text.replace("0.01", "0.02"))


DAMAGES: dict[str, tuple[Damage, str]] = {
    "hostile": (hostile, ".metadata names posix.system, which is not part of the metadata"),
    "hostile inside": (hostile_inside, ".metadata names posix.system"),
    "hostile for one rank": (hostile_for_one_rank, ".metadata cannot be read: No such file"),
    "hostile object": (hostile_object, "it is a checkpoint of another model: it has no tensor model."),
    "hostile tensor": (hostile_tensor, "byte 0: it names posix.system, which"),
    "no metadata": (lambda path: (path / ".metadata").unlink(), ".metadata cannot be read: No such file"),
    "half of the metadata": (lambda path: truncate(path / ".metadata", 0.5), ".metadata is damaged"),
    "empty metadata": (lambda path: truncate(path / ".metadata", 0), ".metadata is damaged"),
    "a bit of the metadata": (lambda path: flip(path / ".metadata", 0.5), ".metadata is damaged"),
    "no shard": (lambda path: shard(path).unlink(), "distcp cannot be read: No such file"),
    "half of a shard": (lambda path: truncate(shard(path), 0.5), "it ends at byte"),
    "a bit of a weight": (flip_weight, "does not match its CRC-32"),
    "another name": (edited(renamed), "it is a checkpoint of another model: it has no tensor model."),
    "another shape": (edited(lambda metadata: reshape(metadata)), "it is a checkpoint of another model: its model."),
    "a box less": (edited(lambda metadata: tensor(metadata).chunks.pop()), "do not cover it"),
    "another tensor": (edited(lambda metadata: metadata.storage_data.update({box(metadata): scalar(metadata)})), "has torch."),
    "another learning rate": (digit, "optimizer.json is damaged"),
    "no learning rate": (lambda path: (path / "optimizer.json").unlink(), "optimizer.json cannot be read"),
    "no such step": (lambda path: (path.parent / "latest").write_text("step-3"), ".metadata cannot be read"),
    "no name": (lambda path: (path.parent / "latest").write_bytes(b"\xff\0"), "cannot read"),
    "a name elsewhere": (lambda path: (path.parent / "latest").write_text("../step-2"), "not the name of a checkpoint"),
}  # fmt: skip


def tensor(metadata: Metadata) -> Any:
    return metadata.state_dict_metadata[weight(metadata)]


def reshape(metadata: Metadata) -> None:
    """One more row, stored in a box of its own."""
    name, whole = weight(metadata), tensor(metadata)
    last = type(whole.chunks[0])(
        torch.Size([whole.size[0], *[0] * (len(whole.size) - 1)]), torch.Size([1, *whole.size[1:]])
    )
    whole.chunks.append(last)
    whole.size = torch.Size([whole.size[0] + 1, *whole.size[1:]])
    metadata.storage_data[MetadataIndex(name, last.offsets)] = metadata.storage_data[box(metadata)]


def scalar(metadata: Metadata) -> _StorageInfo:
    """The place of an optimizer's step count."""
    return next(place for index, place in metadata.storage_data.items() if index.fqn.endswith(".step"))


def state_of(trainer: Trainer) -> list[torch.Tensor]:
    """All that a load may change."""
    assert trainer.optimizer is not None
    tensors = [parameter.master for parameter in trainer.trained_parameters()]
    states = [trainer.optimizer.state[master] for master in tensors]
    tensors += [parameter.weight for parameter in trainer.trained_parameters()]
    tensors += [state[key] for state in states for key in sorted(state)]
    settings = [trainer.num_steps, *(group["lr"] for group in trainer.optimizer.param_groups)]
    return [tensor.detach().clone() for tensor in tensors] + [torch.tensor(settings)]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def attempt(trainer: Trainer, folder: Path) -> tuple[str, bool]:
    """The error of a load, and whether the trainer is as before."""
    before, error = state_of(trainer), ""
    try:
        trainer.load(folder)
    except AutoparError as raised:
        error = f"{type(raised).__name__}: {raised}"
    return error, same(before, state_of(trainer))


def load_damaged(plan_json: bytes, folder: str) -> dict[str, tuple[str, bool]]:
    """What comes of loading each damaged checkpoint, and at last of the undamaged one."""
    trainer, batch = trainer_and_batch(plan_json)
    whole = Path(folder) / "whole"
    trainer.step(batch)
    trainer.save(whole, 1)
    trainer.step(batch)
    trainer.save(whole, 2)
    saved = state_of(trainer)
    trainer.step(batch)
    found = {}
    for name, (damage, _) in DAMAGES.items():
        copy = Path(folder) / name
        if dist.get_rank() == 0:
            shutil.copytree(whole, copy)
            damage(copy / "step-2")
        dist.barrier()
        found[name] = attempt(trainer, copy)
    found["none"] = attempt(trainer, Path(folder) / "nothing here")
    found["one rank's"] = attempt(trainer, whole if dist.get_rank() == 0 else Path(folder) / "nothing here")
    other = Path(folder) / "other"
    if dist.get_rank() == 0:
        shutil.copytree(whole, other)
        (other / "latest").write_text("step-1")
    dist.barrier()
    found["different"] = attempt(trainer, whole if dist.get_rank() == 0 else other)
    assert trainer.load(whole) == 2
    assert same(state_of(trainer), saved)
    return found


def test_damaged_checkpoints_are_refused_on_every_rank(pool: Pool, tmp_path: Path) -> None:
    plan = layout_plan(random_workload(SEED), "dp=2,mbs=1,zero=1")
    first, second = pool.run(2, load_damaged, msgspec.json.encode(plan), str(tmp_path))
    for name, (_, message) in DAMAGES.items():
        for error, untouched in (first[name], second[name]):
            assert untouched, name
            assert error.startswith("CheckpointError: "), (name, error)
            assert message in error, name
            assert str(tmp_path / name) in error
            assert "\n" not in error
        assert first[name] == second[name], name
        assert not (tmp_path / name / MARKER).exists(), name
    assert "; nothing was loaded; to load another (step-1), write its name to" in first["hostile"][0]
    for found in (first, second):
        assert found["none"] == (
            f"PlanFileError: no checkpoint in {tmp_path}/nothing here: No such file or directory",
            True,
        )
        error, untouched = found["one rank's"]
        assert untouched
        assert error.startswith(f"CheckpointError: rank 1: no checkpoint in {tmp_path}/nothing here")
        error, untouched = found["different"]
        assert untouched
        assert "see different checkpoints: rank 0 sees step-2" in error


@pytest.mark.parametrize("damage", [hostile, hostile_inside, hostile_object])
def test_torch_itself_runs_what_is_refused(damage: Damage, pool: Pool, tmp_path: Path) -> None:
    pool.run(
        1, load_by_torch, msgspec.json.encode(layout_plan(random_workload(SEED), "dp=1,mbs=2")), str(tmp_path), damage
    )
    assert (tmp_path / MARKER).exists()


def load_by_torch(plan_json: bytes, folder: str, damage: Damage) -> None:
    trainer, _ = trainer_and_batch(plan_json)
    trainer.save(folder, 2)
    path = Path(folder) / "step-2"
    damage(path)
    with contextlib.suppress(CheckpointException):
        torch.distributed.checkpoint.load(trainer.state_dict(), checkpoint_id=path)
