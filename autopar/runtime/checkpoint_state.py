"""What a checkpoint has of a training: the tensors of a rank, under the model's own names and global shapes."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from autopar.core.placement import REPLICATE
from autopar.runtime.checkpoint_shards import CheckpointShard
from autopar.runtime.stored_parameters import StoredParameter, stored_indices
from autopar.runtime.training_state import TrainingState
from autopar.runtime.transfer import DimIndices

OptimizerStates = Mapping[Tensor, Mapping[str, Any]]
"""The optimizer's state: by master, then key."""


def state_dict(state: TrainingState, optimizer_states: OptimizerStates | None = None) -> dict[str, Any]:
    """``model`` (by the model's names) and ``optimizer`` (by name, then key) as ``CheckpointShard``s that share the
    state's memory, for ``torch.distributed.checkpoint`` to save and to load into. ``optimizer_states``: the optimizer's
    tensors by master, where they are not those of its own state."""
    if optimizer_states is None:
        optimizer_states = state.optimizer.state if state.optimizer is not None else {}
    model: dict[str, CheckpointShard] = {}
    optimizer: dict[str, dict[str, CheckpointShard]] = {}
    for parameter, indices, is_writer in _stored_parameters(state):
        name = parameter.names[0]
        if name in model:
            continue
        model[name] = CheckpointShard(parameter.master, parameter.sharding.shape, indices, is_writer)
        entries = optimizer_states.get(parameter.master, {})
        optimizer[name] = {
            key: _optimizer_shard(entry, parameter, indices, is_writer)
            for key, entry in entries.items()
            if isinstance(entry, Tensor)
        }
    for name, shard in _buffer_shards(state):
        model.setdefault(name, shard)
    return {"model": model, "optimizer": optimizer}


def _optimizer_shard(
    entry: Tensor, parameter: StoredParameter, indices: DimIndices, is_writer: bool
) -> CheckpointShard:
    """A tensor of the optimizer's state is sharded as its master, or the same on all ranks, such as a step count."""
    if entry.shape == parameter.master.shape and entry.dim():
        return CheckpointShard(entry, parameter.sharding.shape, indices, is_writer)
    full = tuple(torch.arange(size) for size in entry.shape)
    has_first_element = all(len(index) and int(index[0]) == 0 for index in indices)
    return CheckpointShard(entry, entry.shape, full, is_writer and has_first_element)


def _stored_parameters(state: TrainingState) -> Iterator[tuple[StoredParameter, DimIndices, bool]]:
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


def is_setting(key: str, value: Any) -> bool:
    """Whether a parameter group's entry is a setting of plain numbers or text, not its parameters."""
    are_numbers = isinstance(value, (tuple, list)) and all(isinstance(each, (int, float)) for each in value)
    return key != "params" and (are_numbers or isinstance(value, (bool, int, float, str, type(None))))
