"""The tails of pipelines, built from the last stage backwards, and how each branches.

A tail carries the M, W and R of `bounds`; with the head tables of `completion` they bound every whole pipeline that it
can become, so that its branches come by rising bound.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.inter.alpa_dp import SubmeshStage
from autopar.inter.bound_tables import LevelTimes, PrefixBounds
from autopar.inter.pipeline_bounds import own_order_bound_s

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PartialPipeline:
    """The last stages of a pipeline and the values of `bounds` that they hand on."""

    num_stages: int
    first_block: int
    num_devices: int
    round_trip_s: float
    last_backward_s: float
    step_time_s: float
    slowest_forward_s: float
    slowest_backward_s: float
    stage: SubmeshStage | None
    suffix: "PartialPipeline | None"

    def stages(self) -> tuple[SubmeshStage, ...]:
        found, tail = [], self
        while tail.stage is not None and tail.suffix is not None:
            found.append(tail.stage)
            tail = tail.suffix
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Branches:
    """All tails that are ``later`` and one stage more, by rising ``bound_s``; columns of arrays, made when asked."""

    suffix: PartialPipeline
    bound_s: list[float]
    first_block: list[int]
    num_devices: list[int]
    submesh: list[int]
    suffix_values: Floats  # (branches, 5): trip_s, finish_s, total_s, slowest_forward_s, slowest_backward_s

    def partial_pipeline(self, index: int) -> PartialPipeline:
        start, later = self.first_block[index], self.suffix
        trip_s, finish_s, total_s, slowest_forward_s, slowest_backward_s = self.suffix_values[index].tolist()
        return PartialPipeline(
            num_stages=later.num_stages + 1,
            first_block=start,
            num_devices=later.num_devices + self.num_devices[index],
            round_trip_s=trip_s,
            last_backward_s=finish_s,
            step_time_s=total_s,
            slowest_forward_s=slowest_forward_s,
            slowest_backward_s=slowest_backward_s,
            stage=(start, later.first_block, self.submesh[index]),
            suffix=later,
        )


@dataclass(frozen=True, slots=True)
class SearchTree:
    """How a tail branches."""

    level_times: LevelTimes
    prefixes: PrefixBounds

    def branches(self, suffix: PartialPipeline, cutoff_s: float) -> Branches | None:
        """Every tail of one stage more that can become a pipeline with a bound below ``below_s``; None if none can."""
        levels, heads, place, end = self.level_times, self.prefixes, suffix.num_stages + 1, suffix.first_block
        if place > levels.num_stages:
            return None
        sizes = np.array(levels.submesh_sizes)
        devices = np.minimum(suffix.num_devices + sizes, levels.num_devices)
        at = (place, np.arange(end)[:, None], devices)
        B = levels.num_microbatches
        forward, backward = levels.forward_s[place, :end, end], levels.backward_s[place, :end, end]
        step = levels.step_s[place, :end, end]
        time_s = forward + backward
        head_trip = heads.round_trip_s[at]
        fits = np.isfinite(time_s) & np.isfinite(head_trip) & (suffix.num_devices + sizes <= levels.num_devices)
        rows, classes = np.nonzero(fits)
        if not len(rows):
            return None
        forward, backward, step, time_s = forward[fits], backward[fits], step[fits], time_s[fits]
        cut = levels.stage_boundary_s[classes, end, suffix.num_devices]
        if suffix.stage is not None:
            cut = np.maximum(cut, levels.stage_boundary_s[suffix.stage[2], end, suffix.num_devices])
        way = suffix.round_trip_s + cut
        own = own_order_bound_s(levels.schedule, B, np.array(place), forward, backward, way, levels.relaxed)
        finish = np.maximum(own, time_s + (cut + suffix.last_backward_s))
        trip = time_s + (cut + suffix.round_trip_s)
        slow_f, slow_b = np.maximum(forward, suffix.slowest_forward_s), np.maximum(backward, suffix.slowest_backward_s)
        if levels.schedule == "gpipe" and not levels.relaxed:
            finish = np.maximum(finish, trip + (B - 1) * (slow_f + slow_b))
        stepped = finish + step
        if levels.busy_s is not None:
            stepped = np.maximum(stepped, levels.busy_s[place, :end, end][fits])
        total = np.maximum(stepped, forward + suffix.step_time_s)
        bound = np.maximum(
            np.maximum(finish + head_trip[fits], total + heads.forward_s[at][fits]), heads.own_bound_s[at][fits]
        )
        order = np.argsort(bound, kind="stable")
        order = order[: int(np.searchsorted(bound[order], cutoff_s))]
        if not len(order):
            return None
        values = np.stack([trip, finish, total, slow_f, slow_b], axis=1)[order]
        classes = classes[order]
        return Branches(
            suffix, bound[order].tolist(), rows[order].tolist(), sizes[classes].tolist(), classes.tolist(), values
        )
