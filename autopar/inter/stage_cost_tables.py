"""Tables over all stages, as the outer search reads them: bounds that no choice is below, and times that are reached.

No choice for a stage of blocks with counts n_c takes less than (D_c: optimum of a price row (`intra.price_rows`))

    max over rows of [sum_c n_c min_mode D_c - price * (M - fixed - workspace)]

seconds, then the least over boundary placements and meshes. A row's weight of saved bytes is the number s of
micro-batches held; for an s between two weights the same combination of the two rows' optima is a bound, as D is
concave in its prices.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.inter.block_pricer import Mesh
from autopar.inter.even_partition import even_ends, layers
from autopar.inter.pipeline_bounds import max_in_flight
from autopar.inter.pipeline_problem import StageTable
from autopar.inter.stage_costs import FREE, LEAN_WEIGHTS, WEIGHTS, MeshSums, StageBook, between, with_host
from autopar.intra import priced_objectives as pr
from autopar.intra.priced_objectives import PriceRow

Floats = NDArray[np.float64]
Ints = NDArray[np.integer]
BOUNDS = ("forward_s", "through_s", "step_s", "busy_s")
HUGE = 1e29  # sums of this and more hold an impossible part


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageBounds:
    """Seconds that no choice for a stage type is below: of its forward, forward + backward (``through_s``), what it
    does once per step, and B micro-batches with the step (``busy_s``); inf where nothing fits. ``even_s`` (3, types)
    are forward, backward and step of the fastest choice whose blocks all take one point: a good start."""

    forward_s: Floats
    through_s: Floats
    step_s: Floats
    busy_s: Floats
    even_s: Floats


class StageTables:
    """The tables of one book over the submeshes of ``sizes`` devices."""

    def __init__(self, book: StageBook, sizes: tuple[int, ...]) -> None:
        self.book, self.sizes = book, sizes
        self.cutoff_s = np.inf
        self._bounds: dict[tuple[int, int], StageBounds] = {}
        self._fitting: dict[tuple[Mesh, int], NDArray[np.bool_]] = {}
        self._by_mesh: dict[Mesh, StageBounds] = {}
        self._priced: dict[tuple[Mesh, int], tuple[NDArray[np.bool_], StageBounds]] = {}

    def release(self) -> None:
        """Give back the memory of what was priced; asking again prices it again."""
        for kept in (self._bounds, self._fitting, self._by_mesh, self._priced):
            kept.clear()
        self.book.release()

    def ignore_from(self, cutoff_s: float) -> None:
        """Steps of ``cutoff_s`` seconds or longer are of no interest: stages busy for that long need no exact price."""
        if cutoff_s != self.cutoff_s:
            self.cutoff_s = cutoff_s
            self._bounds.clear()

    def free(self) -> StageTable:
        """Bounds over (first block, end block, submesh size) with memory left out of account."""
        by_size = []
        for size in self.sizes:
            found = [self._mesh_bounds(mesh) for mesh in self.book.meshes(size)]
            by_size.append({name: np.min([getattr(one, name) for one in found], axis=0) for name in BOUNDS})
        return StageTable(
            forward_s=self._planes(FREE, [bound["forward_s"] for bound in by_size]),
            backward_s=self._planes(FREE, [bound["through_s"] - bound["forward_s"] for bound in by_size]),
            step_s=self._planes(FREE, [bound["step_s"] for bound in by_size]),
            busy_s=self._planes(FREE, [bound["busy_s"] for bound in by_size]),
        )

    def through_s(self, size: int) -> Floats:
        """(L + 1, L + 1): forward and backward of blocks i..j-1 take no less on ``size`` devices, memory aside; inf
        where j <= i."""
        return self._least(size, "through_s")

    def least_step_s(self, size: int) -> Floats:
        """The same of what is done once per step."""
        return self._least(size, "step_s")

    def _least(self, size: int, name: str) -> Floats:
        least = np.min([getattr(self._mesh_bounds(mesh), name) for mesh in self.book.meshes(size)], axis=0)
        return np.where(self.book.type_of >= 0, least[self.book.type_of], np.inf)

    def can_fit(self, in_flight_of: tuple[int, ...]) -> bool:
        """False: the leanest choices of no pipeline fit the budget, if stage number s from the last holds
        ``in_flight_of[s - 1]`` micro-batches."""
        count, unit = len(self.book.blocks.blocks), math.gcd(*self.sizes)
        behind = np.zeros(
            (count + 1, self.book.gpus // unit + 1), np.float32
        )  # which (first block, devices) tails reach
        behind[count, 0] = 1.0
        for held in in_flight_of:
            reached = np.zeros_like(behind)
            for size in self.sizes:
                fits = np.any([self._fits(mesh, held) for mesh in self.book.meshes(size)], axis=0)
                stages = np.where(self._possible(size, held), fits[self.book.type_of], False).astype(np.float32)
                reached[:, size // unit :] += stages @ behind[:, : behind.shape[1] - size // unit]
            behind = np.minimum(reached, 1.0)
            if behind[0, -1]:
                return True
        return False

    def bounding(self, in_flight: int) -> StageTable:
        """Bounds over (first block, end block, submesh size); inf for stages that cannot stand where ``in_flight``
        micro-batches are held (1F1B, stage number ``in_flight`` from the last)."""
        found = [self.bounds(size, in_flight) for size in self.sizes]
        backward = [one.through_s - np.where(np.isfinite(one.through_s), one.forward_s, 0.0) for one in found]
        return StageTable(
            forward_s=self._planes(in_flight, [one.forward_s for one in found]),
            backward_s=self._planes(in_flight, backward),
            step_s=self._planes(in_flight, [one.step_s for one in found]),
            busy_s=self._planes(in_flight, [one.busy_s for one in found]),
        )

    def even(self, in_flight: int) -> StageTable:
        """The same of the fastest choices whose blocks all take one point: times that are reached, no bounds."""
        found = [self.bounds(size, in_flight).even_s for size in self.sizes]
        forward, backward, step = (self._planes(in_flight, [one[at] for one in found]) for at in range(3))
        return StageTable(forward_s=forward, backward_s=backward, step_s=step)

    def guesses(self) -> list[tuple[float, tuple[tuple[int, int, int], ...]]]:
        """Pipelines of equal stages (first block, end block, devices), one for each number of stages, and about what a
        step of each takes, all blocks of a stage at one point of the free phase, transfers aside; none that does not
        fit."""
        book, found = self.book, []
        for size in self.sizes:
            num_stages, rest = divmod(book.gpus, size)
            if rest or num_stages > book.max_stages or num_stages > len(layers(book.blocks.blocks)):
                continue
            ends = even_ends(book.blocks.blocks, num_stages) if num_stages > 1 else [len(book.blocks.blocks)]
            stages = tuple((first, end, size) for first, end in itertools.pairwise((0, *ends)))
            kinds = [int(book.type_of[first, end]) for first, end, _ in stages]
            held = [max_in_flight(book.schedule, book.num_microbatches, place) for place in range(num_stages, 0, -1)]
            pairs = list(zip(kinds, held, strict=True))
            seconds = {pair: self._free_fitting_s(size, *pair) for pair in pairs}
            times = [seconds[pair] for pair in pairs]
            step_time_s = sum(times) + (book.num_microbatches - 1) * max(times)
            if math.isfinite(step_time_s):
                found.append((step_time_s, stages))
        return found

    def _free_fitting_s(self, size: int, kind: int, in_flight: int) -> float:
        """Seconds per micro-batch of a stage's fastest point of the free phase that fits."""
        found = np.inf
        for mesh in self.book.meshes(size):
            sums = self.book.sums(mesh, FREE)
            memory = sums.held[0][kind] + in_flight * sums.held[1][kind]
            found = min(found, float(np.where(memory <= self.book.room_bytes, sums.time_s[kind], np.inf).min()))
        return found

    def work_bound_s(self) -> float:
        """No plan of this micro-batch is faster, whatever its memory: the least device-seconds of every block, spread
        over all GPUs."""
        book = self.book
        least = np.full(len(book.columns), np.inf)
        for size in self.sizes:
            for mesh in book.meshes(size):
                for column in range(len(book.columns)):
                    points = book.points(column, mesh, FREE)
                    path = [at for at, row in enumerate(points.rows) if row.family == "path"]
                    room_s = max(row.price_s_per_byte for row in points.rows) * book.budget_bytes
                    seconds = max(float(with_host(points)[path].min()) - room_s, self._launch_floor_s(column, mesh))
                    least[column] = min(least[column], size * seconds)
        whole = book.counts[int(book.type_of[0, len(book.blocks.blocks)])]
        loop_s, once_s = book.loop_s
        blocks_s = np.where(whole > 0, whole * least, 0.0).sum() / book.gpus
        return float(book.num_microbatches * (blocks_s + loop_s) + once_s)

    def bounds(self, num_devices: int, in_flight: int) -> StageBounds:
        """Bounds of every stage type on ``num_devices`` devices with ``in_flight`` micro-batches held."""
        key = (num_devices, in_flight)
        if key not in self._bounds:
            self._bounds[key] = self._make_bounds(num_devices, in_flight)
        return self._bounds[key]

    def _make_bounds(self, num_devices: int, in_flight: int) -> StageBounds:
        book = self.book
        B, meshes, room = book.num_microbatches, book.meshes(num_devices), book.room_bytes
        found = [self._mesh_bounds(mesh) for mesh in meshes]
        best = np.full(len(book.counts), np.inf)
        even = np.full((3, len(book.counts)), np.inf)
        needed = np.zeros(len(book.counts), bool)
        needed[book.type_of[self._possible(num_devices, in_flight)]] = True
        if not needed.any():
            nothing = np.full(len(book.counts), np.inf)
            return StageBounds(even_s=even, **dict.fromkeys(BOUNDS, nothing))
        fits_free = []
        for mesh in meshes:
            sums = book.sums(mesh, FREE)
            fits_free.append(sums.of_fastest(in_flight)[1] <= room)
            self._improve(best, even, mesh, sums, in_flight)
        fits = [self._fits(mesh, in_flight) for mesh in meshes]
        for at in sorted(range(len(meshes)), key=lambda at: float(found[at].busy_s.min())):
            lower = found[at].busy_s
            wanted = needed & fits[at] & ~fits_free[at] & (lower < B * best) & (lower < self.cutoff_s)
            if wanted.any():
                for weight, _ in between(WEIGHTS, in_flight):
                    self._improve(best, even, meshes[at], book.sums(meshes[at], weight), in_flight)
                found[at] = self._priced_bounds(meshes[at], in_flight, wanted)
        least = {
            name: np.min(
                [np.where(fit, getattr(one, name), np.inf) for one, fit in zip(found, fits, strict=True)], axis=0
            )
            for name in BOUNDS
        }
        return StageBounds(even_s=np.where(best < HUGE, even, np.inf), **least)

    def _improve(self, best: Floats, even: Floats, mesh: Mesh, sums: MeshSums, in_flight: int) -> None:
        """Take the fastest point that fits, for each type where it is below ``best`` (seconds)."""
        types = np.flatnonzero(sums.of_fastest(in_flight)[0] < best)
        if not len(types):
            return
        memory = sums.held[0][types] + in_flight * sums.held[1][types]
        flat = np.where(memory <= self.book.room_bytes, sums.time_s[types], np.inf).reshape(len(types), -1)
        at = flat.argmin(axis=1)
        fastest_s = flat[np.arange(len(types)), at]
        better = fastest_s < best[types]
        if better.any():
            best[types[better]] = fastest_s[better]
            picked = self._totals(mesh, sums, types[better], at[better])
            for number, seconds in enumerate(self.book.times_s(picked)):
                even[number, types[better]] = seconds

    def _totals(self, mesh: Mesh, sums: MeshSums, types: Ints, flat: Ints) -> Floats:
        """(picks, metrics) of stage types whose blocks all take the point at a flat (row, boundary) of ``sums``."""
        row, boundary = np.divmod(flat, sums.time_s.shape[2])
        points = [self.book.points(column, mesh, sums.phase) for column in range(len(self.book.columns))]
        totals = np.stack([one.totals[sums.kept][row, boundary] for one in points], axis=1)
        counts = self.book.counts[types]
        present = counts[..., None] > 0
        return np.asarray(np.sum(np.where(present, totals, 0.0) * counts[..., None], axis=1))

    def run_busy_s(self, size: int, kinds: tuple[int, ...], held: tuple[int, ...]) -> float:
        """B micro-batches and the step of a run of ``size`` devices take no less, if they run a chunk of each of
        ``kinds``, of which they hold ``held`` micro-batches; inf where nothing fits."""
        book, found = self.book, np.inf
        counts = book.counts[list(kinds)].sum(axis=0)[None]
        for mesh in book.meshes(size):
            free = sum((book.sums(mesh, FREE).bound_s[kind] for kind in kinds), np.zeros(()))[None]
            busy_s = float(self._bounds_of(mesh, counts, free, book.sums(mesh, FREE).rows).busy_s[0])
            if busy_s < min(found, self.cutoff_s) and self._fits_together(mesh, counts, kinds, held):
                if not self._free_fits(mesh, kinds, held):
                    parts = [
                        self._row_bounds(mesh, count, np.array([kind]))[0]
                        for kind, count in zip(kinds, held, strict=True)
                    ]
                    rows = book.sums(mesh, between(WEIGHTS, held[0])[0][0]).rows
                    priced = self._bounds_of(mesh, counts, np.sum(parts, axis=0)[None], rows)
                    busy_s = max(busy_s, float(priced.busy_s[0]))
                found = min(found, busy_s)
        return found

    def _free_fits(self, mesh: Mesh, kinds: tuple[int, ...], held: tuple[int, ...]) -> bool:
        """Whether the fastest choice, memory aside, fits all the same."""
        sums = self.book.sums(mesh, FREE)
        at = int(sums.time_s[list(kinds)].sum(axis=0).argmin())
        memory = sum(sums.memory_bytes(count)[kind] for kind, count in zip(kinds, held, strict=True))
        return bool(np.ravel(memory)[at] <= self.book.room_bytes)

    def _fits_together(self, mesh: Mesh, counts: Floats, kinds: tuple[int, ...], held: tuple[int, ...]) -> bool:
        """False: the leanest choices of the chunks do not fit together."""
        need = sum(float(self._lean_bytes(mesh, count)[kind]) for kind, count in zip(kinds, held, strict=True))
        return bool(need + self._workspace(mesh, counts)[0] - counts.sum() <= self.book.room_bytes)

    def _fits(self, mesh: Mesh, in_flight: int) -> NDArray[np.bool_]:
        """(types,) False: no choice on the mesh fits, by the leanest of each block."""
        if (mesh, in_flight) not in self._fitting:
            counts = self.book.counts
            slack = counts.sum(axis=1)  # a byte per block: what time may count for
            need = self._lean_bytes(mesh, in_flight) + self._workspace(mesh, counts) - slack
            self._fitting[mesh, in_flight] = need <= self.book.room_bytes
        return self._fitting[mesh, in_flight]

    def _lean_bytes(self, mesh: Mesh, in_flight: int) -> Floats:
        """(types,) the least bytes of any choice, but for workspace and the fixed share."""
        sums = self.book.sums(mesh, FREE)
        need = np.zeros(())
        for weight, share in between(LEAN_WEIGHTS, in_flight):
            lean = [at for at, row in enumerate(sums.rows) if row.family == "lean" and row.saved_weight == weight]
            need = need + share * sums.bound_s[:, lean[0]].min(axis=-1) / pr.LEAN_PRICE
        return np.asarray(need)

    def _workspace(self, mesh: Mesh, counts: Floats) -> Floats:
        least = np.array([self.book.points(column, mesh, FREE).least[1] for column in range(len(self.book.columns))])
        return np.asarray(np.where(counts > 0, least, 0.0).max(axis=1))

    def _mesh_bounds(self, mesh: Mesh) -> StageBounds:
        """With memory left out of account."""
        if mesh not in self._by_mesh:
            sums = self.book.sums(mesh, FREE)
            self._by_mesh[mesh] = self._bounds_of(mesh, self.book.counts, sums.bound_s, sums.rows)
        return self._by_mesh[mesh]

    def _priced_bounds(self, mesh: Mesh, in_flight: int, wanted: NDArray[np.bool_]) -> StageBounds:
        """With memory for ``in_flight`` micro-batches for the types ``wanted``, and for others that were once."""
        if (mesh, in_flight) not in self._priced:
            free = self._mesh_bounds(mesh)
            copied = {name: getattr(free, name).copy() for name in BOUNDS}
            self._priced[mesh, in_flight] = (np.zeros(len(wanted), bool), StageBounds(even_s=free.even_s, **copied))
        done, found = self._priced[mesh, in_flight]
        types = np.flatnonzero(wanted & ~done)
        if len(types):
            rows = self.book.sums(mesh, between(WEIGHTS, in_flight)[0][0]).rows
            priced = self._bounds_of(mesh, self.book.counts[types], self._row_bounds(mesh, in_flight, types), rows)
            for name in BOUNDS:
                known = getattr(found, name)
                known[types] = np.maximum(known[types], getattr(priced, name))
            done[types] = True
        return found

    def _row_bounds(self, mesh: Mesh, in_flight: int, types: Ints) -> Floats:
        """(types, rows, boundaries): the rows' optima, between two weights of saved bytes the same combination."""
        weights = between(WEIGHTS, in_flight)
        return sum((share * self.book.sums(mesh, weight).bound_s[types] for weight, share in weights), np.zeros(()))

    def _bounds_of(self, mesh: Mesh, counts: Floats, bound: Floats, rows: tuple[PriceRow, ...]) -> StageBounds:
        """Bounds of stages with (stages, columns) ``counts`` of blocks from (stages, rows, boundaries) optima."""
        book, B = self.book, self.book.num_microbatches
        least = np.array([book.points(column, mesh, FREE).least for column in range(len(book.columns))])
        least = np.where(np.isfinite(least), least, HUGE)
        room = np.maximum(book.room_bytes - self._workspace(mesh, counts), 0.0)
        price = np.array([row.price_s_per_byte for row in rows])
        value = bound - (price[:, None] * room[:, None, None] if np.isfinite(book.budget_bytes) else 0.0)
        forward, step = counts @ least[:, 0], counts @ least[:, 2]
        launches = counts @ np.array([self._launch_floor_s(c, mesh) for c in range(len(book.columns))])
        best = {family: np.full(value.shape[::2], -np.inf) for family in pr.FAMILIES}
        for at, family in enumerate(row.family for row in rows):
            if family != "lean":
                best[family] = np.maximum(best[family], value[:, at])
        loop_s, once_s = book.loop_s
        path = np.maximum(np.maximum(best["path"], best["linked"]), np.maximum(launches, forward)[:, None])
        busy = B * np.maximum(np.maximum(best["hidden"], best["reduced"]), path)
        busy = np.maximum(busy, B * path + step[:, None]) + B * loop_s + once_s
        return StageBounds(
            forward_s=forward + loop_s / 2,
            through_s=path.min(axis=1) + loop_s,
            step_s=step + once_s,
            busy_s=busy.min(axis=1),
            even_s=np.zeros(0),
        )

    def _launch_floor_s(self, column: int, mesh: Mesh) -> float:
        forward, _, backward, _ = self.book.points(column, mesh, FREE).tables.host_s
        return forward + backward

    def _planes(self, in_flight: int, values: list[Floats]) -> Floats:
        planes = [
            np.where(self._possible(size, in_flight), of_type[self.book.type_of], np.inf)
            for size, of_type in zip(self.sizes, values, strict=True)
        ]
        return np.stack(planes, axis=-1)

    def _possible(self, size: int, in_flight: int) -> NDArray[np.bool_]:
        """Which (first, end) can stand there (``FREE``: anywhere): with fewer micro-batches held than there are, 1F1B
        says how many stages follow, each of a block at least."""
        type_of, count, B = self.book.type_of, len(self.book.blocks.blocks), self.book.num_microbatches
        first, end = np.indices((count + 1, count + 1))
        if size == self.book.gpus:
            alone = max_in_flight(self.book.schedule, B, 1)
            return np.asarray((first == 0) & (end == count) & (in_flight in (alone, FREE)))
        if in_flight == FREE or in_flight >= B:
            return type_of >= 0
        return np.asarray((type_of >= 0) & ((end == count) if in_flight == 1 else end <= count + 1 - in_flight))
