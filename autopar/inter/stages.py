"""What every possible stage costs: blocks i..j-1 on a submesh, at a number s of micro-batches in flight.

A stage runs all its blocks on one mesh with one boundary placement; its totals are the sums over its blocks, with what
overlaps applied once:

    forward, backward    sums over blocks                                      seconds per micro-batch
    step                 max(reduction - last backward, 0) + optimizer         seconds per step
    memory               state + s * saved + max workspace + fixed             bytes, at most the budget M

Two prices are made of the rows of `intra.frontier` (D_c: a row's optimum for a block of column c, n_c of them):

    bounds    max over rows of [sum_c n_c min_mode D_c - price * (M - fixed - workspace)], for rows with a weight of saved
              bytes of at most s; then the least over boundary placements and meshes. No choice at all is below it.
    finish    the fastest choice that fits (`finish`), made when a pipeline that holds the stage is evaluated.

Stages with the same count of each kind of block cost the same, so prices are made once per distinct count vector.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.inter.blocks import Blocks, Mesh, Restriction
from autopar.inter.finish import Finished, StagePoints, fastest
from autopar.inter.mix import best_mix
from autopar.inter.partition import StageTable
from autopar.inter.transfers import Transfers
from autopar.intra import frontier as fr
from autopar.intra.frontier import BlockPoints, PriceRow, free_rows, lean_rows, priced_rows

Floats = NDArray[np.float64]
FREE, LEAN = 0, -1
WEIGHTS = (16, 4, 1)
"""Weights of saved bytes for which rows are made where memory binds: the largest not above s serves s in flight."""
BOUNDS = ("forward_s", "through_s", "step_s", "busy_s")
HUGE = 1e30  # stands for "impossible" in sums, where inf times zero would be undefined


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeshSums:
    """Per stage type, row and boundary placement: the eight ``totals``, ``time_s`` per micro-batch with its share of
    the step, and the ``bound_s`` of the rows. ``fastest`` (types,) is the flat position of the least time."""

    rows: tuple[PriceRow, ...]
    totals: Floats
    time_s: Floats
    bound_s: Floats
    fastest: NDArray[np.integer]

    def memory_bytes(self, in_flight: int) -> Floats:
        """All but the fixed share, (types, rows, boundaries)."""
        return fr.memory_bytes(self.totals, in_flight)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageBounds:
    """Seconds that no choice for a stage type is below: of its forward, forward + backward (``through_s``), what it does
    once per step, and B micro-batches with the step (``busy_s``); inf where nothing fits. ``even_s`` (3, types) are
    forward, backward and step of the fastest choice whose blocks all take one point: a good start."""

    forward_s: Floats
    through_s: Floats
    step_s: Floats
    busy_s: Floats
    even_s: Floats


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
    ) -> None:
        self.restriction, self.gpus = restriction, gpus
        self.blocks, self.micro_batch, self.num_microbatches = blocks, micro_batch, num_microbatches
        self.budget_bytes = budget_bytes
        self.modes = modes if blocks.core else tuple(mode for mode in modes if mode != "selective") or ("none",)
        self.cutoff_s = np.inf
        self.transfers = Transfers(self)
        self.columns: list[tuple[int, frozenset[int]]] = []
        self._rows: dict[tuple[int, ...], int] = {}
        count = len(blocks.blocks)
        self.type_of = np.full((count + 1, count + 1), -1)
        for first in range(count):
            counts: dict[int, int] = {}
            for end in range(first + 1, count + 1):
                block = blocks.blocks[end - 1]
                column = self.column(block.kind, blocks.held(block, first))
                counts[column] = counts.get(column, 0) + 1
                key = tuple(sorted((column << 16) + number for column, number in counts.items()))
                self.type_of[first, end] = self._rows.setdefault(key, len(self._rows))
        self.counts = np.zeros((len(self._rows), len(self.columns)))
        for key, row in self._rows.items():
            for packed in key:
                self.counts[row, packed >> 16] = packed & 0xFFFF
        graph = blocks.graph
        self._growing = {size for value in graph.values for size in value.shape if graph.batch.grows(size)}
        self._meshes: dict[int, list[Mesh]] = {}
        self._bounds: dict[tuple[int, int], StageBounds] = {}
        self._finished: dict[tuple[int, int, int], Finished | None] = {}
        self._points: dict[tuple[int, tuple[int, ...], int], BlockPoints] = {}
        self._sums: dict[tuple[Mesh, int], MeshSums] = {}
        self._by_mesh: dict[tuple[Mesh, int], StageBounds] = {}

    def release(self) -> None:
        """Give back the memory of what was priced; asking again prices it again."""
        for kept in (self._bounds, self._finished, self._points, self._sums, self._by_mesh):
            kept.clear()
        self.blocks.forget(self.micro_batch)

    def ignore_from(self, cutoff_s: float) -> None:
        """Steps of ``cutoff_s`` seconds or longer are of no interest: stages busy for that long need no exact price."""
        if cutoff_s != self.cutoff_s:
            self.cutoff_s = cutoff_s
            self._bounds.clear()

    def column(self, kind: int, held: frozenset[int]) -> int:
        """The position of a kind of block whose parameters ``held`` another block of the stage stores."""
        if (kind, held) not in self.columns:
            self.columns.append((kind, held))
        return self.columns.index((kind, held))

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
                found = [mesh for mesh in found if self.whole(self.micro_batch // mesh.data)]
            self._meshes[num_devices] = found
        return self._meshes[num_devices]

    def whole(self, local_batch: int) -> bool:
        """Whether every size of the model is a whole number at this many samples per data rank."""
        traced = self.blocks.graph.batch.traced
        return all((size * local_batch) % traced == 0 for size in self._growing)

    def rows(self, phase: int) -> tuple[PriceRow, ...]:
        """The price rows of a phase: ``FREE``, the weight of saved bytes where memory binds, or ``LEAN``, where time has
        next to no say."""
        rate = self.blocks.rate_s_per_byte
        if phase == LEAN:
            return tuple(row for weight in (1.0, 8.0) for row in lean_rows(rate, self.modes, weight))
        if self.restriction is not None:  # memory has no say in a layout
            return free_rows(rate, self.modes, ("priced",))
        return free_rows(rate, self.modes) if phase == FREE else priced_rows(rate, self.modes, float(phase))

    def points(self, column: int, mesh: Mesh, phase: int) -> BlockPoints:
        """The frontier of a column's blocks by the rows of a phase."""
        key = (column, mesh.sizes, phase)
        if key not in self._points:
            kind, held = self.columns[column]
            self._points[key] = self.blocks.points(
                kind, held, mesh, self.micro_batch, self.num_microbatches, self.rows(phase), self.restriction
            )
        return self._points[key]

    def sums(self, mesh: Mesh, phase: int) -> MeshSums:
        """The rows' totals and bounds for every stage type."""
        if (mesh, phase) not in self._sums:
            points = [self.points(column, mesh, phase) for column in range(len(self.columns))]
            totals = np.stack([np.where(np.isfinite(one.totals), one.totals, HUGE) for one in points])
            bounds = np.stack([np.where(np.isfinite(one.bound_s), one.bound_s, HUGE) for one in points])
            sums = np.einsum("tc,crbm->trbm", self.counts, totals)
            sums[..., fr.WORKSPACE] = 0.0
            for column, present in enumerate((self.counts > 0).T):
                held = np.where(present[:, None, None], totals[None, column, :, :, fr.WORKSPACE], 0.0)
                np.maximum(sums[..., fr.WORKSPACE], held, out=sums[..., fr.WORKSPACE])
            bound = np.einsum("tc,crb->trb", self.counts, _least_over_modes(self.rows(phase), bounds))
            time = self.time_s(sums)
            self._sums[mesh, phase] = MeshSums(
                rows=self.rows(phase),
                totals=sums,
                time_s=time,
                bound_s=bound,
                fastest=time.reshape(len(time), -1).argmin(axis=1),
            )
        return self._sums[mesh, phase]

    def bounds(self, num_devices: int, in_flight: int) -> StageBounds:
        """Bounds of every stage type on ``num_devices`` devices with ``in_flight`` micro-batches held."""
        key = (num_devices, in_flight)
        if key not in self._bounds:
            self._bounds[key] = self._make_bounds(num_devices, in_flight)
        return self._bounds[key]

    def _make_bounds(self, num_devices: int, in_flight: int) -> StageBounds:
        B, meshes, room = self.num_microbatches, self.meshes(num_devices), self.budget_bytes - self.fixed_bytes()
        found = [self._mesh_bounds(mesh, FREE) for mesh in meshes]
        best = np.full(len(self.counts), np.inf)
        even = np.full((3, len(self.counts)), np.inf)
        fits_free = []
        for mesh in meshes:
            sums = self.sums(mesh, FREE)
            memory = sums.memory_bytes(in_flight).reshape(len(best), -1)
            fits_free.append(np.take_along_axis(memory, sums.fastest[:, None], axis=1)[:, 0] <= room)
            self._improve(best, even, sums, in_flight, room)
        phase = self._phase(in_flight)
        needed = np.zeros(len(self.counts), bool)
        needed[self.type_of[self._possible(num_devices, in_flight)]] = True
        for at in sorted(range(len(meshes)), key=lambda at: float(found[at].busy_s.min())):
            lower = found[at].busy_s
            wanted = needed & ~fits_free[at] & (lower < B * best) & (lower < self.cutoff_s)
            if wanted.any():
                self._improve(best, even, self.sums(meshes[at], phase), in_flight, room)
                found[at] = _larger(found[at], self._mesh_bounds(meshes[at], phase))
        impossible = ~(best < HUGE / 2)
        least = {
            name: np.where(impossible, np.inf, np.min([getattr(one, name) for one in found], axis=0)) for name in BOUNDS
        }
        return StageBounds(even_s=np.where(impossible, np.inf, even), **least)

    def _improve(self, best: Floats, even: Floats, sums: MeshSums, in_flight: int, room_bytes: float) -> None:
        """Take the fastest point that fits, for each type where it is below ``best`` (seconds)."""
        time = np.where(sums.memory_bytes(in_flight) <= room_bytes, sums.time_s, np.inf)
        flat = time.reshape(len(best), -1)
        at = flat.argmin(axis=1)
        rows = np.arange(len(best))
        better = flat[rows, at] < best
        best[better] = flat[rows, at][better]
        if better.any():
            picked = sums.totals.reshape(*flat.shape, fr.NUM_TOTALS)[rows[better], at[better]]
            for number, seconds in enumerate(self.times_s(picked)):
                even[number, better] = seconds

    def _phase(self, in_flight: int) -> int:
        return next(weight for weight in WEIGHTS if weight <= in_flight)

    def _mesh_bounds(self, mesh: Mesh, phase: int) -> StageBounds:
        if (mesh, phase) not in self._by_mesh:
            self._by_mesh[mesh, phase] = self._make_mesh_bounds(mesh, phase)
        return self._by_mesh[mesh, phase]

    def _make_mesh_bounds(self, mesh: Mesh, phase: int) -> StageBounds:
        sums, B = self.sums(mesh, phase), self.num_microbatches
        least = np.array([self.points(column, mesh, phase).least for column in range(len(self.columns))])
        present = self.counts > 0
        workspace = np.where(present, least[:, 1], 0.0).max(axis=1)
        room = np.maximum(self.budget_bytes - self.fixed_bytes() - workspace, 0.0)
        price = np.array([row.price_s_per_byte for row in sums.rows])
        value = sums.bound_s - (price[:, None] * room[:, None, None] if np.isfinite(self.budget_bytes) else 0.0)
        forward, step = self.counts @ least[:, 0], self.counts @ least[:, 2]
        launches = self.counts @ np.array([self._launch_floor_s(c, mesh, phase) for c in range(len(self.columns))])
        best = {family: np.full(value.shape[::2], -np.inf) for family in fr.FAMILIES}
        for row, family in enumerate(r.family for r in sums.rows):
            best[family] = np.maximum(best[family], value[:, row])
        path = np.maximum(np.maximum(best["path"], best["tenth"]), np.maximum(launches, forward)[:, None])
        busy = B * np.maximum(np.maximum(best["hidden"], best["reduced"]), path)
        busy = np.maximum(busy, B * path + step[:, None])
        return StageBounds(
            forward_s=forward, through_s=path.min(axis=1), step_s=step, busy_s=busy.min(axis=1), even_s=np.zeros(0)
        )

    def _launch_floor_s(self, column: int, mesh: Mesh, phase: int) -> float:
        forward, _, backward = self.points(column, mesh, phase).tables.host_s
        return forward + backward

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
        execution, cluster = self.blocks.execution, self.blocks.cluster
        contention = self.contention
        backward, reduction = totals[..., fr.BACKWARD], totals[..., fr.STEP]
        reduction = np.maximum(reduction - backward, 0.0) + contention * np.minimum(reduction, backward)
        loop_s = execution.software.microbatch_calls * cluster.device.launch_s / 2
        step = reduction + totals[..., fr.STEP_EXPOSED] + execution.software.step_calls * cluster.device.launch_s
        return totals[..., fr.FORWARD] + loop_s, backward + loop_s, step

    def roles(self, boundary: int, mesh: Mesh) -> tuple[str, ...]:
        """How the inner axes place what crosses blocks under a boundary placement."""
        return self.points(0, mesh, FREE).tables.boundaries[boundary]

    def finish(self, kind: int, num_devices: int, in_flight: int) -> Finished | None:
        """The fastest choice for stage type ``kind`` that fits; None when there is none."""
        key = (kind, num_devices, in_flight)
        if key not in self._finished:
            self._finished[key] = self._finish(kind, num_devices, in_flight)
        return self._finished[key]

    def _finish(self, kind: int, num_devices: int, in_flight: int) -> Finished | None:
        room = self.budget_bytes - self.fixed_bytes()
        best: Finished | None = None
        meshes = self.meshes(num_devices)
        lower = dict.fromkeys(meshes, 0.0)
        if len(meshes) > 1:
            lower = {mesh: float(self._mesh_bounds(mesh, FREE).busy_s[kind]) for mesh in meshes}
        for mesh in sorted(lower, key=lambda mesh: lower[mesh]):
            if best is not None and lower[mesh] >= self.num_microbatches * best.time_s:
                break
            points = self._stage_points(kind, mesh, in_flight)
            boundary = None
            if self.restriction is not None:
                boundary = self.points(0, mesh, FREE).tables.boundaries.index(self.restriction.boundary)
            found = fastest(points, self, in_flight, room, boundary)
            if found is not None and (best is None or found.time_s < best.time_s):
                best = found
        return best

    def _stage_points(self, kind: int, mesh: Mesh, in_flight: int) -> StagePoints:
        columns = tuple(int(column) for column in np.flatnonzero(self.counts[kind]))
        phases = [FREE]
        if self.restriction is None:
            sums, room = self.sums(mesh, FREE), self.budget_bytes - self.fixed_bytes()
            if sums.memory_bytes(in_flight)[kind].reshape(-1)[sums.fastest[kind]] > room:
                phases.append(self._phase(in_flight))
        numbers = tuple(int(self.counts[kind, column]) for column in columns)
        found = {phase: [self.points(column, mesh, phase) for column in columns] for phase in phases}
        return StagePoints.of(mesh, columns, numbers, found)

    def mix(self, kind: int, in_flight: int, run: Finished) -> Finished:
        """``run`` or, on its mesh, the proven best mix of frontier points that is faster."""
        points = self._stage_points(kind, run.choice.mesh, in_flight)
        best, room = run, self.budget_bytes - self.fixed_bytes()
        for boundary in range(points.totals.shape[2]):
            found = best_mix(points, self, in_flight, room, boundary, self.num_microbatches, self.contention)
            if found is not None and found.time_s < best.time_s * (1 - 1e-9):
                best = found
        return best

    def free_table(self, sizes: tuple[int, ...]) -> StageTable:
        """Bounds over (first block, end block, submesh size) with memory left out of account."""
        by_size = []
        for size in sizes:
            found = [self._mesh_bounds(mesh, FREE) for mesh in self.meshes(size)]
            by_size.append({name: np.min([getattr(one, name) for one in found], axis=0) for name in BOUNDS})
        one = self.num_microbatches  # held by all stages: every place is possible
        return StageTable(
            forward_s=self._planes(sizes, one, [bound["forward_s"] for bound in by_size]),
            backward_s=self._planes(sizes, one, [bound["through_s"] - bound["forward_s"] for bound in by_size]),
            step_s=self._planes(sizes, one, [bound["step_s"] for bound in by_size]),
            busy_s=self._planes(sizes, one, [bound["busy_s"] for bound in by_size]),
        )

    def work_bound_s(self, sizes: tuple[int, ...], gpus: int) -> float:
        """No plan of this micro-batch is faster, whatever its memory: the least device-seconds of every block, spread
        over all GPUs."""
        least = np.full(len(self.columns), np.inf)
        for size in sizes:
            for mesh in self.meshes(size):
                for column in range(len(self.columns)):
                    points = self.points(column, mesh, FREE)
                    path = [at for at, row in enumerate(points.rows) if row.family == "path"]
                    room_s = max(row.price_s_per_byte for row in points.rows) * self.budget_bytes
                    seconds = max(float(points.bound_s[path].min()) - room_s, self._launch_floor_s(column, mesh, FREE))
                    least[column] = min(least[column], size * seconds)
        whole = self.counts[int(self.type_of[0, len(self.blocks.blocks)])]
        return float(self.num_microbatches * np.where(whole > 0, whole * least, 0.0).sum() / gpus)

    def fixed_bytes(self) -> float:
        """What torch's allocator does not count: context, and where ranks talk the buffers of two communicators."""
        communicators = 2 if self.gpus > 1 else 0
        return float(
            self.blocks.cluster.device.context_bytes + self.blocks.cluster.communication_buffer_bytes(communicators)
        )

    def table(self, sizes: tuple[int, ...], in_flight: int) -> StageTable:
        """Bounds over (first block, end block, submesh size) as the outer search reads them; inf for stages that cannot
        stand where ``in_flight`` micro-batches are held (1F1B, stage number ``in_flight`` from the last)."""
        found = [self.bounds(size, in_flight) for size in sizes]
        backward = [one.through_s - np.where(np.isfinite(one.through_s), one.forward_s, 0.0) for one in found]
        return StageTable(
            forward_s=self._planes(sizes, in_flight, [one.forward_s for one in found]),
            backward_s=self._planes(sizes, in_flight, backward),
            step_s=self._planes(sizes, in_flight, [one.step_s for one in found]),
            busy_s=self._planes(sizes, in_flight, [one.busy_s for one in found]),
        )

    def even_table(self, sizes: tuple[int, ...], in_flight: int) -> StageTable:
        """The same of the fastest choices whose blocks all take one point: times that are reached, no bounds."""
        found = [self.bounds(size, in_flight).even_s for size in sizes]
        forward, backward, step = (self._planes(sizes, in_flight, [one[at] for one in found]) for at in range(3))
        return StageTable(forward_s=forward, backward_s=backward, step_s=step)

    def _planes(self, sizes: tuple[int, ...], in_flight: int, values: list[Floats]) -> Floats:
        planes = [
            np.where(self._possible(size, in_flight), of_type[self.type_of], np.inf)
            for size, of_type in zip(sizes, values, strict=True)
        ]
        return np.stack(planes, axis=-1)

    def _possible(self, size: int, in_flight: int) -> NDArray[np.bool_]:
        """Which (first, end) can stand there: with fewer micro-batches held than there are, 1F1B says how many stages
        follow, each of a block at least."""
        count = len(self.blocks.blocks)
        first, end = np.indices((count + 1, count + 1))
        if size == self.gpus:
            return np.asarray((first == 0) & (end == count))
        if in_flight >= self.num_microbatches:
            return self.type_of >= 0
        return np.asarray((self.type_of >= 0) & ((end == count) if in_flight == 1 else end <= count + 1 - in_flight))


def _least_over_modes(rows: tuple[PriceRow, ...], bounds: Floats) -> Floats:
    """(columns, rows, boundaries): every row's value replaced by the least among the rows that differ in mode only."""
    groups: dict[tuple[str, float, float], list[int]] = {}
    for at, row in enumerate(rows):
        groups.setdefault((row.family, row.price_s_per_byte, row.saved_weight), []).append(at)
    least = bounds.copy()
    for group in groups.values():
        least[:, group] = bounds[:, group].min(axis=1, keepdims=True)
    return least


def _larger(one: StageBounds, other: StageBounds) -> StageBounds:
    larger = {name: np.maximum(getattr(one, name), getattr(other, name)) for name in BOUNDS}
    return StageBounds(even_s=one.even_s, **larger)
