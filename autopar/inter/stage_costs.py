"""What every possible stage costs: blocks i..j-1 on a submesh, at a number s of micro-batches in flight.

A stage runs all its blocks on one mesh with one boundary placement; its totals are the sums over its blocks, with what
overlaps applied once:

    forward, backward    sums over blocks                                      seconds per micro-batch
    step                 max(reduction - last backward, 0) + optimizer         seconds per step
    memory               state + s * saved + max workspace + fixed             bytes, at most the budget M

Blocks in their order hold what `stage_memory` says, which the sum comes near; the arrangement of a pipeline holds its
choices to that. The fastest choice that fits (`finish`) is made of the solutions of `intra.frontier` when a pipeline
that holds the stage is evaluated; what no choice is below says `stage_tables`. Stages with the same count of each kind
of block cost the same, so prices are made once per distinct count vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.core.plan import MemoryParts
from autopar.inter.block_pricer import BlockPricer, LayoutRestriction, StageMesh
from autopar.inter.pipeline_bounds import max_in_flight
from autopar.inter.stage_choice import (
    StageChoice,
    StageFrontier,
    StagePrice,
    fastest_feasible,
    price_totals,
    sum_totals,
)
from autopar.inter.stage_ilp import best_frontier_mix
from autopar.inter.stage_transfers import StageTransfers
from autopar.intra import block_totals as tt
from autopar.intra.frontier import BlockFrontier
from autopar.intra.priced_objectives import (
    PricedObjective,
    least_memory_objectives,
    memory_priced_objectives,
    unpriced_objectives,
)
from autopar.pipeline.schedule import Schedule

Floats = NDArray[np.float64]
FREE, PRICED = 0, 1  # phases: rows where memory or time has no say, rows where both have
IN_FLIGHT_GRID = (1, 2, 4, 8, 16, 32)
"""Weights of saved bytes for which rows are made where memory binds."""
LEAN_IN_FLIGHT_GRID = (1, 4, 32)
"""The same of the leanest choices, which differ less."""
MAX_STAGES = 32
"""Pipelines are at most this deep."""
IMPOSSIBLE = 1e30  # stands for "impossible" in sums, where inf times zero would be undefined


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeshTotals:
    """Per stage type, row and boundary placement: ``time_s`` per micro-batch with its share of the step, bytes ``held``
    (2, ...) whatever is in flight and per micro-batch in flight, and the ``bound_s`` of the rows. ``fastest`` (types,)
    is the flat position of the least time; ``phase`` and ``kept`` say which rows these are of `StageBook.points`."""

    phase: int
    objective_slice: slice
    objectives: tuple[PricedObjective, ...]
    amortised_s: Floats
    memory_terms: Floats
    bound_s: Floats
    fastest: NDArray[np.integer]

    def memory_bytes(self, in_flight: float) -> Floats:
        """All but the fixed share, (types, rows, boundaries)."""
        return np.asarray(self.memory_terms[0] + in_flight * self.memory_terms[1])

    def fastest_time_and_bytes(self, in_flight: float) -> tuple[Floats, Floats]:
        """(types,) seconds of the fastest choice, and the bytes it holds."""
        at = (np.arange(len(self.fastest)), self.fastest)
        flat = [values.reshape(len(self.fastest), -1)[at] for values in (self.amortised_s, *self.memory_terms)]
        return flat[0], flat[1] + in_flight * flat[2]


class StageCosts:
    """Costs of all stages at one micro-batch size."""

    def __init__(
        self,
        pricer: BlockPricer,
        micro_batch: int,
        num_microbatches: int,
        budget_bytes: float,
        recompute_modes: tuple[str, ...],
        num_devices: int,
        restriction: LayoutRestriction | None = None,
        schedule: Schedule = "1f1b",
    ) -> None:
        self.restriction, self.num_devices, self.schedule = restriction, num_devices, schedule
        self.pricer, self.micro_batch, self.num_microbatches = pricer, micro_batch, num_microbatches
        self.budget_bytes = budget_bytes
        self.recompute_modes = (
            recompute_modes
            if pricer.attention_ops
            else tuple(mode for mode in recompute_modes if mode != "selective") or ("none",)
        )
        self.transfers = StageTransfers(self)
        types = pricer.stage_kinds
        self.variants: list[tuple[int, frozenset[int]]] = list(types.variants)
        self._variant_index = {column: at for at, column in enumerate(types.variants)}
        self.stage_kind_of, self.num_blocks, self._example_of = types.kind_of, types.num_blocks, types.example_of
        self._meshes: dict[int, list[StageMesh]] = {}
        self._fastest: dict[tuple[tuple[int, ...], int, float, float], StagePrice | None] = {}
        self.peaks: dict[tuple[StageChoice, int, int, int], MemoryParts] = {}  # kept here by `arrangement`
        self.tied_bytes: dict[tuple[int, int, StageChoice], float] = {}  # kept here by `tied`
        self._objectives: dict[tuple[tuple[int, ...], bool], tuple[PricedObjective, ...]] = {}
        self._frontiers: dict[tuple[int, tuple[int, ...], int], BlockFrontier] = {}
        self._mesh_totals: dict[tuple[StageMesh, int], MeshTotals] = {}

    def release(self) -> None:
        """Give back the memory of what was priced; asking again prices it again."""
        for kept in (self._fastest, self._frontiers, self._mesh_totals, self.peaks, self.tied_bytes):
            kept.clear()
        self.pricer.release(self.micro_batch)

    def variant(self, kind: int, stored_elsewhere: frozenset[int]) -> int:
        """The position of a kind of block whose parameters ``held`` another block of the stage stores."""
        at = self._variant_index.setdefault((kind, stored_elsewhere), len(self.variants))
        if at == len(self.variants):
            self.variants.append((kind, stored_elsewhere))
        return at

    def variants_of(self, first_block: int, end_block: int) -> list[int]:
        """The columns of blocks first..end-1 of one stage."""
        return [
            self.variant(b.kind, self.pricer.stored_elsewhere(b, first_block))
            for b in self.pricer.blocks[first_block:end_block]
        ]

    def meshes(self, num_devices: int) -> list[StageMesh]:
        """All data x inner meshes whose data axis divides the micro-batch; of a layout, its own."""
        if num_devices not in self._meshes:
            if self.restriction is not None:
                found = [self.restriction.mesh] if self.restriction.mesh.num_devices == num_devices else []
            else:
                found = [
                    StageMesh(data_size=num_devices // inner, inner_sizes=(inner,) if inner > 1 else ())
                    for inner in range(1, num_devices + 1)
                    if num_devices % inner == 0 and self.micro_batch % (num_devices // inner) == 0
                ]
                pinned = self.pricer.pins.num_axes if self.pricer.pins else None
                found = [
                    mesh
                    for mesh in found
                    if self.has_integer_sizes(self.micro_batch // mesh.data_size)
                    and pinned in (None, len(mesh.named_sizes))
                ]
            self._meshes[num_devices] = found
        return self._meshes[num_devices]

    def has_integer_sizes(self, local_batch: int) -> bool:
        """Whether every size of the model is a whole number at this many samples per data rank."""
        traced = self.pricer.graph.batch.traced_size
        return all((size * local_batch) % traced == 0 for size in self.pricer.batch_dependent_sizes)

    def objectives(self, mesh: StageMesh, phase: int) -> tuple[PricedObjective, ...]:
        """The price rows of a phase; of ``PRICED``, as many for each weight of saved bytes (`weights_on`)."""
        rate = self.pricer.stream_s_per_byte
        if self.restriction is not None:  # memory has no say in a layout
            return unpriced_objectives(rate, self.recompute_modes, ("priced",))
        if phase == FREE:
            return (
                *unpriced_objectives(rate, self.recompute_modes),
                *least_memory_objectives(self.recompute_modes, LEAN_IN_FLIGHT_GRID),
            )
        links_bind = any(self.frontier(column, mesh, FREE).gathers_can_bind for column in range(len(self.variants)))
        weights = self.in_flight_grid(mesh)
        if (weights, links_bind) not in self._objectives:
            found = tuple(
                row
                for weight in weights
                for row in memory_priced_objectives(rate, self.recompute_modes, float(weight), links_bind)
            )
            self._objectives[weights, links_bind] = found
        return self._objectives[weights, links_bind]

    def in_flight_grid(self, mesh: StageMesh) -> tuple[int, ...]:
        """The weights of saved bytes that stages on a mesh may need."""
        if self.schedule == "gpipe":
            return tuple(weight for weight, _ in interpolation_weights(IN_FLIGHT_GRID, self.num_microbatches))
        most = 1 if mesh.num_devices == self.num_devices else self.num_microbatches
        return tuple(weight for at, weight in enumerate(IN_FLIGHT_GRID) if at == 0 or IN_FLIGHT_GRID[at - 1] < most)

    def frontier(self, variant: int, mesh: StageMesh, phase: int) -> BlockFrontier:
        """The frontier of a column's blocks by the rows of a phase."""
        key = (variant, mesh.sizes, phase)
        if key not in self._frontiers:
            kind, held = self.variants[variant]
            self._frontiers[key] = self.pricer.frontier(
                kind,
                held,
                mesh,
                self.micro_batch,
                self.num_microbatches,
                self.objectives(mesh, phase),
                self.restriction,
            )
        return self._frontiers[key]

    def mesh_totals(self, mesh: StageMesh, grid_in_flight: int) -> MeshTotals:
        """The rows' totals and bounds for every stage type; of the priced rows those of one weight, or ``FREE``."""
        if (mesh, grid_in_flight) not in self._mesh_totals:
            phase = PRICED if grid_in_flight else FREE
            points = [self.frontier(column, mesh, phase) for column in range(len(self.variants))]
            kept = self.objective_slice(mesh, grid_in_flight)
            rows = self.objectives(mesh, phase)[kept]
            totals = np.stack([np.where(np.isfinite(one.totals[kept]), one.totals[kept], IMPOSSIBLE) for one in points])
            bounds = np.stack([with_launch_time(one)[kept] for one in points])
            sums = np.einsum("tc,crbm->trbm", self.num_blocks, totals)
            sums[..., tt.WORKSPACE] = 0.0  # the most of the blocks, not their sum
            workspace = np.zeros(sums.shape[:-1])
            for column, present in enumerate((self.num_blocks > 0).T):
                held = np.where(present[:, None, None], totals[None, column, :, :, tt.WORKSPACE], 0.0)
                np.maximum(workspace, held, out=workspace)
            time = self.amortised_s(sums)
            self._mesh_totals[mesh, grid_in_flight] = MeshTotals(
                phase=phase,
                objective_slice=kept,
                objectives=rows,
                amortised_s=time,
                memory_terms=np.stack([tt.memory_bytes(sums, 0) + workspace, sums[..., tt.SAVED]]),
                bound_s=np.einsum("tc,crb->trb", self.num_blocks, _min_over_recompute_modes(rows, bounds)),
                fastest=time.reshape(len(time), -1).argmin(axis=1),
            )
        return self._mesh_totals[mesh, grid_in_flight]

    def objective_slice(self, mesh: StageMesh, grid_in_flight: int) -> slice:
        """Which rows of their phase are those of a weight."""
        if not grid_in_flight:
            return slice(None)
        weights = self.in_flight_grid(mesh)
        each = len(self.objectives(mesh, PRICED)) // len(weights)
        at = weights.index(grid_in_flight)
        return slice(at * each, (at + 1) * each)

    def amortised_s(self, totals: Floats) -> Floats:
        """Seconds per micro-batch with its share of the step."""
        forward, backward, step = self.times_s(totals)
        return forward + backward + step / self.num_microbatches

    @property
    def overlap_contention(self) -> float:
        """What hiding communication behind compute costs of the shorter of the two; 1: nothing is hidden."""
        return self.pricer.cluster.overlap_contention if self.pricer.execution.overlap else 1.0

    def times_s(self, totals: Floats) -> tuple[Floats, Floats, Floats]:
        """Forward, backward, and exposed step seconds of stage totals."""
        contention = self.overlap_contention
        backward, reduction = totals[..., tt.BACKWARD], totals[..., tt.STEP_OVERLAPPABLE]
        reduction = np.maximum(reduction - backward, 0.0) + contention * np.minimum(reduction, backward)
        loop_s, once_s = self.training_loop_s
        step = reduction + totals[..., tt.STEP_EXPOSED] + once_s
        return totals[..., tt.FORWARD] + loop_s / 2, backward + loop_s / 2, step

    @property
    def training_loop_s(self) -> tuple[float, float]:
        """What the training loop takes of every stage beside its ops: per micro-batch, and once per step."""
        software, launch_s = self.pricer.execution.software, self.pricer.cluster.device.launch_s
        return software.microbatch_calls * launch_s, software.step_calls * launch_s

    def boundary_roles(self, boundary: int, mesh: StageMesh) -> tuple[str, ...]:
        """How the inner axes place what crosses blocks under a boundary placement."""
        return self.frontier(0, mesh, FREE).tables.boundary_roles[boundary]

    def fastest_feasible(
        self, stage_kinds: tuple[int, ...], num_devices: int, in_flight: float, tensor_budget_bytes: float | None = None
    ) -> StagePrice | None:
        """The fastest choice for the blocks of a stage type that fits; None when there is none. Of several ``kinds``,
        the chunks of one run of devices, as if they were one stage that holds ``in_flight`` micro-batches.
        ``room_bytes``: default, what the budget leaves."""
        tensor_budget_bytes = self.tensor_budget_bytes if tensor_budget_bytes is None else tensor_budget_bytes
        key = (stage_kinds, num_devices, in_flight, tensor_budget_bytes)
        if key not in self._fastest:
            self._fastest[key] = self._find_fastest(stage_kinds, num_devices, in_flight, tensor_budget_bytes)
        return self._fastest[key]

    def _find_fastest(
        self, stage_kinds: tuple[int, ...], num_devices: int, in_flight: float, tensor_budget_bytes: float
    ) -> StagePrice | None:
        best: StagePrice | None = None
        best_s = np.inf
        meshes = self.meshes(num_devices)
        lower = dict.fromkeys(meshes, 0.0)
        if len(meshes) > 1:
            lower = {mesh: self._unconstrained_bound_s(stage_kinds, mesh) for mesh in meshes}
        for mesh in sorted(lower, key=lambda mesh: lower[mesh]):
            if lower[mesh] >= best_s:
                break
            points = self._stage_frontier(stage_kinds, mesh, in_flight, tensor_budget_bytes)
            boundaries = range(points.totals.shape[2])
            if self.restriction is not None:
                at = self.frontier(0, mesh, FREE).tables.boundary_roles.index(self.restriction.boundary_roles)
                boundaries = range(at, at + 1)
            for boundary in boundaries:
                found = fastest_feasible(points, self, in_flight, tensor_budget_bytes, boundary, best_s)
                if found is None:
                    continue
                value_s = found.amortised_s + sum(self._receive_s(kind, found, num_devices) for kind in stage_kinds)
                if value_s < best_s:
                    best, best_s = found, value_s
        return best

    def _receive_s(self, stage_kind: int, price: StagePrice, num_devices: int) -> float:
        """What a micro-batch's activations and gradients take to reach the stage, by how its boundary places them, if
        its neighbours are of its own size and on other nodes: it tells boundaries that are equally fast inside
        apart."""
        if num_devices == self.num_devices or self.restriction is not None:
            return 0.0
        return self.transfers.receive_s(self._example_of[stage_kind], num_devices, price.choice)

    def _unconstrained_bound_s(self, stage_kinds: tuple[int, ...], mesh: StageMesh) -> float:
        """Seconds per micro-batch, with its share of the step, that no choice on a mesh is below, memory aside."""
        sums = self.mesh_totals(mesh, FREE)
        hidden = [at for at, row in enumerate(sums.objectives) if row.family == "hidden"]
        charged_s = max(sums.objectives[at].price_s_per_byte for at in hidden) * self.tensor_budget_bytes
        bound_s = float(sums.bound_s[list(stage_kinds)].sum(axis=0)[hidden].min())
        return bound_s - (charged_s if np.isfinite(charged_s) else 0.0)

    def _stage_frontier(
        self, stage_kinds: tuple[int, ...], mesh: StageMesh, in_flight: float, tensor_budget_bytes: float
    ) -> StageFrontier:
        counts = self.num_blocks[list(stage_kinds)].sum(axis=0)
        columns = tuple(int(column) for column in np.flatnonzero(counts))
        parts = [(FREE, slice(None))]
        if self.restriction is None:
            sums = self.mesh_totals(mesh, FREE)
            fastest_at = int(sums.amortised_s[list(stage_kinds)].sum(axis=0).argmin())
            if (
                sums.memory_bytes(in_flight)[list(stage_kinds)].sum(axis=0).reshape(-1)[fastest_at]
                > tensor_budget_bytes
            ):
                parts += [
                    (PRICED, self.objective_slice(mesh, weight))
                    for weight, _ in interpolation_weights(IN_FLIGHT_GRID, in_flight)
                ]
        numbers = tuple(int(counts[column]) for column in columns)
        found = [(phase, kept, [self.frontier(column, mesh, phase) for column in columns]) for phase, kept in parts]
        return StageFrontier.of(mesh, columns, numbers, found)

    def improve_by_ilp(
        self, stage_kinds: tuple[int, ...], in_flight: float, price: StagePrice, tensor_budget_bytes: float
    ) -> StagePrice:
        """``run`` or, on its mesh, the proven best mix of frontier points that is faster."""
        points = self._stage_frontier(stage_kinds, price.choice.mesh, in_flight, tensor_budget_bytes)
        best = price
        for boundary in range(points.totals.shape[2]):
            found = best_frontier_mix(
                points, self, in_flight, tensor_budget_bytes, boundary, self.num_microbatches, self.overlap_contention
            )
            if found is not None and found.amortised_s < best.amortised_s * (1 - 1e-9):
                best = found
        return best

    def totals(self, choice: StageChoice) -> Floats:
        """The totals (`intra.totals`) of a stage's blocks under a choice."""
        parts: list[tuple[Floats, float]] = []
        for column, mix in choice.mixes:
            for (phase, row), count in mix:
                points = self.frontier(column, choice.mesh, phase)
                parts.append((points.totals[row, choice.boundary], float(count)))
        return sum_totals(parts)

    def price_choice(self, choice: StageChoice, in_flight: float) -> StagePrice:
        """A stage under a choice."""
        return price_totals(self, self.totals(choice), in_flight, choice)

    @property
    def max_stages(self) -> int:
        """The most stages a pipeline may have."""
        return min(len(self.pricer.blocks), self.num_devices, MAX_STAGES)

    def max_in_flight_from_last(self) -> tuple[int, ...]:
        """Micro-batches that stage number 1, 2, ... from the last holds."""
        return tuple(
            max_in_flight(self.schedule, self.num_microbatches, place) for place in range(1, self.max_stages + 1)
        )

    @property
    def tensor_budget_bytes(self) -> float:
        """The budget without the fixed share."""
        return self.budget_bytes - self.fixed_bytes()

    def fixed_bytes(self) -> float:
        """What torch's allocator does not count: context, and where ranks talk the buffers of two communicators."""
        communicators = 2 if self.num_devices > 1 else 0
        return float(
            self.pricer.cluster.device.context_bytes + self.pricer.cluster.communication_buffer_bytes(communicators)
        )


