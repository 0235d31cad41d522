"""Interleaved pipelines of one micro-batch size (Narayanan et al., Megatron-LM, SC 2021, section 2.2).

S submeshes of n devices run v chunks each, in turns. For every (S, v) two partitions of the blocks are tried: as even as
Megatron's, and the one whose slowest chunk is fastest (`min_max_partition`). With t_c the least sum of forward f and
backward b of chunk c, x_c the time of a micro-batch's activation and gradient across the stage boundary after chunk c,
busy_r the least time that submesh r works in a step, and step_0 the per-step time of the first submesh,

    T >= max over r of [ sum over c < r of (t_c + x_c) + busy_r ]                  (`_arrival_bound_s`)
    T >= simulated end with f = b = t / 2 and half of x each direction + step_0    (`_simulated_bound_s`)

The first holds because submesh r starts when a micro-batch arrives at its first chunk, and its last gradient still has to
pass the chunks before that. The second holds because the schedule, read backwards in time, is itself with forward and
backward exchanged: its end E(f, b) = E(b, f) is convex (a maximum of sums), so E(f, b) >= E((f + b) / 2, (f + b) / 2).
Pipelines are simulated best first by these bounds until no bound that remains is below the best step.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.core.errors import LayoutError
from autopar.inter.even_partition import even_ends
from autopar.inter.pipeline_candidate import PipelineCandidate
from autopar.inter.stage_cost_tables import StageCostTables
from autopar.inter.stage_costs import StageCosts
from autopar.inter.stage_span import DeviceStage
from autopar.pipeline.simulate import StageTimes, simulate

Floats = NDArray[np.float64]
CHUNK_COUNTS = (2, 3, 4, 5, 6, 8, 10, 12, 16)
"""Numbers of chunks per submesh that are tried; more only add transfers and launches where no bubble is left."""
GAP_TOLERANCE = 1e-3
"""Pipelines whose bound is below the best step by less than this share are pruned (as in `search_pipelines`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _InterleavedCandidate:
    """Stages in model order, with ``num_chunks`` per submesh; ``bound_s`` is a
    lower bound on the step that ignores memory."""

    stages: tuple[DeviceStage, ...]
    num_chunks: int
    bound_s: float

    def on(self, stage_costs: StageCosts) -> PipelineCandidate:
        """The same as a pipeline of these costs."""
        return PipelineCandidate(
            stage_costs=stage_costs, stages=self.stages, schedule="interleaved", num_chunks=self.num_chunks
        )


class InterleavedSearch:
    """The interleaved pipelines of one micro-batch size. ``stage_boundary_s`` (K, L + 1, D + 1) bounds the transfers
    across each boundary as in `PipelineProblem`; ``unconstrained_bound_s`` bounds all steps where memory is ignored, inf
    where there is no pipeline."""

    def __init__(self, tables: StageCostTables, stage_boundary_s: Floats) -> None:
        self.tables, self.stage_costs = tables, tables.stage_costs
        self._stage_boundary_s = dict(zip(tables.submesh_sizes, stage_boundary_s, strict=True))
        self._forward_backward_s = {size: tables.forward_backward_s(size) for size in tables.submesh_sizes}
        self._step_s = {size: tables.per_step_s(size) for size in tables.submesh_sizes}
        self._candidates = self._make_candidates()
        self.unconstrained_bound_s = min((candidate.bound_s for candidate in self._candidates), default=np.inf)

    def bounded_candidates(self) -> list[tuple[float, PipelineCandidate]]:
        """(lower bound on the step in seconds that ignores memory, pipeline) of all pipelines."""
        return [(candidate.bound_s, candidate.on(self.stage_costs)) for candidate in self._candidates]

    def search(
        self, incumbent_s: float, deadline_s: float, simulate_s: Callable[[PipelineCandidate, float], float]
    ) -> float:
        """Simulate every pipeline that may be below ``incumbent_s``; returns a lower bound on all steps, at most
        ``incumbent_s``. ``deadline_s`` is on the clock of ``time.perf_counter``; ``simulate_s(pipeline, cutoff_s)`` is
        the simulated step in seconds, or inf where it is known to be no less than the cutoff."""
        best_s = open_s = incumbent_s
        cutoff_s = incumbent_s * (1 - GAP_TOLERANCE)
        bounded = sorted(
            (
                (max(candidate.bound_s, self._simulated_bound_s(candidate)), candidate)
                for candidate in self._candidates
                if candidate.bound_s < cutoff_s
            ),
            key=lambda pair: pair[0],
        )
        for bound_s, candidate in bounded:
            is_late = time.perf_counter() > deadline_s
            if is_late or bound_s >= best_s * (1 - GAP_TOLERANCE):
                open_s = min(open_s, bound_s)
                break
            pipeline = candidate.on(self.stage_costs)
            bound_s = max(bound_s, self._arrival_bound_s(candidate.stages, self._busy_bounds_s(pipeline), best_s))
            open_s = min(open_s, bound_s)
            if bound_s < best_s * (1 - GAP_TOLERANCE):
                best_s = min(best_s, simulate_s(pipeline, best_s))
        pruned_s = (candidate.bound_s for candidate in self._candidates if candidate.bound_s >= cutoff_s)
        return min(open_s, best_s, min(pruned_s, default=np.inf))

    def _make_candidates(self) -> list[_InterleavedCandidate]:
        """Both partitions of every number of submeshes and chunks."""
        costs, work_s = self.stage_costs, self.tables.work_lower_bound_s()
        found = []
        for size, num_chunks in itertools.product(self.tables.submesh_sizes, CHUNK_COUNTS):
            S = costs.num_devices // size
            if costs.num_devices % size or S < 2 or costs.max_stages < S or costs.num_microbatches % S:
                continue
            for ends in self._partitions(S * num_chunks, size):
                stages = tuple(DeviceStage(first, end, size) for first, end in itertools.pairwise((0, *ends)))
                through = [self._forward_backward_s[size][first, end] for first, end, _ in stages]
                busy_s = [costs.num_microbatches * float(sum(through[submesh::S])) for submesh in range(S)]
                bound_s = max(work_s, self._arrival_bound_s(stages, busy_s))
                found.append(_InterleavedCandidate(stages=stages, num_chunks=num_chunks, bound_s=bound_s))
        return found

    def _partitions(self, num_stages: int, num_devices: int) -> set[tuple[int, ...]]:
        """The last block + 1 of every chunk, by both partitions of the module's docstring."""
        blocks = self.stage_costs.pricer.blocks
        if num_stages > len(blocks):
            return set()
        found = {min_max_partition(self._forward_backward_s[num_devices], num_stages)}
        with suppress(LayoutError):  # more chunks than layers
            found.add(tuple(even_ends(blocks, num_stages)))
        return found

    def _busy_bounds_s(self, candidate: PipelineCandidate) -> Iterator[float]:
        """The least seconds that each submesh works in a step, within the memory that its chunks share."""
        in_flight, S = candidate.in_flight(), candidate.num_submeshes
        kinds = [int(self.stage_costs.stage_kind_of[first, end]) for first, end, _ in candidate.stages]
        for submesh in range(S):
            num_devices = candidate.stages[submesh].num_devices
            yield self.tables.submesh_busy_s(num_devices, tuple(kinds[submesh::S]), in_flight[submesh::S])

    def _arrival_bound_s(
        self, stages: tuple[DeviceStage, ...], busy_s: Iterable[float], cutoff_s: float = np.inf
    ) -> float:
        """The first bound of the module's docstring in seconds, over as many submeshes as it takes to reach
        ``cutoff_s``; ``busy_s`` of each submesh."""
        arrival_s, bound_s = 0.0, 0.0
        for chunk, ((first, end, size), busy) in enumerate(zip(stages, busy_s, strict=False)):
            bound_s = max(bound_s, arrival_s + busy)
            if bound_s >= cutoff_s:
                break
            arrival_s += float(self._forward_backward_s[size][first, end]) + self._boundary_s(end, size, chunk)
        return bound_s

    def _boundary_s(self, block: int, num_devices: int, chunk: int) -> float:
        """The least seconds of a micro-batch across the boundary before ``block`` and back, after the chunk number
        ``chunk`` in model order."""
        devices_after = (
            self.stage_costs.num_devices - (chunk * num_devices) % self.stage_costs.num_devices - num_devices
        )
        return float(self._stage_boundary_s[num_devices][block, devices_after])

    def _simulated_bound_s(self, candidate: _InterleavedCandidate) -> float:
        """The second bound of the module's docstring in seconds."""
        times = []
        for chunk, (first, end, size) in enumerate(candidate.stages):
            half_s = float(self._forward_backward_s[size][first, end]) / 2
            times.append(
                StageTimes(
                    forward_s=half_s,
                    backward_s=half_s,
                    transfer_forward_s=self._boundary_s(end, size, chunk) / 2,
                    transfer_backward_s=self._boundary_s(first, size, chunk - 1) / 2,
                )
            )
        num_chunks, S = candidate.num_chunks, len(candidate.stages) // candidate.num_chunks
        end_s = simulate("interleaved", times, self.stage_costs.num_microbatches, num_chunks).last_backward_s[0]
        return end_s + sum(float(self._step_s[size][first, end]) for first, end, size in candidate.stages[::S])


def min_max_partition(time_s: Floats, num_stages: int) -> tuple[int, ...]:
    """The last block + 1 of each of ``num_stages`` stages of blocks 0..L-1 whose slowest is as fast as possible;
    ``time_s[i, j]`` (L + 1, L + 1) is the seconds of blocks i..j-1, inf where j <= i.

    >>> span = np.subtract.outer(-np.arange(6.0), -np.arange(6.0))
    >>> min_max_partition(np.where(span > 0, span, np.inf), 2) in ((2, 5), (3, 5))
    True
    """
    slowest_s = time_s[0]
    previous_ends = []
    for _ in range(num_stages - 1):
        with_stage_s = np.maximum(slowest_s[:, None], time_s)
        previous_ends.append(with_stage_s.argmin(axis=0))
        slowest_s = with_stage_s.min(axis=0)
    ends = [len(time_s) - 1]
    for previous_end in reversed(previous_ends):
        ends.append(int(previous_end[ends[-1]]))
    return tuple(reversed(ends))
