"""The blocks of one graph and what they cost per mesh and micro-batch, computed once and kept."""

from dataclasses import dataclass, field
from functools import cached_property

import msgspec
import numpy as np
from numpy.typing import NDArray

from autopar.cluster.cluster import Cluster
from autopar.cost.execution_model import ExecutionModel
from autopar.cost.fusion import savings, with_fused_loss
from autopar.cost.redistribution_time import MeshLinks
from autopar.graph.ir import Block, Graph, GraphProfile
from autopar.inter.block_pins import BlockPins
from autopar.inter.stage_kinds import StageTypes, stage_types
from autopar.intra.block_space import BlockSpace, block_space
from autopar.intra.block_tables import BlockTables, TableBuilder
from autopar.intra.frontier import BlockPoints, ParameterPrices, block_points
from autopar.intra.op_metrics import Savers
from autopar.intra.priced_objectives import PriceRow
from autopar.intra.recompute import Kept
from autopar.intra.strategies import Allowed


class Mesh(msgspec.Struct, frozen=True, kw_only=True):
    """``data`` ranks along the batch (outermost) times ``inner`` axes that every op may use as it likes. (A struct of
    msgspec, which hashes in C: meshes and price rows are keys that a search looks up hundreds of thousands of times.)"""

    data: int
    inner: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.data, *self.inner)

    @property
    def has_data_axis(self) -> bool:
        """Whether a plan names the data axis: one of size 1 beside inner axes says nothing."""
        return self.data > 1 or not self.inner

    @property
    def named(self) -> tuple[int, ...]:
        """Sizes of the axes that a plan names."""
        return self.sizes if self.has_data_axis else self.inner

    @property
    def num_devices(self) -> int:
        return self.data * int(np.prod(self.inner, dtype=int))


@dataclass(frozen=True, slots=True, kw_only=True)
class Restriction:
    """What a manual layout fixes: the one mesh of every stage, the options each inner axis allows, the ZeRO stage over
    the data axis, and the boundary placement (a role per inner axis). ``allowed`` must depend on the boundary only, by
    which tables are shared, and on ``names``, the inner axes' own."""

    mesh: Mesh
    allowed: Allowed = field(compare=False)
    zero: int
    boundary: tuple[str, ...]
    names: tuple[str, ...] = ()


