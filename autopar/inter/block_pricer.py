"""The blocks of one model and what they cost per mesh and micro-batch size, computed once."""

from collections.abc import Sequence
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

Objectives = tuple[PricedObjective, ...]


class StageMesh(msgspec.Struct, frozen=True, kw_only=True):
    """The logical mesh of a stage: a data axis of ``data_size`` ranks (outermost), over which the batch is sharded, and
    inner axes, over which every op may shard any dim. (A msgspec struct hashes in C: a search looks meshes and
    objectives up as dict keys hundreds of thousands of times.)"""

    data_size: int
    inner_sizes: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of all axes, the data axis first."""
        return (self.data_size, *self.inner_sizes)

    @property
    def has_data_axis(self) -> bool:
        """Whether a plan names the data axis: with inner axes, one of size 1 is left out."""
        return self.data_size > 1 or not self.inner_sizes

    @property
    def named_sizes(self) -> tuple[int, ...]:
        """The sizes of the axes that a plan names."""
        return self.sizes if self.has_data_axis else self.inner_sizes

    @property
    def num_devices(self) -> int:
        """The product of all sizes."""
        return self.data_size * int(np.prod(self.inner_sizes, dtype=int))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutRestriction:
    """What a manual layout fixes: the one mesh of every stage, the options that each inner axis allows, the ZeRO stage
    over the data axis, the boundary placement (a role per inner axis), and the names of the inner axes. Equality leaves
    ``option_filter`` out: cost tables are shared, so restrictions of equal ``boundary_roles`` and ``axis_names`` must
    allow the same options on meshes that both name, or both leave out, a data axis."""

    mesh: StageMesh
    option_filter: OptionFilter = field(compare=False)
    zero_stage: int
    boundary_roles: tuple[str, ...]
    axis_names: tuple[str, ...] = ()


class BlockPricer:
    """The blocks of one model, their spaces per kind, and their tables and frontiers per mesh and micro-batch size, all
    cached. ``profile`` is that of ``graph``; without ``pins`` no placement is fixed.

    Blocks are priced per variant (`stage_kinds`): a kind, and the tied parameters that an earlier block of the same
    stage already stores.
    """

    def __init__(
        self,
        graph: Graph,
        blocks: tuple[Block, ...],
        cluster: Cluster,
        execution: ExecutionModel,
        profile: GraphProfile,
        pins: BlockPins | None = None,
    ) -> None:
        self.pins = pins if pins is not None and pins.pins else None
        self.graph, self.blocks, self.cluster, self.execution = graph, blocks, cluster, execution
        self.profile: GraphProfile = with_fused_loss(graph, profile, execution.fused_chains)
        self.fusion_savings = fusion_savings(graph, self.profile, execution.fused_chains)
        self.first_of_kind: dict[int, Block] = {}
        for block in blocks:
            self.first_of_kind.setdefault(block.kind, block)
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
        users = _parameter_users(blocks)
        self.first_user = {value: of_value[0] for value, of_value in users.items()}
        self.tied_users = {
            value: tuple(users[value])
            for value in sorted(users)
            if graph.values[value].kind == "parameter" and graph.values[value].requires_grad and len(users[value]) > 1
        }
        self._parameter_free_values = graph.parameter_free()
        self._spaces: dict[int, BlockSpace] = {}
        self._tables: dict[tuple[object, ...], BlockTables] = {}
        self._frontiers: dict[tuple[object, ...], BlockFrontier] = {}
        self._storage_metrics: dict[StageMesh, StorageMetricsCache] = {}
        self._objectives_without_recompute: dict[Objectives, tuple[Objectives, NDArray[np.integer]]] = {}
        self._links: dict[tuple[object, ...], MeshLinks] = {}

    def stored_elsewhere(self, block: Block, first_block: int) -> frozenset[int]:
        """The parameters of ``block`` (values) that an earlier block of a stage beginning at ``first_block`` stores."""
        return frozenset(value for value in block.parameters if first_block <= self.first_user[value] < block.index)

    @cached_property
    def stage_kinds(self) -> StageKinds:
        """The kinds of all stages, the same for every mesh and micro-batch size."""
        return count_stage_kinds(self.blocks, self.stored_elsewhere)

    @cached_property
    def batch_dependent_sizes(self) -> frozenset[int]:
        """The tensor sizes of the model that grow with the batch, as traced."""
        sizes = {size for value in self.graph.values for size in value.shape}
        return frozenset(size for size in sizes if self.graph.batch.is_proportional(size))

    @property
    def stream_s_per_byte(self) -> float:
        """Seconds in which the device streams a byte of its memory: the unit of memory prices."""
        device = self.cluster.device
        return float(device.memory_bound_s(float(device.memory_bytes))) / float(device.memory_bytes)

    def block_space(self, kind: int) -> BlockSpace:
        """The ops of a block of this kind with their options."""
        if kind not in self._spaces:
            self._spaces[kind] = build_block_space(self.graph, self.first_of_kind[kind], self._parameter_free_values)
        return self._spaces[kind]

    def make_all_spaces(self) -> None:
        """Build the spaces of all kinds now, for example before the pricer goes to a worker process."""
        for kind in self.first_of_kind:
            self.block_space(kind)

    def release(self, micro_batch: int) -> None:
        """Free the frontiers of a micro-batch size; tables stay, because other sizes share them."""
        for key in [key for key in self._frontiers if key[3] == micro_batch]:
            del self._frontiers[key]

    def frontier(
        self,
        kind: int,
        stored_elsewhere: frozenset[int],
        mesh: StageMesh,
        objectives: Objectives,
        *,
        micro_batch: int,
        num_microbatches: int,
        restriction: LayoutRestriction | None = None,
    ) -> BlockFrontier:
        """The solutions of all ``objectives`` for a block of this kind on ``mesh``, whose parameters
        ``stored_elsewhere`` it does not store; ``micro_batch`` counts samples over the whole mesh."""
        key = (kind, stored_elsewhere, mesh, micro_batch, num_microbatches, objectives, restriction)
        if key not in self._frontiers:
            tables = self._block_tables(kind, mesh, micro_batch, restriction)
            if mesh not in self._storage_metrics:
                self._storage_metrics[mesh] = StorageMetricsCache(self._mesh_links(mesh), self.execution)
            solved, repeats = objectives, None
            if self.first_of_kind[kind].name in ("embedding", "head"):  # programs checkpoint their layers, not these
                if objectives not in self._objectives_without_recompute:
                    self._objectives_without_recompute[objectives] = objectives_without_recompute(objectives)
                solved, repeats = self._objectives_without_recompute[objectives]
            frontier = solve_frontier(
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
            self._frontiers[key] = frontier if repeats is None else frontier.select(repeats)
        return self._frontiers[key]

    def _block_tables(
        self, kind: int, mesh: StageMesh, micro_batch: int, restriction: LayoutRestriction | None
    ) -> BlockTables:
        """The cost tables of a block kind; meshes share them whose inner axes cross equal links with equal local
        batches."""
        space = self.block_space(kind)
        local_batch = micro_batch // mesh.data_size
        inner_links, mesh_links = self._inner_links(mesh), self._mesh_links(mesh)
        inner_groups = tuple(inner_links.group((axis,)) for axis in range(len(mesh.inner_sizes)))
        # a block that is parallel over the batch is priced by the local batch alone
        data_ranks = 1 if space.data_axis.is_batch_parallel else mesh.data_size
        data_groups: tuple[object, ...] = ()
        if data_ranks > 1:
            data_groups = tuple(mesh_links.group(axes) for axes in ((0,), (0, 1))[: len(mesh.sizes)])
        option_filter = restriction.option_filter if restriction else None
        if self.pins is not None and restriction is None:  # a layout's restriction includes its pins
            option_filter = self.pins.option_filter(mesh.has_data_axis)
        fixed: object = self.pins is not None and mesh.has_data_axis
        if restriction is not None:
            # pins, which may be in its filter, count a data axis that the plan names
            fixed = (restriction.boundary_roles, restriction.axis_names, mesh.has_data_axis)
        key = (kind, local_batch, mesh.inner_sizes, inner_groups, data_ranks, data_groups, fixed)
        if key not in self._tables:
            self._tables[key] = BlockTableBuilder(
                space,
                self.priced_model,
                BlockMesh(
                    inner_links=inner_links, mesh_links=mesh_links, data_ranks=data_ranks, local_batch=local_batch
                ),
                option_filter=option_filter,
                as_megatron=restriction is not None,  # a manual layout is Megatron's program
            ).build()
        return self._tables[key]

    def _mesh_links(self, mesh: StageMesh) -> MeshLinks:
        """The links of all axes."""
        return MeshLinks(self.cluster, mesh.num_devices, mesh.sizes, tuple(range(len(mesh.sizes))))

    def _inner_links(self, mesh: StageMesh) -> MeshLinks:
        """The links of the inner axes; meshes whose inner axes cross equal links share one object."""
        links = MeshLinks(self.cluster, mesh.num_devices, mesh.sizes, tuple(range(1, len(mesh.sizes))))
        groups = tuple(links.group((axis,)) for axis in range(len(mesh.inner_sizes)))
        return self._links.setdefault((mesh.inner_sizes, groups), links)


def _parameter_users(blocks: Sequence[Block]) -> dict[int, list[int]]:
    """The blocks (indices, ascending) that use each parameter or buffer (value)."""
    users: dict[int, list[int]] = {}
    for block in blocks:
        for value in block.parameters:
            users.setdefault(value, []).append(block.index)
    return users


def objectives_without_recompute(objectives: Objectives) -> tuple[Objectives, NDArray[np.integer]]:
    """The distinct objectives that are left without recomputation, and the index of that of each given one."""
    distinct: dict[PricedObjective, int] = {}
    repeats = [
        distinct.setdefault(msgspec.structs.replace(objective, mode="none"), len(distinct)) for objective in objectives
    ]
    return tuple(distinct), np.array(repeats)


def charge_memories(
    graph: Graph, profile: GraphProfile, attention_ops: frozenset[int], selective_saved: SelectiveSaved | None
) -> ChargedMemories:
    """By op, the memories that it is the first to save for backward: the positions of the op's values in each, and
    whether selective recomputation frees it, which it does with what attention made, or, given ``selective_saved``,
    with all else."""
    made_by = {value: op.id for op in graph.ops for value in op.outputs}
    seen: set[int] = set()
    charged: dict[int, tuple[tuple[tuple[int, ...], bool], ...]] = {}
    for op in graph.ops:
        profiled = profile.ops[op.id]
        values = (*op.inputs, *op.outputs)
        by_owner: dict[int, dict[int, int]] = {}
        for position in (*profiled.saved_inputs, *(len(op.inputs) + output for output in profiled.saved_outputs)):
            owner = profile.storage_owner[values[position]]
            if owner not in seen and graph.values[owner].kind not in ("parameter", "buffer"):
                by_owner.setdefault(owner, {}).setdefault(values[position], position)
        seen.update(by_owner)
        if by_owner:
            charged[op.id] = tuple(
                (
                    tuple(positions.values()),
                    made_by.get(owner) in attention_ops
                    if selective_saved is None
                    else owner not in selective_saved.saved_owners,
                )
                for owner, positions in by_owner.items()
            )
    return charged
