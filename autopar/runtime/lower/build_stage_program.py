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
from autopar.runtime.lower.local_op import at_micro_batch
from autopar.runtime.lower.op_sharding import UsageReader, gradient_of, settled
from autopar.runtime.lower.planned_blocks import PlannedBlocks
from autopar.runtime.lower.redistribute_tensor import Conversion
from autopar.runtime.lower.stage_program import ProgramMove, ProgramOp, StageParameter, StageProgram


class StageBuilder:
    """Builds one stage's program; ``placed`` is where each slot's value lies, and where its gradient must go; ``at``
    the slot of each value for the next reader, ``between`` where blocks meet."""

    def __init__(self, planned: PlannedBlocks, index: int) -> None:
        self.planned, self.graph, self.index = planned, planned.graph, index
        self.plan = planned.plan.stages[index]
        self.sizes = tuple(axis.size for axis in self.plan.axes)
        self.reader = UsageReader(self.graph, planned.plan.micro_batch_size, self.sizes)
        self.replicated: Placements = (REPLICATE,) * len(self.sizes)
        self.placed: dict[int, tuple[Placements, Placements]] = {}
        self.at: dict[int, int] = {}
        self.between: dict[int, int] = {}
        self.num_slots = len(self.graph.values)
        self.pure: dict[int, tuple[bool, ...]] = {}
        self.stored: dict[int, StageParameter] = {}
        self.received: dict[int, tuple[Placements, Placements]] = {}
        self.inputs: dict[int, None] = {}
        self.constants: dict[int, None] = {}
        self.written: dict[int, None] = {}
        self.steps: list[ProgramOp | ProgramMove] = []

    def build(self) -> StageProgram:
        programs = {ref.index: self.planned.programs[ref.program] for ref in self.plan.blocks}
        mine = [self.planned.blocks[ref.index] for ref in self.plan.blocks]
        for block in mine:
            for value, parameter in self.planned.block_parameters(block, programs[block.index]):
                self.stored[value] = _of_all_uses(self.stored[value], parameter) if value in self.stored else parameter
        for block in mine:
            self._add_block(block, programs[block.index])
        sent = sorted(
            value
            for value, readers in self.planned.readers.items()
            if value in self.planned.carrying
            and self.planned.maker.get(value) == self.index
            and any(reader != self.index for reader in readers)
        )
        loss = self.graph.outputs[0]
        makes_loss = self.planned.maker[loss] == self.index
        kept = [self.stored[value] for value in sorted(self.stored)]
        steps = tuple(self.steps)
        return StageProgram(
            index=self.index,
            plan=self.plan,
            steps=steps,
            parameters=tuple(p for p in kept if self.graph.values[p.value].kind == "parameter"),
            buffers=tuple(p for p in kept if self.graph.values[p.value].kind == "buffer"),
            written=tuple(self.written),
            constants=tuple(self.constants),
            inputs=tuple(self.inputs),
            received=tuple(self.received),
            received_placements=tuple(settled(lie[0], self.sizes) for lie in self.received.values()),
            received_gradients=tuple(settled(lie[1], self.sizes) for lie in self.received.values()),
            sent=tuple(sent),
            send_slots=tuple(self._slot(value) for value in sent),
            send_conversions=tuple(self._send(value) for value in sent),
            loss=settled(self.placed[self._slot(loss)][0], self.sizes) if makes_loss else None,
            loss_slot=self._slot(loss),
            random=any(is_random(step.op) for step in steps if isinstance(step, ProgramOp)),
            shapes={value: self.reader.shape(value) for value in (*self.inputs, *self.received, *sent)},
        )

    def _add_block(self, block: Block, program: BlockProgram) -> None:
        begins, shared, ends = self.planned.lies_between(block, program)
        ops = self.graph.ops[block.first_op : block.end_op]
        again_gathered = {
            op.inputs[at] for op, planned in zip(ops, program.ops, strict=False) for at in planned.gathers_again
        }
        recompute, stays = self.planned.recomputed(block, program)
        program = msgspec.structs.replace(program, recompute=recompute)
        self.at = {}
        for value, planned in begins.items():
            if value in self.planned.carrying:
                lie = self._lie(value, planned)
                if self._slot(value) not in self.placed:  # an activation of another stage comes as the block wants it
                    self._receive(value, lie)
                self._move(value, lie, block, program)
                if value in shared:
                    self._move(value, self._lie(value, shared[value]), block, program, again=value in again_gathered)
        told = zip(self.planned.block_ops(block, program), program.ops, strict=True)
        for (op, inputs, outputs, passing), op_plan in told:
            if self._is_needed(op):
                again = op_plan.gathers_again
                self._add(op, inputs, outputs, passing, block.index, recompute, again, stays=op.id in stays)
                for value in op.outputs:
                    if value in shared and value in self.planned.carrying:
                        self._move(
                            value, self._lie(value, shared[value]), block, program, again=value in again_gathered
                        )
        for value, planned in ends.items():
            if value in self.planned.carrying:
                self._move(value, self._lie(value, planned), block, program)
        for op in ops:
            self.between.update((value, self.at[value]) for value in op.outputs if value in self.at)
        self.at = {}

    def _slot(self, value: int) -> int:
        """The slot that the next reader of a value finds it in."""
        return self.at.get(value, self.between.get(value, value))

    def _lie(self, value: int, planned: ValuePlan) -> tuple[Placements, Placements]:
        """The plan's placements and those of the gradient, replicated on axes where the value's sizes do not allow the
        shard."""
        placements, shape = parse_placements(planned.placement), self.reader.shape(value)
        gradient = parse_placements(planned.gradient) if planned.gradient else gradient_of(placements)
        for axis in reversed(range(len(self.sizes))):
            if is_legal(shape, placements, self.sizes):
                break
            placements, gradient = (
                tuple(REPLICATE if at == axis else each for at, each in enumerate(side))
                for side in (placements, gradient)
            )
        return placements, gradient

    def _receive(self, value: int, lie: tuple[Placements, Placements]) -> None:
        forward, backward = self.planned.crosses_as_terms(value)
        self.received[value] = (lie[0] if forward else gradient_of(lie[0]), lie[1] if backward else gradient_of(lie[1]))
        self.pure[value] = (False,) * len(self.sizes)
        self.placed[value] = self.received[value]

    def _move(
        self,
        value: int,
        lie: tuple[Placements, Placements],
        block: Block,
        program: BlockProgram,
        *,
        again: bool = False,
    ) -> None:
        """Bring a value to where the block's next readers find it."""
        source = self._slot(value)
        made, wanted = self.placed[source]
        conversion = self._conversion(value, made, lie[0], lie[1], wanted)
        target = source
        if conversion.changes:
            target = self._new_slot(lie)
            self.steps.append(
                ProgramMove(
                    source=source,
                    target=target,
                    conversion=conversion,
                    block=block.index,
                    recompute=program.recompute,
                    again=again,
                )
            )
        self.at[value] = target

    def _new_slot(self, lie: tuple[Placements, Placements]) -> int:
        self.num_slots += 1
        self.placed[self.num_slots - 1] = lie
        return self.num_slots - 1

    def _is_needed(self, op: Op) -> bool:
        """Preparation of data is made where it is read; what writes a buffer runs where it stands."""
        writes = op.is_in_place
        buffer = writes and self.graph.values[op.inputs[0]].kind == "buffer"
        return buffer or not self.planned.carrying.isdisjoint(op.outputs)

    def _add(
        self,
        op: Op,
        inputs: tuple[Placements, ...],
        outputs: tuple[Placements, ...],
        passing: frozenset[int] | None,
        block: int,
        recompute: Recompute,
        gathers_again: tuple[int, ...] = (),
        *,
        stays: bool = False,
    ) -> None:
        for value in op.inputs:
            self._provide(value)
        carriers = [self.pure[value] for value in op.inputs if self.graph.values[value].requires_grad]
        pure = [all(each[axis] for each in carriers) for axis in range(len(self.sizes))]
        through = pure if passing is None else [axis in passing for axis in range(len(self.sizes))]
        usage = self.reader.read(op, inputs, outputs, through)
        conversions = []
        for at, value in enumerate(op.inputs):
            if self._slot(value) not in self.placed:  # where the plan names no placements between blocks
                self._receive(value, (usage.inputs[at], usage.inputs[at]))
            made, wanted = self.placed[self._slot(value)]
            conversions.append(self._conversion(value, made, usage.inputs[at], usage.input_gradients[at], wanted))
        reads = tuple(self._slot(value) for value in op.inputs)
        for at, value in enumerate(op.outputs):
            self.at[value] = self._new_slot((usage.outputs[at], usage.output_gradients[at]))
            self.pure[value] = tuple(
                alone and not labels and placement == REPLICATE
                for alone, labels, placement in zip(pure, usage.labels, usage.outputs[at], strict=True)
            )
            if block < 0:
                self.between[value] = self.at.pop(value)
        if op.packet == "batch_norm" or op.is_in_place:
            self.written.update((value, None) for value in op.inputs if self.graph.values[value].kind == "buffer")
        scaled = at_micro_batch(op, self.graph.batch, self.planned.plan.micro_batch_size)
        self.steps.append(
            ProgramOp(
                op=scaled,
                usage=usage,
                reads=reads,
                makes=tuple(self._slot(value) for value in op.outputs),
                conversions=tuple(conversions),
                output_shapes=tuple(self.reader.shape(value) for value in op.outputs),
                block=block,
                recompute=recompute,
                gathers_again=gathers_again,
                stays=stays,
            )
        )

    def _provide(self, value: int) -> None:
        """Makes sure that a value is there: stored, to be received, an input, or prepared here from the inputs."""
        if self._slot(value) in self.placed:
            return
        found = self.graph.values[value]
        self.pure[value] = (True,) * len(self.sizes)
        if found.kind in ("parameter", "buffer"):
            stored = self.stored.get(value)
            if stored is None:
                trained = found.kind == "parameter" and found.requires_grad
                stored = StageParameter(
                    value=value,
                    shape=found.shape,
                    compute=self.replicated,
                    gradient=self.replicated,
                    zero=0,
                    zero_axes=(),
                    trained=trained,
                )
                self.stored[value] = stored
            self.placed[value] = (stored.compute, stored.gradient)
            if stored.trained:
                self.pure[value] = tuple(placement == PARTIAL for placement in stored.gradient)
        elif found.kind == "activation" and value in self.planned.carrying:
            if found.requires_grad:
                self.pure[value] = (False,) * len(self.sizes)
        elif found.kind == "activation":
            op = self.planned.op_of[value]
            self._add(op, (self.replicated,) * len(op.inputs), (self.replicated,) * len(op.outputs), None, -1, "none")
        else:
            (self.inputs if found.kind == "input" else self.constants)[value] = None
            self.placed[value] = (self.replicated, self.replicated)

    def _send(self, value: int) -> Conversion:
        made, wanted = self.placed[self._slot(value)]
        forward, backward = self.planned.crosses_as_terms(value)
        sent, returned = made if forward else gradient_of(made), wanted if backward else gradient_of(wanted)
        return self._conversion(value, made, sent, returned, wanted)

    def _conversion(
        self, value: int, source: Placements, target: Placements, given: Placements, wanted: Placements
    ) -> Conversion:
        """From the maker's placement to the reader's; the gradient from what the reader gives to what the maker
        wants."""
        grad = self.graph.values[value].requires_grad
        return Conversion(
            shape=self.reader.shape(value),
            source=settled(source, self.sizes),
            target=settled(target, self.sizes),
            gradient_source=settled(given, self.sizes) if grad else (),
            gradient_target=settled(wanted, self.sizes) if grad else (),
        )


def _of_all_uses(first: StageParameter, other: StageParameter) -> StageParameter:
    """A tied parameter is stored as its first block uses it. Where another block shards it, or leaves a partial
    gradient, the gradient stays partial until the end of the step."""
    gradient = tuple(
        PARTIAL if stored == REPLICATE and (used != stored or {one, two} == {REPLICATE, PARTIAL}) else one
        for stored, used, one, two in zip(first.compute, other.compute, first.gradient, other.gradient, strict=True)
    )
    return replace(first, gradient=gradient)
