"""What the ranks of a world must agree on before the first step: the plan, its number of ranks, and the order of
collectives."""

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
"""How far apart ranks may arrive at their first collective."""


def check_world(plan: Plan, timeout_s: float = RENDEZVOUS_TIMEOUT_S) -> None:
    """Check that every rank has this plan, and the world as many ranks as the plan. Collective.

    UsageError on every rank where that is not so; AutoparError on the ranks that arrive where one does not within
    ``timeout_s``."""
    if not dist.is_initialized():
        raise UsageError("torch.distributed is not initialised: call init_process_group, or start with torchrun")
    world = dist.get_world_size()
    if world != plan.gpus:
        raise UsageError(
            f"the plan is for {plan.gpus} ranks, the world has {world}: start {plan.gpus} ranks, or make a plan for "
            f"{world}"
        )
    _await_ranks(timeout_s)
    digest = hashlib.sha256(msgspec.json.encode(plan)).hexdigest()[:12]
    digests: list[Any] = [None] * world
    dist.all_gather_object(digests, digest)
    if len(set(digests)) > 1:
        others = [f"rank {rank} has {other}" for rank, other in enumerate(digests) if other != digests[0]]
        raise UsageError(f"the ranks have different plans: rank 0 has {digests[0]}, {', '.join(others[:8])}")


def _await_ranks(timeout_s: float) -> None:
    """AutoparError where a rank does not arrive; other collectives would wait for it until the process group's
    timeout."""
    timeout = timedelta(seconds=timeout_s)
    try:
        group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
        dist.monitored_barrier(group, timeout=timeout, wait_all_ranks=True)
    except RuntimeError as error:
        raise AutoparError(
            f"rank {dist.get_rank()} waited {timeout_s:g} s for the other ranks ({str(error).splitlines()[0][:200]}); "
            "look at the log of the missing rank, then restart all ranks"
        ) from error


def check_same_collectives(stages: Mapping[int, StageRunner]) -> None:
    """Check that the members of each process group run the same collectives in the same order; else they would hang.

    ``stages`` are this rank's, by index. AutoparError on every rank where two members differ. Collective."""
    own: dict[tuple[int, str], str] = {}
    for index, stage in stages.items():
        if stage.lowered is not None:
            mesh = stage.function.mesh
            own[index, "stage"] = _digest(collective_order(stage.lowered, mesh))
            own |= {
                (index, group): _digest(order)
                for group, order in collective_order_by_group(stage.lowered, mesh).items()
            }
    digests_by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests_by_rank, own)
    for index, group in sorted({key for digests in digests_by_rank for key in digests}):
        ranks: dict[str, list[int]] = {}
        for rank, digests in enumerate(digests_by_rank):
            if (index, group) in digests:
                ranks.setdefault(digests[index, group], []).append(rank)
        if len(ranks) > 1:
            sides = " and ".join(str(same) for same in ranks.values())
            raise AutoparError(
                f"ranks {sides} lowered stage {index} to different sequences of collectives, which would hang; run the "
                "plan by build_trainer(..., mode='reference') and report it"
            )


def _digest(lines: Sequence[str]) -> str:
    """A hash of a sequence of collectives."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
