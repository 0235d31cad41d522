"""The frontier of a block on a mesh: one optimal solution for every way of weighing time against memory.

Every *price row* (`price_rows`) gives a pairwise problem, so elimination solves all rows and all boundary placements at
once and exactly. Parameters are leaves: for each row and strategy the cheapest storage is taken. What the solutions
cost is then summed per metric (`totals`), with what overlaps applied to the block as a whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from autopar.cost import parameter_storage as pm
from autopar.cost.execution_model import ExecutionModel
from autopar.cost.redistribution_time import MeshLinks
from autopar.intra import op_metrics as om
from autopar.intra.block_tables import BlockTables
from autopar.intra.block_totals import sum_totals
from autopar.intra.priced_objectives import PricedObjective, metric_weights

Floats = NDArray[np.float64]
StorageFilter = Callable[[int, pm.ParameterStorage], bool]
"""Whether a parameter (value) may be stored so."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockFrontier:
    """``totals[row, boundary]`` are those of `totals`, inf where there is no solution; the boundary placement is the
    same on both sides. ``choices[node, row, boundary]`` and ``storage[op][row]`` say which; ``bound_s[row, boundary]``
    is the row's optimum. ``least`` holds the least forward seconds, workspace and seconds once per step of any choice;
    ``links_bind``: ZeRO-3 gathers can take longer than the compute that hides them. ``regathered`` says by flow which
    solutions gather it again, (rows, boundaries)."""

    tables: BlockTables
    objectives: tuple[PricedObjective, ...]
    totals: Floats
    choices: NDArray[np.integer]
    storages: tuple[tuple[tuple[tuple[pm.ParameterStorage, ...], ...], NDArray[np.integer]], ...]
    bound_s: Floats
    minima: tuple[float, float, float]
    gathers_can_bind: bool
    regathered: dict[int, NDArray[np.bool_]]

    def select(self, positions: NDArray[np.integer]) -> "BlockFrontier":
        """Rows number ``at`` of these, in that order."""
        return replace(
            self,
            objectives=tuple(self.objectives[row] for row in positions),
            totals=self.totals[positions],
            choices=self.choices[:, positions],
            storages=tuple((names, chosen[:, positions]) for names, chosen in self.storages),
            bound_s=self.bound_s[positions],
            regathered={flow: flags[positions] for flow, flags in self.regathered.items()},
        )

    def regathered_edges(self, objective: int, boundary: int) -> tuple[int, ...]:
        """The flows (positions) that a solution gathers again in the backward."""
        return tuple(flow for flow, flags in self.regathered.items() if flags[objective, boundary])


class StorageMetricsCache:
    """Metrics of every storage of a parameter, cached by (elements, item size, axes) for one mesh."""

    def __init__(self, mesh_links: MeshLinks, execution: ExecutionModel) -> None:
        self.mesh_links, self.execution = mesh_links, execution
        self._cache: dict[tuple[int, int, tuple[int, ...]], tuple[tuple[pm.ParameterStorage, ...], Floats]] = {}

    def metrics_of(
        self, elements: int, itemsize: int, axes: tuple[int, ...]
    ) -> tuple[tuple[pm.ParameterStorage, ...], Floats]:
        key = (elements, itemsize, axes)
        if key not in self._cache:
            choices = pm.storage_choices(axes)
            metrics = np.stack(
                [
                    pm.storage_metrics(choice, axes, elements, itemsize, self.mesh_links, self.execution)
                    for choice in choices
                ]
            )
            self._cache[key] = (choices, metrics)
        return self._cache[key]


