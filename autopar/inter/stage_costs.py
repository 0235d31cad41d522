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
from autopar.inter.block_pricer import Blocks, Mesh, Restriction
from autopar.inter.pipeline_bounds import max_in_flight
from autopar.inter.stage_choice import Finished, StageChoice, StagePoints, add, fastest, finished
from autopar.inter.stage_ilp import best_mix
from autopar.inter.stage_transfers import Transfers
from autopar.intra import block_totals as tt
from autopar.intra.frontier import BlockPoints
from autopar.intra.priced_objectives import PriceRow, free_rows, lean_rows, priced_rows
from autopar.pipeline.schedule import Schedule

Floats = NDArray[np.float64]
FREE, PRICED = 0, 1  # phases: rows where memory or time has no say, rows where both have
WEIGHTS = (1, 2, 4, 8, 16, 32)
"""Weights of saved bytes for which rows are made where memory binds."""
LEAN_WEIGHTS = (1, 4, 32)
"""The same of the leanest choices, which differ less."""
MAX_STAGES = 32
"""Pipelines are at most this deep."""
HUGE = 1e30  # stands for "impossible" in sums, where inf times zero would be undefined


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeshSums:
    """Per stage type, row and boundary placement: ``time_s`` per micro-batch with its share of the step, bytes ``held``
    (2, ...) whatever is in flight and per micro-batch in flight, and the ``bound_s`` of the rows. ``fastest`` (types,)
    is the flat position of the least time; ``phase`` and ``kept`` say which rows these are of `StageBook.points`."""

    phase: int
    kept: slice
    rows: tuple[PriceRow, ...]
    time_s: Floats
    held: Floats
    bound_s: Floats
    fastest: NDArray[np.integer]

    def memory_bytes(self, in_flight: float) -> Floats:
        """All but the fixed share, (types, rows, boundaries)."""
        return np.asarray(self.held[0] + in_flight * self.held[1])

    def of_fastest(self, in_flight: float) -> tuple[Floats, Floats]:
        """(types,) seconds of the fastest choice, and the bytes it holds."""
        at = (np.arange(len(self.fastest)), self.fastest)
        flat = [values.reshape(len(self.fastest), -1)[at] for values in (self.time_s, *self.held)]
        return flat[0], flat[1] + in_flight * flat[2]


