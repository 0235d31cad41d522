"""The frontier of a block on a mesh: one optimal solution for every way of weighing time against memory.

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

Parameters are leaves: for each row and strategy the cheapest storage is taken. What the solutions cost is then summed
per metric, with what overlaps (ZeRO-3 gathers behind one block's compute) applied to the block as a whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from autopar.cost import parameters as pm
from autopar.cost.execution import ExecutionModel
from autopar.cost.redistribute import MeshLinks
from autopar.intra import tables as tb
from autopar.intra.tables import BlockTables

Floats = NDArray[np.float64]
Rests = Callable[[int, pm.Storage], bool]
"""Whether a parameter (value) may be stored so."""
MODES = ("none", "selective", "full")
FAMILIES = ("priced", "hidden", "reduced", "path", "linked")
PRICES = (0.1, 1.0, 2.5, 5.0, 8.0, 14.0, 30.0, 100.0)
"""Prices of a byte tried where memory binds, in units of the time the device takes to stream it; densest where
computing a layer again costs about what its activations free."""
LEAN_PRICE = 1e3
"""Seconds per byte at which time has no say."""
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
    """``totals[row, boundary]`` are the eight sums above (seconds, seconds, seconds once per step that backward may
    hide, seconds once per step, bytes, bytes per micro-batch in flight, bytes, bytes of gradients that a backward
    makes), inf where there is no solution; the boundary placement is the same on both sides. ``choices[node, row,
    boundary]`` and ``storage[op][row]`` say which; ``bound_s[row, boundary]`` is the row's optimum. ``least`` holds the
    least forward seconds, workspace and seconds once per step of any choice; ``links_bind``: ZeRO-3 gathers can take
    longer than the compute that hides them. ``regathered`` says by flow which solutions gather it again, (rows,
    boundaries)."""

    tables: BlockTables
    rows: tuple[PriceRow, ...]
    totals: Floats
    choices: NDArray[np.integer]
    storages: tuple[tuple[tuple[tuple[pm.Storage, ...], ...], NDArray[np.integer]], ...]
    bound_s: Floats
    least: tuple[float, float, float]
    links_bind: bool
    regathered: dict[int, NDArray[np.bool_]]

    def repeated(self, at: NDArray[np.integer]) -> "BlockPoints":
        """Rows number ``at`` of these, in that order."""
        return replace(
            self,
            rows=tuple(self.rows[row] for row in at),
            totals=self.totals[at],
            choices=self.choices[:, at],
            storages=tuple((names, chosen[:, at]) for names, chosen in self.storages),
            bound_s=self.bound_s[at],
            regathered={flow: flags[at] for flow, flags in self.regathered.items()},
        )

    def regathers(self, row: int, boundary: int) -> tuple[int, ...]:
        """The flows (positions) that a solution gathers again in the backward."""
        return tuple(flow for flow, flags in self.regathered.items() if flags[row, boundary])


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


def block_points(
    tables: BlockTables,
    prices: ParameterPrices,
    rows: tuple[PriceRow, ...],
    num_microbatches: int,
    data_axis: bool,
    held: frozenset[int] = frozenset(),
    zero: int | None = None,
    rests: Rests | None = None,
) -> BlockPoints:
    """Solve all rows. ``data_axis``: mesh axis 0 has several ranks. ``held`` parameters are stored by another block of
    the stage; ``zero`` fixes the ZeRO stage over the data axis, ``rests`` says which storages may be."""
    late_share = 0.5 if prices.execution.late_gradients else 0.0
    beta, share, weights, parameter_weights = _row_weights(rows, num_microbatches, tables.contention, late_share)
    node_costs: list[Floats] = [weights @ metrics.T for metrics in tables.node_metrics]
    storages = []
    parameter_metrics: list[tuple[Floats, NDArray[np.integer]]] = []
    for at, uses in enumerate(tables.parameter_uses):
        again = frozenset(number for number in range(len(uses)) if (at, number) in tables.again)
        cost, chosen, metrics, names = _parameter_costs(
            uses, prices, parameter_weights, data_axis, held, again, zero, rests, len(tables.strategies[at])
        )
        node_costs[2 + at] = node_costs[2 + at] + cost
        parameter_metrics.append((metrics, chosen))
        storages.append((names, chosen))
    late = (share * beta)[:, None, None]
    once = share[:, None, None]
    repeats: dict[tuple[str, ...], Floats] = {
        by: (share * np.where([row.mode in by for row in rows], 1.0 + beta, 1.0))[:, None, None]
        for by in (("full",), ("selective",), ("full", "selective"))
    }
    kept = weights[:, tb.SAVED][:, None, None]  # what a byte kept by one micro-batch costs
    extra_s = {  # of gathering again what one op reads
        at: _scaled(one.choice_s, late) - kept * one.freed_bytes
        for at, one in tables.regathers.items()
        if one.is_choice
    }
    edge_costs = []
    moved = zip(tables.moved_again, tables.moved_selectively, strict=True)
    for at, ((_, _, forward, backward), repeated) in enumerate(zip(tables.edges, moved, strict=True)):
        cost = _scaled(forward, repeats.get(_moved_by(*repeated), once)) + _scaled(backward, late)
        if at in tables.saved_bytes:
            cost = cost + kept * tables.saved_bytes[at]
        if at in extra_s:
            cost = cost + np.minimum(extra_s[at], 0.0)
        edge_costs.append(cost)
    table = tables.eliminator.solve(node_costs, edge_costs)
    diagonal = np.arange(len(tables.boundaries))
    values = table.values[:, diagonal, diagonal]
    choices = table.backtrack_all()[:, :, diagonal, diagonal]
    regathered = {}
    for at, one in tables.regathers.items():
        source, target = (choices[node] for node in tables.edges[at][:2])
        regathered[at] = one.always[source, target]
        if at in extra_s:
            regathered[at] = regathered[at] | (extra_s[at][np.arange(len(rows))[:, None], source, target] < 0)
    totals = _totals(tables, rows, choices, parameter_metrics, regathered)
    totals[~np.isfinite(values)] = np.inf
    return BlockPoints(
        tables=tables,
        rows=rows,
        totals=totals,
        choices=choices,
        storages=tuple(storages),
        bound_s=values,
        least=_least(tables, parameter_metrics),
        links_bind=_links_bind(tables, parameter_metrics),
        regathered=regathered,
    )


def _moved_by(full: bool, selective: bool) -> tuple[str, ...]:
    """The modes that move a value again."""
    return (*(("full",) if full else ()), *(("selective",) if selective else ()))


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


def _links_bind(tables: BlockTables, parameter_metrics: Sequence[tuple[Floats, NDArray[np.integer]]]) -> bool:
    """Whether some choice's gathers may take longer than its compute: the longest of each against the least of each."""
    least = [m.min(axis=0) for m in tables.node_metrics]
    forward = sum(float(m[tb.FORWARD] + m[tb.CORE_FORWARD]) for m in least)
    backward = sum(float(m[tb.BACKWARD]) for m in least)
    for metric, compute_s in ((pm.GATHER_FORWARD, forward), (pm.GATHER_BACKWARD, backward)):
        gathers = sum(
            float(np.where(np.isfinite(use[..., metric]), use[..., metric], 0.0).max())
            for metrics, _ in parameter_metrics
            for use in metrics
        )
        if gathers > compute_s:
            return True
    return False


