"""The programs of all stages of a plan, and what crosses between them.

All ranks derive the programs of all stages, from the plan and the graph alone, so sender and receiver of a value agree
on its placements at both ends. What is read further on passes through the stages between, from each to the next, and
its gradient back; partial sums are reduced before they are sent, unless all stages on the way hold as many terms.
"""

from collections.abc import Iterable

from autopar.core.local_shape import is_legal
from autopar.core.placement import PARTIAL, REPLICATE, Placement, Placements, Shard
from autopar.core.plan import Plan
from autopar.graph.ir import Block, Graph
from autopar.runtime.lower.build_stage_program import StageProgramBuilder
from autopar.runtime.lower.op_sharding import replicate_unit_axes
from autopar.runtime.lower.planned_blocks import PlannedBlocks
from autopar.runtime.lower.stage_program import BoundaryTransfer, StageProgram


def build_programs(
    plan: Plan, graph: Graph, blocks: tuple[Block, ...]
) -> tuple[tuple[StageProgram, ...], tuple[BoundaryTransfer, ...]]:
    """The programs of all stages, and what crosses between them; PlanFileError where plan and graph do not fit."""
    planned = PlannedBlocks(plan, graph, blocks)
    programs = tuple(StageProgramBuilder(planned, index).build() for index in range(len(plan.stages)))
    return programs, tuple(_stage_transfers(planned, programs))


def _stage_transfers(planned: PlannedBlocks, programs: tuple[StageProgram, ...]) -> Iterable[BoundaryTransfer]:
    """From each stage to the next, in order of value."""
    for value in sorted({value for program in programs for value in program.received}):
        made = planned.producing_stage[value]
        last = max(program.index for program in programs if value in program.received)
        maker = programs[made]
        conversion = maker.send_redistributions[maker.sent.index(value)]
        found = planned.graph.values[value]
        lies = (conversion.target, conversion.gradient_source)
        for at in range(made, last):
            next_lies = _received_placements(
                planned, programs[at + 1], value, (conversion.target, conversion.gradient_source)
            )
            yield BoundaryTransfer(
                value=value,
                shape=conversion.shape,
                dtype=found.dtype,
                requires_grad=found.requires_grad,
                sender=at,
                receiver=at + 1,
                sender_placements=lies[0],
                receiver_placements=next_lies[0],
                receiver_gradient_placements=next_lies[1],
                sender_gradient_placements=lies[1],
            )
            lies = next_lies


def _received_placements(
    planned: PlannedBlocks, program: StageProgram, value: int, sent: tuple[Placements, Placements]
) -> tuple[Placements, Placements]:
    """How a stage takes a value in and gives its gradient back: as it reads it; where it only passes it on, sharded by
    the batch alone, partial sums as they were ``made``."""
    if value in program.received:
        at = program.received.index(value)
        return program.received_placements[at], program.received_gradient_placements[at]
    shape = planned.graph.values[value].shape
    grows = next((dim for dim, size in enumerate(shape) if planned.graph.batch.is_proportional(size)), None)
    data: Placement = REPLICATE if grows is None else Shard(grows)
    placements = tuple(data if axis.name == "dp" and not at else REPLICATE for at, axis in enumerate(program.plan.axes))
    sizes = [axis.size for axis in program.plan.axes]
    scaled = tuple(planned.graph.batch.scale(size, planned.plan.micro_batch_size) for size in shape)
    if not is_legal(scaled, placements, sizes):
        placements = (REPLICATE,) * len(sizes)
    passed = replicate_unit_axes(placements, sizes)
    return sent[0] if PARTIAL in sent[0] else passed, sent[1] if PARTIAL in sent[1] else passed
