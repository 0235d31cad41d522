"""The frontier of a block on a mesh: one optimal solution for every way of weighing time against memory.

Every *priced objective* (`priced_objectives`) gives a pairwise choice problem. Elimination solves those of all
objectives and all boundary placements at once and exactly, or bounds them where it is too wide (`mini_buckets`):

    cost of node n      weights . metrics of n, + the cheapest storage of its parameters        (choose_storages)
    cost of edge e      share * (r f + beta b) + saved price * bytes saved                      (_edge_costs)
    f, b                its forward and backward seconds
    r                   1 + beta where the objective's recomputation repeats f, else 1
    share, beta         what a second counts, and one of the backward                           (metric_weights)

What the solutions cost is then summed per metric (`block_totals`), with what overlaps in the block as a whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from autopar.cost import parameter_storage as pm
from autopar.intra import op_metrics as om
from autopar.intra.block_space import FIRST_OP_NODE
from autopar.intra.block_tables import BlockTables
from autopar.intra.block_totals import sum_totals
from autopar.intra.priced_objectives import MetricWeights, PricedObjective, metric_weights
from autopar.intra.storage_choice import OpStorages, StorageChoice, StorageMetricsCache, StorageRules, choose_storages

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockFrontier:
    """The solution of each objective under each boundary placement, the same on both sides of the block.

    ``totals`` (objectives, boundary placements, NUM_TOTALS) are those of `block_totals`, inf where there is no
    solution. ``choices`` (nodes, objectives, boundary placements) and ``storages``, by op, say which solution it is;
    ``regathered`` maps an edge (index) to (objectives, boundary placements) whether the solution regathers it.
    ``bound_s`` (objectives, boundary placements) is the optimum of the objective. ``minima`` are the least forward
    seconds, workspace bytes and exposed seconds per step of any choices; ``gathers_can_bind``: ZeRO-3 gathers can take
    longer than the compute that they overlap with.
    """

    tables: BlockTables
    objectives: tuple[PricedObjective, ...]
    totals: Floats
    choices: NDArray[np.integer]
    storages: tuple[OpStorages, ...]
    bound_s: Floats
    minima: tuple[float, float, float]
    gathers_can_bind: bool
    regathered: dict[int, NDArray[np.bool_]]

    def select(self, positions: NDArray[np.integer]) -> "BlockFrontier":
        """The frontier of the objectives at ``positions`` of this one's, in that order; a position may repeat."""
        return replace(
            self,
            objectives=tuple(self.objectives[row] for row in positions),
            totals=self.totals[positions],
            choices=self.choices[:, positions],
            storages=tuple(OpStorages(options, chosen[:, positions]) for options, chosen in self.storages),
            bound_s=self.bound_s[positions],
            regathered={edge: flags[positions] for edge, flags in self.regathered.items()},
        )

    def regathered_edges(self, objective: int, boundary: int) -> tuple[int, ...]:
        """The edges (indices) that a solution regathers in the backward."""
        return tuple(edge for edge, flags in self.regathered.items() if flags[objective, boundary])


def solve_frontier(
    tables: BlockTables,
    storage_metrics: StorageMetricsCache,
    objectives: tuple[PricedObjective, ...],
    num_microbatches: int,
    rules: StorageRules,
) -> BlockFrontier:
    """Solve all objectives, of steps of ``num_microbatches``. ``storage_metrics`` are those of the mesh; ``rules`` say
    which storages parameters may have."""
    weights = metric_weights(
        objectives,
        num_microbatches,
        tables.overlap_contention,
        0.5 if storage_metrics.execution.backward_allocates_gradients else 0.0,
    )
    storages = _choose_all_storages(tables, storage_metrics, weights.storage, rules)
    node_costs: list[Floats] = [weights.op @ metrics.T for metrics in tables.node_metrics]
    for at, storage in enumerate(storages):
        node_costs[FIRST_OP_NODE + at] = node_costs[FIRST_OP_NODE + at] + storage.costs
    regather_costs = _regather_costs(tables, weights)
    table = tables.eliminator.solve(node_costs, _edge_costs(tables, objectives, weights, regather_costs))
    diagonal = np.arange(len(tables.boundary_roles))
    values = table.values[:, diagonal, diagonal]
    choices = table.backtrack_all()[:, :, diagonal, diagonal]
    regathered = _regathered(tables, choices, regather_costs)
    parameter_metrics = [(storage.metrics, storage.storages.chosen) for storage in storages]
    totals = sum_totals(tables, objectives, choices, parameter_metrics, regathered)
    totals[~np.isfinite(values)] = np.inf
    return BlockFrontier(
        tables=tables,
        objectives=objectives,
        totals=totals,
        choices=choices,
        storages=tuple(storage.storages for storage in storages),
        bound_s=values,
        minima=_minima(tables, storages),
        gathers_can_bind=_gathers_can_bind(tables, storages),
        regathered=regathered,
    )


