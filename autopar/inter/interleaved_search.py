"""Interleaved pipelines of one micro-batch size (Narayanan et al., Megatron-LM, SC 2021, section 2.2).

S runs of n devices take v chunks each, in turns. For every (S, v) the blocks are cut in two ways: as even as Megatron
cuts layers, and so that the longest chunk is as short as can be. With t_c the least forward f and backward b of chunk c
together, x_c what a micro-batch takes across the cut behind it and back, busy_r what run r does in a step at least, and
step_0 what the first run does once per step,

    T >= max over r of [ sum over c < r of (t_c + x_c) + busy_r ]       (`_way_s`)
    T >= simulated end with f = b = t / 2 and half of x each way + step_0     (`_simulated_s`)

The first as run r starts when a micro-batch reaches its first chunk, and what its last gradient still has to pass comes
behind. The second as the schedule, read backwards in time, is itself with forwards and backwards exchanged: its end
E(f, b) = E(b, f) is convex (a maximum of sums), so E(f, b) >= E((f + b) / 2, (f + b) / 2). Best first by these bounds,
pipelines are simulated until no bound left is below the best step.
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
from autopar.pipeline.simulate import StageTimes, simulate

Floats = NDArray[np.float64]
CHUNK_COUNTS = (2, 3, 4, 5, 6, 8, 10, 12, 16)
"""Chunks a run of devices may have; more only add transfers and launches to a bubble that is gone."""
GAP_TOLERANCE = 1e-3
"""Bounds that near to the best step are not followed (as in `partition.search`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _InterleavedCandidate:
    """``stages`` (first block, last block + 1, devices) in model order, ``num_chunks`` a run; ``bound_s`` with memory
    left out of account."""

    stages: tuple[tuple[int, int, int], ...]
    num_chunks: int
    bound_s: float

    def on(self, stage_costs: StageCosts) -> PipelineCandidate:
        return PipelineCandidate(
            stage_costs=stage_costs, stages=self.stages, schedule="interleaved", num_chunks=self.num_chunks
        )


class InterleavedSearch:
    """The interleaved pipelines of one book. ``free_bound_s``: none is faster, memory aside; inf where there is
    none."""

    def __init__(self, tables: StageCostTables, stage_boundary_s: Floats) -> None:
        self.tables, self.stage_costs = tables, tables.stage_costs
        self._stage_boundary_s = dict(zip(tables.submesh_sizes, stage_boundary_s, strict=True))
        self._forward_backward_s = {size: tables.forward_backward_s(size) for size in tables.submesh_sizes}
        self._step_s = {size: tables.per_step_s(size) for size in tables.submesh_sizes}
        self._candidates = self._make_candidates()
        self.unconstrained_bound_s = min((one.bound_s for one in self._candidates), default=np.inf)

    def bounded_candidates(self) -> list[tuple[float, PipelineCandidate]]:
        """All pipelines with what each takes at least, memory aside."""
        return [(one.bound_s, one.on(self.stage_costs)) for one in self._candidates]

    def search(
        self, incumbent_s: float, deadline_s: float, simulate_s: Callable[[PipelineCandidate, float], float]
    ) -> float:
        """Simulate what may be below ``known_s`` seconds; returns a bound on all (at most ``known_s``). ``deadline_s``
        on the clock of ``time.perf_counter``; ``step_s`` simulates the step of a pipeline, inf where it is plain that it is
        not below a number of seconds."""
        best_s = open_s = incumbent_s
        near = (one for one in self._candidates if one.bound_s < incumbent_s * (1 - GAP_TOLERANCE))
        bounded = sorted(
            ((max(one.bound_s, self._simulated_bound_s(one)), one) for one in near), key=lambda pair: pair[0]
        )
        for bound_s, candidate in bounded:
            late = time.perf_counter() > deadline_s
            if late or bound_s >= best_s * (1 - GAP_TOLERANCE):
                open_s = min(open_s, bound_s)
                break
            arrangement = candidate.on(self.stage_costs)
            bound_s = max(bound_s, self._arrival_bound_s(candidate.stages, self._busy_bounds_s(arrangement), best_s))
            open_s = min(open_s, bound_s)
            if bound_s < best_s * (1 - GAP_TOLERANCE):
                best_s = min(best_s, simulate_s(arrangement, best_s))
        least_s = min(
            (one.bound_s for one in self._candidates if one.bound_s >= incumbent_s * (1 - GAP_TOLERANCE)),
            default=np.inf,
        )
        return min(open_s, best_s, least_s)

    def _make_candidates(self) -> list[_InterleavedCandidate]:
        book, work_s = self.stage_costs, self.tables.work_lower_bound_s()
        found = []
        for size, num_chunks in itertools.product(self.tables.submesh_sizes, CHUNK_COUNTS):
            S = book.num_devices // size
            if book.num_devices % size or S < 2 or book.max_stages < S or book.num_microbatches % S:
                continue
            for ends in self._partitions(S * num_chunks, size):
                stages = tuple((first, end, size) for first, end in itertools.pairwise((0, *ends)))
                through = [self._forward_backward_s[size][first, end] for first, end, _ in stages]
                busy_s = [book.num_microbatches * float(sum(through[run::S])) for run in range(S)]
                bound_s = max(work_s, self._arrival_bound_s(stages, busy_s))
                found.append(_InterleavedCandidate(stages=stages, num_chunks=num_chunks, bound_s=bound_s))
        return found

    def _partitions(self, num_stages: int, num_devices: int) -> set[tuple[int, ...]]:
        """Where the chunks end, by both ways of the module's docstring."""
        blocks = self.stage_costs.pricer.blocks
        if num_stages > len(blocks):
            return set()
        found = {min_max_partition(self._forward_backward_s[num_devices], num_stages)}
        with suppress(LayoutError):  # fewer layers than chunks: embedding and head stand alone
            found.add(tuple(even_ends(blocks, num_stages)))
        return found

    def _busy_bounds_s(self, candidate: PipelineCandidate) -> Iterator[float]:
        """What each run of devices does in a step at least, in the memory that its chunks share."""
        held, S, book = candidate.in_flight(), candidate.num_submeshes, self.stage_costs
        kinds = [int(book.stage_kind_of[first, end]) for first, end, _ in candidate.stages]
        for run in range(S):
            yield self.tables.submesh_busy_s(candidate.stages[run][2], tuple(kinds[run::S]), held[run::S])

    def _arrival_bound_s(
        self, stages: tuple[tuple[int, int, int], ...], busy_s: Iterable[float], cutoff_s: float = np.inf
    ) -> float:
        """The first bound of the module's docstring, of as many runs as it takes to reach ``enough_s``."""
        way_s, bound_s = 0.0, 0.0
        for at, ((first, end, size), busy) in enumerate(zip(stages, busy_s, strict=False)):
            bound_s = max(bound_s, way_s + busy)
            if bound_s >= cutoff_s:
                break
            way_s += float(self._forward_backward_s[size][first, end]) + self._boundary_s(end, size, at)
        return bound_s

    def _boundary_s(self, block: int, num_devices: int, chunk: int) -> float:
        """What a micro-batch takes across the cut behind a chunk, number ``chunk`` in model order, and back."""
        behind = self.stage_costs.num_devices - (chunk * num_devices) % self.stage_costs.num_devices - num_devices
        return float(self._stage_boundary_s[num_devices][block, behind])

    def _simulated_bound_s(self, candidate: _InterleavedCandidate) -> float:
        """The second bound of the module's docstring."""
        times = []
        for at, (first, end, size) in enumerate(candidate.stages):
            half_s = float(self._forward_backward_s[size][first, end]) / 2
            on_s, back_s = self._boundary_s(end, size, at) / 2, self._boundary_s(first, size, at - 1) / 2
            times.append(
                StageTimes(forward_s=half_s, backward_s=half_s, transfer_forward_s=on_s, transfer_backward_s=back_s)
            )
        num_chunks, S = candidate.num_chunks, len(candidate.stages) // candidate.num_chunks
        end_s = simulate("interleaved", times, self.stage_costs.num_microbatches, num_chunks).last_backward_s[0]
        return end_s + sum(float(self._step_s[size][first, end]) for first, end, size in candidate.stages[::S])


def min_max_partition(time_s: Floats, num_stages: int) -> tuple[int, ...]:
    """Where the stages end if blocks 0..L-1 are cut into ``num_stages`` so that the longest is as short as can be;
    ``time_s`` (L + 1, L + 1) of blocks i..j-1, inf where j <= i.

    >>> span = np.subtract.outer(-np.arange(6.0), -np.arange(6.0))
    >>> shortest_longest(np.where(span > 0, span, np.inf), 2) in ((2, 5), (3, 5))
    True
    """
    longest_s = time_s[0]
    before = []
    for _ in range(num_stages - 1):
        both_s = np.maximum(longest_s[:, None], time_s)
        before.append(both_s.argmin(axis=0))
        longest_s = both_s.min(axis=0)
    ends = [len(time_s) - 1]
    for previous in reversed(before):
        ends.append(int(previous[ends[-1]]))
    return tuple(reversed(ends))
