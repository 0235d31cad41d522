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

from autopar.inter.block_pricer import StageMesh
from autopar.inter.even_partition import even_ends, layers
from autopar.inter.pipeline_bounds import max_in_flight
from autopar.inter.pipeline_problem import StageTimeTable
from autopar.inter.stage_costs import (
    FREE,
    IN_FLIGHT_GRID,
    LEAN_IN_FLIGHT_GRID,
    MeshTotals,
    StageCosts,
    interpolation_weights,
    with_launch_time,
)
from autopar.intra import priced_objectives as pr
from autopar.intra.priced_objectives import PricedObjective

Floats = NDArray[np.float64]
Ints = NDArray[np.integer]
BOUND_FIELDS = ("forward_s", "forward_backward_s", "step_s", "busy_s")
HUGE = 1e29  # sums of this and more hold an impossible part


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageBounds:
    """Seconds that no choice for a stage type is below: of its forward, forward + backward (``through_s``), what it
    does once per step, and B micro-batches with the step (``busy_s``); inf where nothing fits. ``even_s`` (3, types)
    are forward, backward and step of the fastest choice whose blocks all take one point: a good start."""

    forward_s: Floats
    forward_backward_s: Floats
    step_s: Floats
    busy_s: Floats
    uniform_s: Floats