class StageBook:
    """Costs of all stages at one micro-batch size."""

    def __init__(
        self,
        blocks: Blocks,
        micro_batch: int,
        num_microbatches: int,
        budget_bytes: float,
        modes: tuple[str, ...],
        gpus: int,
        restriction: Restriction | None = None,
        schedule: Schedule = "1f1b",
    ) -> None:
        self.restriction, self.gpus, self.schedule = restriction, gpus, schedule
        self.blocks, self.micro_batch, self.num_microbatches = blocks, micro_batch, num_microbatches
        self.budget_bytes = budget_bytes
        self.modes = modes if blocks.core else tuple(mode for mode in modes if mode != "selective") or ("none",)
        self.transfers = Transfers(self)
        types = blocks.stage_types
        self.columns: list[tuple[int, frozenset[int]]] = list(types.columns)
        self._column_at = {column: at for at, column in enumerate(types.columns)}
        self.type_of, self.counts, self._stage_of = types.type_of, types.counts, types.stage_of
        self._meshes: dict[int, list[Mesh]] = {}
        self._finished: dict[tuple[tuple[int, ...], int, float, float], Finished | None] = {}
        self.peaks: dict[tuple[StageChoice, int, int, int], MemoryParts] = {}  # kept here by `arrangement`
        self.tied_bytes: dict[tuple[int, int, StageChoice], float] = {}  # kept here by `tied`
        self._rows: dict[tuple[tuple[int, ...], bool], tuple[PriceRow, ...]] = {}
        self._points: dict[tuple[int, tuple[int, ...], int], BlockPoints] = {}
        self._sums: dict[tuple[Mesh, int], MeshSums] = {}

    def release(self) -> None:
        """Give back the memory of what was priced; asking again prices it again."""
        for kept in (self._finished, self._points, self._sums, self.peaks, self.tied_bytes):
            kept.clear()
        self.blocks.forget(self.micro_batch)

    def column(self, kind: int, held: frozenset[int]) -> int:
        """The position of a kind of block whose parameters ``held`` another block of the stage stores."""
        at = self._column_at.setdefault((kind, held), len(self.columns))
        if at == len(self.columns):
            self.columns.append((kind, held))
        return at

    def columns_of(self, first: int, end: int) -> list[int]:
        """The columns of blocks first..end-1 of one stage."""
        return [self.column(b.kind, self.blocks.held(b, first)) for b in self.blocks.blocks[first:end]]

    def meshes(self, num_devices: int) -> list[Mesh]:
        """All data x inner meshes whose data axis divides the micro-batch; of a layout, its own."""
        if num_devices not in self._meshes:
            if self.restriction is not None:
                found = [self.restriction.mesh] if self.restriction.mesh.num_devices == num_devices else []
            else:
                found = [
                    Mesh(data=num_devices // inner, inner=(inner,) if inner > 1 else ())
                    for inner in range(1, num_devices + 1)
                    if num_devices % inner == 0 and self.micro_batch % (num_devices // inner) == 0
                ]
                pinned = self.blocks.pins.num_axes if self.blocks.pins else None
                found = [
                    mesh
                    for mesh in found
                    if self.whole(self.micro_batch // mesh.data) and pinned in (None, len(mesh.named))
                ]
            self._meshes[num_devices] = found
        return self._meshes[num_devices]

    def whole(self, local_batch: int) -> bool:
        """Whether every size of the model is a whole number at this many samples per data rank."""
        traced = self.blocks.graph.batch.traced
        return all((size * local_batch) % traced == 0 for size in self.blocks.growing)

    def rows(self, mesh: Mesh, phase: int) -> tuple[PriceRow, ...]:
        """The price rows of a phase; of ``PRICED``, as many for each weight of saved bytes (`weights_on`)."""
        rate = self.blocks.rate_s_per_byte
        if self.restriction is not None:  # memory has no say in a layout
            return free_rows(rate, self.modes, ("priced",))
        if phase == FREE:
            return (*free_rows(rate, self.modes), *lean_rows(self.modes, LEAN_WEIGHTS))
        links_bind = any(self.points(column, mesh, FREE).links_bind for column in range(len(self.columns)))
        weights = self.weights_on(mesh)
        if (weights, links_bind) not in self._rows:
            found = tuple(row for weight in weights for row in priced_rows(rate, self.modes, float(weight), links_bind))
            self._rows[weights, links_bind] = found
        return self._rows[weights, links_bind]

    def weights_on(self, mesh: Mesh) -> tuple[int, ...]:
        """The weights of saved bytes that stages on a mesh may need."""
        if self.schedule == "gpipe":
            return tuple(weight for weight, _ in between(WEIGHTS, self.num_microbatches))
        most = 1 if mesh.num_devices == self.gpus else self.num_microbatches
        return tuple(weight for at, weight in enumerate(WEIGHTS) if at == 0 or WEIGHTS[at - 1] < most)

    def points(self, column: int, mesh: Mesh, phase: int) -> BlockPoints:
        """The frontier of a column's blocks by the rows of a phase."""
        key = (column, mesh.sizes, phase)
        if key not in self._points:
            kind, held = self.columns[column]
            self._points[key] = self.blocks.points(
                kind, held, mesh, self.micro_batch, self.num_microbatches, self.rows(mesh, phase), self.restriction
            )
        return self._points[key]

    def sums(self, mesh: Mesh, weight: int) -> MeshSums:
        """The rows' totals and bounds for every stage type; of the priced rows those of one weight, or ``FREE``."""
        if (mesh, weight) not in self._sums:
            phase = PRICED if weight else FREE
            points = [self.points(column, mesh, phase) for column in range(len(self.columns))]
            kept = self.kept(mesh, weight)
            rows = self.rows(mesh, phase)[kept]
            totals = np.stack([np.where(np.isfinite(one.totals[kept]), one.totals[kept], HUGE) for one in points])
            bounds = np.stack([with_host(one)[kept] for one in points])
            sums = np.einsum("tc,crbm->trbm", self.counts, totals)
            sums[..., tt.WORKSPACE] = 0.0  # the most of the blocks, not their sum
            workspace = np.zeros(sums.shape[:-1])
            for column, present in enumerate((self.counts > 0).T):
                held = np.where(present[:, None, None], totals[None, column, :, :, tt.WORKSPACE], 0.0)
                np.maximum(workspace, held, out=workspace)
            time = self.time_s(sums)
            self._sums[mesh, weight] = MeshSums(
                phase=phase,
                kept=kept,
                rows=rows,
                time_s=time,
                held=np.stack([tt.memory_bytes(sums, 0) + workspace, sums[..., tt.SAVED]]),
                bound_s=np.einsum("tc,crb->trb", self.counts, _least_over_modes(rows, bounds)),
                fastest=time.reshape(len(time), -1).argmin(axis=1),
            )
        return self._sums[mesh, weight]

    def kept(self, mesh: Mesh, weight: int) -> slice:
        """Which rows of their phase are those of a weight."""
        if not weight:
            return slice(None)
        weights = self.weights_on(mesh)
        each = len(self.rows(mesh, PRICED)) // len(weights)
        at = weights.index(weight)
        return slice(at * each, (at + 1) * each)

    def time_s(self, totals: Floats) -> Floats:
        """Seconds per micro-batch with its share of the step."""
        forward, backward, step = self.times_s(totals)
        return forward + backward + step / self.num_microbatches

    @property
    def contention(self) -> float:
        """What hiding communication behind compute costs of the shorter of the two; 1: nothing is hidden."""
        return self.blocks.cluster.overlap_contention if self.blocks.execution.overlap else 1.0

    def times_s(self, totals: Floats) -> tuple[Floats, Floats, Floats]:
        """Forward, backward, and exposed step seconds of stage totals."""
        contention = self.contention
        backward, reduction = totals[..., tt.BACKWARD], totals[..., tt.STEP]
        reduction = np.maximum(reduction - backward, 0.0) + contention * np.minimum(reduction, backward)
        loop_s, once_s = self.loop_s
        step = reduction + totals[..., tt.STEP_EXPOSED] + once_s
        return totals[..., tt.FORWARD] + loop_s / 2, backward + loop_s / 2, step

    @property
    def loop_s(self) -> tuple[float, float]:
        """What the training loop takes of every stage beside its ops: per micro-batch, and once per step."""
        software, launch_s = self.blocks.execution.software, self.blocks.cluster.device.launch_s
        return software.microbatch_calls * launch_s, software.step_calls * launch_s

    def roles(self, boundary: int, mesh: Mesh) -> tuple[str, ...]:
        """How the inner axes place what crosses blocks under a boundary placement."""
        return self.points(0, mesh, FREE).tables.boundaries[boundary]

    def finish(
        self, kinds: tuple[int, ...], num_devices: int, in_flight: float, room_bytes: float | None = None
    ) -> Finished | None:
        """The fastest choice for the blocks of a stage type that fits; None when there is none. Of several ``kinds``,
        the chunks of one run of devices, as if they were one stage that holds ``in_flight`` micro-batches.
        ``room_bytes``: default, what the budget leaves."""
        room_bytes = self.room_bytes if room_bytes is None else room_bytes
        key = (kinds, num_devices, in_flight, room_bytes)
        if key not in self._finished:
            self._finished[key] = self._finish(kinds, num_devices, in_flight, room_bytes)
        return self._finished[key]

    def _finish(self, kinds: tuple[int, ...], num_devices: int, in_flight: float, room_bytes: float) -> Finished | None:
        best: Finished | None = None
        best_s = np.inf
        meshes = self.meshes(num_devices)
        lower = dict.fromkeys(meshes, 0.0)
        if len(meshes) > 1:
            lower = {mesh: self._free_bound_s(kinds, mesh) for mesh in meshes}
        for mesh in sorted(lower, key=lambda mesh: lower[mesh]):
            if lower[mesh] >= best_s:
                break
            points = self._stage_points(kinds, mesh, in_flight, room_bytes)
            boundaries = range(points.totals.shape[2])
            if self.restriction is not None:
                at = self.points(0, mesh, FREE).tables.boundaries.index(self.restriction.boundary)
                boundaries = range(at, at + 1)
            for boundary in boundaries:
                found = fastest(points, self, in_flight, room_bytes, boundary, best_s)
                if found is None:
                    continue
                value_s = found.time_s + sum(self._received_s(kind, found, num_devices) for kind in kinds)
                if value_s < best_s:
                    best, best_s = found, value_s
        return best

    def _received_s(self, kind: int, run: Finished, num_devices: int) -> float:
        """What a micro-batch's activations and gradients take to reach the stage, by how its boundary places them, if
        its neighbours are of its own size and on other nodes: it tells boundaries that are equally fast inside
        apart."""
        if num_devices == self.gpus or self.restriction is not None:
            return 0.0
        return self.transfers.received_s(self._stage_of[kind], num_devices, run.choice)

    def _free_bound_s(self, kinds: tuple[int, ...], mesh: Mesh) -> float:
        """Seconds per micro-batch, with its share of the step, that no choice on a mesh is below, memory aside."""
        sums = self.sums(mesh, FREE)
        hidden = [at for at, row in enumerate(sums.rows) if row.family == "hidden"]
        charged_s = max(sums.rows[at].price_s_per_byte for at in hidden) * self.room_bytes
        bound_s = float(sums.bound_s[list(kinds)].sum(axis=0)[hidden].min())
        return bound_s - (charged_s if np.isfinite(charged_s) else 0.0)

    def _stage_points(self, kinds: tuple[int, ...], mesh: Mesh, in_flight: float, room_bytes: float) -> StagePoints:
        counts = self.counts[list(kinds)].sum(axis=0)
        columns = tuple(int(column) for column in np.flatnonzero(counts))
        parts = [(FREE, slice(None))]
        if self.restriction is None:
            sums = self.sums(mesh, FREE)
            fastest_at = int(sums.time_s[list(kinds)].sum(axis=0).argmin())
            if sums.memory_bytes(in_flight)[list(kinds)].sum(axis=0).reshape(-1)[fastest_at] > room_bytes:
                parts += [(PRICED, self.kept(mesh, weight)) for weight, _ in between(WEIGHTS, in_flight)]
        numbers = tuple(int(counts[column]) for column in columns)
        found = [(phase, kept, [self.points(column, mesh, phase) for column in columns]) for phase, kept in parts]
        return StagePoints.of(mesh, columns, numbers, found)

    def mix(self, kinds: tuple[int, ...], in_flight: float, run: Finished, room_bytes: float) -> Finished:
        """``run`` or, on its mesh, the proven best mix of frontier points that is faster."""
        points = self._stage_points(kinds, run.choice.mesh, in_flight, room_bytes)
        best = run
        for boundary in range(points.totals.shape[2]):
            found = best_mix(points, self, in_flight, room_bytes, boundary, self.num_microbatches, self.contention)
            if found is not None and found.time_s < best.time_s * (1 - 1e-9):
                best = found
        return best

    def totals(self, choice: StageChoice) -> Floats:
        """The totals (`intra.totals`) of a stage's blocks under a choice."""
        parts: list[tuple[Floats, float]] = []
        for column, mix in choice.points:
            for (phase, row), count in mix:
                points = self.points(column, choice.mesh, phase)
                parts.append((points.totals[row, choice.boundary], float(count)))
        return add(parts)

    def priced(self, choice: StageChoice, in_flight: float) -> Finished:
        """A stage under a choice."""
        return finished(self, self.totals(choice), in_flight, choice)

    @property
    def max_stages(self) -> int:
        """The most stages a pipeline may have."""
        return min(len(self.blocks.blocks), self.gpus, MAX_STAGES)

    def held_at_most(self) -> tuple[int, ...]:
        """Micro-batches that stage number 1, 2, ... from the last holds."""
        return tuple(
            max_in_flight(self.schedule, self.num_microbatches, place) for place in range(1, self.max_stages + 1)
        )

    @property
    def room_bytes(self) -> float:
        """The budget without the fixed share."""
        return self.budget_bytes - self.fixed_bytes()

    def fixed_bytes(self) -> float:
        """What torch's allocator does not count: context, and where ranks talk the buffers of two communicators."""
        communicators = 2 if self.gpus > 1 else 0
        return float(
            self.blocks.cluster.device.context_bytes + self.blocks.cluster.communication_buffer_bytes(communicators)
        )


def with_host(points: BlockPoints) -> Floats:
    """(rows, boundaries) the rows' optima, which count the device alone, with what the host takes to launch a block:
    beside it, or before it where launches block; ``HUGE`` where there is no solution."""
    forward, selective, backward, full = points.tables.host_s
    repeated = {"selective": selective, "full": full}
    host = np.array(
        [0.0 if row.family == "lean" else forward + backward + repeated.get(row.mode, 0.0) for row in points.rows]
    )
    both = np.add if points.tables.blocking else np.maximum
    return np.asarray(both(np.where(np.isfinite(points.bound_s), points.bound_s, HUGE), host[:, None]))


def _least_over_modes(rows: tuple[PriceRow, ...], bounds: Floats) -> Floats:
    """(columns, rows, boundaries): every row's value replaced by the least among the rows that differ in mode only."""
    groups: dict[tuple[str, float, float], list[int]] = {}
    for at, row in enumerate(rows):
        groups.setdefault((row.family, row.price_s_per_byte, row.saved_weight), []).append(at)
    least = bounds.copy()
    for group in groups.values():
        least[:, group] = bounds[:, group].min(axis=1, keepdims=True)
    return least


def between(weights: Sequence[int], in_flight: float) -> tuple[tuple[int, float], ...]:
    """The weights of saved bytes next to ``in_flight`` and the share of each: their mean is ``in_flight``.

    >>> between((1, 4, 32), 2), between((1, 4, 32), 50)
    (((1, 0.6666666666666667), (4, 0.33333333333333337)), ((32, 1.0),))
    """
    above = next((weight for weight in weights if weight >= in_flight), weights[-1])
    below = max(weight for weight in weights if weight <= in_flight)
    if above <= below:
        return ((below, 1.0),)
    share = (in_flight - below) / (above - below)
    return ((below, 1.0 - share), (above, share))