def with_launch_time(frontier: BlockFrontier) -> Floats:
    """(rows, boundaries) the rows' optima, which count the device alone, with what the host takes to launch a block:
    beside it, or before it where launches block; ``HUGE`` where there is no solution."""
    forward, selective, backward, full = frontier.tables.launch_s
    repeated = {"selective": selective, "full": full}
    host = np.array(
        [
            0.0 if row.family == "lean" else forward + backward + repeated.get(row.mode, 0.0)
            for row in frontier.objectives
        ]
    )
    both = np.add if frontier.tables.blocking_launches else np.maximum
    return np.asarray(both(np.where(np.isfinite(frontier.bound_s), frontier.bound_s, IMPOSSIBLE), host[:, None]))


def _min_over_recompute_modes(objectives: tuple[PricedObjective, ...], bounds: Floats) -> Floats:
    """(columns, rows, boundaries): every row's value replaced by the least among the rows that differ in mode only."""
    groups: dict[tuple[str, float, float], list[int]] = {}
    for at, row in enumerate(objectives):
        groups.setdefault((row.family, row.price_s_per_byte, row.saved_weight), []).append(at)
    least = bounds.copy()
    for group in groups.values():
        least[:, group] = bounds[:, group].min(axis=1, keepdims=True)
    return least


def interpolation_weights(grid: Sequence[int], in_flight: float) -> tuple[tuple[int, float], ...]:
    """The weights of saved bytes next to ``in_flight`` and the share of each: their mean is ``in_flight``.

    >>> between((1, 4, 32), 2), between((1, 4, 32), 50)
    (((1, 0.6666666666666667), (4, 0.33333333333333337)), ((32, 1.0),))
    """
    above = next((weight for weight in grid if weight >= in_flight), grid[-1])
    below = max(weight for weight in grid if weight <= in_flight)
    if above <= below:
        return ((below, 1.0),)
    share = (in_flight - below) / (above - below)
    return ((below, 1.0 - share), (above, share))
