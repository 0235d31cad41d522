"""The program of one stage, built block by block from the plan.

An activation is redistributed as the plan says: from the placement that its op produces to the ``shared`` placement of a
value with several readers, from there to each pair of placements (value, gradient) that some reader needs, and at the
block's end to the boundary placement; its gradient takes the same path back. A plan that names no placements between ops
(``shared``, ``inputs``, ``outputs``) leaves every value as its op produces it. Preparation of data (what depends on no
parameter) is computed where it is read, whichever block it belongs to.
"""

from autopar.core.placement import REPLICATE, Placements
from autopar.core.plan import Recompute, ValuePlan
from autopar.graph.ir import Op
from autopar.graph.random_ops import is_random
from autopar.runtime.lower.local_op import scale_to_micro_batch
from autopar.runtime.lower.op_sharding import OpSharding, OpShardingMatcher, replicate_unit_axes
from autopar.runtime.lower.planned_blocks import PlannedBlock, PlannedBlocks, PlannedOp
from autopar.runtime.lower.redistribute_tensor import EdgeRedistribution
from autopar.runtime.lower.stage_inputs import StageInputs
from autopar.runtime.lower.stage_program import NO_BLOCK, ProgramOp, ProgramRedistribution, StageProgram
from autopar.runtime.lower.value_placements import ValuePlacements, edge_between, legal_placements
from autopar.runtime.lower.value_slots import ValueSlots


