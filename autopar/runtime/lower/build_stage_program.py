"""The program of one stage, built block by block from what the plan says.

An activation moves as the plan says: from where its op leaves it to the ``shared`` placement of several readers, from
there to every (placement, gradient) that some reader takes, and at a block's end to where blocks meet; its gradient
goes the same way back. A plan that names no placements between ops (``shared``, ``inputs``, ``outputs``) leaves every
value where its op does. What depends on no parameter (preparation of data) is made where it is read, whichever block
holds it.
"""

from dataclasses import replace

import msgspec

from autopar.core.local_shape import is_legal
from autopar.core.placement import PARTIAL, REPLICATE, Placements, parse_placements
from autopar.core.plan import BlockProgram, Recompute, ValuePlan
from autopar.graph.ir import Block, Op
from autopar.graph.random_ops import is_random
from autopar.runtime.lower.local_op import scale_to_micro_batch
from autopar.runtime.lower.op_sharding import OpShardingMatcher, gradient_placements, replicate_unit_axes
from autopar.runtime.lower.planned_blocks import PlannedBlocks
from autopar.runtime.lower.redistribute_tensor import EdgeRedistribution
from autopar.runtime.lower.stage_program import ParameterSharding, ProgramOp, ProgramRedistribution, StageProgram


class StageProgramBuilder:
    """Builds one stage's program; ``placed`` is where each slot's value lies, and where its gradient must go; ``at``
    the slot of each value for the next reader, ``between`` where blocks meet."""

    def __init__(self, planned: PlannedBlocks, index: int) -> None:
        self.planned, self.graph, self.index = planned, planned.graph, index
        self.plan = planned.plan.stages[index]
        self.sizes = tuple(axis.size for axis in self.plan.axes)
        self.matcher = OpShardingMatcher(self.graph, planned.plan.micro_batch_size, self.sizes)
        self.replicated: Placements = (REPLICATE,) * len(self.sizes)
        self.slot_placements: dict[int, tuple[Placements, Placements]] = {}
        self.block_slots: dict[int, int] = {}
        self.boundary_slots: dict[int, int] = {}
        self.num_slots = len(self.graph.values)
        self.partial_gradient_passes: dict[int, tuple[bool, ...]] = {}
        self.parameter_shardings: dict[int, ParameterSharding] = {}
        self.received: dict[int, tuple[Placements, Placements]] = {}
        self.inputs: dict[int, None] = {}
        self.constants: dict[int, None] = {}
        self.written_buffers: dict[int, None] = {}
        self.steps: list[ProgramOp | ProgramRedistribution] = []

    def build(self) -> StageProgram:
        programs = {ref.index: self.planned.programs[ref.program] for ref in self.plan.blocks}
        mine = [self.planned.blocks[ref.index] for ref in self.plan.blocks]
        for block in mine:
            for value, parameter in self.planned.parameter_shardings(block, programs[block.index]):
                self.parameter_shardings[value] = (
                    _merge_tied(self.parameter_shardings[value], parameter)
                    if value in self.parameter_shardings
                    else parameter
                )
        for block in mine:
            self._add_block(block, programs[block.index])
        sent = sorted(
            value
            for value, readers in self.planned.reading_stages.items()
            if value in self.planned.parameter_dependent
            and self.planned.producing_stage.get(value) == self.index
            and any(reader != self.index for reader in readers)
        )
        loss = self.graph.outputs[0]
        makes_loss = self.planned.producing_stage[loss] == self.index
        kept = [self.parameter_shardings[value] for value in sorted(self.parameter_shardings)]
        steps = tuple(self.steps)
        return StageProgram(
            index=self.index,
            plan=self.plan,
            steps=steps,
            parameters=tuple(p for p in kept if self.graph.values[p.value].kind == "parameter"),
            buffers=tuple(p for p in kept if self.graph.values[p.value].kind == "buffer"),
            written_buffers=tuple(self.written_buffers),
            constants=tuple(self.constants),
            inputs=tuple(self.inputs),
            received=tuple(self.received),
            received_placements=tuple(replicate_unit_axes(lie[0], self.sizes) for lie in self.received.values()),
            received_gradient_placements=tuple(
                replicate_unit_axes(lie[1], self.sizes) for lie in self.received.values()
            ),
            sent=tuple(sent),
            send_slots=tuple(self._current_slot(value) for value in sent),
            send_redistributions=tuple(self._send_redistribution(value) for value in sent),
            loss_placements=replicate_unit_axes(self.slot_placements[self._current_slot(loss)][0], self.sizes)
            if makes_loss
            else None,
            loss_slot=self._current_slot(loss),
            draws_random=any(is_random(step.op) for step in steps if isinstance(step, ProgramOp)),
            global_shapes={value: self.matcher.global_shape(value) for value in (*self.inputs, *self.received, *sent)},
        )

    def _add_block(self, block: Block, program: BlockProgram) -> None:
        begins, shared, ends = self.planned.placements_between_ops(block, program)
        ops = self.graph.ops[block.first_op : block.end_op]
        again_gathered = {
            op.inputs[at] for op, planned in zip(ops, program.ops, strict=False) for at in planned.regathered
        }
        recompute, stays = self.planned.recomputation(block, program)
        program = msgspec.structs.replace(program, recompute=recompute)
        self.block_slots = {}
        for value, planned in begins.items():
            if value in self.planned.parameter_dependent:
                lie = self._planned_placements(value, planned)
                if (
                    self._current_slot(value) not in self.slot_placements
                ):  # an activation of another stage comes as the block wants it
                    self._receive_activation(value, lie)
                self._redistribute(value, lie, block, program)
                if value in shared:
                    self._redistribute(
                        value,
                        self._planned_placements(value, shared[value]),
                        block,
                        program,
                        regathered=value in again_gathered,
                    )
        told = zip(self.planned.ops_with_placements(block, program), program.ops, strict=True)
        for (op, inputs, outputs, passing), op_plan in told:
            if self._is_needed(op):
                again = op_plan.regathered
                self._add_op(op, inputs, outputs, passing, block.index, recompute, again, saves_result=op.id in stays)
                for value in op.outputs:
                    if value in shared and value in self.planned.parameter_dependent:
                        self._redistribute(
                            value,
                            self._planned_placements(value, shared[value]),
                            block,
                            program,
                            regathered=value in again_gathered,
                        )
        for value, planned in ends.items():
            if value in self.planned.parameter_dependent:
                self._redistribute(value, self._planned_placements(value, planned), block, program)
        for op in ops:
            self.boundary_slots.update(
                (value, self.block_slots[value]) for value in op.outputs if value in self.block_slots
            )
        self.block_slots = {}

    def _current_slot(self, value: int) -> int:
        """The slot that the next reader of a value finds it in."""
        return self.block_slots.get(value, self.boundary_slots.get(value, value))

    def _planned_placements(self, value: int, planned: ValuePlan) -> tuple[Placements, Placements]:
        """The plan's placements and those of the gradient, replicated on axes where the value's sizes do not allow the
        shard."""
        placements, shape = parse_placements(planned.placement), self.matcher.global_shape(value)
        gradient = parse_placements(planned.gradient) if planned.gradient else gradient_placements(placements)
        for axis in reversed(range(len(self.sizes))):
            if is_legal(shape, placements, self.sizes):
                break
            placements, gradient = (
                tuple(REPLICATE if at == axis else each for at, each in enumerate(side))
                for side in (placements, gradient)
            )
        return placements, gradient

    def _receive_activation(self, value: int, placements: tuple[Placements, Placements]) -> None:
        forward, backward = self.planned.crosses_as_partial(value)
        self.received[value] = (
            placements[0] if forward else gradient_placements(placements[0]),
            placements[1] if backward else gradient_placements(placements[1]),
        )
        self.partial_gradient_passes[value] = (False,) * len(self.sizes)
        self.slot_placements[value] = self.received[value]

    def _redistribute(
        self,
        value: int,
        placements: tuple[Placements, Placements],
        block: Block,
        program: BlockProgram,
        *,
        regathered: bool = False,
    ) -> None:
        """Bring a value to where the block's next readers find it."""
        source = self._current_slot(value)
        made, wanted = self.slot_placements[source]
        conversion = self._edge(value, made, placements[0], placements[1], wanted)
        target = source
        if conversion.is_needed:
            target = self._new_slot(placements)
            self.steps.append(
                ProgramRedistribution(
                    source=source,
                    target=target,
                    redistribution=conversion,
                    block=block.index,
                    recompute=program.recompute,
                    regathered=regathered,
                )
            )
        self.block_slots[value] = target

    def _new_slot(self, placements: tuple[Placements, Placements]) -> int:
        self.num_slots += 1
        self.slot_placements[self.num_slots - 1] = placements
        return self.num_slots - 1

    def _is_needed(self, op: Op) -> bool:
        """Preparation of data is made where it is read; what writes a buffer runs where it stands."""
        writes = op.is_in_place
        buffer = writes and self.graph.values[op.inputs[0]].kind == "buffer"
        return buffer or not self.planned.parameter_dependent.isdisjoint(op.outputs)

    def _add_op(
        self,
        op: Op,
        inputs: tuple[Placements, ...],
        outputs: tuple[Placements, ...],
        partial_through: frozenset[int] | None,
        block: int,
        recompute: Recompute,
        regathered_inputs: tuple[int, ...] = (),
        *,
        saves_result: bool = False,
    ) -> None:
        for value in op.inputs:
            self._ensure_available(value)
        carriers = [
            self.partial_gradient_passes[value] for value in op.inputs if self.graph.values[value].requires_grad
        ]
        pure = [all(each[axis] for each in carriers) for axis in range(len(self.sizes))]
        through = pure if partial_through is None else [axis in partial_through for axis in range(len(self.sizes))]
        usage = self.matcher.match(op, inputs, outputs, through)
        conversions = []
        for at, value in enumerate(op.inputs):
            if (
                self._current_slot(value) not in self.slot_placements
            ):  # where the plan names no placements between blocks
                self._receive_activation(value, (usage.inputs[at], usage.inputs[at]))
            made, wanted = self.slot_placements[self._current_slot(value)]
            conversions.append(self._edge(value, made, usage.inputs[at], usage.input_gradients[at], wanted))
        reads = tuple(self._current_slot(value) for value in op.inputs)
        for at, value in enumerate(op.outputs):
            self.block_slots[value] = self._new_slot((usage.outputs[at], usage.output_gradients[at]))
            self.partial_gradient_passes[value] = tuple(
                alone and not labels and placement == REPLICATE
                for alone, labels, placement in zip(pure, usage.labels, usage.outputs[at], strict=True)
            )
            if block < 0:
                self.boundary_slots[value] = self.block_slots.pop(value)
        if op.packet == "batch_norm" or op.is_in_place:
            self.written_buffers.update(
                (value, None) for value in op.inputs if self.graph.values[value].kind == "buffer"
            )
        scaled = scale_to_micro_batch(op, self.graph.batch, self.planned.plan.micro_batch_size)
        self.steps.append(
            ProgramOp(
                op=scaled,
                sharding=usage,
                input_slots=reads,
                output_slots=tuple(self._current_slot(value) for value in op.outputs),
                redistributions=tuple(conversions),
                output_shapes=tuple(self.matcher.global_shape(value) for value in op.outputs),
                block=block,
                recompute=recompute,
                regathered_inputs=regathered_inputs,
                saves_result=saves_result,
            )
        )

    def _ensure_available(self, value: int) -> None:
        """Makes sure that a value is there: stored, to be received, an input, or prepared here from the inputs."""
        if self._current_slot(value) in self.slot_placements:
            return
        found = self.graph.values[value]
        self.partial_gradient_passes[value] = (True,) * len(self.sizes)
        if found.kind in ("parameter", "buffer"):
            stored = self.parameter_shardings.get(value)
            if stored is None:
                trained = found.kind == "parameter" and found.requires_grad
                stored = ParameterSharding(
                    value=value,
                    shape=found.shape,
                    compute_placements=self.replicated,
                    gradient_placements=self.replicated,
                    zero_stage=0,
                    zero_axes=(),
                    trained=trained,
                )
                self.parameter_shardings[value] = stored
            self.slot_placements[value] = (stored.compute_placements, stored.gradient_placements)
            if stored.trained:
                self.partial_gradient_passes[value] = tuple(
                    placement == PARTIAL for placement in stored.gradient_placements
                )
        elif found.kind == "activation" and value in self.planned.parameter_dependent:
            if found.requires_grad:
                self.partial_gradient_passes[value] = (False,) * len(self.sizes)
        elif found.kind == "activation":
            op = self.planned.producers[value]
            self._add_op(
                op, (self.replicated,) * len(op.inputs), (self.replicated,) * len(op.outputs), None, -1, "none"
            )
        else:
            (self.inputs if found.kind == "input" else self.constants)[value] = None
            self.slot_placements[value] = (self.replicated, self.replicated)

    def _send_redistribution(self, value: int) -> EdgeRedistribution:
        made, wanted = self.slot_placements[self._current_slot(value)]
        forward, backward = self.planned.crosses_as_partial(value)
        sent, returned = (
            made if forward else gradient_placements(made),
            wanted if backward else gradient_placements(wanted),
        )
        return self._edge(value, made, sent, returned, wanted)

    def _edge(
        self,
        value: int,
        source: Placements,
        target: Placements,
        gradient_source: Placements,
        gradient_target: Placements,
    ) -> EdgeRedistribution:
        """From the maker's placement to the reader's; the gradient from what the reader gives to what the maker
        wants."""
        grad = self.graph.values[value].requires_grad
        return EdgeRedistribution(
            shape=self.matcher.global_shape(value),
            source=replicate_unit_axes(source, self.sizes),
            target=replicate_unit_axes(target, self.sizes),
            gradient_source=replicate_unit_axes(gradient_source, self.sizes) if grad else (),
            gradient_target=replicate_unit_axes(gradient_target, self.sizes) if grad else (),
        )


def _merge_tied(first: ParameterSharding, other: ParameterSharding) -> ParameterSharding:
    """A tied parameter is stored as its first block uses it. Where another block shards it, or leaves a partial
    gradient, the gradient stays partial until the end of the step."""
    gradient = tuple(
        PARTIAL if stored == REPLICATE and (used != stored or {one, two} == {REPLICATE, PARTIAL}) else one
        for stored, used, one, two in zip(
            first.compute_placements,
            other.compute_placements,
            first.gradient_placements,
            other.gradient_placements,
            strict=True,
        )
    )
    return replace(first, gradient_placements=gradient)
