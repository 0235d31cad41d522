"""The outer search's problem and result: the times of all possible stages, and pipelines made of them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.choice.problem import SolveStatus
from autopar.core.errors import UsageError
from autopar.inter.bound_tables import LevelTimes, make_level_times
from autopar.inter.pipeline_bounds import max_in_flight
from autopar.inter.stage_span import SubmeshStage
from autopar.pipeline.schedule import Schedule

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageTimeTable:
    """Seconds of every possible stage: each (L + 1, L + 1, K), [i, j, k] = blocks i..j-1 on submesh class k, per
    micro-batch (``step_s``: once per step, exposed); ``numpy.inf`` where it does not fit or is not allowed.

    With ``busy_s`` the times are *relaxed*: lower bounds over all choices for the stage, each of which another choice may
    attain: of the forward, of forward + backward, of the per-step time, and (``busy_s``) of all micro-batches plus the
    per-step time.
    """

    forward_s: Floats
    backward_s: Floats
    step_s: Floats
    busy_s: Floats | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PipelineProblem:
    """Split ``num_blocks`` blocks into stages whose submeshes use all of ``num_devices`` devices.

    ``submesh_sizes[k]`` is the number of devices of class k (several classes may have one size);
    ``stage_times(in_flight)`` the times of stages with ``in_flight`` micro-batches in flight, called once for each value.
    ``stage_boundary_s`` (L + 1,) or (K, L + 1, D + 1), default 0, is the least time that a micro-batch's activation and
    gradient together take across the boundary before block i (next to a stage of class k, with d devices after it).
    Only steps below ``upper_bound_s`` are sought. UsageError for counts below 1 and for interleaved schedules.
    """

    num_blocks: int
    num_devices: int
    num_microbatches: int
    submesh_sizes: tuple[int, ...]
    stage_times: Callable[[int], StageTimeTable]
    schedule: Schedule = "1f1b"
    max_stages: int | None = None
    upper_bound_s: float = math.inf
    stage_boundary_s: Floats | None = None

    def __post_init__(self) -> None:
        if self.schedule not in ("1f1b", "gpipe"):
            raise UsageError(f"the stage search knows the schedules 1f1b and gpipe, not {self.schedule!r}")
        if min(self.num_blocks, self.num_devices, self.num_microbatches, *self.submesh_sizes) < 1:
            raise UsageError(
                f"a pipeline needs blocks, devices, micro-batches and submesh sizes of at least 1, not "
                f"{self.num_blocks}, {self.num_devices}, {self.num_microbatches}, {self.submesh_sizes}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedPipeline:
    """Stages, first to last, and their evaluated step in seconds."""

    stages: tuple[SubmeshStage, ...]
    step_time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineResult:
    """The best pipeline and a lower bound in seconds on all.

    ``status``: "optimal" = no pipeline is better than the incumbent by more than the tolerance; "feasible" = stopped by a
    limit, or the times are relaxed and the bound of an evaluated pipeline is below its step; "infeasible" = no pipeline
    is below the problem's upper bound by more than the tolerance; "failed" = a limit was reached before any pipeline was
    found. ``seconds`` is how long the search took.
    """

    incumbent: EvaluatedPipeline | None
    lower_bound_s: float
    status: SolveStatus
    num_evaluated: int
    seconds: float

    @property
    def gap(self) -> float:
        """Relative distance of the lower bound from the incumbent's step; infinite where there is no incumbent."""
        if self.incumbent is None:
            return math.inf
        step_time_s = self.incumbent.step_time_s
        return max(0.0, 1.0 - self.lower_bound_s / step_time_s) if step_time_s > 0 else 0.0


def level_times_of(problem: PipelineProblem) -> LevelTimes | None:
    """The problem in arrays; None where no stages of its submesh sizes can use all devices."""
    unit = math.gcd(*problem.submesh_sizes)
    if problem.num_devices % unit:
        return None
    num_stages = min(problem.num_blocks, problem.num_devices // min(problem.submesh_sizes))
    num_stages = num_stages if problem.max_stages is None else min(num_stages, problem.max_stages)
    if num_stages < 1:
        return None
    in_flight = [max_in_flight(problem.schedule, problem.num_microbatches, level) for level in range(1, num_stages + 1)]
    tables = {count: problem.stage_times(count) for count in sorted(set(in_flight))}
    boundary_s = np.zeros((len(problem.submesh_sizes), problem.num_blocks + 1, problem.num_devices // unit + 1))
    if problem.stage_boundary_s is not None:
        given_s = problem.stage_boundary_s
        boundary_s[:, 1:-1] = given_s[1:-1, None] if given_s.ndim == 1 else given_s[:, 1:-1, ::unit]
    return make_level_times(
        schedule=problem.schedule,
        num_microbatches=problem.num_microbatches,
        submesh_sizes=tuple(size // unit for size in problem.submesh_sizes),
        num_devices=problem.num_devices // unit,
        stage_boundary_s=boundary_s,
        tables=[(tables[c].forward_s, tables[c].backward_s, tables[c].step_s) for c in in_flight],
        busy_s=_busy_tables([tables[c] for c in in_flight]),
    )


def _busy_tables(tables: Sequence[StageTimeTable]) -> list[Floats] | None:
    """``busy_s`` of all tables; None where the times are exact."""
    busy_s = [table.busy_s for table in tables if table.busy_s is not None]
    assert len(busy_s) in (0, len(tables)), "either all stage tables are relaxed or none"
    return busy_s or None
