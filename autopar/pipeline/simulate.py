"""Event simulation of a pipeline schedule: the step time by which plans are compared.

Each rank runs its actions (`schedule`) one after the other. A forward of chunk c waits for chunk c - 1's forward of the
same micro-batch and its transfer, a backward for chunk c + 1's backward and its transfer; transfers (sf, sb) delay the
arrival and do not occupy the rank:

    end F(c, m) = f_c + max(end of the rank's previous action, end F(c - 1, m) + sf_{c-1})
    end B(c, m) = b_c + max(end of the rank's previous action, end B(c + 1, m) + sb_{c+1})
    step time   = max over ranks [end of the rank's last backward + sum of step_s of its chunks]

A chunk takes the same times for every micro-batch, which allows for exact forms faster than a simulation of every action:

* gpipe (`_finish_gpipe`): longest paths in closed form.
* 1f1b (`_finish_1f1b`): put F(s, m) in slot 2m + s and B(s, m) in slot 2m + 2S - 1 - s. Every stage then does one
  action per slot, which depends on the previous slot alone, so a slot is a max-plus linear map x -> A x of the S end
  times. While all stages are busy, any two successive slots are the same map, whose powers come by squaring.
* interleaved (`_finish_interleaved`): in slot n, rank r does forward number n - r, then backward number
  n - (v+1) S + 2 + r; the ranks form a ring, and a slot depends on the previous one alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.core.errors import UsageError
from autopar.pipeline.schedule import Action, Schedule, check_schedule, in_flight_by_rank, rank_actions

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Seconds of one stage (or chunk) per micro-batch, but for ``step_s``, the exposed seconds once per step after the
    stage's last backward (gradient reduction, optimizer). ``transfer_forward_s`` is the activation's transfer to the next
    stage, ``transfer_backward_s`` the gradient's to the previous one."""

    forward_s: float
    backward_s: float
    step_s: float = 0.0
    transfer_forward_s: float = 0.0
    transfer_backward_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """One simulated step. ``last_backward_s``: the end of each rank's last backward; ``bubble_fraction``: the idle fraction
    of all device-seconds of the step (``step_s`` is work, not idle)."""

    schedule: Schedule
    stages: tuple[StageTimes, ...]
    num_microbatches: int
    num_chunks: int
    step_time_s: float
    bubble_fraction: float
    last_backward_s: tuple[float, ...]

    @property
    def in_flight(self) -> tuple[int, ...]:
        """The most micro-batches (of one chunk each) that each rank has in flight, counted from its actions."""
        return in_flight_by_rank(self.schedule, len(self.last_backward_s), self.num_microbatches, self.num_chunks)

    def timeline(self) -> list[tuple[int, Action, float, float]]:
        """(rank, action, start_s, end_s) of every action, rank by rank in the order it runs."""
        return _simulate_events(self.schedule, self.stages, self.num_microbatches, self.num_chunks)


def simulate(
    schedule: Schedule,
    stages: Sequence[StageTimes],
    num_microbatches: int,
    num_chunks: int = 1,
    *,
    num_devices: Sequence[int] | None = None,
) -> Simulation:
    """Simulate one step. ``stages`` are all S v chunks in model order; ``num_devices`` of each of the S ranks' submeshes
    weight ``bubble_fraction`` (default: equal). UsageError where the schedule cannot run with these sizes.

    >>> even = [StageTimes(forward_s=1.0, backward_s=2.0)] * 4
    >>> simulate("1f1b", even, 8).step_time_s      # (B + S - 1) (f + b)
    33.0
    """
    num_ranks = len(stages) // num_chunks
    check_schedule(schedule, num_ranks, num_microbatches, num_chunks)
    if num_ranks * num_chunks != len(stages):
        raise UsageError(f"{len(stages)} stages cannot be divided into {num_chunks} chunks per rank")
    forward = np.array([stage.forward_s for stage in stages])
    backward = np.array([stage.backward_s for stage in stages])
    send_forward = np.array([stage.transfer_forward_s for stage in stages])
    send_backward = np.array([stage.transfer_backward_s for stage in stages])
    step = np.array([stage.step_s for stage in stages]).reshape(num_chunks, num_ranks).sum(axis=0)
    if schedule == "gpipe":
        finish = _finish_gpipe(forward, backward, send_forward, send_backward, num_microbatches)
    elif schedule == "1f1b":
        finish = _finish_1f1b(forward, backward, send_forward, send_backward, num_microbatches)
    else:
        finish = _finish_interleaved(forward, backward, send_forward, send_backward, num_microbatches, num_chunks)
    step_time = float((finish + step).max())
    devices = np.ones(num_ranks) if num_devices is None else np.asarray(num_devices, dtype=np.float64)
    busy = num_microbatches * (forward + backward).reshape(num_chunks, num_ranks).sum(axis=0) + step
    total = step_time * float(devices.sum())
    return Simulation(
        schedule=schedule,
        stages=tuple(stages),
        num_microbatches=num_microbatches,
        num_chunks=num_chunks,
        step_time_s=step_time,
        bubble_fraction=max(0.0, 1.0 - float(devices @ busy) / total) if total > 0 else 0.0,
        last_backward_s=tuple(finish.tolist()),
    )


