"""What the tests of checkpoints share: a small trainer, and a reader of checkpoints that uses torch's own functions."""

from pathlib import Path

import msgspec
import torch

from autopar.core.plan import Plan
from autopar.runtime.apply import build_trainer
from autopar.runtime.trainer import Trainer
from tests.distributed import parity
from tests.distributed.random_models import random_workload

SEED = 6


def read_whole(folder: str) -> dict[str, torch.Tensor]:
    """A checkpoint as full tensors, read in one process by torch's own functions."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    path = Path(folder) / (Path(folder) / "latest").read_text()
    dcp_to_torch_save(path, path / "full.pt")
    found = torch.load(path / "full.pt", weights_only=False)
    flat = {f"model.{name}": tensor for name, tensor in found["model"].items()}
    for name, state in found["optimizer"].items():
        flat.update({f"optimizer.{name}.{key}": tensor for key, tensor in state.items()})
    return flat


def trainer_and_batch(plan_json: bytes) -> tuple[Trainer, dict[str, torch.Tensor]]:
    """A trainer of the random model number `SEED` under a plan, and a batch for it."""
    plan = msgspec.json.decode(plan_json, type=Plan)
    workload = random_workload(SEED)
    model = parity.real_model(workload, SEED)
    trainer = build_trainer(
        plan, model, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), workload=workload, mode="reference"
    )
    return trainer, parity.random_batch(workload, plan.global_batch, SEED, 12)
