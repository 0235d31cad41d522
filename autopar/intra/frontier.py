"""The frontier of a block on a mesh: one optimal solution for every way of weighing time against memory.

A *price row* fixes a recompute mode and prices per byte; the problem it gives is pairwise, so elimination solves all rows
and all boundary placements at once and exactly:

    none        minimise F + C + B                      + price * (state + weight * (saved + core))
    selective   minimise F + 2 C + B                    + price * (state + weight * saved)
    full        minimise 2 F + 2 C + B                  + price * (state + weight * boundary)

    F, C, B     forward outside and inside attention, backward; communication inside them      (tables)
    + what parameters cost per micro-batch and, divided by the micro-batches, per step          (cost.parameters)

Parameters are leaves: for each row and strategy the cheapest storage is taken. What the solutions cost is then summed per
metric, with what overlaps (ZeRO-3 gathers behind one block's compute) applied to the block as a whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.cost import parameters as pm
from autopar.cost.execution import ExecutionModel
from autopar.cost.redistribute import MeshLinks
from autopar.intra import tables as tb
from autopar.intra.elimination import Eliminator
from autopar.intra.space import IN, OUT
from autopar.intra.tables import BlockTables

Floats = NDArray[np.float64]
MODES = ("none", "selective", "full")
FORWARD, BACKWARD, STEP, STEP_EXPOSED, STATE, SAVED, WORKSPACE = range(7)
NUM_TOTALS = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceRow:
    """``price_s_per_byte`` of state; a byte saved by one micro-batch costs ``saved_weight`` times that."""

    mode: str
    price_s_per_byte: float
    saved_weight: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockPoints:
    """``totals[row, boundary]`` are the seven sums above (seconds, seconds, seconds once per step that backward may hide,
    seconds once per step, bytes, bytes per micro-batch in flight, bytes), inf where there is no solution; the boundary
    placement is the same on both sides. ``choices[node, row, boundary]`` and ``storage[op][row]`` say which."""

    tables: BlockTables
    rows: tuple[PriceRow, ...]
    totals: Floats
    choices: NDArray[np.integer]
    storages: tuple[tuple[tuple[tuple[pm.Storage, ...], ...], NDArray[np.integer]], ...]
    bound_s: Floats


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


def price_rows(time_s: float, num_bytes: float, modes: Sequence[str] = MODES) -> tuple[PriceRow, ...]:
    """Rows around the block's own exchange rate of seconds for bytes, from free to a hundred times that."""
    rate = time_s / max(num_bytes, 1.0)
    rows = []
    for mode in modes:
        rows.append(PriceRow(mode=mode, price_s_per_byte=1e-6 * rate, saved_weight=1.0))
        for factor in (0.01, 0.1, 1.0, 10.0):
            rows += [PriceRow(mode=mode, price_s_per_byte=factor * rate, saved_weight=weight) for weight in (1.0, 16.0)]
    return tuple(rows)


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
    weights = np.array([_weights(row) for row in rows])
    per_byte = np.array([[row.price_s_per_byte] for row in rows])
    node_costs: list[Floats] = [weights @ metrics.T for metrics in tables.node_metrics]
    storages = []
    parameter_metrics: list[tuple[Floats, NDArray[np.integer]]] = []
    for at, uses in enumerate(tables.parameter_uses):
        cost, chosen, metrics, names = _parameter_costs(
            uses, prices, per_byte, num_microbatches, data_axis, held, zero, len(tables.strategies[at])
        )
        node_costs[2 + at] = node_costs[2 + at] + cost
        parameter_metrics.append((metrics, chosen))
        storages.append((names, chosen))
    repeat = np.array([2.0 if row.mode == "full" else 1.0 for row in rows])[:, None, None]
    pairs = [(source, target) for source, target, _, _ in tables.edges]
    edge_costs = [repeat * forward + backward for _, _, forward, backward in tables.edges]
    eliminator = Eliminator(tuple(len(metrics) for metrics in tables.node_metrics), tuple(pairs), keep=(IN, OUT))
    table = eliminator.solve(node_costs, edge_costs)
    diagonal = np.arange(len(tables.boundaries))
    values = table.values[:, diagonal, diagonal]
    choices = table.backtrack_all()[:, :, diagonal, diagonal]
    totals = _totals(tables, rows, choices, parameter_metrics)
    totals[~np.isfinite(values)] = np.inf
    return BlockPoints(
        tables=tables, rows=rows, totals=totals, choices=choices, storages=tuple(storages), bound_s=values.min(axis=1)
    )


