"""The blocks of one graph and what they cost per mesh and micro-batch, computed once and kept."""

from dataclasses import dataclass, field
from functools import cached_property

import msgspec
import numpy as np
from numpy.typing import NDArray

from autopar.cluster.cluster import Cluster
from autopar.cost.execution_model import ExecutionModel
from autopar.cost.fusion import fusion_savings, with_fused_loss
from autopar.cost.redistribution_time import MeshLinks
from autopar.graph.ir import Block, Graph, GraphProfile
from autopar.inter.block_pins import BlockPins
from autopar.inter.stage_kinds import StageKinds, count_stage_kinds
from autopar.intra.block_mesh import BlockMesh
from autopar.intra.block_space import BlockSpace, build_block_space
from autopar.intra.block_tables import BlockTables
from autopar.intra.frontier import BlockFrontier, solve_frontier
from autopar.intra.priced_model import ChargedMemories, PricedModel
from autopar.intra.priced_objectives import PricedObjective
from autopar.intra.recompute import SelectiveSaved
from autopar.intra.storage_choice import StorageMetricsCache, StorageRules
from autopar.intra.strategies import OptionFilter
from autopar.intra.table_builder import BlockTableBuilder


class StageMesh(msgspec.Struct, frozen=True, kw_only=True):
    """``data`` ranks along the batch (outermost) times ``inner`` axes that every op may use as it likes. (A struct of
    msgspec, which hashes in C: meshes and price rows are keys that a search looks up hundreds of thousands of times.)"""

    data_size: int
    inner_sizes: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.data_size, *self.inner_sizes)

    @property
    def has_data_axis(self) -> bool:
        """Whether a plan names the data axis: one of size 1 beside inner axes says nothing."""
        return self.data_size > 1 or not self.inner_sizes

    @property
    def named_sizes(self) -> tuple[int, ...]:
        """Sizes of the axes that a plan names."""
        return self.sizes if self.has_data_axis else self.inner_sizes

    @property
    def num_devices(self) -> int:
        return self.data_size * int(np.prod(self.inner_sizes, dtype=int))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutRestriction:
    """What a manual layout fixes: the one mesh of every stage, the options each inner axis allows, the ZeRO stage over
    the data axis, and the boundary placement (a role per inner axis). ``allowed`` must depend on the boundary only, by
    which tables are shared, and on ``names``, the inner axes' own."""

    mesh: StageMesh
    option_filter: OptionFilter = field(compare=False)
    zero_stage: int
    boundary_roles: tuple[str, ...]
    axis_names: tuple[str, ...] = ()