def solve_frontier(
    tables: BlockTables,
    storage_metrics: StorageMetricsCache,
    objectives: tuple[PricedObjective, ...],
    num_microbatches: int,
    has_data_axis: bool,
    stored_elsewhere: frozenset[int] = frozenset(),
    zero_stage: int | None = None,
    storage_filter: StorageFilter | None = None,
) -> BlockFrontier:
    """Solve all rows. ``data_axis``: mesh axis 0 has several ranks. ``held`` parameters are stored by another block of
    the stage; ``zero`` fixes the ZeRO stage over the data axis, ``rests`` says which storages may be."""
    late_share = 0.5 if storage_metrics.execution.backward_allocates_gradients else 0.0
    beta, share, weights, parameter_weights = metric_weights(
        objectives, num_microbatches, tables.overlap_contention, late_share
    )
    node_costs: list[Floats] = [weights @ metrics.T for metrics in tables.node_metrics]
    storages = []
    parameter_metrics: list[tuple[Floats, NDArray[np.integer]]] = []
    for at, uses in enumerate(tables.parameter_uses):
        again = frozenset(number for number in range(len(uses)) if (at, number) in tables.repeated_parameter_uses)
        cost, chosen, metrics, names = _choose_storages(
            uses,
            storage_metrics,
            parameter_weights,
            has_data_axis,
            stored_elsewhere,
            again,
            zero_stage,
            storage_filter,
            len(tables.strategies[at]),
        )
        node_costs[2 + at] = node_costs[2 + at] + cost
        parameter_metrics.append((metrics, chosen))
        storages.append((names, chosen))
    late = (share * beta)[:, None, None]
    once = share[:, None, None]
    repeats: dict[tuple[str, ...], Floats] = {
        by: (share * np.where([row.mode in by for row in objectives], 1.0 + beta, 1.0))[:, None, None]
        for by in (("full",), ("selective",), ("full", "selective"))
    }
    kept = weights[:, om.SAVED][:, None, None]  # what a byte kept by one micro-batch costs
    extra_s = {  # of gathering again what one op reads
        at: _scale_seconds(one.optional_s, late) - kept * one.freed_bytes
        for at, one in tables.regathers.items()
        if one.is_optional
    }
    edge_costs = []
    moved = zip(tables.repeated_by_full, tables.repeated_by_selective, strict=True)
    for at, ((_, _, forward, backward), repeated) in enumerate(zip(tables.edges, moved, strict=True)):
        cost = _scale_seconds(forward, repeats.get(_repeating_modes(*repeated), once)) + _scale_seconds(backward, late)
        if at in tables.edge_saved_bytes:
            cost = cost + kept * tables.edge_saved_bytes[at]
        if at in extra_s:
            cost = cost + np.minimum(extra_s[at], 0.0)
        edge_costs.append(cost)
    table = tables.eliminator.solve(node_costs, edge_costs)
    diagonal = np.arange(len(tables.boundary_roles))
    values = table.values[:, diagonal, diagonal]
    choices = table.backtrack_all()[:, :, diagonal, diagonal]
    regathered = {}
    for at, one in tables.regathers.items():
        source, target = (choices[node] for node in tables.edges[at][:2])
        regathered[at] = one.is_forced[source, target]
        if at in extra_s:
            regathered[at] = regathered[at] | (extra_s[at][np.arange(len(objectives))[:, None], source, target] < 0)
    totals = sum_totals(tables, objectives, choices, parameter_metrics, regathered)
    totals[~np.isfinite(values)] = np.inf
    return BlockFrontier(
        tables=tables,
        objectives=objectives,
        totals=totals,
        choices=choices,
        storages=tuple(storages),
        bound_s=values,
        minima=_minima(tables, parameter_metrics),
        gathers_can_bind=_gathers_can_bind(tables, parameter_metrics),
        regathered=regathered,
    )


def _repeating_modes(full: bool, selective: bool) -> tuple[str, ...]:
    """The modes that move a value again."""
    return (*(("full",) if full else ()), *(("selective",) if selective else ()))


def _scale_seconds(seconds: Floats, factor: Floats) -> Floats:
    """(rows, choices, choices): factor times seconds; what is impossible stays so with a factor of zero."""
    impossible = np.isinf(seconds)
    return np.where(impossible, np.inf, factor * np.where(impossible, 0.0, seconds))