def _finish_gpipe(
    forward_s: Floats, backward_s: Floats, send_forward_s: Floats, send_backward_s: Floats, B: int
) -> Floats:
    """End of each stage's last backward, (S,) seconds. The last forward ends after one forward of every stage and B - 1 more
    of the slowest; the backwards likewise."""
    last_forward = forward_s.sum() + send_forward_s[:-1].sum() + (B - 1) * forward_s.max()
    # send_backward_s[s + 1] is the gradient's transfer to stage s; sums and maxima run from the last stage to s
    arrive = np.append(send_backward_s[1:], 0.0)
    back = np.cumsum((backward_s + arrive)[::-1])[::-1]
    slowest = np.maximum.accumulate(backward_s[::-1])[::-1]
    return np.asarray(last_forward + back + (B - 1) * slowest)


def _finish_1f1b(
    forward_s: Floats, backward_s: Floats, send_forward_s: Floats, send_backward_s: Floats, B: int
) -> Floats:
    """End of each stage's last backward, by slots (module docstring); (S,) seconds."""
    S = len(forward_s)
    stage = np.arange(S)
    num_slots = 2 * B + 2 * S - 2
    first_steady, num_periods = 2 * S - 1, max(B - S, 0)
    after_steady = first_steady + 2 * num_periods
    slots = np.concatenate([np.arange(min(first_steady, num_slots)), np.arange(after_steady, num_slots)])
    is_forward = (slots[:, None] - stage) % 2 == 0
    microbatch = np.where(is_forward, slots[:, None] - stage, slots[:, None] - 2 * S + 1 + stage) // 2
    runs = (microbatch >= 0) & (microbatch < B)
    from_previous = np.concatenate([[-np.inf], send_forward_s[:-1]])
    from_next = np.append(send_backward_s[1:], -np.inf)
    busy = np.where(runs, np.where(is_forward, forward_s, backward_s), 0.0)
    wait = np.where(runs, np.where(is_forward, from_previous, from_next), -np.inf)
    source = np.where(is_forward, np.maximum(stage - 1, 0), np.minimum(stage + 1, S - 1))
    end = np.zeros(S)
    for index, slot in enumerate(slots.tolist()):
        if slot == after_steady and num_periods:
            end = _skip_steady_state(forward_s, backward_s, from_previous, from_next, num_periods, end)
        end = np.maximum(end, end[source[index]] + wait[index]) + busy[index]
    return end


def _skip_steady_state(
    forward_s: Floats, backward_s: Floats, from_previous_s: Floats, from_next_s: Floats, num_periods: int, end_s: Floats
) -> Floats:
    """``end_s`` after ``num_periods`` pairs of an odd and an even slot in which every stage is busy."""
    stage = np.arange(len(forward_s))

    def next_slot(parity: int, ends: Floats) -> Floats:
        """One slot applied to columns of end times; ``parity`` of the slot's number."""
        is_forward = (parity - stage) % 2 == 0
        source = np.where(is_forward, np.maximum(stage - 1, 0), np.minimum(stage + 1, len(stage) - 1))
        wait = np.where(is_forward, from_previous_s, from_next_s)[:, None]
        return np.asarray(np.maximum(ends, ends[source] + wait) + np.where(is_forward, forward_s, backward_s)[:, None])

    identity = np.where(np.eye(len(stage), dtype=np.bool_), 0.0, -np.inf)
    power = next_slot(0, next_slot(1, identity))
    left = num_periods
    # squaring costs S^3 and a single step S^2, so doubling stops once no more steps than stages are left
    while left > len(stage):
        if left % 2:
            end_s = (power + end_s).max(axis=1)
        left //= 2
        power = (power[:, :, None] + power[None, :, :]).max(axis=1)
    for _ in range(left):
        end_s = (power + end_s).max(axis=1)
    return end_s