class Blocks:
    """The blocks of one graph, their spaces per kind, and their points per mesh and micro-batch (cached).

    The kinds are extended by one per block whose tied parameters an earlier block of the same stage may already store.
    """

    def __init__(
        self,
        graph: Graph,
        blocks: tuple[Block, ...],
        cluster: Cluster,
        execution: ExecutionModel,
        profile: GraphProfile | None = None,
        pins: BlockPins | None = None,
    ) -> None:
        if profile is None:
            from autopar.graph.op_profiles import profile_graph  # with torch, which a second process can do without

            profile = profile_graph(graph)
        self.pins = pins if pins is not None and pins.pins else None
        self.graph, self.blocks, self.cluster, self.execution = graph, blocks, cluster, execution
        self.profile: GraphProfile = with_fused_loss(graph, profile, execution.fuses)
        self.fused = savings(graph, self.profile, execution.fuses)
        self._data = graph.parameter_free()
        self.kinds: dict[int, Block] = {}
        for block in blocks:
            self.kinds.setdefault(block.kind, block)
        self._spaces: dict[int, BlockSpace] = {}
        self.core = frozenset(op.id for op in graph.ops if op.is_attention)
        self.kept = Kept.of(graph, self.profile, blocks, execution) if execution.selective == "products" else None
        self.savers = _savers(graph, self.profile, self.core, self.kept)
        users: dict[int, list[int]] = {}
        for block in blocks:
            for value in block.parameters:
                users.setdefault(value, []).append(block.index)
        self.first_user = {value: found[0] for value, found in users.items()}
        trained = (
            value for value in users if graph.values[value].kind == "parameter" and graph.values[value].requires_grad
        )
        self.tied = {value: tuple(users[value]) for value in sorted(trained) if len(users[value]) > 1}
        self._tables: dict[tuple[object, ...], BlockTables] = {}
        self._points: dict[tuple[object, ...], BlockPoints] = {}
        self._prices: dict[Mesh, ParameterPrices] = {}
        self._plain: dict[tuple[PriceRow, ...], tuple[tuple[PriceRow, ...], NDArray[np.integer]]] = {}
        self._links: dict[tuple[object, ...], MeshLinks] = {}

    def held(self, block: Block, first: int) -> frozenset[int]:
        """Parameters of ``block`` that an earlier block of a stage beginning at block ``first`` stores."""
        return frozenset(v for v in block.parameters if first <= self.first_user[v] < block.index)

    @cached_property
    def stage_types(self) -> StageTypes:
        """The types of all stages, whatever their mesh and micro-batch."""
        return stage_types(self.blocks, self.held)

    @cached_property
    def growing(self) -> frozenset[int]:
        """The sizes of the model that grow with the batch."""
        sizes = {size for value in self.graph.values for size in value.shape}
        return frozenset(size for size in sizes if self.graph.batch.grows(size))

    def space(self, kind: int) -> BlockSpace:
        if kind not in self._spaces:
            self._spaces[kind] = block_space(self.graph, self.kinds[kind], self._data)
        return self._spaces[kind]

    def make_spaces(self) -> None:
        """Make the spaces of all kinds now."""
        for kind in self.kinds:
            self.space(kind)

    def points(
        self,
        kind: int,
        held: frozenset[int],
        mesh: Mesh,
        micro_batch: int,
        num_microbatches: int,
        rows: tuple[PriceRow, ...],
        restriction: Restriction | None = None,
    ) -> BlockPoints:
        """The frontier of a kind on a mesh; ``micro_batch`` counts samples over the whole mesh."""
        key = (kind, held, mesh, micro_batch, num_microbatches, rows, restriction)
        if key not in self._points:
            num_devices = mesh.num_devices
            links = self._inner_links(mesh)
            local = micro_batch // mesh.data
            groups = tuple(links.group((axis,)) for axis in range(len(mesh.inner)))
            whole = MeshLinks(self.cluster, num_devices, mesh.sizes, tuple(range(len(mesh.sizes))))
            data = (
                1 if self.space(kind).data_axis.plain else mesh.data
            )  # plain blocks are priced by the local batch alone
            groups_of_all = tuple(whole.group(axes) for axes in ((0,), (0, 1))[: len(mesh.sizes)]) if data > 1 else ()
            allowed = restriction.allowed if restriction else None
            if self.pins is not None and restriction is None:  # a layout's own pins are in its restriction
                allowed = self.pins.allowed(mesh.has_data_axis)
            named = self.pins is not None and mesh.has_data_axis
            fixed = (restriction.boundary, restriction.names) if restriction else named
            table_key = (kind, local, mesh.inner, groups, data, groups_of_all, fixed)
            if table_key not in self._tables:
                self._tables[table_key] = TableBuilder(
                    self.space(kind),
                    self.profile,
                    self.savers,
                    self.core,
                    local,
                    links,
                    self.execution,
                    whole,
                    allowed,
                    self.fused,
                    data,
                    restriction is not None,  # a manual layout is Megatron's program
                    self.kept,
                ).build()
            if mesh not in self._prices:
                self._prices[mesh] = ParameterPrices(whole, self.execution)
            tables = self._tables[table_key]
            solved, repeats = rows, None
            if self.kinds[kind].name in ("embedding", "head"):  # programs wrap their layers in checkpoints, not these
                if rows not in self._plain:
                    self._plain[rows] = _without_recompute(rows)
                solved, repeats = self._plain[rows]
            found = block_points(
                tables,
                self._prices[mesh],
                solved,
                num_microbatches,
                mesh.data > 1,
                held,
                restriction.zero if restriction else None,
                self.pins.rests(mesh.has_data_axis) if self.pins else None,
            )
            self._points[key] = found if repeats is None else found.repeated(repeats)
        return self._points[key]

    def forget(self, micro_batch: int) -> None:
        """Drop the frontiers of a micro-batch size; tables stay, other sizes share them."""
        for key in [key for key in self._points if key[3] == micro_batch]:
            del self._points[key]

    def _inner_links(self, mesh: Mesh) -> MeshLinks:
        """The links of the inner axes; meshes whose inner axes cross equal links share one object."""
        links = MeshLinks(self.cluster, mesh.num_devices, mesh.sizes, tuple(range(1, len(mesh.sizes))))
        groups = tuple(links.group((axis,)) for axis in range(len(mesh.inner)))
        return self._links.setdefault((mesh.inner, groups), links)

    @property
    def rate_s_per_byte(self) -> float:
        """What sets the range of prices: the time in which the device streams a byte of its memory."""
        device = self.cluster.device
        return float(device.memory_bound_s(float(device.memory_bytes))) / float(device.memory_bytes)


def _without_recompute(rows: tuple[PriceRow, ...]) -> tuple[tuple[PriceRow, ...], NDArray[np.integer]]:
    """The rows with nothing computed again, each once, and which of them stands for each given one."""
    at: dict[PriceRow, int] = {}
    repeats = [at.setdefault(msgspec.structs.replace(row, mode="none"), len(at)) for row in rows]
    return tuple(at), np.array(repeats)


def _savers(graph: Graph, profile: GraphProfile, core: frozenset[int], selected: Kept | None) -> Savers:
    """Selective recomputation frees what attention made, or what is none of what is ``selected``."""
    made = {value: op.id for op in graph.ops for value in op.outputs}
    seen: set[int] = set()
    found: Savers = {}
    for op in graph.ops:
        kept = profile.ops[op.id]
        values = (*op.inputs, *op.outputs)
        by_owner: dict[int, dict[int, int]] = {}
        for position in (*kept.saved_inputs, *(len(op.inputs) + at for at in kept.saved_outputs)):
            owner = profile.owners[values[position]]
            if owner not in seen and graph.values[owner].kind not in ("parameter", "buffer"):
                by_owner.setdefault(owner, {}).setdefault(values[position], position)
        seen.update(by_owner)
        if by_owner:
            found[op.id] = tuple(
                (
                    tuple(at.values()),
                    made.get(owner) in core if selected is None else owner not in selected.memories,
                )
                for owner, at in by_owner.items()
            )
    return found