class BlockPricer:
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
        self.profile: GraphProfile = with_fused_loss(graph, profile, execution.fused_chains)
        self.fusion_savings = fusion_savings(graph, self.profile, execution.fused_chains)
        self._parameter_free_values = graph.parameter_free()
        self.first_of_kind: dict[int, Block] = {}
        for block in blocks:
            self.first_of_kind.setdefault(block.kind, block)
        self._spaces: dict[int, BlockSpace] = {}
        self.attention_ops = frozenset(op.id for op in graph.ops if op.is_attention)
        self.selective_saved = (
            SelectiveSaved.by_operation(graph, self.profile, blocks, execution)
            if execution.selective_policy == "products"
            else None
        )
        self.priced_model = PricedModel(
            profile=self.profile,
            execution=execution,
            fusion_savings=self.fusion_savings,
            charged_memories=charge_memories(graph, self.profile, self.attention_ops, self.selective_saved),
            selective_saved=self.selective_saved,
        )
        users: dict[int, list[int]] = {}
        for block in blocks:
            for value in block.parameters:
                users.setdefault(value, []).append(block.index)
        self.first_user = {value: found[0] for value, found in users.items()}
        trained = (
            value for value in users if graph.values[value].kind == "parameter" and graph.values[value].requires_grad
        )
        self.tied_users = {value: tuple(users[value]) for value in sorted(trained) if len(users[value]) > 1}
        self._tables: dict[tuple[object, ...], BlockTables] = {}
        self._frontiers: dict[tuple[object, ...], BlockFrontier] = {}
        self._storage_metrics: dict[StageMesh, StorageMetricsCache] = {}
        self._objectives_without_recompute: dict[
            tuple[PricedObjective, ...], tuple[tuple[PricedObjective, ...], NDArray[np.integer]]
        ] = {}
        self._links: dict[tuple[object, ...], MeshLinks] = {}

    def stored_elsewhere(self, block: Block, first_block: int) -> frozenset[int]:
        """Parameters of ``block`` that an earlier block of a stage beginning at block ``first`` stores."""
        return frozenset(v for v in block.parameters if first_block <= self.first_user[v] < block.index)

    @cached_property
    def stage_kinds(self) -> StageKinds:
        """The types of all stages, whatever their mesh and micro-batch."""
        return count_stage_kinds(self.blocks, self.stored_elsewhere)

    @cached_property
    def batch_dependent_sizes(self) -> frozenset[int]:
        """The sizes of the model that grow with the batch."""
        sizes = {size for value in self.graph.values for size in value.shape}
        return frozenset(size for size in sizes if self.graph.batch.is_proportional(size))

    def block_space(self, kind: int) -> BlockSpace:
        if kind not in self._spaces:
            self._spaces[kind] = build_block_space(self.graph, self.first_of_kind[kind], self._parameter_free_values)
        return self._spaces[kind]

    def make_all_spaces(self) -> None:
        """Make the spaces of all kinds now."""
        for kind in self.first_of_kind:
            self.block_space(kind)

    def frontier(
        self,
        kind: int,
        stored_elsewhere: frozenset[int],
        mesh: StageMesh,
        micro_batch: int,
        num_microbatches: int,
        objectives: tuple[PricedObjective, ...],
        restriction: LayoutRestriction | None = None,
    ) -> BlockFrontier:
        """The frontier of a kind on a mesh; ``micro_batch`` counts samples over the whole mesh."""
        key = (kind, stored_elsewhere, mesh, micro_batch, num_microbatches, objectives, restriction)
        if key not in self._frontiers:
            num_devices = mesh.num_devices
            links = self._inner_links(mesh)
            local = micro_batch // mesh.data_size
            groups = tuple(links.group((axis,)) for axis in range(len(mesh.inner_sizes)))
            whole = MeshLinks(self.cluster, num_devices, mesh.sizes, tuple(range(len(mesh.sizes))))
            data = (
                1 if self.block_space(kind).data_axis.is_batch_parallel else mesh.data_size
            )  # plain blocks are priced by the local batch alone
            groups_of_all = tuple(whole.group(axes) for axes in ((0,), (0, 1))[: len(mesh.sizes)]) if data > 1 else ()
            allowed = restriction.option_filter if restriction else None
            if self.pins is not None and restriction is None:  # a layout's own pins are in its restriction
                allowed = self.pins.option_filter(mesh.has_data_axis)
            named = self.pins is not None and mesh.has_data_axis
            fixed = (restriction.boundary_roles, restriction.axis_names) if restriction else named
            table_key = (kind, local, mesh.inner_sizes, groups, data, groups_of_all, fixed)
            if table_key not in self._tables:
                self._tables[table_key] = BlockTableBuilder(
                    self.block_space(kind),
                    self.priced_model,
                    BlockMesh(inner_links=links, mesh_links=whole, data_ranks=data, local_batch=local),
                    option_filter=allowed,
                    as_megatron=restriction is not None,  # a manual layout is Megatron's program
                ).build()
            if mesh not in self._storage_metrics:
                self._storage_metrics[mesh] = StorageMetricsCache(whole, self.execution)
            tables = self._tables[table_key]
            solved, repeats = objectives, None
            if self.first_of_kind[kind].name in (
                "embedding",
                "head",
            ):  # programs wrap their layers in checkpoints, not these
                if objectives not in self._objectives_without_recompute:
                    self._objectives_without_recompute[objectives] = objectives_without_recompute(objectives)
                solved, repeats = self._objectives_without_recompute[objectives]
            found = solve_frontier(
                tables,
                self._storage_metrics[mesh],
                solved,
                num_microbatches,
                StorageRules(
                    has_data_axis=mesh.data_size > 1,
                    stored_elsewhere=stored_elsewhere,
                    zero_stage=restriction.zero_stage if restriction else None,
                    storage_filter=self.pins.storage_filter(mesh.has_data_axis) if self.pins else None,
                ),
            )
            self._frontiers[key] = found if repeats is None else found.select(repeats)
        return self._frontiers[key]

    def release(self, micro_batch: int) -> None:
        """Drop the frontiers of a micro-batch size; tables stay, other sizes share them."""
        for key in [key for key in self._frontiers if key[3] == micro_batch]:
            del self._frontiers[key]

    def _inner_links(self, mesh: StageMesh) -> MeshLinks:
        """The links of the inner axes; meshes whose inner axes cross equal links share one object."""
        links = MeshLinks(self.cluster, mesh.num_devices, mesh.sizes, tuple(range(1, len(mesh.sizes))))
        groups = tuple(links.group((axis,)) for axis in range(len(mesh.inner_sizes)))
        return self._links.setdefault((mesh.inner_sizes, groups), links)

    @property
    def stream_s_per_byte(self) -> float:
        """What sets the range of prices: the time in which the device streams a byte of its memory."""
        device = self.cluster.device
        return float(device.memory_bound_s(float(device.memory_bytes))) / float(device.memory_bytes)


def objectives_without_recompute(
    rows: tuple[PricedObjective, ...],
) -> tuple[tuple[PricedObjective, ...], NDArray[np.integer]]:
    """The rows with nothing computed again, each once, and which of them stands for each given one."""
    at: dict[PricedObjective, int] = {}
    repeats = [at.setdefault(msgspec.structs.replace(row, mode="none"), len(at)) for row in rows]
    return tuple(at), np.array(repeats)


def charge_memories(
    graph: Graph, profile: GraphProfile, attention_ops: frozenset[int], selective_saved: SelectiveSaved | None
) -> ChargedMemories:
    """Selective recomputation frees what attention made, or what is none of what is ``selected``."""
    made = {value: op.id for op in graph.ops for value in op.outputs}
    seen: set[int] = set()
    found: dict[int, tuple[tuple[tuple[int, ...], bool], ...]] = {}
    for op in graph.ops:
        kept = profile.ops[op.id]
        values = (*op.inputs, *op.outputs)
        by_owner: dict[int, dict[int, int]] = {}
        for position in (*kept.saved_inputs, *(len(op.inputs) + at for at in kept.saved_outputs)):
            owner = profile.storage_owner[values[position]]
            if owner not in seen and graph.values[owner].kind not in ("parameter", "buffer"):
                by_owner.setdefault(owner, {}).setdefault(values[position], position)
        seen.update(by_owner)
        if by_owner:
            found[op.id] = tuple(
                (
                    tuple(at.values()),
                    made.get(owner) in attention_ops
                    if selective_saved is None
                    else owner not in selective_saved.saved_owners,
                )
                for owner, at in by_owner.items()
            )
    return found
