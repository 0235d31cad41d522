"""Checkpoints with torch.distributed.checkpoint: the model's own names and global shapes, so any plan loads any
other's.

    folder/latest         name of the newest whole checkpoint, replaced in one piece
    folder/step-12/       one checkpoint, written as .step-12.tmp and renamed when all ranks are done
        .metadata, *.distcp   model.NAME, optimizer.NAME.KEY (fp32 masters and the optimizer's state)
        optimizer.json        settings of the optimizer's groups (learning rate ...)
        scale.json            the loss scale of an fp16 plan; another plan's checkpoint has none, and the scale starts anew
        SHA256SUMS            hashes of the files above but *.distcp, which have CRCs (see ``checkpoint_files``)

A rank's part of a tensor is a set of boxes; of replicas only the first writes. Nothing but tensors and JSON is stored,
and nothing else is loaded: what else a checkpoint of another writer has is left alone, and never run.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as read_tensors
from torch.distributed.checkpoint.state_dict_saver import save as write_tensors

from autopar.core.errors import AutoparError, CheckpointError, PlanFileError
from autopar.core.placement import REPLICATE
from autopar.core.write_file import write_atomically
from autopar.runtime.checkpoint_integrity import CheckedReader, check_sums, check_tensors, write_sums
from autopar.runtime.checkpoint_metadata import METADATA, TensorIndex, read_metadata
from autopar.runtime.checkpoint_shards import CheckpointShard
from autopar.runtime.loss_scale import LossScale
from autopar.runtime.stored_parameters import StoredParameter, stored_indices
from autopar.runtime.trainer import Trainer
from autopar.runtime.transfer import DimIndices

LATEST = "latest"
OptimizerStates = Mapping[Tensor, Mapping[str, Any]]
"""The optimizer's state: by master, then key."""


def state_dict(trainer: Trainer, states: OptimizerStates | None = None) -> dict[str, Any]:
    """``model`` (by the model's names) and ``optimizer`` (by name, then key) as ``Part``s, for ``dcp.save`` and
    ``load``. ``states``: the optimizer's tensors by master, where they are not those of its own state."""
    if states is None:
        states = trainer.optimizer.state if trainer.optimizer is not None else {}
    model: dict[str, CheckpointShard] = {}
    optimizer: dict[str, dict[str, CheckpointShard]] = {}
    for parameter, held, writes in _stored_parameters(trainer):
        name = parameter.names[0]
        if name in model:
            continue
        model[name] = CheckpointShard(parameter.master, parameter.sharding.shape, held, writes)
        state = states.get(parameter.master, {})
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        optimizer[name] = {key: _optimizer_shard(value, parameter, held, writes) for key, value in tensors.items()}
    for index, stage in trainer.stages.items():
        mesh = trainer.meshes[index]
        for stored in stage.program.buffers:
            name = trainer.graph.values[stored.value].qualified_names[0]
            if name in trainer.persistent_names and name not in model:
                held = stored_indices(stored, mesh, mesh.coordinate, zero_sharded=False)
                first = trainer.first_stage_storing(stored.value) == index
                alone = all(
                    place == 0
                    for place, placement in zip(mesh.coordinate, stored.compute_placements, strict=True)
                    if placement == REPLICATE
                )
                model[name] = CheckpointShard(
                    stage.parameters.buffers[stored.value], stored.shape, held, first and alone
                )
    return {"model": model, "optimizer": optimizer}


def _optimizer_shard(
    value: Tensor, parameter: StoredParameter, indices: DimIndices, is_writer: bool
) -> CheckpointShard:
    """An optimizer's tensor lies as its master, or is one number that all ranks have alike."""
    if value.shape == parameter.master.shape and value.dim():
        return CheckpointShard(value, parameter.sharding.shape, indices, is_writer)
    whole = tuple(torch.arange(size) for size in value.shape)
    first = all(not len(index) or int(index[0]) == 0 for index in indices) and is_writer
    return CheckpointShard(value, value.shape, whole, first and all(len(index) for index in indices))


def _stored_parameters(trainer: Trainer) -> Iterator[tuple[StoredParameter, DimIndices, bool]]:
    for index, stage in trainer.stages.items():
        mesh = trainer.meshes[index]
        for parameter in stage.parameters.parameters.values():
            held = stored_indices(parameter.sharding, mesh, mesh.coordinate, zero_sharded=True)
            if not parameter.sharding.trained:
                held = stored_indices(parameter.sharding, mesh, mesh.coordinate, zero_sharded=False)
            first = trainer.first_stage_storing(parameter.sharding.value) == index
            yield parameter, held, parameter.counts_in_norm and first


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
        write_atomically(temporary / "optimizer.json", json.dumps(_group_settings(trainer)).encode())
        if trainer.loss_scale is not None:
            write_atomically(temporary / "scale.json", json.dumps(trainer.loss_scale.state_dict()).encode())
        write_sums(temporary)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        write_atomically(root / LATEST, final.name.encode())
        steps = sorted(int(path.name.removeprefix("step-")) for path in root.glob("step-*"))
        for old in [number for number in steps if number != step][: max(0, len(steps) - keep)]:
            shutil.rmtree(root / f"step-{old}", ignore_errors=True)
    dist.barrier()
    return final


