"""The smallest budget that would do, and what fills it: the answer to "no plan fits".

Every stage takes its leanest choice found (`intra.price_rows.lean_rows`); over the stages, from the last one backwards,

    need(s, i, d) = min over j, k of max(lean bytes of blocks i..j-1 on submesh k with s stages from it on, need(s - 1,
    j, d - n_k))

so need(S, 0, D) is about the memory of the fullest device of the leanest pipeline. Its lean bytes add up what a stage
holds at different moments; what that pipeline, and every even one, holds at its fullest (`stage_memory`) decides.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.core.plan import MemoryParts
from autopar.inter.block_pricer import StageMesh
from autopar.inter.even_partition import even_ends, layers
from autopar.inter.frontier_cache import UNPRICED
from autopar.inter.pipeline_bounds import max_in_flight
from autopar.inter.stage_choice import StageChoice
from autopar.inter.stage_costs import StageCosts
from autopar.intra import block_totals as tt
from autopar.intra.block_totals import memory_bytes

Floats = NDArray[np.float64]
HUGE = 1e29  # bytes: of what cannot run
_Stages = tuple[tuple[int, int, int], ...]
"""First block, last block + 1, devices."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MemoryBottleneck:
    """The fullest stage (first block, last block + 1, devices) of the leanest pipeline, and what it holds."""

    stage_costs: StageCosts
    stage: tuple[int, int, int]
    memory: MemoryParts

    @property
    def num_bytes(self) -> int:
        """With the fixed share."""
        return self.memory.total


def smallest_budget(stage_costs: StageCosts, submesh_sizes: tuple[int, ...]) -> MemoryBottleneck | None:
    """The least need of any pipeline found of one micro-batch size, in stages of ``sizes`` devices. None where no
    pipeline runs at all."""
    found = [
        _fullest_stage(stage_costs, stages)
        for stages in (*_leanest_pipeline(stage_costs, submesh_sizes), *_even_pipelines(stage_costs, submesh_sizes))
    ]
    return min((one for one in found if one is not None), key=lambda one: one.num_bytes, default=None)


def _fullest_stage(stage_costs: StageCosts, stages: _Stages) -> MemoryBottleneck | None:
    """The fullest stage of a pipeline whose stages are lean; None where one cannot run."""
    found = []
    for place, (first, end, size) in zip(range(len(stages), 0, -1), stages, strict=True):
        held = max_in_flight(stage_costs.schedule, stage_costs.num_microbatches, place)
        choice = _leanest_choice(stage_costs, int(stage_costs.stage_kind_of[first, end]), size, held)
        if choice is None:
            return None
        memory = stage_costs.memory.peak(choice, first, end, held)
        found.append(MemoryBottleneck(stage_costs=stage_costs, stage=(first, end, size), memory=memory))
    return max(found, key=lambda one: one.num_bytes)


def _even_pipelines(stage_costs: StageCosts, submesh_sizes: tuple[int, ...]) -> Iterator[_Stages]:
    """Pipelines of equal stages, as even as layers allow."""
    blocks = stage_costs.pricer.blocks
    for size in submesh_sizes:
        num_stages, rest = divmod(stage_costs.num_devices, size)
        if not rest and num_stages <= min(stage_costs.max_stages, len(layers(blocks))):
            ends = even_ends(blocks, num_stages) if num_stages > 1 else [len(blocks)]
            yield tuple((first, end, size) for first, end in itertools.pairwise((0, *ends)))