def _minima(
    tables: BlockTables, parameter_metrics: Sequence[tuple[Floats, NDArray[np.integer]]]
) -> tuple[float, float, float]:
    forward = sum(float((m[:, om.FORWARD] + m[:, om.SELECTIVE_FORWARD]).min()) for m in tables.node_metrics)
    workspace = max(float(m[:, om.WORKSPACE].min()) for m in tables.node_metrics)
    step = sum(
        float(np.where(np.isfinite(use[..., pm.STEP_EXPOSED_S]), use[..., pm.STEP_EXPOSED_S], np.inf).min())
        for metrics, _ in parameter_metrics
        for use in metrics
    )
    return forward, workspace, step


def _gathers_can_bind(tables: BlockTables, parameter_metrics: Sequence[tuple[Floats, NDArray[np.integer]]]) -> bool:
    """Whether some choice's gathers may take longer than its compute: the longest of each against the least of each."""
    least = [m.min(axis=0) for m in tables.node_metrics]
    forward = sum(float(m[om.FORWARD] + m[om.SELECTIVE_FORWARD]) for m in least)
    backward = sum(float(m[om.BACKWARD]) for m in least)
    for metric, compute_s in ((pm.GATHER_FORWARD_S, forward), (pm.GATHER_BACKWARD_S, backward)):
        gathers = sum(
            float(np.where(np.isfinite(use[..., metric]), use[..., metric], 0.0).max())
            for metrics, _ in parameter_metrics
            for use in metrics
        )
        if gathers > compute_s:
            return True
    return False


def _has_zero_stage(storage: pm.ParameterStorage, zero_stage: int, axes: tuple[int, ...]) -> bool:
    return storage.stage == (zero_stage if axes else 0) and (storage.axes == axes or storage.stage == 0)


def _choose_storages(
    uses: tuple,  # type: ignore[type-arg]
    storage_metrics: StorageMetricsCache,
    weights: Floats,
    has_data_axis: bool,
    stored_elsewhere: frozenset[int],
    repeated_uses: frozenset[int],
    zero_stage: int | None,
    storage_filter: StorageFilter | None,
    num_strategies: int,
) -> tuple[Floats, NDArray[np.integer], Floats, tuple[tuple[pm.ParameterStorage, ...], ...]]:
    """(rows, strategies) cost; (uses, rows, strategies) chosen storage; (uses, strategies, storages, metrics)."""
    num_rows = len(weights)
    cost = np.zeros((num_rows, num_strategies))
    chosen = np.zeros((len(uses), num_rows, num_strategies), int)
    width = 1
    found = []
    for number, (value, per_strategy) in enumerate(uses):
        stored = value.id in stored_elsewhere or number in repeated_uses
        row: list[tuple[tuple[pm.ParameterStorage, ...], Floats]] = []
        for elements, axes in per_strategy:
            full_axes = tuple(axis for axis in axes if axis or has_data_axis) if value.requires_grad else ()
            if value.kind == "buffer" or not value.requires_grad or stored:
                metrics = np.zeros((1, pm.NUM_PARAMETER_METRICS))
                metrics[0, pm.STATE_BYTES] = 0.0 if stored else elements * value.itemsize
                row.append(((pm.ParameterStorage(stage=0, axes=()),), metrics))
            else:
                options, metrics = storage_metrics.metrics_of(elements, value.itemsize, full_axes)
                keep = [
                    i
                    for i, o in enumerate(options)
                    if (zero_stage is None or _has_zero_stage(o, zero_stage, full_axes))
                    and (storage_filter is None or storage_filter(value.id, o))
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
            np.einsum("rm,som->rso", weights, np.nan_to_num(table[use], posinf=0)),
            np.inf,
        )
        chosen[use] = priced.argmin(axis=2)
        cost += priced.min(axis=2)
    names = tuple(options for row in found for options, _ in row)
    return cost, chosen, table, names
