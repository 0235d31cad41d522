"""The best mix of frontier points over the blocks of one stage, as an integer program (PuLP, HiGHS).

Columns c of n_c equal blocks, points p with totals F, W (forward, backward), R, E (reductions, rest of the step),
state, saved, workspace; s micro-batches in flight, M bytes of room, B micro-batches:

    minimise    F + W + step / B
    one_c       sum_p x_cp = n_c                                        x_cp blocks of column c take point p, integer
    used_cp     x_cp <= n_c y_cp                                        y_cp binary: the point occurs
    room        sum_cp (state_cp + s saved_cp) x_cp + work <= M
    work_cp     work >= workspace_cp y_cp
    exposed     step >= sum (R_cp - W_cp hidden) x_cp + sum E_cp x_cp   hidden: 1 - contention
    rest        step >= sum (contention R_cp + E_cp) x_cp

`finish.fastest` mixes two points over one column; this decides over all of them and proves it.
"""

from typing import Any

import numpy as np
import pulp
from numpy.typing import NDArray

from autopar.choice.highs import solve_highs
from autopar.inter.stage_choice import FrontierRef, StageChoice, StageFrontier, StagePrice, StagePricer, sum_totals
from autopar.intra import block_totals as tt
from autopar.intra.block_totals import memory_bytes

Floats = NDArray[np.float64]
ILP_TIME_LIMIT_S = 5.0


def best_frontier_mix(
    frontier: StageFrontier,
    pricing: StagePricer,
    in_flight: float,
    tensor_budget_bytes: float,
    boundary: int,
    num_microbatches: int,
    contention: float,
) -> StagePrice | None:
    """The proven best mix at one boundary placement; None where none fits or HiGHS did not prove one in time."""
    totals = frontier.totals[:, :, boundary]
    kept = [_undominated(column, in_flight, num_microbatches) for column in totals]
    if not all(len(one) for one in kept):
        return None
    scale_s = 1.0 / max(float(totals[0, kept[0][0], tt.FORWARD]), 1e-9)
    scale_bytes = 1.0 / tensor_budget_bytes
    program = pulp.LpProblem("mix", pulp.LpMinimize)
    step = program.add_variable("step", lowBound=0)
    work = program.add_variable("work", lowBound=0)
    time: list[Any] = [step * (1.0 / num_microbatches)]
    held, freed, exposed, rest = [work * 1.0], [work * 1.0], [], []
    counts: list[dict[int, Any]] = []
    for c, (column, number, allowed) in enumerate(zip(totals, frontier.num_blocks, kept, strict=True)):
        x = {p: program.add_variable(f"x_{c}_{p}", 0, number, pulp.LpInteger) for p in allowed}
        program += pulp.lpSum(x.values()) == number, f"one_{c}"
        for p, count in x.items():
            values = column[p]
            y = program.add_variable(f"y_{c}_{p}", 0, 1, pulp.LpInteger)
            program += count <= number * y, f"used_{c}_{p}"
            program += work >= float(values[tt.WORKSPACE] * scale_bytes) * y, f"work_{c}_{p}"
            time.append(float((values[tt.FORWARD] + values[tt.BACKWARD]) * scale_s) * count)
            held.append(float((values[tt.STATE] + in_flight * values[tt.SAVED]) * scale_bytes) * count)
            at_end = values[tt.STATE] + (in_flight - 1) * values[tt.SAVED] + values[tt.NEW_GRADIENTS]
            freed.append(float(at_end * scale_bytes) * count)
            hidden = (1.0 - contention) * float(values[tt.BACKWARD])
            exposed.append(float((values[tt.STEP_OVERLAPPABLE] - hidden + values[tt.STEP_EXPOSED]) * scale_s) * count)
            rest.append(float((contention * values[tt.STEP_OVERLAPPABLE] + values[tt.STEP_EXPOSED]) * scale_s) * count)
        counts.append(x)
    program += pulp.lpSum(held) <= 1.0, "room"
    program += pulp.lpSum(freed) <= 1.0, "room_for_gradients"
    program += step >= pulp.lpSum(exposed), "exposed"
    program += step >= pulp.lpSum(rest), "rest"
    program.setObjective(pulp.lpSum(time))
    solve_highs(program, timeLimit=ILP_TIME_LIMIT_S, threads=1)
    if program.status != pulp.LpStatusOptimal or program.sol_status != pulp.LpSolutionOptimal:
        return None
    mixes: list[tuple[tuple[FrontierRef, int], ...]] = []
    parts: list[tuple[Floats, float]] = []
    for column, x in zip(totals, counts, strict=True):
        taken = [(p, round(count.value())) for p, count in x.items() if round(count.value()) > 0]
        mixes.append(tuple((frontier.refs[p], number) for p, number in taken))
        parts += [(column[p], float(number)) for p, number in taken]
    whole = sum_totals(parts)
    memory = float(memory_bytes(whole, in_flight))
    if memory > tensor_budget_bytes or any(
        sum(number for _, number in mix) != wanted for mix, wanted in zip(mixes, frontier.num_blocks, strict=True)
    ):
        return None  # rounding in the solver let a little too much through
    forward, backward, late = pricing.times_s(whole)
    return StagePrice(
        forward_s=float(forward),
        backward_s=float(backward),
        step_s=float(late),
        memory_bytes=memory + pricing.fixed_bytes(),
        amortised_s=float(pricing.amortised_s(whole)),
        choice=StageChoice(
            mesh=frontier.mesh, boundary=boundary, mixes=tuple(zip(frontier.variants, mixes, strict=True))
        ),
    )


def _undominated(totals: Floats, in_flight: float, num_microbatches: int) -> list[int]:
    """Finite points that no other point is at least as good as in everything that the program counts."""
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
    kept: list[int] = []
    for at in np.lexsort(measures.T[::-1]):
        if not any((measures[other] <= measures[at]).all() for other in kept):
            kept.append(int(at))
    return [int(finite[at]) for at in kept]
