"""Checkpoints with torch.distributed.checkpoint, under the model's own names and global shapes, so that any plan loads
those of any other.

    .metadata, *.distcp   model.NAME, optimizer.NAME.KEY (fp32 masters and the optimizer's state), training.KEY (what
                          else ``Trainer.state_dict`` has, for who loads by torch.distributed.checkpoint itself)
    optimizer.json        settings of the optimizer's parameter groups (learning rate ...)
    scale.json            the loss scale of an fp16 plan; without it the scale starts at its initial value
    SHA256SUMS            hashes of the files above but *.distcp, which have CRCs (see ``checkpoint_integrity``)

It is a folder, written under a temporary name and renamed when all ranks are done (``checkpoint_folder``).

A rank's part of a tensor is a set of boxes (``checkpoint_shards``); of replicas only the first is written. Only tensors
and JSON are stored, and only they are loaded: whatever else a checkpoint of another writer has is ignored, and never
run.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as write_tensors

from autopar.core.errors import CheckpointError, UsageError
from autopar.core.write_file import write_atomically
from autopar.runtime.checkpoint_folder import (
    MAX_STEP,
    checkpoint_path,
    complete_checkpoint,
    prepare_folder,
    remove_old_checkpoints,
    temporary_path,
)
from autopar.runtime.checkpoint_integrity import write_sums
from autopar.runtime.checkpoint_state import full_state_dict, is_setting
from autopar.runtime.on_all_ranks import run_on_all_ranks
from autopar.runtime.training_state import TrainingState


def save(state: TrainingState, folder: str | os.PathLike[str], step: int, *, keep: int = 2) -> Path:
    """Write a checkpoint as ``step-STEP`` and point ``latest`` at it; returns its path. Collective.

    Only the ``keep`` checkpoints of the highest steps remain, this one always; folders of other names are ignored.
    Until it is complete the one before, also of the same step, can be loaded. Where it fails on any rank,
    CheckpointError, the same on every rank; UsageError where ``step`` is not a whole number from 0 on."""
    root = Path(folder)
    _check_step(step)
    is_first_rank = dist.get_rank() == 0

    def prepare() -> dict[str, Any]:
        if is_first_rank:
            prepare_folder(root, step)
        return full_state_dict(state, num_steps=step)

    def complete() -> None:
        if is_first_rank:
            path = temporary_path(root, step)
            write_atomically(path / "optimizer.json", json.dumps(_group_settings(state)).encode())
            if state.loss_scale is not None:
                write_atomically(path / "scale.json", json.dumps(state.loss_scale.state_dict()).encode())
            write_sums(path)
            complete_checkpoint(root, step)
            remove_old_checkpoints(root, step, keep)

    final = checkpoint_path(root, step)
    texts = {"failure": f"cannot save {final}", "remedy": "earlier checkpoints are as they were"}
    entries = run_on_all_ranks(prepare, **texts)
    writer = FileSystemWriter(temporary_path(root, step), sync_files=True)
    run_on_all_ranks(lambda: write_tensors(entries, storage_writer=writer), **texts)
    run_on_all_ranks(complete, **texts)
    return final


def _check_step(step: int) -> None:
    """UsageError where a step is not a whole number from 0 on, CheckpointError where the ranks save different steps.
    Collective."""
    steps: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(steps, step)
    for each in steps:
        if not isinstance(each, int) or not 0 <= each <= MAX_STEP:
            raise UsageError(f"step must be a whole number from 0 to {MAX_STEP}, not {each!r}")
    other = next((rank for rank, each in enumerate(steps) if each != steps[0]), None)
    if other is not None:
        raise CheckpointError(f"cannot save: rank 0 saves step {steps[0]}, rank {other} saves step {steps[other]}")


def _group_settings(state: TrainingState) -> list[dict[str, Any]]:
    """The settings of the optimizer's parameter groups that JSON can store."""
    groups = state.optimizer.param_groups if state.optimizer is not None else []
    return [{key: value for key, value in group.items() if is_setting(key, value)} for group in groups]