class StageCostTables:
    """The tables of one book over the submeshes of ``sizes`` devices."""

    def __init__(self, stage_costs: StageCosts, submesh_sizes: tuple[int, ...]) -> None:
        self.stage_costs, self.submesh_sizes = stage_costs, submesh_sizes
        self.cutoff_s = np.inf
        self._bounds: dict[tuple[int, int], StageBounds] = {}
        self._can_fit_cache: dict[tuple[StageMesh, int], NDArray[np.bool_]] = {}
        self._unconstrained: dict[StageMesh, StageBounds] = {}
        self._constrained: dict[tuple[StageMesh, int], tuple[NDArray[np.bool_], StageBounds]] = {}

    def release(self) -> None:
        """Give back the memory of what was priced; asking again prices it again."""
        for kept in (self._bounds, self._can_fit_cache, self._unconstrained, self._constrained):
            kept.clear()
        self.stage_costs.release()

    def set_cutoff(self, cutoff_s: float) -> None:
        """Steps of ``cutoff_s`` seconds or longer are of no interest: stages busy for that long need no exact price."""
        if cutoff_s != self.cutoff_s:
            self.cutoff_s = cutoff_s
            self._bounds.clear()

    def bounds_without_memory(self) -> StageTimeTable:
        """Bounds over (first block, end block, submesh size) with memory left out of account."""
        by_size = []
        for size in self.submesh_sizes:
            found = [self._unconstrained_bounds(mesh) for mesh in self.stage_costs.meshes(size)]
            by_size.append({name: np.min([getattr(one, name) for one in found], axis=0) for name in BOUND_FIELDS})
        return StageTimeTable(
            forward_s=self._by_stage(FREE, [bound["forward_s"] for bound in by_size]),
            backward_s=self._by_stage(FREE, [bound["forward_backward_s"] - bound["forward_s"] for bound in by_size]),
            step_s=self._by_stage(FREE, [bound["step_s"] for bound in by_size]),
            busy_s=self._by_stage(FREE, [bound["busy_s"] for bound in by_size]),
        )

    def forward_backward_s(self, num_devices: int) -> Floats:
        """(L + 1, L + 1): forward and backward of blocks i..j-1 take no less on ``size`` devices, memory aside; inf
        where j <= i."""
        return self._min_over_meshes(num_devices, "forward_backward_s")

    def per_step_s(self, num_devices: int) -> Floats:
        """The same of what is done once per step."""
        return self._min_over_meshes(num_devices, "step_s")

    def _min_over_meshes(self, num_devices: int, name: str) -> Floats:
        least = np.min(
            [getattr(self._unconstrained_bounds(mesh), name) for mesh in self.stage_costs.meshes(num_devices)], axis=0
        )
        return np.where(self.stage_costs.stage_kind_of >= 0, least[self.stage_costs.stage_kind_of], np.inf)

    def can_any_pipeline_fit(self, in_flight_from_last: tuple[int, ...]) -> bool:
        """False: the leanest choices of no pipeline fit the budget, if stage number s from the last holds
        ``in_flight_of[s - 1]`` micro-batches."""
        count, unit = len(self.stage_costs.pricer.blocks), math.gcd(*self.submesh_sizes)
        behind = np.zeros(
            (count + 1, self.stage_costs.num_devices // unit + 1), np.float32
        )  # which (first block, devices) tails reach
        behind[count, 0] = 1.0
        for held in in_flight_from_last:
            reached = np.zeros_like(behind)
            for size in self.submesh_sizes:
                fits = np.any([self._can_fit(mesh, held) for mesh in self.stage_costs.meshes(size)], axis=0)
                stages = np.where(self.possible_stages(size, held), fits[self.stage_costs.stage_kind_of], False).astype(
                    np.float32
                )
                reached[:, size // unit :] += stages @ behind[:, : behind.shape[1] - size // unit]
            behind = np.minimum(reached, 1.0)
            if behind[0, -1]:
                return True
        return False

    def lower_bounds(self, in_flight: int) -> StageTimeTable:
        """Bounds over (first block, end block, submesh size); inf for stages that cannot stand where ``in_flight``
        micro-batches are held (1F1B, stage number ``in_flight`` from the last)."""
        found = [self.bounds(size, in_flight) for size in self.submesh_sizes]
        backward = [
            one.forward_backward_s - np.where(np.isfinite(one.forward_backward_s), one.forward_s, 0.0) for one in found
        ]
        return StageTimeTable(
            forward_s=self._by_stage(in_flight, [one.forward_s for one in found]),
            backward_s=self._by_stage(in_flight, backward),
            step_s=self._by_stage(in_flight, [one.step_s for one in found]),
            busy_s=self._by_stage(in_flight, [one.busy_s for one in found]),
        )

    def uniform_times(self, in_flight: int) -> StageTimeTable:
        """The same of the fastest choices whose blocks all take one point: times that are reached, no bounds."""
        found = [self.bounds(size, in_flight).uniform_s for size in self.submesh_sizes]
        forward, backward, step = (self._by_stage(in_flight, [one[at] for one in found]) for at in range(3))
        return StageTimeTable(forward_s=forward, backward_s=backward, step_s=step)

    def guess_even_pipelines(self) -> list[tuple[float, tuple[tuple[int, int, int], ...]]]:
        """Pipelines of equal stages (first block, end block, devices), one for each number of stages, and about what a
        step of each takes, all blocks of a stage at one point of the free phase, transfers aside; none that does not
        fit."""
        book, found = self.stage_costs, []
        for size in self.submesh_sizes:
            num_stages, rest = divmod(book.num_devices, size)
            if rest or num_stages > book.max_stages or num_stages > len(layers(book.pricer.blocks)):
                continue
            ends = even_ends(book.pricer.blocks, num_stages) if num_stages > 1 else [len(book.pricer.blocks)]
            stages = tuple((first, end, size) for first, end in itertools.pairwise((0, *ends)))
            kinds = [int(book.stage_kind_of[first, end]) for first, end, _ in stages]
            held = [max_in_flight(book.schedule, book.num_microbatches, place) for place in range(num_stages, 0, -1)]
            pairs = list(zip(kinds, held, strict=True))
            seconds = {pair: self._fastest_fitting_s(size, *pair) for pair in pairs}
            times = [seconds[pair] for pair in pairs]
            step_time_s = sum(times) + (book.num_microbatches - 1) * max(times)
            if math.isfinite(step_time_s):
                found.append((step_time_s, stages))
        return found

    def _fastest_fitting_s(self, num_devices: int, stage_kind: int, in_flight: int) -> float:
        """Seconds per micro-batch of a stage's fastest point of the free phase that fits."""
        found = np.inf
        for mesh in self.stage_costs.meshes(num_devices):
            sums = self.stage_costs.mesh_totals(mesh, FREE)
            memory = sums.memory_terms[0][stage_kind] + in_flight * sums.memory_terms[1][stage_kind]
            found = min(
                found,
                float(
                    np.where(memory <= self.stage_costs.tensor_budget_bytes, sums.amortised_s[stage_kind], np.inf).min()
                ),
            )
        return found

    def work_lower_bound_s(self) -> float:
        """No plan of this micro-batch is faster, whatever its memory: the least device-seconds of every block, spread
        over all GPUs."""
        book = self.stage_costs
        least = np.full(len(book.variants), np.inf)
        for size in self.submesh_sizes:
            for mesh in book.meshes(size):
                for column in range(len(book.variants)):
                    points = book.frontier(column, mesh, FREE)
                    path = [at for at, row in enumerate(points.objectives) if row.family == "path"]
                    room_s = max(row.price_s_per_byte for row in points.objectives) * book.budget_bytes
                    seconds = max(
                        float(with_launch_time(points)[path].min()) - room_s, self._launch_bound_s(column, mesh)
                    )
                    least[column] = min(least[column], size * seconds)
        whole = book.num_blocks[int(book.stage_kind_of[0, len(book.pricer.blocks)])]
        loop_s, once_s = book.training_loop_s
        blocks_s = np.where(whole > 0, whole * least, 0.0).sum() / book.num_devices
        return float(book.num_microbatches * (blocks_s + loop_s) + once_s)

    def bounds(self, num_devices: int, in_flight: int) -> StageBounds:
        """Bounds of every stage type on ``num_devices`` devices with ``in_flight`` micro-batches held."""
        key = (num_devices, in_flight)
        if key not in self._bounds:
            self._bounds[key] = self._make_bounds(num_devices, in_flight)
        return self._bounds[key]

    def _make_bounds(self, num_devices: int, in_flight: int) -> StageBounds:
        book = self.stage_costs
        B, meshes, room = book.num_microbatches, book.meshes(num_devices), book.tensor_budget_bytes
        found = [self._unconstrained_bounds(mesh) for mesh in meshes]
        best = np.full(len(book.num_blocks), np.inf)
        even = np.full((3, len(book.num_blocks)), np.inf)
        needed = np.zeros(len(book.num_blocks), bool)
        needed[book.stage_kind_of[self.possible_stages(num_devices, in_flight)]] = True
        if not needed.any():
            nothing = np.full(len(book.num_blocks), np.inf)
            return StageBounds(uniform_s=even, **dict.fromkeys(BOUND_FIELDS, nothing))
        fits_free = []
        for mesh in meshes:
            sums = book.mesh_totals(mesh, FREE)
            fits_free.append(sums.fastest_time_and_bytes(in_flight)[1] <= room)
            self._improve_uniform(best, even, mesh, sums, in_flight)
        fits = [self._can_fit(mesh, in_flight) for mesh in meshes]
        for at in sorted(range(len(meshes)), key=lambda at: float(found[at].busy_s.min())):
            lower = found[at].busy_s
            wanted = needed & fits[at] & ~fits_free[at] & (lower < B * best) & (lower < self.cutoff_s)
            if wanted.any():
                for weight, _ in interpolation_weights(IN_FLIGHT_GRID, in_flight):
                    self._improve_uniform(best, even, meshes[at], book.mesh_totals(meshes[at], weight), in_flight)
                found[at] = self._constrained_bounds(meshes[at], in_flight, wanted)
        least = {
            name: np.min(
                [np.where(fit, getattr(one, name), np.inf) for one, fit in zip(found, fits, strict=True)], axis=0
            )
            for name in BOUND_FIELDS
        }
        return StageBounds(uniform_s=np.where(best < HUGE, even, np.inf), **least)

    def _improve_uniform(
        self, best_s: Floats, uniform_s: Floats, mesh: StageMesh, mesh_totals: MeshTotals, in_flight: int
    ) -> None:
        """Take the fastest point that fits, for each type where it is below ``best`` (seconds)."""
        types = np.flatnonzero(mesh_totals.fastest_time_and_bytes(in_flight)[0] < best_s)
        if not len(types):
            return
        memory = mesh_totals.memory_terms[0][types] + in_flight * mesh_totals.memory_terms[1][types]
        flat = np.where(memory <= self.stage_costs.tensor_budget_bytes, mesh_totals.amortised_s[types], np.inf).reshape(
            len(types), -1
        )
        at = flat.argmin(axis=1)
        fastest_s = flat[np.arange(len(types)), at]
        better = fastest_s < best_s[types]
        if better.any():
            best_s[types[better]] = fastest_s[better]
            picked = self._uniform_totals(mesh, mesh_totals, types[better], at[better])
            for number, seconds in enumerate(self.stage_costs.times_s(picked)):
                uniform_s[number, types[better]] = seconds

    def _uniform_totals(self, mesh: StageMesh, mesh_totals: MeshTotals, stage_kinds: Ints, positions: Ints) -> Floats:
        """(picks, metrics) of stage types whose blocks all take the point at a flat (row, boundary) of ``sums``."""
        row, boundary = np.divmod(positions, mesh_totals.amortised_s.shape[2])
        points = [
            self.stage_costs.frontier(column, mesh, mesh_totals.phase)
            for column in range(len(self.stage_costs.variants))
        ]
        totals = np.stack([one.totals[mesh_totals.objective_slice][row, boundary] for one in points], axis=1)
        counts = self.stage_costs.num_blocks[stage_kinds]
        present = counts[..., None] > 0
        return np.asarray(np.sum(np.where(present, totals, 0.0) * counts[..., None], axis=1))

    def submesh_busy_s(self, num_devices: int, stage_kinds: tuple[int, ...], in_flight: tuple[int, ...]) -> float:
        """B micro-batches and the step of a run of ``size`` devices take no less, if they run a chunk of each of
        ``kinds``, of which they hold ``held`` micro-batches; inf where nothing fits."""
        book, found = self.stage_costs, np.inf
        counts = book.num_blocks[list(stage_kinds)].sum(axis=0)[None]
        for mesh in book.meshes(num_devices):
            free = sum((book.mesh_totals(mesh, FREE).bound_s[kind] for kind in stage_kinds), np.zeros(()))[None]
            busy_s = float(self._bounds_from(mesh, counts, free, book.mesh_totals(mesh, FREE).objectives).busy_s[0])
            if busy_s < min(found, self.cutoff_s) and self._can_chunks_fit(mesh, counts, stage_kinds, in_flight):
                if not self._unconstrained_optimum_fits(mesh, stage_kinds, in_flight):
                    parts = [
                        self._lagrangian_bounds_s(mesh, count, np.array([kind]))[0]
                        for kind, count in zip(stage_kinds, in_flight, strict=True)
                    ]
                    rows = book.mesh_totals(mesh, interpolation_weights(IN_FLIGHT_GRID, in_flight[0])[0][0]).objectives
                    priced = self._bounds_from(mesh, counts, np.sum(parts, axis=0)[None], rows)
                    busy_s = max(busy_s, float(priced.busy_s[0]))
                found = min(found, busy_s)
        return found

    def _unconstrained_optimum_fits(
        self, mesh: StageMesh, stage_kinds: tuple[int, ...], in_flight: tuple[int, ...]
    ) -> bool:
        """Whether the fastest choice, memory aside, fits all the same."""
        sums = self.stage_costs.mesh_totals(mesh, FREE)
        at = int(sums.amortised_s[list(stage_kinds)].sum(axis=0).argmin())
        memory = sum(sums.memory_bytes(count)[kind] for kind, count in zip(stage_kinds, in_flight, strict=True))
        return bool(np.ravel(memory)[at] <= self.stage_costs.tensor_budget_bytes)

    def _can_chunks_fit(
        self, mesh: StageMesh, counts: Floats, stage_kinds: tuple[int, ...], in_flight: tuple[int, ...]
    ) -> bool:
        """False: the leanest choices of the chunks do not fit together."""
        need = sum(
            float(self._min_bytes(mesh, count)[kind]) for kind, count in zip(stage_kinds, in_flight, strict=True)
        )
        return bool(
            need + self._min_workspace_bytes(mesh, counts)[0] - counts.sum() <= self.stage_costs.tensor_budget_bytes
        )

    def _can_fit(self, mesh: StageMesh, in_flight: int) -> NDArray[np.bool_]:
        """(types,) False: no choice on the mesh fits, by the leanest of each block."""
        if (mesh, in_flight) not in self._can_fit_cache:
            counts = self.stage_costs.num_blocks
            slack = counts.sum(axis=1)  # a byte per block: what time may count for
            need = self._min_bytes(mesh, in_flight) + self._min_workspace_bytes(mesh, counts) - slack
            self._can_fit_cache[mesh, in_flight] = need <= self.stage_costs.tensor_budget_bytes
        return self._can_fit_cache[mesh, in_flight]

    def _min_bytes(self, mesh: StageMesh, in_flight: int) -> Floats:
        """(types,) the least bytes of any choice, but for workspace and the fixed share."""
        sums = self.stage_costs.mesh_totals(mesh, FREE)
        need = np.zeros(())
        for weight, share in interpolation_weights(LEAN_IN_FLIGHT_GRID, in_flight):
            lean = [at for at, row in enumerate(sums.objectives) if row.family == "lean" and row.saved_weight == weight]
            need = need + share * sums.bound_s[:, lean[0]].min(axis=-1) / pr.LEAST_MEMORY_PRICE_S_PER_BYTE
        return np.asarray(need)

    def _min_workspace_bytes(self, mesh: StageMesh, counts: Floats) -> Floats:
        least = np.array(
            [
                self.stage_costs.frontier(column, mesh, FREE).minima[1]
                for column in range(len(self.stage_costs.variants))
            ]
        )
        return np.asarray(np.where(counts > 0, least, 0.0).max(axis=1))

    def _unconstrained_bounds(self, mesh: StageMesh) -> StageBounds:
        """With memory left out of account."""
        if mesh not in self._unconstrained:
            sums = self.stage_costs.mesh_totals(mesh, FREE)
            self._unconstrained[mesh] = self._bounds_from(
                mesh, self.stage_costs.num_blocks, sums.bound_s, sums.objectives
            )
        return self._unconstrained[mesh]

    def _constrained_bounds(self, mesh: StageMesh, in_flight: int, wanted: NDArray[np.bool_]) -> StageBounds:
        """With memory for ``in_flight`` micro-batches for the types ``wanted``, and for others that were once."""
        if (mesh, in_flight) not in self._constrained:
            free = self._unconstrained_bounds(mesh)
            copied = {name: getattr(free, name).copy() for name in BOUND_FIELDS}
            self._constrained[mesh, in_flight] = (
                np.zeros(len(wanted), bool),
                StageBounds(uniform_s=free.uniform_s, **copied),
            )
        done, found = self._constrained[mesh, in_flight]
        types = np.flatnonzero(wanted & ~done)
        if len(types):
            rows = self.stage_costs.mesh_totals(mesh, interpolation_weights(IN_FLIGHT_GRID, in_flight)[0][0]).objectives
            priced = self._bounds_from(
                mesh, self.stage_costs.num_blocks[types], self._lagrangian_bounds_s(mesh, in_flight, types), rows
            )
            for name in BOUND_FIELDS:
                known = getattr(found, name)
                known[types] = np.maximum(known[types], getattr(priced, name))
            done[types] = True
        return found

    def _lagrangian_bounds_s(self, mesh: StageMesh, in_flight: int, stage_kinds: Ints) -> Floats:
        """(types, rows, boundaries): the rows' optima, between two weights of saved bytes the same combination."""
        weights = interpolation_weights(IN_FLIGHT_GRID, in_flight)
        return sum(
            (share * self.stage_costs.mesh_totals(mesh, weight).bound_s[stage_kinds] for weight, share in weights),
            np.zeros(()),
        )

    def _bounds_from(
        self, mesh: StageMesh, counts: Floats, optima_s: Floats, objectives: tuple[PricedObjective, ...]
    ) -> StageBounds:
        """Bounds of stages with (stages, columns) ``counts`` of blocks from (stages, rows, boundaries) optima."""
        book, B = self.stage_costs, self.stage_costs.num_microbatches
        least = np.array([book.frontier(column, mesh, FREE).minima for column in range(len(book.variants))])
        least = np.where(np.isfinite(least), least, HUGE)
        room = np.maximum(book.tensor_budget_bytes - self._min_workspace_bytes(mesh, counts), 0.0)
        price = np.array([row.price_s_per_byte for row in objectives])
        value = optima_s - (price[:, None] * room[:, None, None] if np.isfinite(book.budget_bytes) else 0.0)
        forward, step = counts @ least[:, 0], counts @ least[:, 2]
        launches = counts @ np.array([self._launch_bound_s(c, mesh) for c in range(len(book.variants))])
        best = {family: np.full(value.shape[::2], -np.inf) for family in pr.OBJECTIVE_FAMILIES}
        for at, family in enumerate(row.family for row in objectives):
            if family != "lean":
                best[family] = np.maximum(best[family], value[:, at])
        loop_s, once_s = book.training_loop_s
        path = np.maximum(np.maximum(best["path"], best["linked"]), np.maximum(launches, forward)[:, None])
        busy = B * np.maximum(np.maximum(best["hidden"], best["reduced"]), path)
        busy = np.maximum(busy, B * path + step[:, None]) + B * loop_s + once_s
        return StageBounds(
            forward_s=forward + loop_s / 2,
            forward_backward_s=path.min(axis=1) + loop_s,
            step_s=step + once_s,
            busy_s=busy.min(axis=1),
            uniform_s=np.zeros(0),
        )

    def _launch_bound_s(self, variant: int, mesh: StageMesh) -> float:
        forward, _, backward, _ = self.stage_costs.frontier(variant, mesh, FREE).tables.launch_s
        return forward + backward

    def _by_stage(self, in_flight: int, by_stage_kind: list[Floats]) -> Floats:
        planes = [
            np.where(self.possible_stages(size, in_flight), of_type[self.stage_costs.stage_kind_of], np.inf)
            for size, of_type in zip(self.submesh_sizes, by_stage_kind, strict=True)
        ]
        return np.stack(planes, axis=-1)

    def possible_stages(self, num_devices: int, in_flight: int) -> NDArray[np.bool_]:
        """Which (first, end) can stand there (``FREE``: anywhere): with fewer micro-batches held than there are, 1F1B
        says how many stages follow, each of a block at least."""
        type_of, count, B = (
            self.stage_costs.stage_kind_of,
            len(self.stage_costs.pricer.blocks),
            self.stage_costs.num_microbatches,
        )
        first, end = np.indices((count + 1, count + 1))
        if num_devices == self.stage_costs.num_devices:
            alone = max_in_flight(self.stage_costs.schedule, B, 1)
            return np.asarray((first == 0) & (end == count) & (in_flight in (alone, FREE)))
        if in_flight == FREE or in_flight >= B:
            return type_of >= 0
        return np.asarray((type_of >= 0) & ((end == count) if in_flight == 1 else end <= count + 1 - in_flight))
