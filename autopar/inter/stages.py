"""What every possible stage costs: blocks i..j-1 on a submesh, at a number of micro-batches in flight.

A stage runs all its blocks on one mesh (data axis, inner axis), with one boundary placement and one price row; its totals are
the sums over its blocks, with what overlaps applied once:

    forward, backward    sums over blocks                                      seconds per micro-batch
    step                 max(reduction - last backward, 0) + optimizer         seconds per step
    memory               state + in flight * saved + max workspace + fixed     bytes

Stages with the same count of each kind of block cost the same, so costs are computed once per distinct count vector.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from autopar.cluster.cluster import Cluster
from autopar.cost.execution import ExecutionModel
from autopar.cost.redistribute import MeshLinks
from autopar.graph.ir import Block, Graph
from autopar.graph.profile import GraphProfile, profile_graph
from autopar.inter.partition import StageTable
from autopar.inter.transfers import Transfers
from autopar.intra import frontier as fr
from autopar.intra.frontier import BlockPoints, ParameterPrices, block_points, price_rows
from autopar.intra.space import BlockSpace, block_space, data_values
from autopar.intra.tables import Allowed, BlockTables, TableBuilder

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """``data`` ranks along the batch (outermost) times ``inner`` axes that every op may use as it likes."""

    data: int
    inner: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.data, *self.inner)


@dataclass(frozen=True, slots=True, kw_only=True)
class Restriction:
    """What a manual layout fixes: the one mesh of every stage, the options each inner axis allows, the ZeRO stage over
    the data axis, and the boundary placement (a role per inner axis). ``allowed`` must depend on the boundary only, by
    which tables are shared."""

    mesh: Mesh
    allowed: Allowed = field(compare=False)
    zero: int
    boundary: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageChoice:
    """How a stage runs: mesh, price row and boundary placement (positions)."""

    mesh: Mesh
    row: int
    boundary: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageCosts:
    """Best totals per distinct stage: seconds, seconds, seconds per step, bytes; and the choice (None: does not fit)."""

    forward_s: Floats
    backward_s: Floats
    step_s: Floats
    memory_bytes: Floats
    choices: tuple[StageChoice | None, ...]


class Blocks:
    """The blocks of one graph, their spaces per kind, and their points per mesh and micro-batch (cached).

    The kinds are extended by one per block whose tied parameters an earlier block of the same stage may already store.
    """

    def __init__(self, graph: Graph, blocks: tuple[Block, ...], cluster: Cluster, execution: ExecutionModel) -> None:
        self.graph, self.blocks, self.cluster, self.execution = graph, blocks, cluster, execution
        self.profile: GraphProfile = profile_graph(graph)
        self._data = data_values(graph)
        self.kinds: dict[int, Block] = {}
        for block in blocks:
            self.kinds.setdefault(block.kind, block)
        self._spaces: dict[int, BlockSpace] = {}
        self.core = frozenset(op.id for op in graph.ops if "scaled_dot_product" in op.target)
        self.savers = _savers(graph, self.profile, self.core)
        self.first_user: dict[int, int] = {}
        for block in blocks:
            for value in block.parameters:
                self.first_user.setdefault(value, block.index)
        self._tables: dict[tuple[object, ...], BlockTables] = {}
        self._points: dict[tuple[object, ...], BlockPoints] = {}
        self._prices: dict[Mesh, ParameterPrices] = {}

    def held(self, block: Block, first: int) -> frozenset[int]:
        """Parameters of ``block`` that an earlier block of a stage beginning at block ``first`` stores."""
        return frozenset(v for v in block.parameters if first <= self.first_user[v] < block.index)

    def space(self, kind: int) -> BlockSpace:
        if kind not in self._spaces:
            self._spaces[kind] = block_space(self.graph, self.kinds[kind], self._data)
        return self._spaces[kind]

    def points(
        self,
        kind: int,
        held: frozenset[int],
        mesh: Mesh,
        micro_batch: int,
        num_microbatches: int,
        modes: tuple[str, ...],
        restriction: Restriction | None = None,
    ) -> BlockPoints:
        """The frontier of a kind on a mesh; ``micro_batch`` counts samples over the whole mesh."""
        key = (kind, held, mesh, micro_batch, num_microbatches, modes, restriction)
        if key not in self._points:
            num_devices = mesh.data * int(np.prod(mesh.inner, dtype=int))
            links = MeshLinks(self.cluster, num_devices, mesh.sizes, tuple(range(1, len(mesh.sizes))))
            local = micro_batch // mesh.data
            groups = tuple(links.group((axis,)) for axis in range(len(mesh.inner)))
            table_key = (kind, local, mesh.inner, groups, restriction.boundary if restriction else None)
            if table_key not in self._tables:
                self._tables[table_key] = TableBuilder(
                    self.space(kind),
                    self.profile,
                    self.savers,
                    self.core,
                    local,
                    links,
                    self.execution,
                    restriction.allowed if restriction else None,
                ).build()
            if mesh not in self._prices:
                full = MeshLinks(self.cluster, num_devices, mesh.sizes, tuple(range(len(mesh.sizes))))
                self._prices[mesh] = ParameterPrices(full, self.execution)
            tables = self._tables[table_key]
            rows = price_rows(*self._scale(tables), modes)
            if restriction is not None:  # memory has no say in a layout
                rows = rows[:1]
            self._points[key] = block_points(
                tables,
                self._prices[mesh],
                rows,
                num_microbatches,
                mesh.data > 1,
                held,
                restriction.zero if restriction else None,
            )
        return self._points[key]

    def _scale(self, tables: BlockTables) -> tuple[float, float]:
        """Seconds and bytes that set the range of prices: what the device computes while it streams its memory."""
        device = self.cluster.device
        return float(device.memory_bound_s(float(device.memory_bytes))), float(device.memory_bytes)


def _savers(graph: Graph, profile: GraphProfile, core: frozenset[int]) -> dict[int, tuple[tuple[int, bool], ...]]:
    """Per op, the positions (inputs, then outputs) whose memory it is the first to keep, and whether attention made it."""
    made = {value: op.id for op in graph.ops for value in op.outputs}
    seen: set[int] = set()
    found: dict[int, list[tuple[int, bool]]] = {}
    for op in graph.ops:
        kept = profile.ops[op.id]
        for position in (*kept.saved_inputs, *(len(op.inputs) + at for at in kept.saved_outputs)):
            owner = profile.owners[(*op.inputs, *op.outputs)[position]]
            if owner not in seen and graph.values[owner].kind not in ("parameter", "buffer"):
                seen.add(owner)
                found.setdefault(op.id, []).append((position, made.get(owner) in core))
    return {op: tuple(positions) for op, positions in found.items()}


class StageBook:
    """Costs of all stages at one micro-batch size."""

    def __init__(
        self,
        blocks: Blocks,
        micro_batch: int,
        num_microbatches: int,
        budget_bytes: float,
        modes: tuple[str, ...],
        restriction: Restriction | None = None,
    ) -> None:
        self.restriction = restriction
        self.blocks, self.micro_batch, self.num_microbatches = blocks, micro_batch, num_microbatches
        self.budget_bytes, self.modes = budget_bytes, modes
        self.transfers = Transfers(self)
        self.columns: list[tuple[int, frozenset[int]]] = []
        self._rows: dict[tuple[int, ...], int] = {}
        count = len(blocks.blocks)
        self.type_of = np.full((count + 1, count + 1), -1)
        for first in range(count):
            counts: dict[int, int] = {}
            for end in range(first + 1, count + 1):
                block = blocks.blocks[end - 1]
                column = self._column(block.kind, blocks.held(block, first))
                counts[column] = counts.get(column, 0) + 1
                key = tuple(sorted((column << 16) + number for column, number in counts.items()))
                self.type_of[first, end] = self._rows.setdefault(key, len(self._rows))
        self.counts = np.zeros((len(self._rows), len(self.columns)))
        for key, row in self._rows.items():
            for packed in key:
                self.counts[row, packed >> 16] = packed & 0xFFFF
        self.smallest_bytes = np.inf
        self._costs: dict[tuple[int, int], StageCosts] = {}
        self._stacked: dict[Mesh, Floats] = {}

    def _column(self, kind: int, held: frozenset[int]) -> int:
        if (kind, held) not in self.columns:
            self.columns.append((kind, held))
        return self.columns.index((kind, held))

    def meshes(self, num_devices: int) -> list[Mesh]:
        """All data x inner meshes whose data axis divides the micro-batch; of a layout, its own."""
        if self.restriction is not None:
            mesh = self.restriction.mesh
            return [mesh] if mesh.data * int(np.prod(mesh.inner, dtype=int)) == num_devices else []
        found = []
        for inner in range(1, num_devices + 1):
            if num_devices % inner == 0 and self.micro_batch % (num_devices // inner) == 0:
                found.append(Mesh(data=num_devices // inner, inner=(inner,) if inner > 1 else ()))
        return [mesh for mesh in found if self.whole(self.micro_batch // mesh.data)]

    def whole(self, local_batch: int) -> bool:
        """Whether every size of the model is a whole number at this many samples per data rank."""
        batch = self.blocks.graph.batch
        return all((size * local_batch) % batch.traced == 0 for size in self._growing())

    def _growing(self) -> set[int]:
        graph = self.blocks.graph
        if not hasattr(self, "_growing_sizes"):
            self._growing_sizes = {s for v in graph.values for s in v.shape if graph.batch.grows(s)}
        return self._growing_sizes

    def points(self, column: int, mesh: Mesh) -> BlockPoints:
        kind, held = self.columns[column]
        return self.blocks.points(
            kind, held, mesh, self.micro_batch, self.num_microbatches, self.modes, self.restriction
        )

    def stacked(self, mesh: Mesh) -> Floats:
        """Totals of all columns, (columns, rows, boundaries, totals)."""
        if mesh not in self._stacked:
            self._stacked[mesh] = np.stack([self.points(column, mesh).totals for column in range(len(self.columns))])
        return self._stacked[mesh]

    def costs(self, num_devices: int, in_flight: int) -> StageCosts:
        """The best way to run every distinct stage on ``num_devices`` devices."""
        key = (num_devices, in_flight)
        if key not in self._costs:
            self._costs[key] = self._best(num_devices, in_flight)
        return self._costs[key]

    def _best(self, num_devices: int, in_flight: int) -> StageCosts:
        num_types = len(self.counts)
        best = np.full(num_types, np.inf)
        numbers = np.full((4, num_types), np.inf)
        choices: list[StageChoice | None] = [None] * num_types
        fixed = self.fixed_bytes()
        present = self.counts > 0
        for mesh in self.meshes(num_devices):
            totals = self.stacked(mesh)
            finite = np.where(np.isfinite(totals), totals, 1e30)
            sums = np.einsum("tc,crbm->trbm", self.counts, finite[..., : fr.WORKSPACE])
            workspace = np.zeros(sums.shape[:3])
            for column in range(len(self.columns)):
                held = np.where(present[:, column, None, None], finite[None, column, :, :, fr.WORKSPACE], 0.0)
                workspace = np.maximum(workspace, held)
            memory = sums[..., fr.STATE] + in_flight * sums[..., fr.SAVED] + workspace + fixed
            hidden = sums[..., fr.BACKWARD] if self.blocks.execution.overlap else 0.0
            step = np.maximum(sums[..., fr.STEP] - hidden, 0.0) + sums[..., fr.STEP_EXPOSED]
            time = sums[..., fr.FORWARD] + sums[..., fr.BACKWARD] + step / self.num_microbatches
            if self.restriction is not None:
                time = self._pinned(time, mesh)
            self.smallest_bytes = min(self.smallest_bytes, float(memory[-1].min()))
            time = np.where((memory <= self.budget_bytes) & (time < 1e20), time, np.inf)
            flat = time.reshape(num_types, -1)
            at = flat.argmin(axis=1)
            value = flat[np.arange(num_types), at]
            for row in np.flatnonzero(value < best):
                price, boundary = divmod(int(at[row]), time.shape[2])
                best[row] = value[row]
                where = (row, price, boundary)
                numbers[:, row] = sums[(*where, fr.FORWARD)], sums[(*where, fr.BACKWARD)], step[where], memory[where]
                choices[row] = StageChoice(mesh=mesh, row=price, boundary=boundary)
        return StageCosts(
            forward_s=numbers[0],
            backward_s=numbers[1],
            step_s=numbers[2],
            memory_bytes=numbers[3],
            choices=tuple(choices),
        )

    def _pinned(self, time: Floats, mesh: Mesh) -> Floats:
        """Only the layout's boundary placement, and only the lowest price of memory, which it has no say in."""
        assert self.restriction is not None
        pinned = np.full_like(time, np.inf)
        boundaries = self.points(0, mesh).tables.boundaries
        at = boundaries.index(self.restriction.boundary)
        pinned[:, 0, at] = time[:, 0, at]
        return pinned

    def work_bound_s(self, sizes: tuple[int, ...], gpus: int) -> float:
        """No plan of this micro-batch is faster, whatever its memory: the least device-seconds of every block, spread
        over all GPUs. Rows are compared by their compute and exposed communication alone."""
        least = np.full(len(self.columns), np.inf)
        for size in sizes:
            for mesh in self.meshes(size):
                totals = self.stacked(mesh)
                seconds = (
                    (totals[..., fr.FORWARD] + totals[..., fr.BACKWARD]).reshape(len(self.columns), -1).min(axis=1)
                )
                least = np.minimum(least, size * seconds)
        whole = self.counts[int(self.type_of[0, len(self.blocks.blocks)])]
        return float(self.num_microbatches * np.where(whole > 0, whole * least, 0.0).sum() / gpus)

    def memory_free(self, first: int, end: int, num_devices: int, in_flight: int) -> bool:
        """Whether the stage runs at the lowest price of memory, so that a larger budget would change nothing."""
        choice = self.costs(num_devices, in_flight).choices[int(self.type_of[first, end])]
        return choice is not None and choice.row == 0

    def fixed_bytes(self) -> float:
        """What torch's allocator does not count: context, and the buffers of two communicators."""
        return float(self.blocks.cluster.device.context_bytes + self.blocks.cluster.communication_buffer_bytes(2))

    def table(self, sizes: tuple[int, ...], in_flight: int) -> StageTable:
        """Arrays over (first block, end block, submesh size) as the outer search reads them."""
        arrays = []
        for name in ("forward_s", "backward_s", "step_s"):
            planes = [
                np.where(self.type_of >= 0, getattr(self.costs(size, in_flight), name)[self.type_of], np.inf)
                for size in sizes
            ]
            arrays.append(np.stack(planes, axis=-1))
        return StageTable(forward_s=arrays[0], backward_s=arrays[1], step_s=arrays[2])
