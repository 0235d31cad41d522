"""Loads a checkpoint as ``save_checkpoint`` writes it, after all of it was checked.

Only tensors and JSON are loaded: whatever else a checkpoint of another writer has is ignored, and never run.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as read_tensors

from autopar.core.errors import AutoparError, CheckpointError, PlanFileError
from autopar.runtime.checkpoint_folder import LATEST, checkpoint_path, latest_step, readable_path, saved_steps
from autopar.runtime.checkpoint_integrity import CheckedReader, check_sums, check_tensors
from autopar.runtime.checkpoint_metadata import METADATA, TensorIndex, read_metadata
from autopar.runtime.checkpoint_state import is_setting, state_dict
from autopar.runtime.loss_scale import LossScale
from autopar.runtime.training_state import TrainingState


@dataclass(frozen=True, slots=True, kw_only=True)
class _CheckedCheckpoint:
    """A checkpoint that passed the checks. ``optimizer_states`` are tensors to load the optimizer's state into, by
    master and key; ``settings`` and ``scale`` are None where the checkpoint has none; ``digest`` is the same on ranks
    that see the same checkpoint."""

    path: Path
    step: int
    reader: CheckedReader
    optimizer_states: dict[Tensor, dict[str, Tensor]]
    settings: list[dict[str, Any]] | None
    scale: LossScale | None
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _CheckOutcome:
    """What one rank tells the others of its checks: ``digest`` is None where they failed, for ``reason``;
    ``is_missing``: there is no checkpoint."""

    digest: str | None
    reason: str
    is_missing: bool


def load(state: TrainingState, folder: str | os.PathLike[str]) -> int:
    """Load the newest checkpoint of a folder, written under any plan; returns its step. Collective.

    PlanFileError where there is none; CheckpointError where it is damaged, of another model, or names classes that the
    metadata of torch.distributed.checkpoint does not have. Nothing that it contains is run. All ranks raise the same
    kind of error, and ``state`` is unchanged: everything is checked first, a share of the tensors by each rank. Only
    where a file is lost or changes after that, parameters and optimizer may be partly loaded, and the error says so.

    torch.distributed.checkpoint itself may have written it, under these names. Without ``optimizer.json`` the optimizer
    keeps its settings."""
    checked = _check_on_all_ranks(lambda: _check_newest(state, Path(folder)))
    has_state = torch.tensor(1)
    training = {"has_optimizer_state": has_state} if _tells_optimizer_state(checked.reader.index) else {}
    entries = {**state_dict(state, checked.optimizer_states), "training": training}
    try:
        read_tensors(entries, storage_reader=checked.reader)
    except CheckpointException as error:
        rank, (failure, _) = next(iter(error.failures.items()))
        raise CheckpointError(
            f"cannot load {checked.path}: rank {rank} failed to read a file that passed the check "
            f"({str(failure)[:200]}); parameters and optimizer state are partly loaded: load a checkpoint before the "
            "next step"
        ) from None
    if state.optimizer is not None:
        for master, tensors in checked.optimizer_states.items():
            own = state.optimizer.state[master]
            for key in [key for key, entry in own.items() if isinstance(entry, Tensor)]:
                del own[key]
            own.update(tensors if has_state else {})
        if checked.settings is not None and len(checked.settings) == len(state.optimizer.param_groups):
            for group, settings in zip(state.optimizer.param_groups, checked.settings, strict=True):
                group.update(settings)
    if state.loss_scale is not None and checked.scale is not None:
        state.loss_scale = checked.scale
    for stage in state.stages.values():
        stage.update_weights()
    state.num_steps = checked.step
    return state.num_steps


def _check_on_all_ranks(check: Callable[[], _CheckedCheckpoint]) -> _CheckedCheckpoint:
    """What ``check`` returns; where it fails on any rank, or ranks see different checkpoints, an error on every
    rank."""
    checked, error = None, None
    try:
        checked = check()
    except Exception as raised:  # of whatever kind: the other ranks wait for this one's outcome
        error = raised
    reason = str(error) if isinstance(error, AutoparError) else f"{type(error).__name__}: {error}"
    outcomes: list[Any] = [None] * dist.get_world_size()
    own = _CheckOutcome(
        digest=checked.digest if checked is not None else None,
        reason=reason,
        is_missing=isinstance(error, PlanFileError),
    )
    dist.all_gather_object(outcomes, own)
    if error is not None and not isinstance(error, AutoparError):
        raise error
    _raise_if_any_failed(outcomes)
    assert checked is not None
    return checked


def _raise_if_any_failed(outcomes: Sequence[_CheckOutcome]) -> None:
    """PlanFileError where no rank sees a checkpoint; CheckpointError where one failed, or they see different ones.
    ``outcomes`` are by rank."""
    failed = {rank: outcome for rank, outcome in enumerate(outcomes) if outcome.digest is None}
    all_failed = len(failed) == len(outcomes)
    if all_failed and all(outcome.is_missing for outcome in failed.values()):
        raise PlanFileError(outcomes[0].reason)
    if failed:
        # a rank that found damage, before one that found no checkpoint
        rank = min(failed, key=lambda rank: failed[rank].is_missing)
        is_common = all_failed and len(set(failed.values())) == 1
        raise CheckpointError(failed[rank].reason if is_common else f"rank {rank}: {failed[rank].reason}")
    ranks_by_digest = {outcome.digest: rank for rank, outcome in enumerate(outcomes)}
    if len(ranks_by_digest) > 1:
        views = ", ".join(f"rank {rank} sees {digest}" for digest, rank in list(ranks_by_digest.items())[:8])
        raise CheckpointError(f"the ranks see different checkpoints: {views}; give all ranks the same shared folder")


def _check_newest(state: TrainingState, root: Path) -> _CheckedCheckpoint:
    """Check the newest checkpoint of a folder: all small files, and this rank's share of the tensors. Changes
    nothing."""
    step = latest_step(root)
    path = readable_path(root, step)
    try:
        index = read_metadata(path)
        check_sums(path)
        optimizer_states = _optimizer_tensors(state, index)
        _check_shapes(state_dict(state, optimizer_states), index)
        reader = CheckedReader(path, index)
        names = [name for name in index.tensors if name.startswith(("model.", "optimizer.", "training."))]
        check_tensors(reader, names, rank=dist.get_rank(), num_ranks=dist.get_world_size())
        return _CheckedCheckpoint(
            path=path,
            step=step,
            reader=reader,
            optimizer_states=optimizer_states,
            settings=_read_settings(path),
            scale=_read_scale(path) if state.loss_scale is not None else None,
            digest=f"{path.name} ({hashlib.sha256((path / METADATA).read_bytes()).hexdigest()[:12]})",
        )
    except CheckpointError as error:
        others = ", ".join(checkpoint_path(root, other).name for other in saved_steps(root) if other != step)
        way_out = f"to load another ({others}), write its name to {root / LATEST}" if others else "there is no other"
        raise CheckpointError(f"cannot load {path}: {error}; nothing was loaded; {way_out}") from None


def _tells_optimizer_state(index: TensorIndex) -> bool:
    """Whether the checkpoint tells if the optimizer had taken a step; others than ours do not, and have its state only
    then."""
    tensor = index.tensors.get("training.has_optimizer_state")
    return tensor is not None and not tensor.size and tensor.properties.dtype == torch.int64


def _optimizer_tensors(state: TrainingState, index: TensorIndex) -> dict[Tensor, dict[str, Tensor]]:
    """Tensors, by master and key, to load the optimizer's state of a checkpoint into: the optimizer's own where they
    have its shape and dtype, so that loading needs no second copy; else new ones."""
    if state.optimizer is None:
        return {}
    stored: dict[str, dict[str, TensorStorageMetadata]] = {}
    for name, tensor in index.tensors.items():
        prefix, _, key = name.rpartition(".")
        stored.setdefault(prefix, {})[key] = tensor
    optimizer_states: dict[Tensor, dict[str, Tensor]] = {}
    for parameter in state.trained_parameters():
        master, current = parameter.master, state.optimizer.state.get(parameter.master, {})
        optimizer_states[master] = {}
        for key, tensor in stored.get(f"optimizer.{parameter.names[0]}", {}).items():
            is_sharded = bool(tensor.size) and tensor.size == parameter.sharding.shape
            shape, device = (master.shape, master.device) if is_sharded else (tensor.size, torch.device("cpu"))
            own, dtype = current.get(key), tensor.properties.dtype
            fits = isinstance(own, Tensor) and own.shape == shape and own.dtype == dtype
            optimizer_states[master][key] = own if fits else torch.zeros(shape, dtype=dtype, device=device)
    return optimizer_states


def _check_shapes(shards: Mapping[str, Any], index: TensorIndex) -> None:
    """CheckpointError where the checkpoint lacks a tensor of ``state_dict``, or has it in another shape."""
    wanted = {f"model.{name}": shard for name, shard in shards["model"].items()}
    for name, entries in shards["optimizer"].items():
        wanted |= {f"optimizer.{name}.{key}": shard for key, shard in entries.items()}
    faults = []
    for name, shard in wanted.items():
        tensor = index.tensors.get(name)
        if tensor is None:
            faults.append(f"it has no tensor {name}")
        elif tensor.size != shard.shape:
            faults.append(f"its {name} has shape {tuple(tensor.size)}, not {tuple(shard.shape)}")
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"it is a checkpoint of another model: {', '.join(faults[:3])}{more}")


def _read_json(path: Path) -> Any:
    """The content of a JSON file; None where there is no such file."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}") from None


def _read_settings(path: Path) -> list[dict[str, Any]] | None:
    """The settings of the optimizer's parameter groups; None where the checkpoint has none."""
    groups = _read_json(path / "optimizer.json")
    if groups is None:
        return None
    if (
        not isinstance(groups, list)
        or not all(isinstance(group, dict) for group in groups)
        or not all(is_setting(key, value) for group in groups for key, value in group.items())
    ):
        raise CheckpointError("optimizer.json is damaged: it is not a list of parameter-group settings")
    return groups


def _read_scale(path: Path) -> LossScale | None:
    """The loss scale; None where the checkpoint has none."""
    state = _read_json(path / "scale.json")
    scale = LossScale()
    try:
        if state is not None:
            scale.load_state_dict(state)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"scale.json is damaged: {error}") from None
    return scale if state is not None else None