class StageProgramBuilder:
    """Builds the program of the stage at ``index`` in the plan: ``build`` is called once."""

    def __init__(self, planned: PlannedBlocks, index: int) -> None:
        self.planned, self.graph, self.index = planned, planned.graph, index
        self.plan = planned.plan.stages[index]
        self.sizes = tuple(axis.size for axis in self.plan.axes)
        self.matcher = OpShardingMatcher(self.graph, planned.plan.micro_batch_size, self.sizes)
        self.slots = ValueSlots(len(self.graph.values), len(self.sizes))
        self.inputs = StageInputs(planned, self.slots, len(self.sizes))
        self.written_buffers: dict[int, None] = {}
        self.steps: list[ProgramOp | ProgramRedistribution] = []

    def build(self) -> StageProgram:
        """The stage's program; PlanFileError where the plan does not fit the model."""
        blocks = [(self.planned.blocks[ref.index], self.planned.programs[ref.program]) for ref in self.plan.blocks]
        self.inputs.add_parameters(blocks)
        for block, program in blocks:
            self._add_block(self.planned.planned_block(block, program))
            self.slots.end_block(value for op in self.graph.ops[block.first_op : block.end_op] for value in op.outputs)
        sent = self._sent_values()
        loss = self.graph.outputs[0]
        computes_loss = self.planned.producing_stage[loss] == self.index
        received, steps = self.inputs.received, tuple(self.steps)
        return StageProgram(
            index=self.index,
            plan=self.plan,
            steps=steps,
            parameters=self.inputs.parameters("parameter"),
            buffers=self.inputs.parameters("buffer"),
            written_buffers=tuple(self.written_buffers),
            constants=tuple(self.inputs.constants),
            inputs=tuple(self.inputs.inputs),
            received=tuple(received),
            received_placements=tuple(replicate_unit_axes(each.value, self.sizes) for each in received.values()),
            received_gradient_placements=tuple(
                replicate_unit_axes(each.gradient, self.sizes) for each in received.values()
            ),
            sent=sent,
            send_slots=tuple(map(self.slots.current, sent)),
            send_redistributions=tuple(map(self._send_redistribution, sent)),
            loss_placements=replicate_unit_axes(self.slots.placements(loss).value, self.sizes)
            if computes_loss
            else None,
            loss_slot=self.slots.current(loss),
            draws_random=any(is_random(step.op) for step in steps if isinstance(step, ProgramOp)),
            global_shapes={
                value: self.matcher.global_shape(value) for value in (*self.inputs.inputs, *received, *sent)
            },
        )

    def _sent_values(self) -> tuple[int, ...]:
        """The activations that this stage computes and others read, by id."""
        return tuple(
            value
            for value, readers in sorted(self.planned.reading_stages.items())
            if value in self.planned.parameter_dependent
            and self.planned.producing_stage.get(value) == self.index
            and any(reader != self.index for reader in readers)
        )

    def _add_block(self, block: PlannedBlock) -> None:
        regathered = block.regathered

        def redistribute(value: int, planned: ValuePlan, *, regather: bool = False) -> None:
            self._redistribute(value, self._planned_placements(value, planned), block, regather=regather)

        for value, planned in block.inputs.items():
            if value in self.planned.parameter_dependent:
                if not self.slots.is_available(value):  # received as the first block that reads it needs it
                    self.inputs.receive(value, self._planned_placements(value, planned))
                redistribute(value, planned)
                if value in block.shared:
                    redistribute(value, block.shared[value], regather=value in regathered)
        for planned_op in block.ops:
            if self._is_needed(planned_op.op):
                self._add_op(planned_op, block=block.index, recompute=block.recompute)
                for value in planned_op.op.outputs:
                    if value in block.shared and value in self.planned.parameter_dependent:
                        redistribute(value, block.shared[value], regather=value in regathered)
        for value, planned in block.outputs.items():
            if value in self.planned.parameter_dependent:
                redistribute(value, planned)

    def _planned_placements(self, value: int, planned: ValuePlan) -> ValuePlacements:
        return legal_placements(planned, self.matcher.global_shape(value), self.sizes)

    def _redistribute(
        self, value: int, placements: ValuePlacements, block: PlannedBlock, *, regather: bool = False
    ) -> None:
        """Redistribute a value for the next readers in a block, if they need other placements than it has."""
        source = self.slots.current(value)
        redistribution = self._edge(value, self.slots.placements(value), placements)
        if redistribution.is_needed:
            self.steps.append(
                ProgramRedistribution(
                    source=source,
                    target=self.slots.add(value, placements),
                    redistribution=redistribution,
                    block=block.index,
                    recompute=block.recompute,
                    regathered=regather,
                )
            )

    def _is_needed(self, op: Op) -> bool:
        """Whether an op runs in its own block: if it depends on a parameter, or writes a buffer."""
        writes_buffer = op.is_in_place and self.graph.values[op.inputs[0]].kind == "buffer"
        return writes_buffer or not self.planned.parameter_dependent.isdisjoint(op.outputs)

    def _add_op(self, planned: PlannedOp, *, block: int, recompute: Recompute) -> None:
        """Add an op with the sharding that agrees best with its planned placements, and its inputs redistributed to it."""
        op = planned.op
        for value in op.inputs:
            self._make_available(value)
        replicated_behind = self._partial_gradient_passes(op)
        passes = (
            replicated_behind
            if planned.partial_gradient_axes is None
            else [axis in planned.partial_gradient_axes for axis in range(len(self.sizes))]
        )
        sharding = self.matcher.match(op, planned.inputs, planned.outputs, passes)
        redistributions = tuple(self._input_redistribution(sharding, at, value) for at, value in enumerate(op.inputs))
        input_slots = tuple(map(self.slots.current, op.inputs))
        for at, value in enumerate(op.outputs):
            placements = ValuePlacements(value=sharding.outputs[at], gradient=sharding.output_gradients[at])
            self.slots.add(value, placements, between_blocks=block == NO_BLOCK)
            self.slots.partial_gradient_passes[value] = tuple(
                passed and not labels and placement == REPLICATE
                for passed, labels, placement in zip(
                    replicated_behind, sharding.labels, sharding.outputs[at], strict=True
                )
            )
        if op.packet == "batch_norm" or op.is_in_place:
            self.written_buffers.update(
                (value, None) for value in op.inputs if self.graph.values[value].kind == "buffer"
            )
        self.steps.append(
            ProgramOp(
                op=scale_to_micro_batch(op, self.graph.batch, self.planned.plan.micro_batch_size),
                sharding=sharding,
                input_slots=input_slots,
                output_slots=tuple(map(self.slots.current, op.outputs)),
                redistributions=redistributions,
                output_shapes=tuple(map(self.matcher.global_shape, op.outputs)),
                block=block,
                recompute=recompute,
                regathered_inputs=planned.regathered_inputs,
                saves_result=planned.saves_result,
            )
        )

    def _make_available(self, value: int) -> None:
        """Enter a value from outside, or compute it here, replicated, from the model's inputs."""
        preparation = self.inputs.enter(value)
        if preparation is not None:
            replicated: Placements = (REPLICATE,) * len(self.sizes)
            planned = PlannedOp(
                op=preparation,
                inputs=(replicated,) * len(preparation.inputs),
                outputs=(replicated,) * len(preparation.outputs),
            )
            self._add_op(planned, block=NO_BLOCK, recompute="none")

    def _partial_gradient_passes(self, op: Op) -> list[bool]:
        """Per axis, whether partial gradients may reach all inputs of an op that need a gradient."""
        passes = [
            self.slots.passes_partial_gradient(value) for value in op.inputs if self.graph.values[value].requires_grad
        ]
        return [all(each[axis] for each in passes) for axis in range(len(self.sizes))]

    def _input_redistribution(self, sharding: OpSharding, position: int, value: int) -> EdgeRedistribution:
        """From a value's placements to those in which an op takes it as its input at ``position``."""
        needed, gradient = sharding.inputs[position], sharding.input_gradients[position]
        if not self.slots.is_available(value):  # where the plan names no placements between blocks
            self.inputs.receive(value, ValuePlacements(value=needed, gradient=needed))
        return self._edge(value, self.slots.placements(value), ValuePlacements(value=needed, gradient=gradient))

    def _send_redistribution(self, value: int) -> EdgeRedistribution:
        """From a value's placements at the end of its last block to those in which it is sent."""
        placements = self.slots.placements(value)
        return self._edge(value, placements, self.planned.transfer_placements(value, placements))

    def _edge(self, value: int, source: ValuePlacements, target: ValuePlacements) -> EdgeRedistribution:
        requires_grad = self.graph.values[value].requires_grad
        return edge_between(source, target, self.matcher.global_shape(value), self.sizes, requires_grad=requires_grad)
