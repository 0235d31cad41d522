"""The order of actions of each pipeline schedule, and the micro-batches that it has in flight.

Each of S ranks runs N = B v forwards and N backwards (B micro-batches, v model chunks per rank; v = 1 but for
"interleaved"). The three schedules differ in the warmup w alone: w forwards, then forward and backward in turn, then the
remaining backwards (`_rank_order`):

    "1f1b"         w = min(S - 1 - rank, N)                          Narayanan et al., PipeDream-flush
    "gpipe"        w = N                                             Huang et al.
    "interleaved"  w = min((v - 1) S + 2 (S - 1 - rank), N)          Narayanan et al., Megatron-LM 2021, section 2.2

Step k of the forwards works on local chunk (k // S) mod v, step k of the backwards on the mirrored one, both on
micro-batch (k // (S v)) S + k mod S. That is the order of torch's ``Schedule1F1B``, ``ScheduleGPipe`` and
``ScheduleInterleaved1F1B``. Chunk c (0 is first in the model) is on rank c mod S.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from autopar.core.errors import UsageError

Schedule = Literal["1f1b", "gpipe", "interleaved"]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, order=True)
class Action:
    """One forward ("F") or backward ("B") of chunk ``stage`` on ``microbatch``, printed as torch prints it.

    >>> str(Action("F", 2, 0)), Action.parse("3B11")
    ('2F0', Action(kind='B', stage=3, microbatch=11))
    """

    kind: Literal["F", "B"]
    stage: int
    microbatch: int

    def __str__(self) -> str:
        """As torch prints it."""
        return f"{self.stage}{self.kind}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> "Action":
        """The action of a text such as 2F0; UsageError for any other text."""
        match = re.fullmatch(r"(\d+)([FB])(\d+)", text)
        if match is None:
            raise UsageError(f"{text!r} is not a pipeline action; write stage, F or B, micro-batch, for example 2F0")
        kind: Literal["F", "B"] = "F" if match[2] == "F" else "B"
        return cls(kind, int(match[1]), int(match[3]))


def check_schedule(schedule: str, num_stages: int, num_microbatches: int, num_chunks: int) -> None:
    """UsageError where ``schedule`` is unknown or cannot run with these sizes."""
    if schedule not in ("1f1b", "gpipe", "interleaved"):
        raise UsageError(f"unknown schedule {schedule!r}; it is one of 1f1b, gpipe, interleaved")
    if min(num_stages, num_microbatches, num_chunks) < 1:
        raise UsageError(
            f"{schedule} needs at least 1 stage, micro-batch and chunk, not "
            f"{num_stages} stages, {num_microbatches} micro-batches, {num_chunks} chunks"
        )
    if schedule != "interleaved" and num_chunks != 1:
        raise UsageError(f"{schedule} has 1 model chunk per rank, not {num_chunks}; use schedule interleaved")
    if schedule == "interleaved" and num_microbatches % num_stages:
        raise UsageError(
            f"interleaved needs the number of micro-batches to be a multiple of the number of pipeline ranks: "
            f"{num_microbatches} is not a multiple of {num_stages}; change the micro-batch size or pp"
        )


def num_warmup_forwards(schedule: Schedule, num_stages: int, num_microbatches: int, num_chunks: int, rank: int) -> int:
    """w of the module's table: the forwards of a rank before it alternates between forwards and backwards."""
    num_steps = num_microbatches * num_chunks
    if schedule == "gpipe":
        return num_steps
    if schedule == "1f1b":
        return min(num_stages - 1 - rank, num_steps)
    return min((num_chunks - 1) * num_stages + 2 * (num_stages - 1 - rank), num_steps)


def _rank_order(num_warmup_steps: int, num_steps: int) -> tuple[NDArray[np.bool_], Ints]:
    """Per action of a rank, (2 num_steps,) each: whether it is a forward, and its number among the forwards or backwards."""
    steps = np.arange(num_steps)
    # Forward k is delayed from k by the backwards before it; backward j comes right after forward j + warmup.
    forward_at = steps + np.maximum(steps - num_warmup_steps, 0)
    backward_at = np.where(steps + num_warmup_steps < num_steps, 2 * steps + num_warmup_steps + 1, steps + num_steps)
    is_forward = np.zeros(2 * num_steps, dtype=np.bool_)
    is_forward[forward_at] = True
    step = np.empty(2 * num_steps, dtype=np.int64)
    step[forward_at] = steps
    step[backward_at] = steps
    return is_forward, step


