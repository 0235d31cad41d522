"""The smallest memory budget for which a plan is found, and what fills it: the answer to "no plan fits".

Every stage takes its choice of least memory (`intra.priced_objectives.least_memory_objectives`); over the stages, from
the last one backwards,

    need(s, i, d) = min over j, k of max(bytes of blocks i..j-1 on submesh k as stage number s from the last,
                                         need(s - 1, j, d - n_k))

so need(S, 0, D) is about the memory of the fullest device of the leanest pipeline. Those bytes add up peaks of different
moments; the exact peak (`StageMemory`) of that pipeline, and of every even one, decides.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.core.plan import MemoryParts
from autopar.inter.block_pricer import StageMesh
from autopar.inter.even_pipelines import even_pipelines
from autopar.inter.frontier_cache import UNPRICED
from autopar.inter.pipeline_bounds import max_in_flight
from autopar.inter.stage_choice import StageChoice
from autopar.inter.stage_costs import StageCosts
from autopar.inter.stage_span import DeviceStage
from autopar.intra import block_totals as tt
from autopar.intra.block_totals import memory_bytes

Floats = NDArray[np.float64]
HUGE = 1e29
"""Bytes of a choice that cannot run, where inf times zero would be undefined."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MemoryBottleneck:
    """The fullest stage of a pipeline, and its peak memory on a device."""

    stage_costs: StageCosts
    stage: DeviceStage
    memory: MemoryParts

    @property
    def num_bytes(self) -> int:
        """Peak bytes, the fixed share (context and buffers) included."""
        return self.memory.total


def smallest_budget(stage_costs: StageCosts, submesh_sizes: tuple[int, ...]) -> MemoryBottleneck | None:
    """The bottleneck of the pipeline of least memory found for one micro-batch size, with stages of ``submesh_sizes``
    devices. None where no pipeline can run."""
    pipelines = (*_leanest_pipeline(stage_costs, submesh_sizes), *even_pipelines(stage_costs, submesh_sizes))
    bottlenecks = (_fullest_stage(stage_costs, stages) for stages in pipelines)
    return min((found for found in bottlenecks if found is not None), key=lambda found: found.num_bytes, default=None)


def _fullest_stage(stage_costs: StageCosts, stages: tuple[DeviceStage, ...]) -> MemoryBottleneck | None:
    """The fullest stage of a pipeline whose stages take their choices of least memory; None where one cannot run."""
    filled = []
    for num_from_last, (first, end, size) in zip(range(len(stages), 0, -1), stages, strict=True):
        in_flight = max_in_flight(stage_costs.schedule, stage_costs.num_microbatches, num_from_last)
        choice = _leanest_choice(stage_costs, int(stage_costs.stage_kind_of[first, end]), size, in_flight)
        if choice is None:
            return None
        memory = stage_costs.memory.peak(choice, first, end, in_flight)
        filled.append(MemoryBottleneck(stage_costs=stage_costs, stage=DeviceStage(first, end, size), memory=memory))
    return max(filled, key=lambda bottleneck: bottleneck.num_bytes)


def _leanest_pipeline(stage_costs: StageCosts, submesh_sizes: tuple[int, ...]) -> Iterator[tuple[DeviceStage, ...]]:
    """The leanest pipeline by the recurrence of the module's docstring, if any can run."""
    count, gpus = len(stage_costs.pricer.blocks), stage_costs.num_devices
    in_flight_of = stage_costs.max_in_flight_from_last()
    tables = {
        in_flight: np.stack(
            [_min_bytes_of_kinds(stage_costs, size, in_flight)[stage_costs.stage_kind_of] for size in submesh_sizes], -1
        )
        for in_flight in set(in_flight_of)
    }
    for table in tables.values():
        table[stage_costs.stage_kind_of < 0] = np.inf
    need = np.full((count + 1, gpus + 1), np.inf)
    need[count, 0] = 0.0
    needs = [need]
    for in_flight in in_flight_of:
        following = np.full_like(need, np.inf)
        for k, size in enumerate(submesh_sizes):
            if size <= gpus:
                own = tables[in_flight][:, :, k, None]
                extended = np.maximum(own, needs[-1][None, :, : gpus + 1 - size]).min(axis=1)
                following[:, size:] = np.minimum(following[:, size:], extended)
        needs.append(following)
    best = min(range(1, len(needs)), key=lambda s: float(needs[s][0, gpus]), default=0)
    if not best or not np.isfinite(needs[best][0, gpus]):
        return
    goal, i, devices, stages = float(needs[best][0, gpus]), 0, gpus, []
    for s in range(best, 0, -1):
        for k, size in enumerate(submesh_sizes):
            if size > devices:
                continue
            cost = np.maximum(tables[in_flight_of[s - 1]][i, :, k], needs[s - 1][:, devices - size])
            j = int(cost.argmin())
            if cost[j] <= goal:
                stages.append(DeviceStage(i, j, size))
                i, devices = j, devices - size
                break
    yield tuple(stages)