def memory_bytes(totals: Floats, in_flight: float | Floats) -> Floats:
    """Bytes with ``in_flight`` micro-batches held, all but the fixed share: at the start of a backward, or at its end,
    when its saved tensors are gone and its gradients there."""
    late = np.maximum(totals[..., LATE] - totals[..., SAVED], 0.0)
    return np.asarray(totals[..., STATE] + in_flight * totals[..., SAVED] + late + totals[..., WORKSPACE])


@lru_cache(maxsize=16)
def _row_weights(
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
    weights = [0.0] * tb.NUM_METRICS
    weights[tb.FORWARD] = share
    weights[tb.CORE_FORWARD] = share * (1.0 + beta if row.mode == "selective" else 1.0)
    weights[tb.AGAIN] = share * beta if row.mode == "full" else 0.0
    weights[tb.BACKWARD] = share * beta
    weights[tb.SAVED] = 0.0 if row.mode == "full" else saved
    weights[tb.CORE_SAVED] = saved if row.mode == "none" else 0.0
    weights[tb.BESIDE] = saved if row.mode == "selective" else 0.0
    weights[tb.BOUNDARY] = saved if row.mode == "full" else 0.0
    return weights


def _of_stage(storage: pm.Storage, zero: int, axes: tuple[int, ...]) -> bool:
    return storage.stage == (zero if axes else 0) and (storage.axes == axes or storage.stage == 0)


def _parameter_costs(
    uses: tuple,  # type: ignore[type-arg]
    prices: ParameterPrices,
    weight: Floats,
    data_axis: bool,
    held: frozenset[int],
    again: frozenset[int],
    zero: int | None,
    rests: Rests | None,
    num_strategies: int,
) -> tuple[Floats, NDArray[np.integer], Floats, tuple[tuple[pm.Storage, ...], ...]]:
    """(rows, strategies) cost; (uses, rows, strategies) chosen storage; (uses, strategies, storages, metrics)."""
    num_rows = len(weight)
    cost = np.zeros((num_rows, num_strategies))
    chosen = np.zeros((len(uses), num_rows, num_strategies), int)
    width = 1
    found = []
    for number, (value, per_strategy) in enumerate(uses):
        stored = value.id in held or number in again
        row: list[tuple[tuple[pm.Storage, ...], Floats]] = []
        for elements, axes in per_strategy:
            full_axes = tuple(axis for axis in axes if axis or data_axis) if value.requires_grad else ()
            if value.kind == "buffer" or not value.requires_grad or stored:
                metrics = np.zeros((1, pm.NUM_PARAMETER_METRICS))
                metrics[0, pm.STATE] = 0.0 if stored else elements * value.itemsize
                row.append(((pm.Storage(stage=0, axes=()),), metrics))
            else:
                options, metrics = prices.of(elements, value.itemsize, full_axes)
                keep = [
                    i
                    for i, o in enumerate(options)
                    if (zero is None or _of_stage(o, zero, full_axes)) and (rests is None or rests(value.id, o))
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
    regathered: dict[int, NDArray[np.bool_]],
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
    for at, flags in regathered.items():
        one, (source, target) = tables.regathers[at], tables.edges[at][:2]
        chosen_s = np.where(one.always, 0.0, one.choice_s)[choices[source], choices[target]]  # always: in the edge
        sums[..., tb.BACKWARD] += np.where(flags, chosen_s, 0.0)
        for reader in one.readers:
            passing = tables.node_metrics[reader][choices[reader], tb.WORKSPACE] + one.whole_bytes[choices[target]]
            np.maximum(workspace, np.where(flags, passing, 0.0), out=workspace)
    again = {at: flags.reshape(-1) for at, flags in regathered.items()}
    kept = tables.copies.kept(choices.reshape(len(choices), -1), again)
    sums[..., [tb.SAVED, tb.CORE_SAVED]] += kept.reshape(*shape, 2)
    # a cell without a solution is arbitrary here, infinite at most, and set to inf by the caller
    # seconds that ranks wait for each other, forward and backward, and forward again in full and selective recomputation
    waits = np.zeros((*shape, 4))
    moved_selectively_s = np.zeros(shape)
    edges = zip(tables.edges, tables.sync_s, tables.moved_again, tables.moved_selectively, strict=True)
    for (source, target, forward, backward), sync_s, moved_again, moved_selectively in edges:
        pair = (choices[source], choices[target])
        for way, metric, table in ((0, tb.FORWARD, forward), (1, tb.BACKWARD, backward)):
            time_s = table[pair]
            sums[..., metric] += time_s
            waits[..., way] += sync_s[way] * (time_s > 0)
            if moved_again and way == 0:
                sums[..., tb.AGAIN] += time_s
                waits[..., 2] += sync_s[0] * (time_s > 0)
            if moved_selectively and way == 0:
                moved_selectively_s += time_s
                waits[..., 3] += sync_s[0] * (time_s > 0)
    held = np.zeros((*shape, pm.NUM_PARAMETER_METRICS))
    row_at = np.arange(shape[0])[:, None]
    for at, (metrics, chosen) in enumerate(parameter_metrics):
        strategy = choices[2 + at]
        for use in range(len(metrics)):
            held += metrics[use][strategy, chosen[use][row_at, strategy]]
    full, selective = (np.array([[row.mode == mode] for row in rows]) for mode in ("full", "selective"))
    f, c, b = (sums[..., m] for m in (tb.FORWARD, tb.CORE_FORWARD, tb.BACKWARD))
    saved, core, boundary = (sums[..., m] for m in (tb.SAVED, tb.CORE_SAVED, tb.BOUNDARY))
    again_s = np.where(full, sums[..., tb.AGAIN], np.where(selective, c + moved_selectively_s, 0.0))
    forward_host_s, core_host_s, backward_host_s, again_host_s = tables.host_s
    forward_host = forward_host_s + waits[..., 0]
    backward_host = backward_host_s + waits[..., 1]
    core_host = np.where(selective, core_host_s + waits[..., 3], 0.0)
    backward_host = backward_host + np.where(full, again_host_s + waits[..., 2], core_host)
    totals = np.zeros((*shape, NUM_TOTALS))
    both = np.add if tables.blocking else np.maximum
    for total, busy, gather in (
        (FORWARD, both(f + c, forward_host), held[..., pm.GATHER_FORWARD]),
        (BACKWARD, both(b + held[..., pm.ACCUMULATE] + again_s, backward_host), held[..., pm.GATHER_BACKWARD]),
    ):
        totals[..., total] = np.maximum(busy, gather) + tables.contention * np.minimum(busy, gather)
    totals[..., STEP] = held[..., pm.STEP]
    totals[..., STEP_EXPOSED] = held[..., pm.STEP_EXPOSED]
    totals[..., STATE] = held[..., pm.STATE]
    totals[..., LATE] = held[..., pm.LATE]
    totals[..., SAVED] = np.where(full, boundary, np.where(selective, saved + sums[..., tb.BESIDE], saved + core))
    passing = workspace + 2 * held[..., pm.GATHERED]
    totals[..., WORKSPACE] = passing + np.where(full, saved + core, np.where(selective, core, 0.0))
    return totals