def _choose_all_storages(
    tables: BlockTables, cache: StorageMetricsCache, weights: Floats, rules: StorageRules
) -> list[StorageChoice]:
    """By op."""
    return [
        choose_storages(
            uses,
            cache,
            weights,
            rules,
            repeated_uses=frozenset(
                number for number in range(len(uses)) if (at, number) in tables.repeated_parameter_uses
            ),
            num_strategies=len(tables.strategies[at]),
        )
        for at, uses in enumerate(tables.parameter_uses)
    ]


def _regather_costs(tables: BlockTables, weights: MetricWeights) -> dict[int, Floats]:
    """Edge (index) -> (objectives, choices of source, choices of target) what an optional regather costs, the memory
    that it frees taken off; inf where there is none."""
    backward = (weights.compute * weights.beta)[:, None, None]
    saved_price = weights.op[:, om.SAVED][:, None, None]
    return {
        edge: _scale_seconds(regather.optional_s, backward) - saved_price * regather.freed_bytes
        for edge, regather in tables.regathers.items()
        if regather.is_optional
    }


def _edge_costs(
    tables: BlockTables,
    objectives: Sequence[PricedObjective],
    weights: MetricWeights,
    regather_costs: dict[int, Floats],
) -> list[Floats]:
    """(objectives, choices of source, choices of target) of every edge, with its regather where that is cheaper."""
    share, beta = weights.compute, weights.beta
    backward, once = (share * beta)[:, None, None], share[:, None, None]
    saved_price = weights.op[:, om.SAVED][:, None, None]
    forward_of: dict[tuple[bool, bool], Floats] = {(False, False): once}
    for full, selective in ((True, False), (False, True), (True, True)):
        modes = (*(("full",) if full else ()), *(("selective",) if selective else ()))
        repeats = np.where([objective.mode in modes for objective in objectives], 1.0 + beta, 1.0)
        forward_of[full, selective] = (share * repeats)[:, None, None]
    costs = []
    repeated = zip(tables.repeated_by_full, tables.repeated_by_selective, strict=True)
    for at, (edge, repeated_by) in enumerate(zip(tables.edges, repeated, strict=True)):
        cost = _scale_seconds(edge.forward_s, forward_of[repeated_by]) + _scale_seconds(edge.backward_s, backward)
        if at in tables.edge_saved_bytes:
            cost = cost + saved_price * tables.edge_saved_bytes[at]
        if at in regather_costs:
            cost = cost + np.minimum(regather_costs[at], 0.0)
        costs.append(cost)
    return costs


def _regathered(
    tables: BlockTables, choices: NDArray[np.integer], regather_costs: dict[int, Floats]
) -> dict[int, NDArray[np.bool_]]:
    """Edge (index) -> (objectives, boundary placements) whether the solution regathers it."""
    found = {}
    for at, regather in tables.regathers.items():
        edge = tables.edges[at]
        source, target = choices[edge.source], choices[edge.target]
        found[at] = regather.is_forced[source, target]
        if at in regather_costs:
            objective = np.arange(len(source))[:, None]
            found[at] = found[at] | (regather_costs[at][objective, source, target] < 0)
    return found


def _scale_seconds(seconds: Floats, factor: Floats) -> Floats:
    """(objectives, choices, choices): factor times seconds; inf, a forbidden pair, stays so with a factor of zero."""
    impossible = np.isinf(seconds)
    return np.where(impossible, np.inf, factor * np.where(impossible, 0.0, seconds))


def _minima(tables: BlockTables, storages: Sequence[StorageChoice]) -> tuple[float, float, float]:
    """See `BlockFrontier`."""
    forward = sum(float((m[:, om.FORWARD] + m[:, om.SELECTIVE_FORWARD]).min()) for m in tables.node_metrics)
    workspace = max(float(m[:, om.WORKSPACE].min()) for m in tables.node_metrics)
    step = sum(
        float(np.where(np.isfinite(use[..., pm.STEP_EXPOSED_S]), use[..., pm.STEP_EXPOSED_S], np.inf).min())
        for storage in storages
        for use in storage.metrics
    )
    return forward, workspace, step


def _gathers_can_bind(tables: BlockTables, storages: Sequence[StorageChoice]) -> bool:
    """Whether the ZeRO-3 gathers of some choices may take longer than their compute: the longest gathers against the
    least compute."""
    least = [m.min(axis=0) for m in tables.node_metrics]
    forward = sum(float(m[om.FORWARD] + m[om.SELECTIVE_FORWARD]) for m in least)
    backward = sum(float(m[om.BACKWARD]) for m in least)
    for metric, compute_s in ((pm.GATHER_FORWARD_S, forward), (pm.GATHER_BACKWARD_S, backward)):
        gathers = sum(
            float(np.where(np.isfinite(use[..., metric]), use[..., metric], 0.0).max())
            for storage in storages
            for use in storage.metrics
        )
        if gathers > compute_s:
            return True
    return False
