"""Pipelines of equally many layers and devices per stage: the first guesses of the search."""

import itertools
import math
from collections.abc import Iterator, Sequence

from autopar.inter.even_partition import even_ends, layers
from autopar.inter.pipeline_bounds import max_in_flight
from autopar.inter.stage_costs import StageCosts
from autopar.inter.stage_span import DeviceStage
from autopar.inter.uniform_times import fastest_uniform_s


def even_pipelines(stage_costs: StageCosts, submesh_sizes: Sequence[int]) -> Iterator[tuple[DeviceStage, ...]]:
    """For each submesh size that divides the devices the pipeline of equal stages, layers split as evenly as they
    can."""
    blocks = stage_costs.pricer.blocks
    for size in submesh_sizes:
        num_stages, rest = divmod(stage_costs.num_devices, size)
        if not rest and num_stages <= min(stage_costs.max_stages, len(layers(blocks))):
            ends = even_ends(blocks, num_stages) if num_stages > 1 else [len(blocks)]
            yield tuple(DeviceStage(first, end, size) for first, end in itertools.pairwise((0, *ends)))


def guess_even_pipelines(
    stage_costs: StageCosts, submesh_sizes: Sequence[int]
) -> list[tuple[float, tuple[DeviceStage, ...]]]:
    """The even pipelines that fit, each with an estimate of its step's seconds: 1F1B without transfers, all blocks of a
    stage at one point of the unpriced objectives."""
    guesses = []
    for stages in even_pipelines(stage_costs, submesh_sizes):
        times_s: list[float] = []
        known_s: dict[tuple[int, int], float] = {}
        for (first, end, size), number in zip(stages, range(len(stages), 0, -1), strict=True):
            in_flight = max_in_flight(stage_costs.schedule, stage_costs.num_microbatches, number)
            key = (int(stage_costs.stage_kind_of[first, end]), in_flight)
            if key not in known_s:
                known_s[key] = fastest_uniform_s(stage_costs, size, *key)
            times_s.append(known_s[key])
        step_time_s = sum(times_s) + (stage_costs.num_microbatches - 1) * max(times_s)
        if math.isfinite(step_time_s):
            guesses.append((step_time_s, stages))
    return guesses