def _min_bytes_of_kinds(stage_costs: StageCosts, num_devices: int, in_flight: int) -> Floats:
    """(kinds,) least bytes of every kind of stage on ``num_devices`` devices, without the fixed share; inf where it cannot
    run."""
    least = np.full(len(stage_costs.num_blocks), np.inf)
    for mesh in stage_costs.frontiers.meshes(num_devices):
        own, work = _bytes_by_variant(stage_costs, mesh, in_flight)
        for boundary in range(own.shape[2]):
            for most in _workspace_thresholds(own[..., boundary], work[..., boundary]):
                of_variant = np.where(work[..., boundary] <= most, own[..., boundary], np.inf).min(axis=1)
                need = np.where(
                    stage_costs.num_blocks > 0,
                    stage_costs.num_blocks * np.where(np.isfinite(of_variant), of_variant, HUGE),
                    0.0,
                )
                least = np.minimum(least, need.sum(axis=1) + most)
    return np.where(least < HUGE, least, np.inf)


def _leanest_choice(stage_costs: StageCosts, stage_kind: int, num_devices: int, in_flight: int) -> StageChoice | None:
    """The choice of least memory of a kind of stage; None where it cannot run."""
    variants = np.flatnonzero(stage_costs.num_blocks[stage_kind])
    num_blocks = stage_costs.num_blocks[stage_kind, variants]
    best_bytes, best = np.inf, None
    for mesh in stage_costs.frontiers.meshes(num_devices):
        own, work = _bytes_by_variant(stage_costs, mesh, in_flight)
        for boundary in range(own.shape[2]):
            for most in _workspace_thresholds(own[variants, :, boundary], work[variants, :, boundary]):
                fitting = np.where(work[variants, :, boundary] <= most, own[variants, :, boundary], np.inf)
                need = float((num_blocks * fitting.min(axis=1)).sum() + most)
                if need < best_bytes:
                    rows = fitting.argmin(axis=1)
                    mixes = tuple(
                        (int(variant), (((UNPRICED, int(row)), int(count)),))
                        for variant, row, count in zip(variants, rows, num_blocks, strict=True)
                    )
                    best_bytes, best = need, StageChoice(mesh=mesh, boundary=boundary, mixes=mixes)
    return best


def _bytes_by_variant(stage_costs: StageCosts, mesh: StageMesh, in_flight: int) -> tuple[Floats, Floats]:
    """(bytes without workspace, workspace bytes) of the frontier points of every variant of a block, each (variants, rows,
    boundaries); inf where a point cannot run."""
    totals = np.stack([frontier.totals for frontier in stage_costs.frontiers.frontiers_by_variant(mesh, UNPRICED)])
    work = totals[..., tt.WORKSPACE]
    usable = np.isfinite(totals).all(axis=-1)
    with np.errstate(invalid="ignore"):
        own = memory_bytes(totals, in_flight) - work
    return np.where(usable, own, np.inf), np.where(usable, work, np.inf)


def _workspace_thresholds(bytes_without_workspace: Floats, workspace_bytes: Floats) -> list[float]:
    """The limits on a stage's workspace worth trying (a stage needs the largest of its blocks'): those at which some
    variant's point of least memory within the limit changes. Arguments are (variants, rows)."""
    thresholds = set()
    for own, workspace in zip(bytes_without_workspace, workspace_bytes, strict=True):
        order = np.lexsort((workspace, own))
        order = order[np.isfinite(own[order])]
        thresholds |= set(np.minimum.accumulate(workspace[order]).tolist())
    return sorted(thresholds)
