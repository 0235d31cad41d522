"""The best mix of frontier points over the blocks of one stage, as an integer program (PuLP, HiGHS).

Variants v of n_v equal blocks, points p with totals F, W (forward, backward), R, E (reductions, rest of the step),
state, saved, new gradients, workspace; s in-flight micro-batches, M bytes of budget for tensors, B micro-batches:

    minimise             F + W + step / B
    one_v                sum_p x_vp = n_v                                x_vp blocks of variant v take point p, integer
    used_v_p             x_vp <= n_v y_vp                                y_vp binary: the point occurs
    room                 sum_vp (state + s saved)_vp x_vp + work <= M                       start of a backward
    room_for_gradients   sum_vp (state + (s - 1) saved + new gradients)_vp x_vp + work <= M its end
    work_v_p             work >= workspace_vp y_vp
    exposed              step >= sum (R_vp - (1 - g) W_vp) x_vp + sum E_vp x_vp             g: overlap contention
    rest                 step >= sum (g R_vp + E_vp) x_vp

`fastest_choice` mixes two points over one variant; this decides over all of them and proves the result optimal.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pulp
from numpy.typing import NDArray

from autopar.choice.highs import solve_highs
from autopar.inter.stage_choice import StageChoice, StageFrontier, StagePrice, VariantMix, price_totals, sum_totals
from autopar.inter.stage_pricing import StagePricing
from autopar.intra import block_totals as tt
from autopar.intra.block_totals import memory_bytes

Floats = NDArray[np.float64]
ILP_TIME_LIMIT_S = 5.0


def best_frontier_mix(
    frontier: StageFrontier, pricing: StagePricing, in_flight: float, tensor_budget_bytes: float, boundary: int
) -> StagePrice | None:
    """The proved optimal mix at one boundary placement; None where none fits or HiGHS proved none in time."""
    totals = frontier.totals[:, :, boundary]
    points = [_undominated(of_variant, in_flight) for of_variant in totals]
    if not all(len(allowed) for allowed in points):
        return None
    counts = _solve(
        _MixProgram(
            totals=totals,
            num_blocks=frontier.num_blocks,
            points=points,
            pricing=pricing,
            in_flight=in_flight,
            tensor_budget_bytes=tensor_budget_bytes,
        )
    )
    if counts is None:
        return None
    summed = sum_totals(
        [
            (of_variant[p], float(count))
            for of_variant, taken in zip(totals, counts, strict=True)
            for p, count in taken.items()
        ]
    )
    if float(memory_bytes(summed, in_flight)) > tensor_budget_bytes or any(
        sum(taken.values()) != number for taken, number in zip(counts, frontier.num_blocks, strict=True)
    ):
        return None  # within HiGHS's tolerance, but over the budget once counts are rounded
    mixes: list[VariantMix] = [tuple((frontier.refs[p], count) for p, count in taken.items()) for taken in counts]
    choice = StageChoice(mesh=frontier.mesh, boundary=boundary, mixes=tuple(zip(frontier.variants, mixes, strict=True)))
    return price_totals(pricing, summed, in_flight, choice)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _MixProgram:
    """The data of the program: ``totals[variant, point]``, and the indices of the ``points`` each variant may take."""

    totals: Floats
    num_blocks: tuple[int, ...]
    points: list[list[int]]
    pricing: StagePricing
    in_flight: float
    tensor_budget_bytes: float

    def start_and_end_bytes(self, values: Floats) -> tuple[float, float]:
        """Bytes without workspace of a block with totals ``values``, at the start of a backward and at its end."""
        start = values[tt.STATE] + self.in_flight * values[tt.SAVED]
        end = values[tt.STATE] + (self.in_flight - 1) * values[tt.SAVED] + values[tt.NEW_GRADIENTS]
        return start, end

    def step_bounds_s(self, values: Floats) -> tuple[float, float]:
        """What a block with totals ``values`` adds to the two lower bounds on ``step``: `exposed`, `rest`."""
        contention = self.pricing.overlap_contention
        overlapped = (1.0 - contention) * float(values[tt.BACKWARD])
        return (
            values[tt.STEP_OVERLAPPABLE] - overlapped + values[tt.STEP_EXPOSED],
            contention * values[tt.STEP_OVERLAPPABLE] + values[tt.STEP_EXPOSED],
        )


def _solve(data: _MixProgram) -> list[dict[int, int]] | None:
    """For each variant the number of blocks at each point that occurs; None where HiGHS proves no optimum. Seconds and
    bytes are scaled to about 1."""
    scale_s = 1.0 / max(float(data.totals[0, data.points[0][0], tt.FORWARD]), 1e-9)
    scale_bytes = 1.0 / data.tensor_budget_bytes
    program = pulp.LpProblem("mix", pulp.LpMinimize)
    step = program.add_variable("step", lowBound=0)
    work = program.add_variable("work", lowBound=0)
    time: list[Any] = [step * (1.0 / data.pricing.num_microbatches)]
    at_start, at_end = [work * 1.0], [work * 1.0]
    exposed: list[Any] = []
    rest: list[Any] = []
    x: list[dict[int, Any]] = []
    for v, (totals, number, points) in enumerate(zip(data.totals, data.num_blocks, data.points, strict=True)):
        x.append({p: program.add_variable(f"x_{v}_{p}", 0, number, pulp.LpInteger) for p in points})
        program += pulp.lpSum(x[v].values()) == number, f"one_{v}"
        for p, count in x[v].items():
            y = program.add_variable(f"y_{v}_{p}", 0, 1, pulp.LpInteger)
            program += count <= number * y, f"used_{v}_{p}"
            program += work >= float(totals[p, tt.WORKSPACE] * scale_bytes) * y, f"work_{v}_{p}"
            time.append(float((totals[p, tt.FORWARD] + totals[p, tt.BACKWARD]) * scale_s) * count)
            for sums, num_bytes in zip((at_start, at_end), data.start_and_end_bytes(totals[p]), strict=True):
                sums.append(float(num_bytes * scale_bytes) * count)
            for sums, seconds in zip((exposed, rest), data.step_bounds_s(totals[p]), strict=True):
                sums.append(float(seconds * scale_s) * count)
    program += pulp.lpSum(at_start) <= 1.0, "room"
    program += pulp.lpSum(at_end) <= 1.0, "room_for_gradients"
    program += step >= pulp.lpSum(exposed), "exposed"
    program += step >= pulp.lpSum(rest), "rest"
    program.setObjective(pulp.lpSum(time))
    solve_highs(program, timeLimit=ILP_TIME_LIMIT_S, threads=1)
    if program.status != pulp.LpStatusOptimal or program.sol_status != pulp.LpSolutionOptimal:
        return None
    return [
        {p: round(count.value()) for p, count in of_variant.items() if round(count.value()) > 0} for of_variant in x
    ]


def _undominated(totals: Floats, in_flight: float) -> list[int]:
    """Indices of the finite points (points, totals) that no other point matches or beats in everything that the program
    counts."""
    finite = np.flatnonzero(np.isfinite(totals).all(axis=1))
    measures = np.stack(
        [
            totals[finite, tt.FORWARD] + totals[finite, tt.BACKWARD],
            totals[finite, tt.STEP_OVERLAPPABLE],
            totals[finite, tt.STEP_EXPOSED],
            totals[finite, tt.STATE] + in_flight * totals[finite, tt.SAVED],
            totals[finite, tt.STATE] + (in_flight - 1) * totals[finite, tt.SAVED] + totals[finite, tt.NEW_GRADIENTS],
            totals[finite, tt.WORKSPACE],
        ],
        axis=1,
    )
    undominated: list[int] = []
    for row in np.lexsort(measures.T[::-1]):
        if not any((measures[other] <= measures[row]).all() for other in undominated):
            undominated.append(int(row))
    return [int(finite[row]) for row in undominated]