@dataclass(frozen=True, slots=True, kw_only=True)
class _CheckedCheckpoint:
    """A checkpoint that was checked. ``states`` is room for the optimizer's state; ``settings`` and ``scale`` are None
    where it has none; ``digest`` is the same on ranks that see the same checkpoint."""

    path: Path
    reader: CheckedReader
    states: dict[Tensor, dict[str, Tensor]]
    settings: list[dict[str, Any]] | None
    scale: LossScale | None
    digest: str


def load(trainer: Trainer, folder: str | os.PathLike[str]) -> int:
    """Read the newest checkpoint, of any plan; collective. Returns its step.

    PlanFileError where there is none; CheckpointError where it is damaged, of another model, or names classes that the
    metadata of torch.distributed.checkpoint does not have. Nothing that it contains is run. All ranks raise alike, and
    the trainer is as before: everything is checked first, of the tensors a share by each rank. Only where a file is
    lost or changes after that, parameters and optimizer may be half loaded, and the error says so.

    It may be written by torch.distributed.checkpoint itself, under these names. Without ``optimizer.json`` the
    optimizer keeps its settings."""
    opened = _open_on_all_ranks(lambda: _check_newest(trainer, Path(folder)))
    try:
        read_tensors(state_dict(trainer, opened.states), storage_reader=opened.reader)
    except CheckpointException as error:
        rank, (failure, _) = next(iter(error.failures.items()))
        raise CheckpointError(
            f"cannot load {opened.path}: rank {rank} cannot read what was whole a moment ago ({str(failure)[:200]}); "
            "parameters and optimizer are half loaded: load a checkpoint before the next step"
        ) from None
    if trainer.optimizer is not None:
        for master, tensors in opened.states.items():
            state = trainer.optimizer.state[master]
            for key in [key for key, value in state.items() if isinstance(value, Tensor)]:
                del state[key]
            state.update(tensors)
        if opened.settings is not None and len(opened.settings) == len(trainer.optimizer.param_groups):
            for group, given in zip(trainer.optimizer.param_groups, opened.settings, strict=True):
                group.update(given)
    if trainer.loss_scale is not None and opened.scale is not None:
        trainer.loss_scale = opened.scale
    for stage in trainer.stages.values():
        stage.parameters.update_weights()
    trainer.num_steps = int(opened.path.name.removeprefix("step-"))
    return trainer.num_steps


def _open_on_all_ranks(work: Callable[[], _CheckedCheckpoint]) -> _CheckedCheckpoint:
    """What ``work`` returns; where it fails on any rank, or ranks see different checkpoints, an error on every rank."""
    opened, error = None, None
    try:
        opened = work()
    except Exception as raised:  # whatever it is: the other ranks wait for this one
        error = raised
    found: list[Any] = [None] * dist.get_world_size()
    reason = str(error) if isinstance(error, AutoparError) else f"{type(error).__name__}: {error}"
    dist.all_gather_object(found, (opened and opened.digest, reason, isinstance(error, PlanFileError)))
    failed = {rank: (none, reason) for rank, (digest, reason, none) in enumerate(found) if digest is None}
    if error is not None and not isinstance(error, AutoparError):
        raise error
    if len(failed) == len(found) and all(none for none, _ in failed.values()):
        raise PlanFileError(reason)
    if failed:
        rank = min(failed, key=lambda rank: failed[rank][0])  # a rank that finds something wrong, rather than nothing
        alike = len(failed) == len(found) and len(set(failed.values())) == 1
        raise CheckpointError(failed[rank][1] if alike else f"rank {rank}: {failed[rank][1]}")
    seen = {digest: rank for rank, (digest, *_) in enumerate(found)}
    if len(seen) > 1:
        sights = ", ".join(f"rank {rank} sees {digest}" for digest, rank in list(seen.items())[:8])
        raise CheckpointError(f"the ranks see different checkpoints: {sights}; give all of them one folder")
    assert opened is not None
    return opened


