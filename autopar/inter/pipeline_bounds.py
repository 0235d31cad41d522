"""Lower bounds on a pipeline's simulated step time, and the recursion by which the outer search extends them.

A pipeline is built from its last stage backwards. For the stages from s on (t = f + b, seconds per micro-batch; c_s =
seconds a micro-batch takes across the boundary from s to s + 1 and back; n = number of stages from s on; w = min(n, B)
micro-batches that 1F1B has in flight on stage s; R_s = sum over i > s of t_i + sum over i >= s of c_i, a round trip
through all later stages):

    own_s  the least time from the first arrival at s to the end of its last backward, by the order of the ops on stage s
           (`own_order_bound_s`):
           B t                                              it is never idle
           1f1b:   (t + R) + (B - w) t + (w - 1) max(f, b)  it waits for the first gradient, or for the last one
           1f1b:   2 (t + R) + (B - 1 - w) t                for both, if B > w
           1f1b:   (2 + q) (t + R) + r t                    and for every w-th between, B - 1 - w = q w + r
           gpipe:  (t + R) + (B - 1) t
    M_s  = max(own_s, t_s + c_s + M_{s+1})                  so M_0 bounds the last backward of the first stage
    W_s  = max(M_s + step_s, f_s + W_{s+1})                 so W_0 bounds the step time

M contains the bound max_s [sum_{i<s} t_i + B t_s]. For gpipe M_s is also at least its closed form without waiting,
sum t + sum c + (B - 1)(max f + max b). M, W and R of a pipeline never fall when those of its suffix rise, which is what
makes tables of their minima admissible (`bound_tables`).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autopar.pipeline.schedule import Schedule, num_warmup_forwards
from autopar.pipeline.simulate import StageTimes

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def own_order_bound_s(
    schedule: Schedule,
    num_microbatches: int,
    *,
    num_from_last: Ints,
    forward_s: Floats,
    backward_s: Floats,
    round_trip_s: Floats,
    relaxed: bool = False,
) -> Floats:
    """own_s of the module's docstring in seconds, for stages number ``num_from_last`` = n counted from the last (1).

    The arrays broadcast; ``round_trip_s`` is R_s, 0 for the last stage. ``relaxed``: only the sum of forward and
    backward bounds the stage, so the larger of them is at least half of it.
    """
    B, w = num_microbatches, np.minimum(num_from_last, num_microbatches)
    total = forward_s + backward_s
    trip = total + round_trip_s
    if schedule == "gpipe":
        return np.asarray(trip + (B - 1) * total)
    larger = total / 2 if relaxed else np.maximum(forward_s, backward_s)
    own = np.maximum(B * total, trip + ((B - w) * total + (w - 1) * larger))
    between = np.maximum(B - 1 - w, 0)
    twice = np.where(w < B, 2.0, 0.0)
    stalled = np.maximum(twice * trip + between * total, (twice + between // w) * trip + between % w * total)
    return np.asarray(np.maximum(own, stalled))


def pipeline_lower_bound_s(
    schedule: Schedule, stages: Sequence[StageTimes], num_microbatches: int, num_chunks: int = 1
) -> float:
    """A lower bound in seconds on the simulated step of these stages (for "interleaved", of all S v chunks).

    >>> even = [StageTimes(forward_s=1.0, backward_s=2.0)] * 4
    >>> pipeline_lower_bound_s("1f1b", even, 8)  # tight: (B + S - 1) (f + b)
    33.0
    """
    if schedule == "interleaved":
        return _interleaved_bound_s(stages, num_microbatches, num_chunks)
    B, zero = num_microbatches, np.zeros(())
    bound, finish, later = 0.0, 0.0, zero
    slowest_f, slowest_b = 0.0, 0.0
    for index in range(len(stages) - 1, -1, -1):
        stage, last = stages[index], index == len(stages) - 1
        boundary = 0.0 if last else stage.transfer_forward_s + stages[index + 1].transfer_backward_s
        total = stage.forward_s + stage.backward_s
        round_trip = later + boundary
        own = own_order_bound_s(
            schedule,
            B,
            num_from_last=np.array(len(stages) - index),
            forward_s=np.array(stage.forward_s),
            backward_s=np.array(stage.backward_s),
            round_trip_s=round_trip,
        )
        finish = max(float(own), 0.0 if last else total + boundary + finish)
        slowest_f, slowest_b = max(slowest_f, stage.forward_s), max(slowest_b, stage.backward_s)
        later = round_trip + total
        if schedule == "gpipe":
            finish = max(finish, float(later) + (B - 1) * (slowest_f + slowest_b))
        bound = max(finish + stage.step_s, 0.0 if last else stage.forward_s + bound)
    return bound


def _interleaved_bound_s(stages: Sequence[StageTimes], num_microbatches: int, num_chunks: int) -> float:
    """max over ranks of [arrival at its first chunk + its busy time + what follows], in seconds.

    A rank starts when the first micro-batch arrives at its first chunk and, at best without a pause, ends with the last
    backward of that chunk; the gradient then passes back to each earlier rank, where the per-step time follows.
    """
    num_ranks = len(stages) // num_chunks
    arrival_s = through_s = 0.0
    bound = 0.0
    step_s = [sum(stage.step_s for stage in stages[rank::num_ranks]) for rank in range(num_ranks)]
    through_before_s: list[float] = []
    for rank in range(num_ranks):
        stage = stages[rank]
        busy_s = num_microbatches * sum(chunk.forward_s + chunk.backward_s for chunk in stages[rank::num_ranks])
        for earlier in range(rank + 1):
            return_s = through_s - through_before_s[earlier] if earlier < rank else 0.0
            bound = max(bound, arrival_s + busy_s + return_s + step_s[earlier])
        # Differences of through_before_s are the time that a gradient takes from one rank to an earlier one.
        through_before_s.append(through_s)
        following_b = stages[rank + 1].transfer_backward_s if rank + 1 < len(stages) else 0.0
        arrival_s += stage.forward_s + stage.transfer_forward_s
        through_s += stage.backward_s + following_b
    one_pass = sum(stage.forward_s + stage.backward_s for stage in stages)
    one_pass += sum(stage.transfer_forward_s for stage in stages[:-1]) + sum(
        stage.transfer_backward_s for stage in stages[1:]
    )
    return max(bound, one_pass + step_s[0])


def max_in_flight(schedule: Schedule, num_microbatches: int, num_from_last: int) -> int:
    """The most micro-batches in flight on the stage number ``num_from_last``, counted from the last (1).

    >>> max_in_flight("1f1b", 8, 3), max_in_flight("gpipe", 8, 3)
    (3, 8)
    """
    assert schedule != "interleaved", (
        "chunks in flight of an interleaved schedule depend on all ranks: use in_flight_by_chunk"
    )
    warmup = num_warmup_forwards(schedule, num_from_last, num_microbatches, 1, 0)
    return min(warmup + 1, num_microbatches)
