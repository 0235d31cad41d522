"""A layout after pricing: its stages with their costs, and the memory that the stages of one submesh share."""

from dataclasses import dataclass

from autopar.core.layout import Layout
from autopar.core.plan import MemoryParts, memory_of_chunks
from autopar.inter.block_choice import BlockChoice, block_choices
from autopar.inter.stage_choice import StagePrice
from autopar.inter.stage_costs import StageCosts
from autopar.inter.stage_span import DeviceStage
from autopar.manual.megatron_restriction import LayoutStage
from autopar.pipeline.simulate import StageTimes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PricedStage:
    """A stage of a layout (a chunk, where the schedule is interleaved): the costs it was priced from, the fastest
    choice of what the layout leaves open, and its micro-batches in flight."""

    layout_stage: LayoutStage
    stage_costs: StageCosts
    price: StagePrice
    in_flight: int

    @property
    def span(self) -> DeviceStage:
        """The stage's blocks and number of devices."""
        stage = self.layout_stage
        return DeviceStage(stage.first_block, stage.end_block, stage.spec.num_gpus)

    def block_choices(self) -> list[BlockChoice]:
        """The choice of every block of the stage, in order."""
        first, end, _ = self.span
        return block_choices(self.stage_costs.frontiers, self.price.choice, first, end)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PricedLayout:
    """A resolved layout with its stages in model order, their times with transfers, and the simulated step.
    ``memory_bytes`` is that of the fullest device; ``fits``: whether it is within the budget."""

    layout: Layout
    stages: tuple[PricedStage, ...]
    stage_times: tuple[StageTimes, ...]
    step_time_s: float
    memory_bytes: float
    fits: bool


def submesh_memory_bytes(stages: tuple[PricedStage, ...]) -> dict[int, int]:
    """First device of each submesh -> bytes on each of its devices, over all chunks that it runs."""
    memory: dict[int, list[MemoryParts]] = {}
    for stage in stages:
        first, end, _ = stage.span
        memory.setdefault(stage.layout_stage.first_device, []).append(
            stage.stage_costs.memory.peak(stage.price.choice, first, end, stage.in_flight)
        )
    return {device: memory_of_chunks(parts).total for device, parts in memory.items()}