def _check_newest(trainer: Trainer, root: Path) -> _CheckedCheckpoint:
    """Check the newest checkpoint: all but its tensors, and of these this rank's share. Changes nothing."""
    path = root / _latest_name(root)
    try:
        index = read_metadata(path)
        check_sums(path)
        states = _optimizer_tensors(trainer, index)
        _check_shapes(state_dict(trainer, states), index)
        reader = CheckedReader(path, index)
        names = [name for name in index.tensors if name.startswith(("model.", "optimizer."))]
        check_tensors(reader, names, rank=dist.get_rank(), num_ranks=dist.get_world_size())
        return _CheckedCheckpoint(
            path=path,
            reader=reader,
            states=states,
            settings=_read_settings(path),
            scale=_read_scale(path) if trainer.loss_scale is not None else None,
            digest=f"{path.name} ({hashlib.sha256((path / METADATA).read_bytes()).hexdigest()[:12]})",
        )
    except CheckpointError as error:
        others = ", ".join(sorted(other.name for other in root.glob("step-*") if other != path))
        way_out = f"to load another, write its name to {root / LATEST}: {others}" if others else "there is no other"
        raise CheckpointError(f"cannot load {path}: {error}; nothing was loaded; {way_out}") from None


def _latest_name(root: Path) -> str:
    """The name of the newest checkpoint."""
    try:
        name = (root / LATEST).read_text().strip()
    except FileNotFoundError as error:
        raise PlanFileError(f"no checkpoint in {root}: {error.strerror}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {root / LATEST}: {error}") from None
    if not re.fullmatch(r"step-[0-9]{1,18}", name):
        raise CheckpointError(f"{root / LATEST} has {name[:80]!r}, not the name of a checkpoint such as step-12")
    return name


def _optimizer_tensors(trainer: Trainer, index: TensorIndex) -> dict[Tensor, dict[str, Tensor]]:
    """Tensors for the optimizer's state that a checkpoint holds: the optimizer's own where they have the shape."""
    if trainer.optimizer is None:
        return {}
    stored: dict[str, dict[str, TensorStorageMetadata]] = {}
    for name, tensor in index.tensors.items():
        prefix, _, key = name.rpartition(".")
        stored.setdefault(prefix, {})[key] = tensor
    states: dict[Tensor, dict[str, Tensor]] = {}
    for parameter in trainer.trained_parameters():
        master, known = parameter.master, trainer.optimizer.state.get(parameter.master, {})
        states[master] = {}
        for key, tensor in stored.get(f"optimizer.{parameter.names[0]}", {}).items():
            whole = not tensor.size or tensor.size != parameter.sharding.shape
            shape, device = (tensor.size, torch.device("cpu")) if whole else (master.shape, master.device)
            own, dtype = known.get(key), tensor.properties.dtype
            fits = isinstance(own, Tensor) and own.shape == shape and own.dtype == dtype
            states[master][key] = own if fits else torch.zeros(shape, dtype=dtype, device=device)
    return states


def _check_shapes(shards: Mapping[str, Any], index: TensorIndex) -> None:
    """CheckpointError where a part's tensor is not stored in its shape."""
    optimizer = {f"{name}.{key}": part for name, state in shards["optimizer"].items() for key, part in state.items()}
    wanted = {
        **{f"model.{name}": part for name, part in shards["model"].items()},
        **{f"optimizer.{name}": part for name, part in optimizer.items()},
    }
    faults = []
    for name, part in wanted.items():
        tensor = index.tensors.get(name)
        if tensor is None:
            faults.append(f"it has no tensor {name}")
        elif tensor.size != part.shape:
            faults.append(f"its {name} has shape {tuple(tensor.size)}, not {tuple(part.shape)}")
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"it is of another model: {', '.join(faults[:3])}{more}")


def _read_json(path: Path) -> Any:
    """None where there is no such file."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}") from None


def _read_settings(path: Path) -> list[dict[str, Any]] | None:
    groups = _read_json(path / "optimizer.json")
    if groups is None:
        return None
    if (
        not isinstance(groups, list)
        or not all(isinstance(group, dict) for group in groups)
        or not all(_is_setting(key, value) for group in groups for key, value in group.items())
    ):
        raise CheckpointError("optimizer.json is damaged: it is no list of an optimizer's settings")
    return groups


def _read_scale(path: Path) -> LossScale | None:
    state = _read_json(path / "scale.json")
    scale = LossScale()
    try:
        if state is not None:
            scale.load_state_dict(state)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"scale.json is damaged: {error}") from None
    return scale if state is not None else None


def _group_settings(trainer: Trainer) -> list[dict[str, Any]]:
    """Plain settings of the optimizer's groups."""
    groups = trainer.optimizer.param_groups if trainer.optimizer is not None else []
    return [{key: value for key, value in group.items() if _is_setting(key, value)} for group in groups]


def _is_setting(key: str, value: Any) -> bool:
    numbers = isinstance(value, (tuple, list)) and all(isinstance(each, (int, float)) for each in value)
    return key != "params" and (numbers or isinstance(value, (bool, int, float, str, type(None))))
