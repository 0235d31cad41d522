"""The programs of all stages of a plan, and the transfers between them.

Every rank derives the programs of all stages from the plan and the graph alone, so that sender and receiver of a value
agree on its placements at both ends. A value that a later stage reads is passed on by the stages between, each to the
next, and its gradient back. Partial sums are reduced before they are sent, unless all stages on the way have equally
many addends.
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
from autopar.runtime.lower.value_placements import ValuePlacements


def build_programs(
    plan: Plan, graph: Graph, blocks: tuple[Block, ...]
) -> tuple[tuple[StageProgram, ...], tuple[BoundaryTransfer, ...]]:
    """The programs of all stages, and the transfers between them; PlanFileError where plan and graph do not fit."""
    planned = PlannedBlocks(plan, graph, blocks)
    programs = tuple(StageProgramBuilder(planned, index).build() for index in range(len(plan.stages)))
    return programs, tuple(_stage_transfers(planned, programs))


def _stage_transfers(planned: PlannedBlocks, programs: tuple[StageProgram, ...]) -> Iterable[BoundaryTransfer]:
    """By value, then from each stage to the next."""
    for value in sorted({value for program in programs for value in program.received}):
        first = planned.producing_stage[value]
        last = max(program.index for program in programs if value in program.received)
        producer = programs[first]
        redistribution = producer.send_redistributions[producer.sent.index(value)]
        sent = ValuePlacements(value=redistribution.target, gradient=redistribution.gradient_source)
        sender_placements = sent
        for sender in range(first, last):
            receiver_placements = _received_placements(planned, programs[sender + 1], value, sent)
            yield BoundaryTransfer(
                value=value,
                shape=redistribution.shape,
                dtype=planned.graph.values[value].dtype,
                requires_grad=planned.graph.values[value].requires_grad,
                sender=sender,
                receiver=sender + 1,
                sender_placements=sender_placements.value,
                receiver_placements=receiver_placements.value,
                receiver_gradient_placements=receiver_placements.gradient,
                sender_gradient_placements=sender_placements.gradient,
            )
            sender_placements = receiver_placements


def _received_placements(
    planned: PlannedBlocks, program: StageProgram, value: int, sent: ValuePlacements
) -> ValuePlacements:
    """How a stage receives a value and returns its gradient: as its ops need it. A stage that only passes it on has it
    sharded by the batch alone, partial sums as the producer sent them (``sent``)."""
    if value in program.received:
        at = program.received.index(value)
        return ValuePlacements(value=program.received_placements[at], gradient=program.received_gradient_placements[at])
    batch, shape = planned.graph.batch, planned.graph.values[value].shape
    batch_dim = next((dim for dim, size in enumerate(shape) if batch.is_proportional(size)), None)
    data: Placement = REPLICATE if batch_dim is None else Shard(batch_dim)
    axes = program.plan.axes
    placements: Placements = tuple(data if axis.name == "dp" and not at else REPLICATE for at, axis in enumerate(axes))
    sizes = [axis.size for axis in axes]
    scaled = tuple(batch.scale(size, planned.plan.micro_batch_size) for size in shape)
    if not is_legal(scaled, placements, sizes):
        placements = (REPLICATE,) * len(sizes)
    by_batch = replicate_unit_axes(placements, sizes)
    return ValuePlacements(
        value=sent.value if PARTIAL in sent.value else by_batch,
        gradient=sent.gradient if PARTIAL in sent.gradient else by_batch,
    )
