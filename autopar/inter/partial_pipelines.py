"""The nodes of the outer search: suffixes of pipelines, built from the last stage backwards, and their branches.

A suffix carries its M, W and R of `pipeline_bounds`; with the prefix bounds of `bound_tables` they bound every complete
pipeline that it can become, by which its branches are ordered.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.inter.bound_tables import LevelTimes, PrefixBounds
from autopar.inter.pipeline_bounds import own_order_bound_s
from autopar.inter.stage_span import SubmeshStage

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialPipeline:
    """The last ``num_stages`` stages of a pipeline, blocks first_block..L-1 on ``num_devices`` devices (in the units of
    `LevelTimes`), with their R, M and W in seconds. ``stage`` is the first of them and ``suffix`` the others; both are
    None where there are no stages."""

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

    @classmethod
    def empty(cls, num_blocks: int) -> "PartialPipeline":
        """The root of the search: no stages yet, of a model of ``num_blocks`` blocks."""
        return cls(
            num_stages=0,
            first_block=num_blocks,
            num_devices=0,
            round_trip_s=0.0,
            last_backward_s=0.0,
            step_time_s=0.0,
            slowest_forward_s=0.0,
            slowest_backward_s=0.0,
            stage=None,
            suffix=None,
        )

    def stages(self) -> tuple[SubmeshStage, ...]:
        """The stages, first to last."""
        stages, partial = [], self
        while partial.stage is not None and partial.suffix is not None:
            stages.append(partial.stage)
            partial = partial.suffix
        return tuple(stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Branches:
    """Every extension of ``suffix`` by one stage that is worth following, by rising ``bound_s``: parallel columns, from
    which a `PartialPipeline` is made only when it is taken."""

    suffix: PartialPipeline
    bound_s: list[float]
    first_block: list[int]
    num_devices: list[int]
    submesh: list[int]
    suffix_values: Floats  # (branches, 5): R, M, W, slowest_forward_s, slowest_backward_s

    def partial_pipeline(self, index: int) -> PartialPipeline:
        """Branch number ``index``."""
        first_block, suffix = self.first_block[index], self.suffix
        round_trip_s, last_backward_s, step_time_s, forward_s, backward_s = self.suffix_values[index].tolist()
        return PartialPipeline(
            num_stages=suffix.num_stages + 1,
            first_block=first_block,
            num_devices=suffix.num_devices + self.num_devices[index],
            round_trip_s=round_trip_s,
            last_backward_s=last_backward_s,
            step_time_s=step_time_s,
            slowest_forward_s=forward_s,
            slowest_backward_s=backward_s,
            stage=SubmeshStage(first_block, suffix.first_block, self.submesh[index]),
            suffix=suffix,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchTree:
    """What branching reads: the times of stages, and the bounds on what must come before a suffix."""

    level_times: LevelTimes
    prefixes: PrefixBounds

    def branches(self, suffix: PartialPipeline, cutoff_s: float) -> Branches | None:
        """Every extension by one stage that can become a pipeline with a bound below ``cutoff_s``; None if none can."""
        levels, prefixes, place, end = self.level_times, self.prefixes, suffix.num_stages + 1, suffix.first_block
        if place > levels.num_stages:
            return None
        sizes = np.array(levels.submesh_sizes)
        devices = np.minimum(suffix.num_devices + sizes, levels.num_devices)
        state = (place, np.arange(end)[:, None], devices)
        B = levels.num_microbatches
        forward, backward = levels.forward_s[place, :end, end], levels.backward_s[place, :end, end]
        step = levels.step_s[place, :end, end]
        time_s = forward + backward
        prefix_trip = prefixes.round_trip_s[state]
        fits = np.isfinite(time_s) & np.isfinite(prefix_trip) & (suffix.num_devices + sizes <= levels.num_devices)
        rows, classes = np.nonzero(fits)
        if not len(rows):
            return None
        forward, backward, step, time_s = forward[fits], backward[fits], step[fits], time_s[fits]
        boundary = levels.stage_boundary_s[classes, end, suffix.num_devices]
        if suffix.stage is not None:
            boundary = np.maximum(boundary, levels.stage_boundary_s[suffix.stage.submesh, end, suffix.num_devices])
        own = own_order_bound_s(
            levels.schedule,
            B,
            num_from_last=np.array(place),
            forward_s=forward,
            backward_s=backward,
            round_trip_s=suffix.round_trip_s + boundary,
            relaxed=levels.relaxed,
        )
        finish = np.maximum(own, time_s + (boundary + suffix.last_backward_s))
        trip = time_s + (boundary + suffix.round_trip_s)
        slow_f, slow_b = np.maximum(forward, suffix.slowest_forward_s), np.maximum(backward, suffix.slowest_backward_s)
        if levels.schedule == "gpipe" and not levels.relaxed:
            finish = np.maximum(finish, trip + (B - 1) * (slow_f + slow_b))
        stepped = finish + step
        if levels.busy_s is not None:
            stepped = np.maximum(stepped, levels.busy_s[place, :end, end][fits])
        total = np.maximum(stepped, forward + suffix.step_time_s)
        bound = np.maximum(
            np.maximum(finish + prefix_trip[fits], total + prefixes.forward_s[state][fits]),
            prefixes.own_bound_s[state][fits],
        )
        order = np.argsort(bound, kind="stable")
        order = order[: int(np.searchsorted(bound[order], cutoff_s))]
        if not len(order):
            return None
        values = np.stack([trip, finish, total, slow_f, slow_b], axis=1)[order]
        classes = classes[order]
        return Branches(
            suffix=suffix,
            bound_s=bound[order].tolist(),
            first_block=rows[order].tolist(),
            num_devices=sizes[classes].tolist(),
            submesh=classes.tolist(),
            suffix_values=values,
        )