def _finish_interleaved(
    forward_s: Floats, backward_s: Floats, send_forward_s: Floats, send_backward_s: Floats, B: int, v: int
) -> Floats:
    """End of each rank's last backward, (S,) seconds; the arrays are (S v,), chunks in model order."""
    S = len(forward_s) // v
    forward_s, backward_s = forward_s.reshape(v, S), backward_s.reshape(v, S)
    num_steps, shift = v * B, (v + 1) * S - 2
    rank = np.arange(S)
    slots = np.arange(num_steps + shift)[:, None]
    # what arrives at local chunk l of rank r comes from chunk l S + r - 1 (forward) or l S + r + 1 (backward)
    from_previous = np.concatenate([[-np.inf], send_forward_s[:-1]]).reshape(v, S)
    from_next = np.append(send_backward_s[1:], -np.inf).reshape(v, S)
    step_f, step_b = slots - rank, slots - shift + rank
    runs_f, runs_b = (step_f >= 0) & (step_f < num_steps), (step_b >= 0) & (step_b < num_steps)
    local_f, local_b = (step_f // S) % v, v - 1 - (step_b // S) % v
    busy_f = np.where(runs_f, forward_s[local_f, rank], 0.0)
    busy_b = np.where(runs_b, backward_s[local_b, rank], 0.0)
    wait_f = np.where(runs_f, from_previous[local_f, rank], -np.inf)
    wait_b = np.where(runs_b, from_next[local_b, rank], -np.inf)
    before, after = np.roll(rank, 1), np.roll(rank, -1)
    end_f, end_b = np.zeros(S), np.zeros(S)
    for n in range(len(slots)):
        arrived = np.maximum(end_f[before] + wait_f[n], end_f)
        next_f = np.where(runs_f[n], np.maximum(arrived, end_b) + busy_f[n], end_f)
        arrived = np.maximum(end_b[after] + wait_b[n], end_b)
        end_b = np.where(runs_b[n], np.maximum(arrived, next_f) + busy_b[n], end_b)
        end_f = next_f
    return end_b


def _simulate_events(
    schedule: Schedule, stages: Sequence[StageTimes], num_microbatches: int, num_chunks: int
) -> list[tuple[int, Action, float, float]]:
    """(rank, action, start_s, end_s) of every action, found by running each rank's actions as far as their inputs have
    arrived."""
    num_ranks = len(stages) // num_chunks
    orders = rank_actions(schedule, num_ranks, num_microbatches, num_chunks)
    arrived: dict[Action, float] = {Action("F", 0, m): 0.0 for m in range(num_microbatches)}
    done: list[list[tuple[int, Action, float, float]]] = [[] for _ in orders]
    ready, num_left = list(range(num_ranks)), sum(map(len, orders))
    while ready:
        rank = ready.pop()
        time_s = done[rank][-1][3] if done[rank] else 0.0
        while len(done[rank]) < len(orders[rank]):
            action = orders[rank][len(done[rank])]
            if action not in arrived:
                break
            stage, number = action.stage, action.microbatch
            start_s = max(time_s, arrived[action])
            if action.kind == "F":
                time_s = start_s + stages[stage].forward_s
                following = Action("F", stage + 1, number) if stage + 1 < len(stages) else Action("B", stage, number)
                delay_s = stages[stage].transfer_forward_s if stage + 1 < len(stages) else 0.0
            else:
                time_s = start_s + stages[stage].backward_s
                following, delay_s = Action("B", stage - 1, number), stages[stage].transfer_backward_s
            done[rank].append((rank, action, start_s, time_s))
            arrived[following] = time_s + delay_s
            num_left -= 1
            if following.stage >= 0 and following.stage % num_ranks != rank:
                ready.append(following.stage % num_ranks)
    assert num_left == 0, f"{schedule} deadlocks with {num_left} actions left"
    return [event for events in done for event in events]