def _leanest_pipeline(stage_costs: StageCosts, submesh_sizes: tuple[int, ...]) -> Iterator[_Stages]:
    """The leanest pipeline by the recurrence, if any runs."""
    count, gpus, in_flight_of = (
        len(stage_costs.pricer.blocks),
        stage_costs.num_devices,
        stage_costs.max_in_flight_from_last(),
    )
    tables = {
        held: np.stack(
            [_min_bytes_of_kinds(stage_costs, size, held)[stage_costs.stage_kind_of] for size in submesh_sizes], -1
        )
        for held in set(in_flight_of)
    }
    for table in tables.values():
        table[stage_costs.stage_kind_of < 0] = np.inf
    need = np.full((count + 1, gpus + 1), np.inf)
    need[count, 0] = 0.0
    needs = [need]
    for held in in_flight_of:
        following = np.full_like(need, np.inf)
        for k, size in enumerate(submesh_sizes):
            if size <= gpus:
                step = np.maximum(tables[held][:, :, k, None], needs[-1][None, :, : gpus + 1 - size]).min(axis=1)
                following[:, size:] = np.minimum(following[:, size:], step)
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
                stages.append((i, j, size))
                i, devices = j, devices - size
                break
    yield tuple(stages)


def _min_bytes_of_kinds(stage_costs: StageCosts, num_devices: int, in_flight: int) -> Floats:
    """(types,) bytes without the fixed share."""
    least = np.full(len(stage_costs.num_blocks), np.inf)
    for mesh in stage_costs.frontiers.meshes(num_devices):
        own, work = _bytes_by_variant(stage_costs, mesh, in_flight)
        for boundary in range(own.shape[2]):
            for most in _workspace_thresholds(own[..., boundary], work[..., boundary]):
                columns = np.where(work[..., boundary] <= most, own[..., boundary], np.inf).min(axis=1)
                need = np.where(
                    stage_costs.num_blocks > 0,
                    stage_costs.num_blocks * np.where(np.isfinite(columns), columns, HUGE),
                    0.0,
                )
                least = np.minimum(least, need.sum(axis=1) + most)
    return np.where(least < HUGE, least, np.inf)


def _leanest_choice(stage_costs: StageCosts, stage_kind: int, num_devices: int, in_flight: int) -> StageChoice | None:
    """The leanest choice of a stage type; None where none runs."""
    columns = np.flatnonzero(stage_costs.num_blocks[stage_kind])
    numbers = stage_costs.num_blocks[stage_kind, columns]
    best_bytes, best = np.inf, None
    for mesh in stage_costs.frontiers.meshes(num_devices):
        own, work = _bytes_by_variant(stage_costs, mesh, in_flight)
        for boundary in range(own.shape[2]):
            for most in _workspace_thresholds(own[columns, :, boundary], work[columns, :, boundary]):
                fitting = np.where(work[columns, :, boundary] <= most, own[columns, :, boundary], np.inf)
                need = float((numbers * fitting.min(axis=1)).sum() + most)
                if need < best_bytes:
                    rows = fitting.argmin(axis=1)
                    points = tuple(
                        (int(column), (((UNPRICED, int(row)), int(number)),))
                        for column, row, number in zip(columns, rows, numbers, strict=True)
                    )
                    best_bytes, best = need, StageChoice(mesh=mesh, boundary=boundary, mixes=points)
    return best


def _bytes_by_variant(stage_costs: StageCosts, mesh: StageMesh, in_flight: int) -> tuple[Floats, Floats]:
    """(columns, rows, boundaries): bytes of the points of each column without workspace, and their workspace."""
    totals = np.stack([one.totals for one in stage_costs.frontiers.frontiers_by_variant(mesh, UNPRICED)])
    work = totals[..., tt.WORKSPACE]
    usable = np.isfinite(totals).all(axis=-1)
    with np.errstate(invalid="ignore"):
        own = memory_bytes(totals, in_flight) - work
    return np.where(usable, own, np.inf), np.where(usable, work, np.inf)


def _workspace_thresholds(bytes_without_workspace: Floats, workspace_bytes: Floats) -> list[float]:
    """Workspaces that some column's leanest point within them has: a stage needs the largest of its blocks'."""
    found = set()
    for bytes_of, work_of in zip(bytes_without_workspace, workspace_bytes, strict=True):
        order = np.lexsort((work_of, bytes_of))
        order = order[np.isfinite(bytes_of[order])]
        found |= set(np.minimum.accumulate(work_of[order]).tolist())
    return sorted(found)
