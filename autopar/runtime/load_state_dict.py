"""Restores a training from the sections of ``checkpoint_state.full_state_dict``, in memory."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from autopar.core.errors import CheckpointError
from autopar.runtime.checkpoint_shards import CheckpointShard
from autopar.runtime.checkpoint_state import (
    is_number_setting,
    optimizer_shard,
    state_dict,
    stored_parameters,
    training_entries,
)
from autopar.runtime.training_state import TrainingState

_MAX_NAMED_FAULTS = 3
Sections = Mapping[str, Mapping[str, Any]]


def check_state_dict(state: TrainingState, given: Sections) -> None:
    """CheckpointError that names what ``given`` lacks, what of it would not be restored, and what is sharded as under
    another plan. Changes nothing."""
    faults = list(dict.fromkeys(_faults(state, given)))
    if faults:
        more = f" and {len(faults) - _MAX_NAMED_FAULTS} more" if len(faults) > _MAX_NAMED_FAULTS else ""
        raise CheckpointError(f"{', '.join(faults[:_MAX_NAMED_FAULTS])}{more}")


def _faults(state: TrainingState, given: Sections) -> Iterator[str]:
    """What is wrong with ``given``, a clause each."""
    own = {**state_dict(state), "training": training_entries(state, num_steps=0)}
    yield from _differing_names("", own, given)
    sections = [section for section in own if section in given]
    for section in sections:
        yield from _differing_names(f"{section}.", own[section], given[section])
    if "model" in sections:
        for name, shard in _own_shards(state):
            if name in given["model"]:
                yield from _shard_fault(f"model.{name}", given["model"][name], shard)
    if "training" in sections:
        for name in own["training"].keys() & given["training"].keys():
            entry = given["training"][name]
            if not isinstance(entry, Tensor) or entry.shape != own["training"][name].shape:
                yield f"training.{name} is not a tensor of shape {tuple(own['training'][name].shape)}"
    if "optimizer" in sections:
        yield from _optimizer_faults(state, given)


def _own_shards(state: TrainingState) -> Iterator[tuple[str, CheckpointShard]]:
    """(name, shard) of all masters and buffers, each copy of a parameter that is tied over this rank's stages."""
    yield from state_dict(state)["model"].items()
    for parameter, indices, _ in stored_parameters(state):
        yield parameter.names[0], CheckpointShard(parameter.master, parameter.sharding.shape, indices, is_writer=False)


def _optimizer_faults(state: TrainingState, given: Sections) -> Iterator[str]:
    is_set = _has_optimizer_state(given)
    optimizer_states = state.optimizer.state if state.optimizer is not None else {}
    for parameter, indices, _ in stored_parameters(state):
        name = parameter.names[0]
        entries = given["optimizer"].get(name, {})
        if state.optimizer is None:
            yield from (f"there is no optimizer to restore optimizer.{name}.{key}" for key in entries)
            continue
        for key, entry in entries.items():
            if not isinstance(entry, CheckpointShard):
                yield f"optimizer.{name}.{key} is not one of the tensors of state_dict()"
            else:
                yield from _shard_fault(
                    f"optimizer.{name}.{key}", entry, optimizer_shard(entry.local, parameter, indices, is_writer=False)
                )
        for key, own in optimizer_states.get(parameter.master, {}).items():
            if isinstance(own, Tensor) and is_set and key not in entries:
                yield f"optimizer.{name}.{key} is missing"


def _differing_names(prefix: str, own: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"{prefix}{name} is missing" for name in own if name not in given)
    yield from (f"{prefix}{name} would not be restored" for name in given if name not in own)


def _shard_fault(name: str, given: Any, own: CheckpointShard) -> Iterator[str]:
    if not isinstance(given, CheckpointShard):
        yield f"{name} is not one of the tensors of state_dict()"
    elif given.shape != own.shape:
        yield f"{name} has shape {tuple(given.shape)}, not {tuple(own.shape)}"
    elif given.boxes != own.boxes:
        yield f"{name} is sharded as under another plan: use torch.distributed.checkpoint, or save and load"


def _has_optimizer_state(given: Sections) -> bool:
    return bool(given.get("training", {}).get("has_optimizer_state", 0))


def load_state_dict(state: TrainingState, given: Sections) -> None:
    """Restore all of ``given``, which passed ``check_state_dict``; the weights are not updated from the masters.

    Tensors are copied, unless they are the state's own; those that ``full_state_dict`` made anew are taken over."""
    with torch.no_grad():
        for name, shard in _own_shards(state):
            _copy(given["model"][name].local, shard.local)
        if state.optimizer is not None:
            _load_optimizer(state, state.optimizer, given)
    training = given["training"]
    state.num_steps = int(training["num_steps"])
    if state.loss_scale is not None:
        state.loss_scale.load_state_dict(
            {key: training[f"loss_scale.{key}"].item() for key in ("factor", "good_steps")}
        )


def _load_optimizer(state: TrainingState, optimizer: torch.optim.Optimizer, given: Sections) -> None:
    """Restore the optimizer's tensors, and the numbers of its parameter groups."""
    for parameter, *_ in stored_parameters(state):
        if not parameter.sharding.trained:
            continue
        restored = given["optimizer"][parameter.names[0]] if _has_optimizer_state(given) else {}
        current = optimizer.state.get(parameter.master, {})
        for key in [key for key, entry in current.items() if isinstance(entry, Tensor) and key not in restored]:
            del current[key]
        for key, shard in restored.items():
            entry = current.get(key)
            if isinstance(entry, Tensor) and entry.shape == shard.local.shape and entry.dtype == shard.local.dtype:
                _copy(shard.local, entry)
            else:
                optimizer.state[parameter.master][key] = shard.local if shard.is_new else shard.local.clone()
    for number, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if is_number_setting(key, value):
                group[key] = _setting_like(value, given["training"][f"setting.{number}.{key}"].tolist())


def _setting_like(own: Any, restored: Any) -> Any:
    """A restored setting, of floats, with the types that the optimizer's own has."""
    if isinstance(own, (tuple, list)):
        return type(own)(_setting_like(*pair) for pair in zip(own, restored, strict=True))
    return int(restored) if isinstance(own, int) and restored == int(restored) else restored


def _copy(source: Tensor, target: Tensor) -> None:
    if source.data_ptr() != target.data_ptr():
        target.copy_(source)
