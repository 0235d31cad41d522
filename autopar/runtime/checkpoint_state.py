"""What a checkpoint has of a training: the tensors of a rank, under the model's own names and global shapes.

    model      NAME: fp32 master, or buffer
    optimizer  NAME: {KEY: the optimizer's tensor of that parameter}
    training   num_steps
               has_optimizer_state: 0 before the first step, when the tensors of "optimizer" have no meaning
               setting.GROUP.KEY: a number of a parameter group of the optimizer (lr, betas ...)
               loss_scale.factor, loss_scale.good_steps of an fp16 plan

"training" are small tensors, the same on every rank; a rank without an optimizer has no entries of that.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from autopar.core.placement import REPLICATE
from autopar.runtime.checkpoint_shards import CheckpointShard
from autopar.runtime.new_optimizer_state import new_optimizer_state
from autopar.runtime.stored_parameters import StoredParameter, stored_indices
from autopar.runtime.training_state import TrainingState
from autopar.runtime.transfer import DimIndices

OptimizerStates = Mapping[Tensor, Mapping[str, Any]]
"""The optimizer's state: by master, then key."""


def state_dict(state: TrainingState, optimizer_states: OptimizerStates | None = None) -> dict[str, Any]:
    """``model`` (by the model's names) and ``optimizer`` (by name, then key) as ``CheckpointShard``s that share the
    state's memory, for ``torch.distributed.checkpoint`` to save and to load into. ``optimizer_states``: tensors by master
    that nothing else uses, in place of the optimizer's own."""
    are_new = optimizer_states is not None
    if optimizer_states is None:
        optimizer_states = state.optimizer.state if state.optimizer is not None else {}
    model: dict[str, CheckpointShard] = {}
    optimizer: dict[str, dict[str, CheckpointShard]] = {}
    for parameter, indices, is_writer in stored_parameters(state):
        name = parameter.names[0]
        if name in model:
            continue
        model[name] = CheckpointShard(parameter.master, parameter.sharding.shape, indices, is_writer)
        entries = optimizer_states.get(parameter.master, {})
        optimizer[name] = {
            key: optimizer_shard(entry, parameter, indices, is_writer=is_writer, is_new=are_new)
            for key, entry in entries.items()
            if isinstance(entry, Tensor)
        }
    for name, shard in _buffer_shards(state):
        model.setdefault(name, shard)
    return {"model": model, "optimizer": optimizer}


def optimizer_shard(
    entry: Tensor, parameter: StoredParameter, indices: DimIndices, *, is_writer: bool, is_new: bool = False
) -> CheckpointShard:
    """A tensor of the optimizer's state is sharded as its master, or the same on all ranks, such as a step count."""
    if entry.shape == parameter.master.shape and entry.dim():
        return CheckpointShard(entry, parameter.sharding.shape, indices, is_writer, is_new=is_new)
    full = tuple(torch.arange(size) for size in entry.shape)
    has_first_element = all(len(index) and int(index[0]) == 0 for index in indices)
    return CheckpointShard(entry, entry.shape, full, is_writer and has_first_element, is_new=is_new)


def stored_parameters(state: TrainingState) -> Iterator[tuple[StoredParameter, DimIndices, bool]]:
    """(parameter, the indices of its master, whether this rank writes them) of this rank's stages."""
    for stage_index, stage in state.stages.items():
        for value, parameter in stage.parameters.items():
            indices = stored_indices(parameter.sharding, stage.mesh, stage.mesh.coordinate, zero_sharded=True)
            is_first_stage = state.first_stage_storing[value] == stage_index
            yield parameter, indices, parameter.counts_in_norm and is_first_stage


def _buffer_shards(state: TrainingState) -> Iterator[tuple[str, CheckpointShard]]:
    """(name, this rank's shard) of the buffers that the model's own ``state_dict`` has."""
    for stage_index, stage in state.stages.items():
        for sharding in stage.buffer_shardings:
            name = state.buffer_names.get(sharding.value)
            if name is None:
                continue
            indices = stored_indices(sharding, stage.mesh, stage.mesh.coordinate, zero_sharded=False)
            positions = zip(stage.mesh.coordinate, sharding.compute_placements, strict=True)
            is_first_replica = all(position == 0 for position, placement in positions if placement == REPLICATE)
            is_writer = is_first_replica and state.first_stage_storing[sharding.value] == stage_index
            yield name, CheckpointShard(stage.buffers[sharding.value], sharding.shape, indices, is_writer)


def training_entries(state: TrainingState, *, num_steps: int) -> dict[str, Tensor]:
    """The section "training", as tensors of their own."""
    entries = {"num_steps": torch.tensor(num_steps)}
    if state.optimizer is not None:
        entries["has_optimizer_state"] = torch.tensor(int(has_optimizer_state(state.optimizer)))
        for number, group in enumerate(state.optimizer.param_groups):
            for key, value in group.items():
                if is_number_setting(key, value):
                    entries[f"setting.{number}.{key}"] = torch.tensor(value, dtype=torch.float64)
    if state.loss_scale is not None:
        entries["loss_scale.factor"] = torch.tensor(state.loss_scale.factor, dtype=torch.float64)
        entries["loss_scale.good_steps"] = torch.tensor(state.loss_scale.good_steps)
    return entries


def has_optimizer_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer has tensors of any parameter: after its first step, some from the start."""
    return any(isinstance(entry, Tensor) for entries in optimizer.state.values() for entry in entries.values())


def full_state_dict(state: TrainingState, *, num_steps: int) -> dict[str, dict[str, Any]]:
    """All three sections, to save or to load into. Before the optimizer's first step "optimizer" has new tensors, which
    ``load_state_dict`` takes over. Raises UsageError where these cannot be made."""
    states: OptimizerStates | None = None
    if state.optimizer is not None and not has_optimizer_state(state.optimizer):
        states = {
            parameter.master: new_optimizer_state(state.optimizer, parameter.master)
            for parameter in state.trained_parameters()
        }
    return {**state_dict(state, states), "training": training_entries(state, num_steps=num_steps)}


def is_number_setting(key: str, value: Any) -> bool:
    """Whether a parameter group's entry is a number, or several, rather than a switch."""
    values = value if isinstance(value, (tuple, list)) else (value,)
    return key != "params" and all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in values)


def is_setting(key: str, value: Any) -> bool:
    """Whether a parameter group's entry is a setting of plain numbers or text, not its parameters."""
    are_numbers = isinstance(value, (tuple, list)) and all(isinstance(each, (int, float)) for each in value)
    return key != "params" and (are_numbers or isinstance(value, (bool, int, float, str, type(None))))
