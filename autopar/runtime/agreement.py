"""What the ranks of a world must agree on before the first step: one plan, its size, and the order of collectives."""

import hashlib
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import msgspec
import torch.distributed as dist

from autopar.core.errors import AutoparError, UsageError
from autopar.core.plan import Plan
from autopar.runtime.lower.lowered_collectives import collective_order, collective_order_by_group
from autopar.runtime.stage_runner import StageRunner

RENDEZVOUS_TIMEOUT_S = 50.0
"""How far apart ranks may come to the first meeting."""


def check_world(plan: Plan, timeout_s: float = RENDEZVOUS_TIMEOUT_S) -> None:
    """UsageError on every rank where the world has another size than the plan, or ranks hold different plans;
    AutoparError on every rank that is there where one does not come within ``patience_s``."""
    if not dist.is_initialized():
        raise UsageError("torch.distributed is not initialised: call init_process_group, or start with torchrun")
    world = dist.get_world_size()
    if world != plan.gpus:
        raise UsageError(f"the plan is for {plan.gpus} ranks, the world has {world}; start {plan.gpus}, or plan again")
    _await_ranks(timeout_s)
    digest = hashlib.sha256(msgspec.json.encode(plan)).hexdigest()[:12]
    found: list[Any] = [None] * world
    dist.all_gather_object(found, digest)
    if len(set(found)) > 1:
        others = [f"rank {rank} has {other}" for rank, other in enumerate(found) if other != found[0]]
        raise UsageError(f"the ranks hold different plans: rank 0 has {found[0]}, {', '.join(others[:8])}")


def _await_ranks(timeout_s: float) -> None:
    """AutoparError where a rank does not come: other collectives would wait for it for the process group's timeout."""
    patience = timedelta(seconds=timeout_s)
    try:
        group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=patience)
        dist.monitored_barrier(group, timeout=patience, wait_all_ranks=True)
    except RuntimeError as error:
        raise AutoparError(
            f"rank {dist.get_rank()} waited {timeout_s:g} s for the others ({str(error).splitlines()[0][:200]}); see how "
            "the missing rank ended, and start all ranks again"
        ) from error


def check_same_collectives(stages: Mapping[int, StageRunner]) -> None:
    """AutoparError on every rank where the members of a group would run different collectives: they would hang."""
    mine: dict[tuple[int, str], str] = {}
    for index, stage in stages.items():
        if stage.lowered is not None:
            mesh = stage.function.mesh
            mine[index, "stage"] = _digest(collective_order(stage.lowered, mesh))
            mine |= {
                (index, group): _digest(run) for group, run in collective_order_by_group(stage.lowered, mesh).items()
            }
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    for index, group in sorted({key for theirs in found for key in theirs}):
        ranks: dict[str, list[int]] = {}
        for rank, theirs in enumerate(found):
            if (index, group) in theirs:
                ranks.setdefault(theirs[index, group], []).append(rank)
        if len(ranks) > 1:
            sides = " and ".join(str(alike) for alike in ranks.values())
            raise AutoparError(
                f"ranks {sides} of stage {index} lowered it to different collectives; "
                "run with mode='reference' and report the plan"
            )


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
