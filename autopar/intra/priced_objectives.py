"""Priced objectives: the ways of weighing time against memory, each of which gives one optimal solution of a block.

A *priced objective* fixes a recompute mode, a price per byte, and what communication costs; its problem is pairwise, so
elimination solves all objectives and all boundary placements at once (`frontier`). Per micro-batch, B of them in a step:

    mode        minimise                             (_op_weights, _storage_weights)
    none        F + C + beta W           + price * (state + weight * (saved + freed))
    selective   F + (1 + beta) C + beta W + price * (state + weight * (saved + selective only))
    full        F + C + beta (A + W)     + price * (state + weight * inputs)

    F, C, W     seconds of the forward that selective recomputation does not repeat, of the forward that it does, and of
                the backward, with the collectives in them                                            (`op_metrics`)
    A           of F + C what full recomputation repeats                                              (`recompute`)
    saved, freed, selective only, inputs
                SAVED, SELECTIVE_FREED, SELECTIVE_ONLY_SAVED, INPUT_SAVED                             (`op_metrics`)

    family      beta           F, C, W   ZeRO-3 gathers   reductions / B   rest of the step / B
    priced      1              1         1                1                1             nothing overlaps: a solution
    hidden      1              1         g                g                1             a bound on t + step / B
    reduced     1 - (1-g)/B    1         g                1                1             the same
    path        1              1         g                0                0             a bound on t alone
    linked      1              g         1                0                0             the same
    lean        1              1         1                1                1             price outweighs time: least memory

g is the contention: compute a that overlaps with communication b takes max(a, b) + g min(a, b) = max(a + g b, g a + b),
and a step exposes max(g r, r - (1 - g) W) of its reductions r. So the optimum of a hidden, reduced, path or linked
objective is never above the true time plus price * memory of any choices under its mode. Linked is the better bound only
where gathers take longer than compute, as over slow links between nodes.

Gradients that a backward creates (NEW_GRADIENTS: all with one micro-batch; without overlap those that ZeRO-2 and 3 shard)
take the memory of the saved tensors that it frees: max(s saved, (s - 1) saved + new gradients) is priced by the mean of
the two, which is not above it.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from autopar.cost import parameter_storage as pm
from autopar.intra import op_metrics as om

Floats = NDArray[np.float64]
OBJECTIVE_FAMILIES = ("priced", "hidden", "reduced", "path", "linked")
PRICE_FACTORS = (0.1, 1.0, 2.5, 5.0, 8.0, 14.0, 30.0, 100.0)
"""Prices of a byte that are tried where memory binds, in units of the time the device takes to stream it; densest where
recomputing a layer costs about what its activations free."""
LEAST_MEMORY_PRICE_S_PER_BYTE = 1e3
"""A price at which memory outweighs any difference in time."""


class PricedObjective(msgspec.Struct, frozen=True, kw_only=True):
    """A byte of state costs ``price_s_per_byte``, a byte saved by one micro-batch ``saved_weight`` times that. ``mode``
    is the recomputation: "none", "selective" or "full"; ``family`` one of the module docstring's."""

    mode: str
    price_s_per_byte: float
    saved_weight: float
    family: str = "priced"


def unpriced_objectives(
    rate_s_per_byte: float, modes: Sequence[str], families: Sequence[str] = OBJECTIVE_FAMILIES[:4]
) -> tuple[PricedObjective, ...]:
    """Objectives for memory that does not bind: so low a price that it only breaks ties. Recomputation never pays there,
    so the mode is the first of ``modes``."""
    low = 1e-6 * rate_s_per_byte
    return tuple(
        PricedObjective(mode=modes[0], price_s_per_byte=low, saved_weight=1.0, family=family) for family in families
    )


def memory_priced_objectives(
    rate_s_per_byte: float, modes: Sequence[str], saved_weight: float, gathers_can_bind: bool
) -> tuple[PricedObjective, ...]:
    """Objectives for memory that binds, in stages with ``saved_weight`` micro-batches in flight; ``gathers_can_bind`` as
    in ``BlockFrontier``."""
    return tuple(
        PricedObjective(mode=mode, price_s_per_byte=factor * rate_s_per_byte, saved_weight=saved_weight, family=family)
        for mode in modes
        for family in ("hidden", "path", *(("linked",) if gathers_can_bind else ()))
        for factor in PRICE_FACTORS
    )