def _weights(row: PriceRow) -> list[float]:
    saved = row.price_s_per_byte * row.saved_weight
    weights = [0.0] * tb.NUM_METRICS
    weights[tb.FORWARD] = 2.0 if row.mode == "full" else 1.0
    weights[tb.CORE_FORWARD] = 1.0 if row.mode == "none" else 2.0
    weights[tb.BACKWARD] = 1.0
    weights[tb.SAVED] = 0.0 if row.mode == "full" else saved
    weights[tb.CORE_SAVED] = saved if row.mode == "none" else 0.0
    weights[tb.BOUNDARY] = saved if row.mode == "full" else 0.0
    return weights


def _parameter_costs(
    uses: tuple,  # type: ignore[type-arg]
    prices: ParameterPrices,
    per_byte: Floats,
    num_microbatches: int,
    data_axis: bool,
    held: frozenset[int],
    zero: int | None,
    num_strategies: int,
) -> tuple[Floats, NDArray[np.integer], Floats, tuple[tuple[pm.Storage, ...], ...]]:
    """(rows, strategies) cost; (uses, rows, strategies) chosen storage; (uses, strategies, storages, metrics)."""
    num_rows = len(per_byte)
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
    weight = np.zeros((num_rows, pm.NUM_PARAMETER_METRICS))
    weight[:, [pm.GATHER_FORWARD, pm.GATHER_BACKWARD]] = 1.0
    weight[:, [pm.STEP, pm.STEP_EXPOSED]] = 1.0 / num_microbatches
    weight[:, pm.STATE] = per_byte[:, 0]
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
    finite = np.nan_to_num  # cells without a solution are arbitrary here and set to inf by the caller
    for node, metrics in enumerate(tables.node_metrics):
        picked = metrics[choices[node]]
        workspace = np.maximum(sums[..., tb.WORKSPACE], picked[..., tb.WORKSPACE])
        sums += picked
        sums[..., tb.WORKSPACE] = workspace
    # Costs charge a tensor to the first op that keeps it; solutions may keep it in two placements (`copies`).
    for at, tensors in enumerate(tables.kept):
        sums[..., [tb.SAVED, tb.CORE_SAVED]] -= tensors[choices[2 + at]]
    kept = tables.copies.kept(choices.reshape(len(choices), -1))
    sums[..., [tb.SAVED, tb.CORE_SAVED]] += kept.reshape(*shape, 2)
    for source, target, forward, backward in tables.edges:
        pair = (choices[source], choices[target])
        sums[..., tb.FORWARD] += finite(forward[pair], posinf=0)
        sums[..., tb.BACKWARD] += finite(backward[pair], posinf=0)
    held = np.zeros((*shape, pm.NUM_PARAMETER_METRICS))
    row_at = np.arange(shape[0])[:, None]
    for at, (metrics, chosen) in enumerate(parameter_metrics):
        strategy = choices[2 + at]
        for use in range(len(metrics)):
            held += np.nan_to_num(metrics[use][strategy, chosen[use][row_at, strategy]], posinf=0)
    totals = np.zeros((*shape, NUM_TOTALS))
    launch = tables.num_kernels
    device_launch = tables.launch_s
    for index, row in enumerate(rows):
        f, c, b = (sums[index, :, m] for m in (tb.FORWARD, tb.CORE_FORWARD, tb.BACKWARD))
        saved, core, boundary = (sums[index, :, m] for m in (tb.SAVED, tb.CORE_SAVED, tb.BOUNDARY))
        again = {"none": 0.0 * f, "selective": c, "full": f + c}[row.mode]
        launches = {"none": 0, "selective": 0, "full": launch[0]}[row.mode] + launch[1]
        gather_f, gather_b = held[index, :, pm.GATHER_FORWARD], held[index, :, pm.GATHER_BACKWARD]
        totals[index, :, FORWARD] = np.maximum(np.maximum(f + c, launch[0] * device_launch), gather_f)
        totals[index, :, BACKWARD] = np.maximum(np.maximum(b + again, launches * device_launch), gather_b)
        totals[index, :, STEP] = held[index, :, pm.STEP]
        totals[index, :, STEP_EXPOSED] = held[index, :, pm.STEP_EXPOSED]
        totals[index, :, STATE] = held[index, :, pm.STATE]
        totals[index, :, SAVED] = {"none": saved + core, "selective": saved, "full": boundary}[row.mode]
        passing = sums[index, :, tb.WORKSPACE] + 2 * held[index, :, pm.GATHERED]
        totals[index, :, WORKSPACE] = passing + {"none": 0 * f, "selective": core, "full": saved + core}[row.mode]
    return totals
