"""Runs a part of a collective operation that may fail on some ranks only, where the others would wait for it."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from autopar.core.errors import AutoparError, CheckpointError

_Result = TypeVar("_Result")


def run_on_all_ranks(action: Callable[[], _Result], *, failure: str, remedy: str) -> _Result:
    """What ``action`` returns; where it fails on any rank, the same CheckpointError on every rank. Collective.

    The error says ``failure`` (what could not be done), the first rank that failed and why, and ``remedy``."""
    result, message = None, None
    cause: BaseException | None = None
    try:
        result = action()
    except CheckpointException as error:  # torch has told all ranks
        rank, (reason, _) = next(iter(error.failures.items()))
        message, cause = f"{failure}: rank {rank}: {_reason_text(reason)}; {remedy}", error
    except Exception as error:  # of whatever kind: the other ranks wait for this one's outcome
        message, cause = f"{failure}: rank {dist.get_rank()}: {_reason_text(error)}; {remedy}", error
    messages: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    first = next((each for each in messages if each is not None), None)
    if first is not None:
        raise CheckpointError(first) from cause
    return result  # type: ignore[return-value]


def _reason_text(error: BaseException) -> str:
    """An error as a clause of one line."""
    text = str(error) if isinstance(error, AutoparError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:300]
