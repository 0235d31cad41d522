"""Checkpoints with torch.distributed.checkpoint: the model's own names and global shapes, so any plan loads any
other's.

    folder/latest         name of the newest whole checkpoint, replaced in one piece
    folder/step-12/       one checkpoint, written as .step-12.tmp and renamed when all ranks are done
        .metadata, *.distcp   model.NAME, optimizer.NAME.KEY (fp32 masters and the optimizer's state)
        optimizer.json        settings of the optimizer's groups (learning rate ...)
        scale.json            the loss scale of an fp16 plan; another plan's checkpoint has none, and the scale starts anew

A rank's part of a tensor is a set of boxes; of replicas only the first writes. Nothing but tensors and JSON is stored.
"""

import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load as read_tensors
from torch.distributed.checkpoint.state_dict_saver import save as write_tensors

from autopar.plan.errors import PlanFileError
from autopar.plan.write import write_atomically
from autopar.runtime.parameters import StoredParameter, rest_held
from autopar.runtime.trainer import Trainer
from autopar.runtime.transfer import Held

Box = tuple[tuple[slice, ...], ChunkStorageMetadata]


class Part(Tensor):
    """What a rank holds of a tensor of global ``shape``, for torch.distributed.checkpoint: a wrapper without data of
    its own. ``writes``: whether this rank's replica is the one that is stored."""

    local: Tensor
    boxes: list[Box]
    writes: bool

    @staticmethod
    def __new__(cls, local: Tensor, shape: Sequence[int], held: Held, writes: bool) -> "Part":
        made: Part = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=local.dtype, device=local.device)
        made.local, made.writes = local.detach(), writes
        made.boxes = list(_boxes(held))
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} of a part of a checkpoint: use torch.distributed.checkpoint")

    def __create_write_items__(self, fqn: str, part: Any) -> list[WriteItem]:
        if not self.writes:
            return []
        properties = TensorProperties(dtype=self.local.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for _, chunk in self.boxes
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [chunk for _, chunk in self.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for where, chunk in self.boxes:
            if index.offset is None or chunk.offsets == index.offset:
                return self.local[where] if where else self.local
        raise ValueError(f"this rank holds no box of {index.fqn} at {index.offset}")


def _boxes(held: Held) -> Iterator[Box]:
    """The rectangles that the product of these indices consists of: where in the part, and where in the whole."""
    runs = [list(_runs(index.tolist())) for index in held]
    for chosen in itertools.product(*runs):
        offsets = torch.Size([first for _, first, _ in chosen])
        sizes = torch.Size([length for _, _, length in chosen])
        yield (
            tuple(slice(at, at + length) for at, _, length in chosen),
            ChunkStorageMetadata(offsets=offsets, sizes=sizes),
        )


def _runs(indices: list[int]) -> Iterator[tuple[int, int, int]]:
    """(position, first index, length) of each run of consecutive indices."""
    start = 0
    for at in range(1, len(indices) + 1):
        if at == len(indices) or indices[at] != indices[at - 1] + 1:
            yield start, indices[start], at - start
            start = at


def state_dict(trainer: Trainer) -> dict[str, Any]:
    """``model`` (by the model's names) and ``optimizer`` (by name, then key) as ``Part``s, for ``dcp.save`` and
    ``load``."""
    model: dict[str, Part] = {}
    optimizer: dict[str, dict[str, Part]] = {}
    for parameter, held, writes in _stored(trainer):
        name = parameter.names[0]
        if name in model:
            continue
        model[name] = Part(parameter.master, parameter.stored.shape, held, writes)
        state = trainer.optimizer.state.get(parameter.master, {}) if trainer.optimizer is not None else {}
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        optimizer[name] = {key: _state_part(value, parameter, held, writes) for key, value in tensors.items()}
    for index, stage in trainer.stages.items():
        mesh = trainer.meshes[index]
        for stored in stage.program.buffers:
            name = trainer.graph.values[stored.value].names[0]
            if name in trainer.persistent and name not in model:
                held = rest_held(stored, mesh, mesh.coordinate, cut=False)
                first = trainer.first_stage_with(stored.value) == index
                alone = all(
                    place == 0 for place, token in zip(mesh.coordinate, stored.compute, strict=True) if token == "R"
                )
                model[name] = Part(stage.parameters.buffers[stored.value], stored.shape, held, first and alone)
    return {"model": model, "optimizer": optimizer}


def _state_part(value: Tensor, parameter: StoredParameter, held: Held, writes: bool) -> Part:
    """An optimizer's tensor lies as its master, or is one number that all ranks have alike."""
    if value.shape == parameter.master.shape and value.dim():
        return Part(value, parameter.stored.shape, held, writes)
    whole = tuple(torch.arange(size) for size in value.shape)
    first = all(not len(index) or int(index[0]) == 0 for index in held) and writes
    return Part(value, value.shape, whole, first and all(len(index) for index in held))


def _stored(trainer: Trainer) -> Iterator[tuple[StoredParameter, Held, bool]]:
    for index, stage in trainer.stages.items():
        mesh = trainer.meshes[index]
        for parameter in stage.parameters.parameters.values():
            held = rest_held(parameter.stored, mesh, mesh.coordinate, cut=True)
            if not parameter.stored.trained:
                held = rest_held(parameter.stored, mesh, mesh.coordinate, cut=False)
            first = trainer.first_stage_with(parameter.stored.value) == index
            yield parameter, held, parameter.counted and first


def save(trainer: Trainer, folder: str | os.PathLike[str], step: int, *, keep: int = 2) -> Path:
    """Write a checkpoint of this step and point ``latest`` at it; collective. Older ones beyond ``keep`` are removed.

    Whatever interrupts it, ``latest`` names a whole checkpoint."""
    root = Path(folder)
    temporary, final = root / f".step-{step}.tmp", root / f"step-{step}"
    if dist.get_rank() == 0:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
    dist.barrier()
    write_tensors(state_dict(trainer), storage_writer=FileSystemWriter(temporary, sync_files=True))
    dist.barrier()
    if dist.get_rank() == 0:
        write_atomically(temporary / "optimizer.json", json.dumps(_settings(trainer)).encode())
        if trainer.scale is not None:
            write_atomically(temporary / "scale.json", json.dumps(trainer.scale.state()).encode())
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        write_atomically(root / "latest", final.name.encode())
        steps = sorted(int(path.name.removeprefix("step-")) for path in root.glob("step-*"))
        for old in [number for number in steps if number != step][: max(0, len(steps) - keep)]:
            shutil.rmtree(root / f"step-{old}", ignore_errors=True)
    dist.barrier()
    return final


def load(trainer: Trainer, folder: str | os.PathLike[str]) -> int:
    """Read the newest checkpoint, of any plan; collective. Returns its step; PlanFileError where there is none."""
    root = Path(folder)
    try:
        path = root / (root / "latest").read_text().strip()
    except OSError as error:
        raise PlanFileError(f"no checkpoint in {root}: {error.strerror}") from None
    reader = FileSystemReader(path)
    found = reader.read_metadata().state_dict_metadata
    if trainer.optimizer is not None:
        _make_state(
            trainer,
            {
                name: (tuple(meta.size), meta.properties.dtype)
                for name, meta in found.items()
                if name.startswith("optimizer.") and isinstance(meta, TensorStorageMetadata)
            },
        )
    read_tensors(state_dict(trainer), storage_reader=reader)
    if trainer.optimizer is not None:
        settings = json.loads((path / "optimizer.json").read_bytes())
        if len(settings) == len(trainer.optimizer.param_groups):
            for group, given in zip(trainer.optimizer.param_groups, settings, strict=True):
                group.update(given)
    if trainer.scale is not None and (path / "scale.json").is_file():
        trainer.scale.restore(json.loads((path / "scale.json").read_bytes()))
    for stage in trainer.stages.values():
        stage.parameters.gather()
    trainer.num_steps = int(path.name.removeprefix("step-"))
    return trainer.num_steps


def _make_state(trainer: Trainer, stored: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    """Room for the optimizer's state that a checkpoint holds."""
    assert trainer.optimizer is not None
    for parameter in trainer.trained():
        prefix = f"optimizer.{parameter.names[0]}."
        state = trainer.optimizer.state[parameter.master]
        for name, (size, dtype) in stored.items():
            key = name.removeprefix(prefix)
            if not name.startswith(prefix) or "." in key:
                continue
            shape = parameter.master.shape if size == parameter.stored.shape and size else size
            device = parameter.master.device if shape == parameter.master.shape and size else torch.device("cpu")
            state[key] = torch.zeros(shape, dtype=dtype, device=device)


def _settings(trainer: Trainer) -> list[dict[str, Any]]:
    """Plain settings of the optimizer's groups."""
    groups = trainer.optimizer.param_groups if trainer.optimizer is not None else []
    plain = (bool, int, float, str, type(None))
    return [
        {key: value for key, value in group.items() if isinstance(value, plain) or _is_numbers(value)}
        for group in groups
    ]


def _is_numbers(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(isinstance(each, (int, float)) for each in value)