def least_memory_objectives(modes: Sequence[str], saved_weights: Sequence[int]) -> tuple[PricedObjective, ...]:
    """Objectives whose solutions need the least memory there is; time only breaks ties."""
    return tuple(
        PricedObjective(
            mode=mode, price_s_per_byte=LEAST_MEMORY_PRICE_S_PER_BYTE, saved_weight=float(weight), family="lean"
        )
        for mode in modes
        for weight in saved_weights
    )


class MetricWeights(NamedTuple):
    """Of each objective: ``beta``, what a second of the backward counts against one of the forward; ``compute``, what a
    second of compute counts; and the weights of the metrics of ops (objectives, NUM_OP_METRICS) and of parameter
    storages (objectives, NUM_PARAMETER_METRICS)."""

    beta: Floats
    compute: Floats
    op: Floats
    storage: Floats


@lru_cache(maxsize=16)
def metric_weights(
    objectives: tuple[PricedObjective, ...], num_microbatches: int, overlap_contention: float, new_gradient_share: float
) -> MetricWeights:
    """The weights of objectives over steps of ``num_microbatches``. ``new_gradient_share``: the share of the price of
    new gradients in the mean of the module docstring, 0 where a backward creates none."""
    beta = np.array(
        [
            1.0 - (1.0 - overlap_contention) / num_microbatches if objective.family == "reduced" else 1.0
            for objective in objectives
        ]
    )
    pairs = list(zip(objectives, beta.tolist(), strict=True))
    return MetricWeights(
        beta=beta,
        compute=np.array([_compute_and_gather_weights(objective, overlap_contention)[0] for objective in objectives]),
        op=np.array(
            [_op_weights(objective, each, overlap_contention, new_gradient_share) for objective, each in pairs]
        ),
        storage=np.array(
            [
                _storage_weights(objective, num_microbatches, each, overlap_contention, new_gradient_share)
                for objective, each in pairs
            ]
        ),
    )


def _storage_weights(
    objective: PricedObjective, num_microbatches: int, beta: float, overlap_contention: float, new_gradient_share: float
) -> list[float]:
    """The weights of the metrics of a parameter's storage."""
    compute, gathers = _compute_and_gather_weights(objective, overlap_contention)
    weights = [0.0] * pm.NUM_PARAMETER_METRICS
    weights[pm.GATHER_FORWARD_S], weights[pm.GATHER_BACKWARD_S] = gathers, beta * gathers
    reductions = {"priced": 1.0, "reduced": 1.0, "lean": 1.0, "hidden": overlap_contention}.get(objective.family, 0.0)
    weights[pm.STEP_OVERLAPPABLE_S] = reductions / num_microbatches
    weights[pm.STEP_EXPOSED_S] = 0.0 if objective.family in ("path", "linked") else 1.0 / num_microbatches
    weights[pm.STATE_BYTES] = objective.price_s_per_byte
    weights[pm.NEW_GRADIENT_BYTES] = new_gradient_share * objective.price_s_per_byte
    weights[pm.ACCUMULATE_S] = compute * beta
    return weights


def _compute_and_gather_weights(objective: PricedObjective, overlap_contention: float) -> tuple[float, float]:
    """What a second of compute and a second of ZeRO-3 gathers count."""
    return {"priced": (1.0, 1.0), "lean": (1.0, 1.0), "linked": (overlap_contention, 1.0)}.get(
        objective.family, (1.0, overlap_contention)
    )


def _op_weights(
    objective: PricedObjective, beta: float, overlap_contention: float, new_gradient_share: float
) -> list[float]:
    """The weights of the metrics of an op."""
    saved = objective.price_s_per_byte * max(objective.saved_weight - new_gradient_share, 0.0)
    share = _compute_and_gather_weights(objective, overlap_contention)[0]
    weights = [0.0] * om.NUM_OP_METRICS
    weights[om.FORWARD] = share
    weights[om.SELECTIVE_FORWARD] = share * (1.0 + beta if objective.mode == "selective" else 1.0)
    weights[om.FULL_RECOMPUTE] = share * beta if objective.mode == "full" else 0.0
    weights[om.BACKWARD] = share * beta
    weights[om.SAVED] = 0.0 if objective.mode == "full" else saved
    weights[om.SELECTIVE_FREED] = saved if objective.mode == "none" else 0.0
    weights[om.SELECTIVE_ONLY_SAVED] = saved if objective.mode == "selective" else 0.0
    weights[om.INPUT_SAVED] = saved if objective.mode == "full" else 0.0
    return weights