def rank_actions(
    schedule: Schedule, num_stages: int, num_microbatches: int, num_chunks: int = 1
) -> tuple[tuple[Action, ...], ...]:
    """The actions of each of ``num_stages`` pipeline ranks, first rank first, in the order the rank runs them.

    >>> [" ".join(map(str, rank)) for rank in rank_actions("1f1b", 2, 3)]
    ['0F0 0F1 0B0 0F2 0B1 0B2', '1F0 1B0 1F1 1B1 1F2 1B2']
    """
    check_schedule(schedule, num_stages, num_microbatches, num_chunks)
    num_steps = num_microbatches * num_chunks
    group = num_stages if num_chunks > 1 or schedule == "interleaved" else num_steps
    ranks = []
    for rank in range(num_stages):
        warmup = num_warmup_forwards(schedule, num_stages, num_microbatches, num_chunks, rank)
        is_forward, step = _rank_order(warmup, num_steps)
        chunk = _local_chunk(is_forward, step, group, num_chunks) * num_stages + rank
        microbatch = step // (group * num_chunks) * group + step % group
        ranks.append(
            tuple(
                Action("F" if forward else "B", index, number)
                for forward, index, number in zip(is_forward.tolist(), chunk.tolist(), microbatch.tolist(), strict=True)
            )
        )
    return tuple(ranks)


def in_flight_by_rank(
    schedule: Schedule, num_stages: int, num_microbatches: int, num_chunks: int = 1
) -> tuple[int, ...]:
    """The most micro-batches that each rank has in flight; each counts one chunk, 1/v of a rank's blocks.

    Counted from the rank's own actions: forwards begun whose backward has not ended.

    >>> in_flight_by_rank("1f1b", 4, 8), in_flight_by_rank("gpipe", 4, 8), in_flight_by_rank("interleaved", 2, 4, 2)
    ((4, 3, 2, 1), (8, 8, 8, 8), (5, 3))
    """
    check_schedule(schedule, num_stages, num_microbatches, num_chunks)
    num_steps = num_microbatches * num_chunks
    peaks = []
    for rank in range(num_stages):
        warmup = num_warmup_forwards(schedule, num_stages, num_microbatches, num_chunks, rank)
        is_forward, _ = _rank_order(warmup, num_steps)
        peaks.append(int(np.cumsum(np.where(is_forward, 1, -1)).max()))
    return tuple(peaks)


@lru_cache(maxsize=256)
def in_flight_by_chunk(
    schedule: Schedule, num_stages: int, num_microbatches: int, num_chunks: int = 1
) -> tuple[int, ...]:
    """Micro-batches that each of the S v chunks, in model order, has in flight at the peak of its rank; at least 1.

    >>> in_flight_by_chunk("1f1b", 4, 8), in_flight_by_chunk("interleaved", 2, 4, 2)
    ((4, 3, 2, 1), (3, 2, 2, 1))
    """
    if num_chunks == 1:
        return in_flight_by_rank(schedule, num_stages, num_microbatches)
    check_schedule(schedule, num_stages, num_microbatches, num_chunks)
    in_flight = np.ones((num_chunks, num_stages), np.int64)
    for rank in range(num_stages):
        warmup = num_warmup_forwards(schedule, num_stages, num_microbatches, num_chunks, rank)
        is_forward, step = _rank_order(warmup, num_microbatches * num_chunks)
        local = _local_chunk(is_forward, step, num_stages, num_chunks)
        change = np.where(is_forward, 1, -1)
        counts = np.cumsum(change[:, None] * (local[:, None] == np.arange(num_chunks)), axis=0)
        in_flight[:, rank] = np.maximum(counts[counts.sum(axis=1).argmax()], 1)
    return tuple(in_flight.ravel().tolist())


def _local_chunk(is_forward: NDArray[np.bool_], step: Ints, group: int, num_chunks: int) -> Ints:
    """Which of its chunks a rank works on in each action; ``group`` micro-batches in a row take the same chunk."""
    local = (step // group) % num_chunks
    return np.where(is_forward, local, num_chunks - 1 - local)
