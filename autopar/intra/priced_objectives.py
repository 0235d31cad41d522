"""Price rows: the ways of weighing time against memory, each of which gives one optimal solution of a block.

A *price row* fixes a recompute mode, prices per byte, and what communication costs; the problem it gives is pairwise,
so elimination solves all rows and all boundary placements at once and exactly. Per micro-batch, B of them in a step:

    none        minimise F + C + beta W                     + price * (state + weight * (saved + core))
    selective   minimise F + (1 + beta) C + beta W          + price * (state + weight * (saved + beside))
    full        minimise F + C + beta (A + W)          + price * (state + weight * boundary)

    F, C, W     forward that selective recomputation does not repeat (outside attention) and that it does, backward;
                communication inside them                                                      (tables)
    A           of F + C what the backward needs again, or all of it                           (`again`)
    family      beta           F, C, W   ZeRO-3 gathers   reductions / B   rest of the step / B
    priced      1              1         1                1                1             nothing is hidden: a solution
    hidden      1              1         g                g                1             a bound on t + step / B
    reduced     1 - (1-g)/B    1         g                1                1             the same
    path        1              1         g                0                0             a bound on t alone
    linked      1              g         1                0                0             the same
    lean        1              1         1                1                1             next to no time: least memory

g is the contention: compute a beside communication b takes max(a, b) + g min(a, b) = max(a + g b, g a + b), and a step
exposes max(g r, r - (1 - g) W) of its reductions r, so the optimum of a hidden, reduced, path or linked row is never
above the true time plus price * memory of any choice of its mode. Linked is the better bound only where gathers take
longer than compute, as over slow links between nodes.

Gradients that a backward makes (LATE: with one micro-batch all, without overlap what ZeRO-2 and 3 cut) take the place
of the saved tensors it frees: max(s saved, (s - 1) saved + late) is priced by the mean of the two, which is not above
it.
"""

from collections.abc import Sequence
from functools import lru_cache

import msgspec
import numpy as np
from numpy.typing import NDArray

from autopar.cost import parameter_storage as pm
from autopar.intra import op_metrics as om

Floats = NDArray[np.float64]
MODES = ("none", "selective", "full")
FAMILIES = ("priced", "hidden", "reduced", "path", "linked")
PRICES = (0.1, 1.0, 2.5, 5.0, 8.0, 14.0, 30.0, 100.0)
"""Prices of a byte tried where memory binds, in units of the time the device takes to stream it; densest where
computing a layer again costs about what its activations free."""
LEAN_PRICE = 1e3
"""Seconds per byte at which time has no say."""


class PriceRow(msgspec.Struct, frozen=True, kw_only=True):
    """``price_s_per_byte`` of state; a byte saved by one micro-batch costs ``saved_weight`` times that."""

    mode: str
    price_s_per_byte: float
    saved_weight: float
    family: str = "priced"


def free_rows(
    rate_s_per_byte: float, modes: Sequence[str], families: Sequence[str] = FAMILIES[:4]
) -> tuple[PriceRow, ...]:
    """Rows for memory that does not bind: so low a price that it only breaks ties. Recomputing never pays there, so the
    mode is the first of ``modes``."""
    low = 1e-6 * rate_s_per_byte
    return tuple(PriceRow(mode=modes[0], price_s_per_byte=low, saved_weight=1.0, family=family) for family in families)


def priced_rows(
    rate_s_per_byte: float, modes: Sequence[str], saved_weight: float, links_bind: bool
) -> tuple[PriceRow, ...]:
    """Rows for memory that binds, for stages that hold ``saved_weight`` micro-batches."""
    return tuple(
        PriceRow(mode=mode, price_s_per_byte=factor * rate_s_per_byte, saved_weight=saved_weight, family=family)
        for mode in modes
        for family in ("hidden", "path", *(("linked",) if links_bind else ()))
        for factor in PRICES
    )


def lean_rows(modes: Sequence[str], weights: Sequence[int]) -> tuple[PriceRow, ...]:
    """Rows whose solutions need the least memory there is; time only breaks ties."""
    return tuple(
        PriceRow(mode=mode, price_s_per_byte=LEAN_PRICE, saved_weight=float(weight), family="lean")
        for mode in modes
        for weight in weights
    )


@lru_cache(maxsize=16)
def row_weights(
    rows: tuple[PriceRow, ...], num_microbatches: int, contention: float, late_share: float
) -> tuple[Floats, Floats, Floats, Floats]:
    """Per row: beta, what a second of compute counts, and the weights of the ops' and the parameters' metrics."""
    beta = np.array([1.0 - (1.0 - contention) / num_microbatches if row.family == "reduced" else 1.0 for row in rows])
    pairs = list(zip(rows, beta.tolist(), strict=True))
    return (
        beta,
        np.array([_shares(row, contention)[0] for row in rows]),
        np.array([_weights(row, late, contention, late_share) for row, late in pairs]),
        np.array([_parameter_weights(row, num_microbatches, late, contention, late_share) for row, late in pairs]),
    )


def _parameter_weights(
    row: PriceRow, num_microbatches: int, beta: float, contention: float, late_share: float
) -> list[float]:
    compute, gathers = _shares(row, contention)
    weights = [0.0] * pm.NUM_PARAMETER_METRICS
    weights[pm.GATHER_FORWARD], weights[pm.GATHER_BACKWARD] = gathers, beta * gathers
    reductions = {"priced": 1.0, "reduced": 1.0, "lean": 1.0, "hidden": contention}.get(row.family, 0.0)
    weights[pm.STEP] = reductions / num_microbatches
    weights[pm.STEP_EXPOSED] = 0.0 if row.family in ("path", "linked") else 1.0 / num_microbatches
    weights[pm.STATE] = row.price_s_per_byte
    weights[pm.LATE] = late_share * row.price_s_per_byte
    weights[pm.ACCUMULATE] = compute * beta
    return weights


def _shares(row: PriceRow, contention: float) -> tuple[float, float]:
    """What a second of compute and a second of gathers count."""
    return {"priced": (1.0, 1.0), "lean": (1.0, 1.0), "linked": (contention, 1.0)}.get(row.family, (1.0, contention))


def _weights(row: PriceRow, beta: float, contention: float, late_share: float) -> list[float]:
    saved = row.price_s_per_byte * max(row.saved_weight - late_share, 0.0)
    share = _shares(row, contention)[0]
    weights = [0.0] * om.NUM_METRICS
    weights[om.FORWARD] = share
    weights[om.CORE_FORWARD] = share * (1.0 + beta if row.mode == "selective" else 1.0)
    weights[om.AGAIN] = share * beta if row.mode == "full" else 0.0
    weights[om.BACKWARD] = share * beta
    weights[om.SAVED] = 0.0 if row.mode == "full" else saved
    weights[om.CORE_SAVED] = saved if row.mode == "none" else 0.0
    weights[om.BESIDE] = saved if row.mode == "selective" else 0.0
    weights[om.BOUNDARY] = saved if row.mode == "full" else 0.0
    return weights
