"""The frontier of a block on a mesh: one optimal solution for every way of weighing time against memory.

A *price row* fixes a recompute mode, prices per byte, and what communication costs; the problem it gives is pairwise, so
elimination solves all rows and all boundary placements at once and exactly. Per micro-batch, B of them in a step:

    none        minimise F + C + beta W                     + price * (state + weight * (saved + core))
    selective   minimise F + (1 + beta) C + beta W          + price * (state + weight * saved)
    full        minimise (1 + beta) (F + C) + beta W        + price * (state + weight * boundary)

    F, C, W     forward outside and inside attention, backward; communication inside them      (tables)
    family      beta       ZeRO-3 gathers   reductions / B   rest of the step / B
    priced      1          charged          charged          charged     nothing is hidden: a good solution
    hidden      1          free             free             charged     all that can be hidden is: a bound on t + step/B
    reduced     1 - 1/B    free             charged          charged     the last backward hides reductions: a bound too
    path        1          free             free             free        a bound on t alone
    tenth       1          a tenth          free             free        the same, with nine tenths of F, C and W

Gradients that a backward makes (LATE: with one micro-batch all, without overlap what ZeRO-2 and 3 cut) take the place of
the saved tensors it frees: max(s saved, (s - 1) saved + late) is priced by the mean of the two, which is not above it.

Parameters are leaves: for each row and strategy the cheapest storage is taken. What the solutions cost is then summed per
metric, with what overlaps (ZeRO-3 gathers behind one block's compute) applied to the block as a whole. Because
max(a, b) >= (1 - x) a + x b and step >= reductions - last backward, the optimum of a hidden, reduced, path or tenth row is
never above the true time plus price * memory of any choice of its mode. Tenth is the better bound where gathers take far
longer than compute, as over slow links between nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.cost import parameters as pm
from autopar.cost.execution import ExecutionModel
from autopar.cost.redistribute import MeshLinks
from autopar.intra import tables as tb
from autopar.intra.tables import BlockTables

Floats = NDArray[np.float64]
MODES = ("none", "selective", "full")
FAMILIES = ("priced", "hidden", "reduced", "path", "tenth")
PRICES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
"""Prices of a byte tried where memory binds, in units of the time the device takes to stream it."""
FORWARD, BACKWARD, STEP, STEP_EXPOSED, STATE, SAVED, WORKSPACE, LATE = range(8)
NUM_TOTALS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceRow:
    """``price_s_per_byte`` of state; a byte saved by one micro-batch costs ``saved_weight`` times that."""

    mode: str
    price_s_per_byte: float
    saved_weight: float
    family: str = "priced"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockPoints:
    """``totals[row, boundary]`` are the eight sums above (seconds, seconds, seconds once per step that backward may hide,
    seconds once per step, bytes, bytes per micro-batch in flight, bytes, bytes of gradients that a backward makes), inf where there is no solution; the boundary
    placement is the same on both sides. ``choices[node, row, boundary]`` and ``storage[op][row]`` say which;
    ``bound_s[row, boundary]`` is the row's optimum. ``least`` holds the least forward seconds, workspace and seconds
    once per step of any choice."""

    tables: BlockTables
    rows: tuple[PriceRow, ...]
    totals: Floats
    choices: NDArray[np.integer]
    storages: tuple[tuple[tuple[tuple[pm.Storage, ...], ...], NDArray[np.integer]], ...]
    bound_s: Floats
    least: tuple[float, float, float]


class ParameterPrices:
    """Metrics of every storage of a parameter, cached by (elements, item size, axes) for one mesh."""

    def __init__(self, links: MeshLinks, execution: ExecutionModel) -> None:
        self.links, self.execution = links, execution
        self._cache: dict[tuple[int, int, tuple[int, ...]], tuple[tuple[pm.Storage, ...], Floats]] = {}

    def of(self, elements: int, itemsize: int, axes: tuple[int, ...]) -> tuple[tuple[pm.Storage, ...], Floats]:
        key = (elements, itemsize, axes)
        if key not in self._cache:
            choices = pm.storages(axes)
            metrics = np.stack(
                [pm.storage_metrics(choice, axes, elements, itemsize, self.links, self.execution) for choice in choices]
            )
            self._cache[key] = (choices, metrics)
        return self._cache[key]


def free_rows(
    rate_s_per_byte: float, modes: Sequence[str], families: Sequence[str] = FAMILIES[:4]
) -> tuple[PriceRow, ...]:
    """Rows for memory that does not bind: so low a price that it only breaks ties. Recomputing never pays there, so the
    mode is the first of ``modes``."""
    low = 1e-6 * rate_s_per_byte
    return tuple(PriceRow(mode=modes[0], price_s_per_byte=low, saved_weight=1.0, family=family) for family in families)


def priced_rows(rate_s_per_byte: float, modes: Sequence[str], saved_weight: float) -> tuple[PriceRow, ...]:
    """Rows for memory that binds, for stages that hold ``saved_weight`` micro-batches or more."""
    return tuple(
        PriceRow(mode=mode, price_s_per_byte=factor * rate_s_per_byte, saved_weight=saved_weight, family=family)
        for mode in modes
        for family in ("priced", "path", "tenth")
        for factor in PRICES
    )


def lean_rows(rate_s_per_byte: float, modes: Sequence[str], saved_weight: float) -> tuple[PriceRow, ...]:
    """Rows whose solutions need next to the least memory there is."""
    price = 1e4 * rate_s_per_byte
    return tuple(PriceRow(mode=mode, price_s_per_byte=price, saved_weight=saved_weight) for mode in modes)


def block_points(
    tables: BlockTables,
    prices: ParameterPrices,
    rows: tuple[PriceRow, ...],
    num_microbatches: int,
    data_axis: bool,
    held: frozenset[int] = frozenset(),
    zero: int | None = None,
) -> BlockPoints:
    """Solve all rows. ``data_axis``: mesh axis 0 has several ranks. ``held`` parameters are stored by another block of
    the stage; ``zero`` pins the ZeRO stage over the data axis."""
    beta = np.array([1.0 - 1.0 / num_microbatches if row.family == "reduced" else 1.0 for row in rows])
    late_share = 0.5 if prices.execution.late_gradients else 0.0
    weights = np.array([_weights(row, late, late_share) for row, late in zip(rows, beta, strict=True)])
    parameter_weights = np.array(
        [_parameter_weights(row, num_microbatches, late, late_share) for row, late in zip(rows, beta, strict=True)]
    )
    node_costs: list[Floats] = [weights @ metrics.T for metrics in tables.node_metrics]
    storages = []
    parameter_metrics: list[tuple[Floats, NDArray[np.integer]]] = []
    for at, uses in enumerate(tables.parameter_uses):
        cost, chosen, metrics, names = _parameter_costs(
            uses, prices, parameter_weights, data_axis, held, zero, len(tables.strategies[at])
        )
        node_costs[2 + at] = node_costs[2 + at] + cost
        parameter_metrics.append((metrics, chosen))
        storages.append((names, chosen))
    late = beta[:, None, None]
    repeat = np.array([1.0 + b if row.mode == "full" else 1.0 for row, b in zip(rows, beta, strict=True)])[
        :, None, None
    ]
    edge_costs = [_scaled(forward, repeat) + _scaled(backward, late) for _, _, forward, backward in tables.edges]
    table = tables.eliminator.solve(node_costs, edge_costs)
    diagonal = np.arange(len(tables.boundaries))
    values = table.values[:, diagonal, diagonal]
    choices = table.backtrack_all()[:, :, diagonal, diagonal]
    totals = _totals(tables, rows, choices, parameter_metrics)
    totals[~np.isfinite(values)] = np.inf
    return BlockPoints(
        tables=tables,
        rows=rows,
        totals=totals,
        choices=choices,
        storages=tuple(storages),
        bound_s=values,
        least=_least(tables, parameter_metrics),
    )


def _scaled(seconds: Floats, factor: Floats) -> Floats:
    """(rows, choices, choices): factor times seconds; what is impossible stays so with a factor of zero."""
    impossible = np.isinf(seconds)
    return np.where(impossible, np.inf, factor * np.where(impossible, 0.0, seconds))


def _least(
    tables: BlockTables, parameter_metrics: Sequence[tuple[Floats, NDArray[np.integer]]]
) -> tuple[float, float, float]:
    forward = sum(float((m[:, tb.FORWARD] + m[:, tb.CORE_FORWARD]).min()) for m in tables.node_metrics)
    workspace = max(float(m[:, tb.WORKSPACE].min()) for m in tables.node_metrics)
    step = sum(
        float(np.where(np.isfinite(use[..., pm.STEP_EXPOSED]), use[..., pm.STEP_EXPOSED], np.inf).min())
        for metrics, _ in parameter_metrics
        for use in metrics
    )
    return forward, workspace, step


def memory_bytes(totals: Floats, in_flight: int | Floats) -> Floats:
    """Bytes with ``in_flight`` micro-batches held, all but the fixed share: at the start of a backward, or at its end,
    when its saved tensors are gone and its gradients there."""
    late = np.maximum(totals[..., LATE] - totals[..., SAVED], 0.0)
    return np.asarray(totals[..., STATE] + in_flight * totals[..., SAVED] + late + totals[..., WORKSPACE])


def _parameter_weights(row: PriceRow, num_microbatches: int, beta: float, late_share: float) -> list[float]:
    weights = [0.0] * pm.NUM_PARAMETER_METRICS
    gathers = {"priced": 1.0, "tenth": 0.1}.get(row.family, 0.0)
    weights[pm.GATHER_FORWARD] = weights[pm.GATHER_BACKWARD] = gathers
    weights[pm.STEP] = 1.0 / num_microbatches if row.family in ("priced", "reduced") else 0.0
    weights[pm.STEP_EXPOSED] = 0.0 if row.family in ("path", "tenth") else 1.0 / num_microbatches
    weights[pm.STATE] = row.price_s_per_byte
    weights[pm.LATE] = late_share * row.price_s_per_byte
    weights[pm.ACCUMULATE] = _compute_share(row) * beta
    return weights


def _compute_share(row: PriceRow) -> float:
    return 0.9 if row.family == "tenth" else 1.0


def _weights(row: PriceRow, beta: float, late_share: float) -> list[float]:
    saved = row.price_s_per_byte * max(row.saved_weight - late_share, 0.0)
    share = _compute_share(row)
    weights = [0.0] * tb.NUM_METRICS
    weights[tb.FORWARD] = share * (1.0 + beta if row.mode == "full" else 1.0)
    weights[tb.CORE_FORWARD] = share * (1.0 if row.mode == "none" else 1.0 + beta)
    weights[tb.BACKWARD] = share * beta
    weights[tb.SAVED] = 0.0 if row.mode == "full" else saved
    weights[tb.CORE_SAVED] = saved if row.mode == "none" else 0.0
    weights[tb.BOUNDARY] = saved if row.mode == "full" else 0.0
    return weights


def _parameter_costs(
    uses: tuple,  # type: ignore[type-arg]
    prices: ParameterPrices,
    weight: Floats,
    data_axis: bool,
    held: frozenset[int],
    zero: int | None,
    num_strategies: int,
) -> tuple[Floats, NDArray[np.integer], Floats, tuple[tuple[pm.Storage, ...], ...]]:
    """(rows, strategies) cost; (uses, rows, strategies) chosen storage; (uses, strategies, storages, metrics)."""
    num_rows = len(weight)
    cost = np.zeros((num_rows, num_strategies))
    chosen = np.zeros((len(uses), num_rows, num_strategies), int)
    width = 1
    found = []
    for value, per_strategy in uses:
        row: list[tuple[tuple[pm.Storage, ...], Floats]] = []
        for elements, axes in per_strategy:
            full_axes = ((0, *axes) if data_axis else axes) if value.requires_grad else ()
            if value.kind == "buffer" or not value.requires_grad or value.id in held:
                metrics = np.zeros((1, pm.NUM_PARAMETER_METRICS))
                metrics[0, pm.STATE] = 0.0 if value.id in held else elements * value.itemsize
                row.append(((pm.Storage(stage=0, axes=()),), metrics))
            else:
                options, metrics = prices.of(elements, value.itemsize, full_axes)
                if zero is not None:
                    keep = [
                        i
                        for i, o in enumerate(options)
                        if o.stage == (zero if full_axes else 0) and (o.axes == full_axes or o.stage == 0)
                    ]
                    options, metrics = tuple(options[i] for i in keep), metrics[keep]
                row.append((options, metrics))
        width = max(width, *(len(options) for options, _ in row))
        found.append(row)
    table = np.full((len(uses), num_strategies, width, pm.NUM_PARAMETER_METRICS), 0.0)
    for use, row in enumerate(found):
        for strategy, (options, metrics) in enumerate(row):
            table[use, strategy, : len(options)] = metrics
            table[use, strategy, len(options) :] = np.inf
        priced = np.where(
            np.isfinite(table[use, :, :, 0]),
            np.einsum("rm,som->rso", weight, np.nan_to_num(table[use], posinf=0)),
            np.inf,
        )
        chosen[use] = priced.argmin(axis=2)
        cost += priced.min(axis=2)
    names = tuple(options for row in found for options, _ in row)
    return cost, chosen, table, names


def _totals(
    tables: BlockTables,
    rows: tuple[PriceRow, ...],
    choices: NDArray[np.integer],
    parameter_metrics: list[tuple[Floats, NDArray[np.integer]]],
) -> Floats:
    shape = choices.shape[1:]
    sums = np.zeros((*shape, tb.NUM_METRICS))
    workspace = np.zeros(shape)
    for node, metrics in enumerate(tables.node_metrics):
        picked = metrics[choices[node]]
        np.maximum(workspace, picked[..., tb.WORKSPACE], out=workspace)
        sums += picked
    # Costs charge a tensor to the first op that keeps it; solutions may keep it in two placements (`copies`).
    for at, tensors in enumerate(tables.kept):
        sums[..., [tb.SAVED, tb.CORE_SAVED]] -= tensors[choices[2 + at]]
    kept = tables.copies.kept(choices.reshape(len(choices), -1))
    sums[..., [tb.SAVED, tb.CORE_SAVED]] += kept.reshape(*shape, 2)
    waits = np.zeros((*shape, 2))  # collectives, forward and backward
    # a cell without a solution is arbitrary here, infinite at most, and set to inf by the caller
    waits = np.zeros((*shape, 2))  # collectives, forward and backward
    for source, target, forward, backward in tables.edges:
        pair = (choices[source], choices[target])
        for way, metric, table in ((0, tb.FORWARD, forward), (1, tb.BACKWARD, backward)):
            time_s = table[pair]
            sums[..., metric] += time_s
            waits[..., way] += time_s > 0
    held = np.zeros((*shape, pm.NUM_PARAMETER_METRICS))
    row_at = np.arange(shape[0])[:, None]
    for at, (metrics, chosen) in enumerate(parameter_metrics):
        strategy = choices[2 + at]
        for use in range(len(metrics)):
            held += metrics[use][strategy, chosen[use][row_at, strategy]]
    full, selective = (np.array([[row.mode == mode] for row in rows]) for mode in ("full", "selective"))
    f, c, b = (sums[..., m] for m in (tb.FORWARD, tb.CORE_FORWARD, tb.BACKWARD))
    saved, core, boundary = (sums[..., m] for m in (tb.SAVED, tb.CORE_SAVED, tb.BOUNDARY))
    again = np.where(full, f + c, np.where(selective, c, 0.0))
    forward_host_s, core_host_s, backward_host_s = tables.host_s
    forward_host = forward_host_s + tables.sync_s * waits[..., 0]
    backward_host = backward_host_s + tables.sync_s * waits[..., 1]
    backward_host = backward_host + np.where(full, forward_host, np.where(selective, core_host_s, 0.0))
    totals = np.zeros((*shape, NUM_TOTALS))
    both = np.add if tables.blocking else np.maximum
    for total, busy, gather in (
        (FORWARD, both(f + c, forward_host), held[..., pm.GATHER_FORWARD]),
        (BACKWARD, both(b + held[..., pm.ACCUMULATE] + again, backward_host), held[..., pm.GATHER_BACKWARD]),
    ):
        totals[..., total] = np.maximum(busy, gather) + tables.contention * np.minimum(busy, gather)
    totals[..., STEP] = held[..., pm.STEP]
    totals[..., STEP_EXPOSED] = held[..., pm.STEP_EXPOSED]
    totals[..., STATE] = held[..., pm.STATE]
    totals[..., LATE] = held[..., pm.LATE]
    totals[..., SAVED] = np.where(full, boundary, np.where(selective, saved, saved + core))
    passing = workspace + 2 * held[..., pm.GATHERED]
    totals[..., WORKSPACE] = passing + np.where(full, saved + core, np.where(selective, core, 0.0))
    return totals
