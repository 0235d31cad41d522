"""The tails of pipelines, built from the last stage backwards, and how each branches.

A tail carries the M, W and R of `bounds`; with the head tables of `completion` they bound every whole pipeline that it
can become, so that its branches come by rising bound.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.inter.alpa_dp import Stage
from autopar.inter.bound_tables import Heads, Levels
from autopar.inter.pipeline_bounds import own_s

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Tail:
    """The last stages of a pipeline and the values of `bounds` that they hand on."""

    num_stages: int
    block: int
    devices: int
    trip_s: float
    finish_s: float
    total_s: float
    slowest_forward_s: float
    slowest_backward_s: float
    stage: Stage | None
    later: "Tail | None"

    def stages(self) -> tuple[Stage, ...]:
        found, tail = [], self
        while tail.stage is not None and tail.later is not None:
            found.append(tail.stage)
            tail = tail.later
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Branches:
    """All tails that are ``later`` and one stage more, by rising ``bound_s``; columns of arrays, made when asked."""

    later: Tail
    bound_s: list[float]
    start: list[int]
    size: list[int]
    submesh: list[int]
    values: Floats  # (branches, 5): trip_s, finish_s, total_s, slowest_forward_s, slowest_backward_s

    def tail(self, index: int) -> Tail:
        start, later = self.start[index], self.later
        trip_s, finish_s, total_s, slowest_forward_s, slowest_backward_s = self.values[index].tolist()
        return Tail(
            num_stages=later.num_stages + 1,
            block=start,
            devices=later.devices + self.size[index],
            trip_s=trip_s,
            finish_s=finish_s,
            total_s=total_s,
            slowest_forward_s=slowest_forward_s,
            slowest_backward_s=slowest_backward_s,
            stage=(start, later.block, self.submesh[index]),
            later=later,
        )


@dataclass(frozen=True, slots=True)
class Tree:
    """How a tail branches."""

    levels: Levels
    heads: Heads

    def branches(self, tail: Tail, below_s: float) -> Branches | None:
        """Every tail of one stage more that can become a pipeline with a bound below ``below_s``; None if none can."""
        levels, heads, place, end = self.levels, self.heads, tail.num_stages + 1, tail.block
        if place > levels.num_stages:
            return None
        sizes = np.array(levels.sizes)
        devices = np.minimum(tail.devices + sizes, levels.num_devices)
        at = (place, np.arange(end)[:, None], devices)
        B = levels.num_microbatches
        forward, backward = levels.forward_s[place, :end, end], levels.backward_s[place, :end, end]
        step = levels.step_s[place, :end, end]
        time_s = forward + backward
        head_trip = heads.trip_s[at]
        fits = np.isfinite(time_s) & np.isfinite(head_trip) & (tail.devices + sizes <= levels.num_devices)
        rows, classes = np.nonzero(fits)
        if not len(rows):
            return None
        forward, backward, step, time_s = forward[fits], backward[fits], step[fits], time_s[fits]
        cut = levels.cut_s[classes, end, tail.devices]
        if tail.stage is not None:
            cut = np.maximum(cut, levels.cut_s[tail.stage[2], end, tail.devices])
        way = tail.trip_s + cut
        own = own_s(levels.schedule, B, np.array(place), forward, backward, way, levels.relaxed)
        finish = np.maximum(own, time_s + (cut + tail.finish_s))
        trip = time_s + (cut + tail.trip_s)
        slow_f, slow_b = np.maximum(forward, tail.slowest_forward_s), np.maximum(backward, tail.slowest_backward_s)
        if levels.schedule == "gpipe" and not levels.relaxed:
            finish = np.maximum(finish, trip + (B - 1) * (slow_f + slow_b))
        stepped = finish + step
        if levels.busy_s is not None:
            stepped = np.maximum(stepped, levels.busy_s[place, :end, end][fits])
        total = np.maximum(stepped, forward + tail.total_s)
        bound = np.maximum(np.maximum(finish + head_trip[fits], total + heads.down_s[at][fits]), heads.step_s[at][fits])
        order = np.argsort(bound, kind="stable")
        order = order[: int(np.searchsorted(bound[order], below_s))]
        if not len(order):
            return None
        values = np.stack([trip, finish, total, slow_f, slow_b], axis=1)[order]
        classes = classes[order]
        return Branches(
            tail, bound[order].tolist(), rows[order].tolist(), sizes[classes].tolist(), classes.tolist(), values
        )
