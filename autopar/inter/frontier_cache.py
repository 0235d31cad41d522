"""The frontiers of all blocks on all meshes at one micro-batch size, solved once and cached.

A *phase* is a set of objectives that are solved together: the unpriced ones, where either memory or time does not
count, which every stage needs, and the memory-priced ones, which only stages bound by memory need.
"""

from autopar.inter.block_pricer import BlockPricer, StageMesh
from autopar.inter.in_flight_grid import IN_FLIGHT_GRID, LEAN_IN_FLIGHT_GRID, interpolation_weights
from autopar.inter.micro_batch_setting import MicroBatchSetting
from autopar.inter.stage_kinds import BlockVariant
from autopar.intra.frontier import BlockFrontier
from autopar.intra.priced_objectives import (
    PricedObjective,
    least_memory_objectives,
    memory_priced_objectives,
    unpriced_objectives,
)

UNPRICED, PRICED = 0, 1
"""The two phases."""


class FrontierCache:
    """The meshes of stages, the objectives per mesh and phase, and the frontier of every block variant under them."""

    def __init__(self, pricer: BlockPricer, setting: MicroBatchSetting) -> None:
        self.pricer, self.setting = pricer, setting
        self.variants: tuple[BlockVariant, ...] = pricer.stage_kinds.variants
        self._variant_index = {variant: index for index, variant in enumerate(self.variants)}
        modes = setting.recompute_modes
        if not pricer.attention_ops:  # "selective" recomputes attention
            modes = tuple(mode for mode in modes if mode != "selective") or ("none",)
        self._recompute_modes = modes
        self._meshes: dict[int, list[StageMesh]] = {}
        self._objectives: dict[tuple[tuple[int, ...], bool], tuple[PricedObjective, ...]] = {}
        self._frontiers: dict[tuple[int, StageMesh, int], BlockFrontier] = {}

    def release(self) -> None:
        """Free the frontiers; they are solved again when asked for."""
        self._frontiers.clear()
        self.pricer.release(self.setting.micro_batch)

    def variant(self, kind: int, stored_elsewhere: frozenset[int]) -> int:
        """The index of the variant of a block kind whose parameters ``stored_elsewhere`` another block of its stage
        stores."""
        return self._variant_index[kind, stored_elsewhere]

    def variants_of(self, first_block: int, end_block: int) -> list[int]:
        """The variant of each block of the stage ``first_block <= i < end_block``."""
        return [
            self.variant(block.kind, self.pricer.stored_elsewhere(block, first_block))
            for block in self.pricer.blocks[first_block:end_block]
        ]

    def meshes(self, num_devices: int) -> list[StageMesh]:
        """The meshes of a stage on ``num_devices`` devices: all (data, inner) sizes whose data axis divides the
        micro-batch, leaves integer tensor sizes and suits the pins; of a layout, its own mesh."""
        if num_devices not in self._meshes:
            self._meshes[num_devices] = self._make_meshes(num_devices)
        return self._meshes[num_devices]

    def _make_meshes(self, num_devices: int) -> list[StageMesh]:
        setting = self.setting
        if setting.restriction is not None:
            return [setting.restriction.mesh] if setting.restriction.mesh.num_devices == num_devices else []
        meshes = [
            StageMesh(data_size=num_devices // inner, inner_sizes=(inner,) if inner > 1 else ())
            for inner in range(1, num_devices + 1)
            if num_devices % inner == 0 and setting.micro_batch % (num_devices // inner) == 0
        ]
        num_axes = self.pricer.pins.num_axes if self.pricer.pins else None
        return [
            mesh
            for mesh in meshes
            if self.has_integer_sizes(setting.micro_batch // mesh.data_size)
            and num_axes in (None, len(mesh.named_sizes))
        ]

    def has_integer_sizes(self, local_batch: int) -> bool:
        """Whether every tensor size of the model is an integer at ``local_batch`` samples per data rank."""
        traced = self.pricer.graph.batch.traced_size
        return all((size * local_batch) % traced == 0 for size in self.pricer.batch_dependent_sizes)

    def objectives(self, mesh: StageMesh, phase: int) -> tuple[PricedObjective, ...]:
        """The objectives of a phase; those of ``PRICED`` are equally many for each point of `in_flight_grid`, one after
        the other."""
        rate = self.pricer.stream_s_per_byte
        if self.setting.restriction is not None:  # a layout is priced whether or not it fits
            return unpriced_objectives(rate, self._recompute_modes, ("priced",))
        if phase == UNPRICED:
            return (
                *unpriced_objectives(rate, self._recompute_modes),
                *least_memory_objectives(self._recompute_modes, LEAN_IN_FLIGHT_GRID),
            )
        gathers_bind = any(frontier.gathers_can_bind for frontier in self.frontiers_by_variant(mesh, UNPRICED))
        grid = self.in_flight_grid(mesh)
        if (grid, gathers_bind) not in self._objectives:
            self._objectives[grid, gathers_bind] = tuple(
                objective
                for in_flight in grid
                for objective in memory_priced_objectives(rate, self._recompute_modes, float(in_flight), gathers_bind)
            )
        return self._objectives[grid, gathers_bind]

    def in_flight_grid(self, mesh: StageMesh) -> tuple[int, ...]:
        """The points of `IN_FLIGHT_GRID` that stages on a mesh may need."""
        setting = self.setting
        if setting.schedule == "gpipe":
            return tuple(point for point, _ in interpolation_weights(IN_FLIGHT_GRID, setting.num_microbatches))
        most = 1 if mesh.num_devices == setting.num_devices else setting.num_microbatches
        before = (0, *IN_FLIGHT_GRID)
        return tuple(point for point, lower in zip(IN_FLIGHT_GRID, before, strict=False) if lower < most)

    def objective_slice(self, mesh: StageMesh, grid_in_flight: int) -> slice:
        """Which objectives of their phase are those of a grid point; all where ``grid_in_flight`` is ``UNPRICED``."""
        if grid_in_flight == UNPRICED:
            return slice(None)
        grid = self.in_flight_grid(mesh)
        per_point = len(self.objectives(mesh, PRICED)) // len(grid)
        index = grid.index(grid_in_flight)
        return slice(index * per_point, (index + 1) * per_point)

    def frontier(self, variant: int, mesh: StageMesh, phase: int) -> BlockFrontier:
        """The frontier of a block variant under the objectives of a phase."""
        key = (variant, mesh, phase)
        if key not in self._frontiers:
            kind, stored_elsewhere = self.variants[variant]
            self._frontiers[key] = self.pricer.frontier(
                kind,
                stored_elsewhere,
                mesh,
                self.objectives(mesh, phase),
                micro_batch=self.setting.micro_batch,
                num_microbatches=self.setting.num_microbatches,
                restriction=self.setting.restriction,
            )
        return self._frontiers[key]

    def frontiers_by_variant(self, mesh: StageMesh, phase: int) -> list[BlockFrontier]:
        """The frontiers of all variants, in their order."""
        return [self.frontier(variant, mesh, phase) for variant in range(len(self.variants))]

    def boundary_roles(self, boundary: int, mesh: StageMesh) -> tuple[str, ...]:
        """The role of each inner axis under a boundary placement: how it places the values between blocks."""
        return self.frontier(0, mesh, UNPRICED).tables.boundary_roles[boundary]
