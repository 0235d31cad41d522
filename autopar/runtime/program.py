"""What each stage computes: its ops with their usages, the moves between them, and what crosses stages.

An activation moves as the plan says: from where its op leaves it to the ``shared`` placement of several readers, from
there to every (placement, gradient) that some reader takes, and at a block's end to where blocks meet; its gradient
goes the same way back. A value in one of these places is a *slot*; where nothing changes, two places are one slot. A
plan that names no placements between ops (``shared``, ``inputs``, ``outputs``) leaves every value where its op does.

All ranks derive the programs of all stages, from the plan and the graph alone, so sender and receiver of a value agree
on its placements at both ends. What is read further on passes through the stages between, from each to the next, and
its gradient back; partial sums are reduced before they are sent.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod

from autopar.graph.ir import Block, Graph, Op
from autopar.graph.random_ops import is_random
from autopar.plan.errors import PlanFileError
from autopar.plan.plan import BlockProgram, OpPlan, Plan, Recompute, StagePlan, ValuePlan
from autopar.runtime.kernels import at_micro_batch
from autopar.runtime.layout import Cut, Placement, Token, is_legal, parse
from autopar.runtime.move import Conversion
from autopar.runtime.usage import Usage, UsageReader, gradient_of, settled


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramOp:
    """An op of a stage: the slots it reads and makes; ``conversions`` say how it takes each of its inputs, shapes are
    global. ``block`` is the block that runs it, -1 for the preparation of data that another block holds."""

    op: Op
    usage: Usage
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    conversions: tuple[Conversion, ...]
    output_shapes: tuple[tuple[int, ...], ...]
    block: int
    recompute: Recompute


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramMove:
    """Brings what slot ``source`` holds to slot ``target``."""

    source: int
    target: int
    conversion: Conversion
    block: int
    recompute: Recompute


@dataclass(frozen=True, slots=True, kw_only=True)
class StageParameter:
    """A parameter or buffer of a stage. ``compute`` is where its ops use it, ``gradient`` where one micro-batch leaves
    its gradient before ZeRO cuts it; ``zero`` (0 to 3) is the stage of ZeRO over ``zero_axes``, which cut dim 0 of what
    ``compute`` leaves to a rank."""

    value: int
    shape: tuple[int, ...]
    compute: Placement
    gradient: Placement
    zero: int
    zero_axes: tuple[int, ...]
    trained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """An activation on its way from stage ``maker``, which makes it or passes it on, to the next, ``reader``, with its
    placement on either's mesh; ``returned`` is how the reader gives the gradient, ``taken_back`` how the maker takes
    it."""

    value: int
    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool
    maker: int
    reader: int
    sent: Placement
    received: Placement
    returned: Placement
    taken_back: Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class StageProgram:
    """A stage's computation on one micro-batch. ``received`` and ``sent`` are activations, by value;
    ``send_conversions`` bring a value from where blocks meet (its ``send_slots``) to its ``sent`` placement. A value's
    own id is the slot of what comes from outside. ``loss`` is how the loss lies in its ``loss_slot``, None where
    another stage makes it; ``random``: some op drops out; ``shapes`` are the global shapes of inputs and of what
    crosses stages."""

    index: int
    plan: StagePlan
    steps: tuple[ProgramOp | ProgramMove, ...]
    parameters: tuple[StageParameter, ...]
    buffers: tuple[StageParameter, ...]
    written: tuple[int, ...]
    constants: tuple[int, ...]
    inputs: tuple[int, ...]
    received: tuple[int, ...]
    received_placements: tuple[Placement, ...]
    received_gradients: tuple[Placement, ...]
    sent: tuple[int, ...]
    send_slots: tuple[int, ...]
    send_conversions: tuple[Conversion, ...]
    loss: Placement | None
    loss_slot: int
    random: bool
    shapes: dict[int, tuple[int, ...]]

    @property
    def ops(self) -> tuple[ProgramOp, ...]:
        return tuple(step for step in self.steps if isinstance(step, ProgramOp))


def build_programs(
    plan: Plan, graph: Graph, blocks: tuple[Block, ...]
) -> tuple[tuple[StageProgram, ...], tuple[Crossing, ...]]:
    """The programs of all stages, and what crosses between them; PlanFileError where plan and graph do not fit."""
    builder = _Builder(plan, graph, blocks)
    programs = tuple(builder.stage(index) for index in range(len(plan.stages)))
    return programs, tuple(builder.crossings(programs))


def carrying(graph: Graph) -> frozenset[int]:
    """Values that depend on a parameter; all others every rank computes from the inputs by itself."""
    found = {value.id for value in graph.values if value.kind == "parameter"}
    for op in graph.ops:
        if not found.isdisjoint(op.inputs):
            found.update(op.outputs)
    return frozenset(found)


class _Builder:
    def __init__(self, plan: Plan, graph: Graph, blocks: tuple[Block, ...]) -> None:
        self.plan, self.graph, self.blocks = plan, graph, blocks
        self.carrying = carrying(graph)
        self.programs = {program.id: program for program in plan.programs}
        self.first_of_kind: dict[int, Block] = {}
        for block in blocks:
            self.first_of_kind.setdefault(block.kind, block)
        stage_of_block = {ref.index: at for at, stage in enumerate(plan.stages) for ref in stage.blocks}
        if set(stage_of_block) != {block.index for block in blocks}:
            raise PlanFileError(f"the plan has {len(stage_of_block)} blocks, the model {len(blocks)}; plan again")
        self.maker: dict[int, int] = {}
        self.op_of: dict[int, Op] = {}
        for block in blocks:
            for op in graph.ops[block.first_op : block.end_op]:
                for value in op.outputs:
                    self.op_of[value] = op
                    self.maker[value] = stage_of_block[block.index]
        self.readers: dict[int, set[int]] = {}
        for block in blocks:
            for op in graph.ops[block.first_op : block.end_op]:
                for value in op.inputs:
                    self.readers.setdefault(value, set()).add(stage_of_block[block.index])

    def stage(self, index: int) -> StageProgram:
        return _StageBuilder(self, index).build()

    def crossings(self, programs: tuple[StageProgram, ...]) -> Iterable[Crossing]:
        """From each stage to the next, in order of value."""
        for value in sorted({value for program in programs for value in program.received}):
            made = self.maker[value]
            last = max(program.index for program in programs if value in program.received)
            maker = programs[made]
            conversion = maker.send_conversions[maker.sent.index(value)]
            found = self.graph.values[value]
            lies = (conversion.target, conversion.gradient_source)
            for at in range(made, last):
                next_lies = self._lies(programs[at + 1], value, (conversion.target, conversion.gradient_source))
                yield Crossing(
                    value=value,
                    shape=conversion.shape,
                    dtype=found.dtype,
                    requires_grad=found.requires_grad,
                    maker=at,
                    reader=at + 1,
                    sent=lies[0],
                    received=next_lies[0],
                    returned=next_lies[1],
                    taken_back=lies[1],
                )
                lies = next_lies

    def _lies(
        self, program: StageProgram, value: int, made: tuple[Placement, Placement]
    ) -> tuple[Placement, Placement]:
        """How a stage takes a value in and gives its gradient back: as it reads it; where it only passes it on, cut by
        the batch alone, terms as they were ``made``."""
        if value in program.received:
            at = program.received.index(value)
            return program.received_placements[at], program.received_gradients[at]
        shape = self.graph.values[value].shape
        grows = next((dim for dim, size in enumerate(shape) if self.graph.batch.grows(size)), None)
        cut: Token = "R" if grows is None else Cut(grows)
        tokens = tuple(cut if axis.name == "dp" and not at else "R" for at, axis in enumerate(program.plan.axes))
        sizes = [axis.size for axis in program.plan.axes]
        scaled = tuple(self.graph.batch.scale(size, self.plan.micro_batch_size) for size in shape)
        if not is_legal(scaled, tokens, sizes):
            tokens = ("R",) * len(sizes)
        cuts = settled(tokens, sizes)
        return made[0] if "P" in made[0] else cuts, made[1] if "P" in made[1] else cuts

    def crosses_as_terms(self, value: int) -> tuple[bool, bool]:
        """Whether a value, and its gradient, may cross stages as partial sums: all stages on its way hold as many
        terms."""
        made = self.maker[value]
        last = max(self.readers[value])
        sizes = [tuple(axis.size for axis in self.plan.stages[at].axes) for at in range(made, last + 1)]
        lies = [self._planned_lie(at, value) for at in range(made, last + 1)]
        passed_on = any(lie is None and mesh != sizes[0] for lie, mesh in zip(lies, sizes, strict=True))
        forward, backward = (
            {
                prod(size for size, token in zip(mesh, parse(lie[side]), strict=True) if token == "P")
                for lie, mesh in zip(lies, sizes, strict=True)
                if lie is not None and lie[side]
            }
            for side in (0, 1)
        )
        return len(forward) == 1 and not passed_on, len(backward) == 1 and not passed_on

    def _planned_lie(self, stage: int, value: int) -> tuple[str, str] | None:
        """How a stage makes a value or takes it in, None where it only passes it on."""
        for ref in self.plan.stages[stage].blocks:
            block, program = self.blocks[ref.index], self.programs[ref.program]
            for values, planned in ((block.outputs, program.outputs), (block.inputs, program.inputs)):
                if planned and value in values:
                    lie = planned[values.index(value)]
                    return lie.placement, lie.gradient
        return None

    def lies_between(
        self, block: Block, program: BlockProgram
    ) -> tuple[dict[int, ValuePlan], dict[int, ValuePlan], dict[int, ValuePlan]]:
        """How values lie where the block begins, for several of its readers, and where it ends, as far as the plan
        says."""
        first = self.first_of_kind[block.kind]
        alike = dict(zip(first.inputs, block.inputs, strict=True))
        ops = self.graph.ops
        for mine, theirs in zip(ops[block.first_op : block.end_op], ops[first.first_op : first.end_op], strict=True):
            alike.update(zip(theirs.outputs, mine.outputs, strict=True))
        by_name = {self.graph.values[theirs].name: mine for theirs, mine in alike.items()}
        unknown = [planned.name for planned in program.shared if planned.name not in by_name]
        sides = ((program.inputs, block.inputs), (program.outputs, block.outputs))
        if unknown or any(planned and len(planned) != len(values) for planned, values in sides):
            raise PlanFileError(
                f"program {program.id} of the plan does not fit block {block.name} of the model; plan again"
            )
        shared = {by_name[planned.name]: planned for planned in program.shared}
        begins, ends = (dict(zip(values, planned, strict=True)) if planned else {} for planned, values in sides)
        return begins, shared, ends

    def block_ops(
        self, block: Block, program: BlockProgram
    ) -> Iterable[tuple[Op, tuple[Placement, ...], tuple[Placement, ...], frozenset[int] | None]]:
        """Each op of a block with its planned placements, and the axes on which a partial gradient is to go through it,
        None where the plan does not say."""
        ops = self.graph.ops[block.first_op : block.end_op]
        if len(ops) != len(program.ops) or program.kind != block.kind:
            raise PlanFileError(
                f"program {program.id} of the plan has {len(program.ops)} ops of kind {program.kind}, block {block.name} of "
                f"the model {len(ops)} of kind {block.kind}; plan again"
            )
        for op, planned in zip(ops, program.ops, strict=True):
            if len(planned.inputs) != len(op.inputs) or len(planned.outputs) != len(op.outputs):
                raise PlanFileError(f"the plan's op {planned.name} does not fit the model's {op.name}; plan again")
            passing = _partial_axes(planned) if planned.output_gradients else None
            yield op, tuple(map(parse, planned.inputs)), tuple(map(parse, planned.outputs)), passing

    def block_parameters(self, block: Block, program: BlockProgram) -> Iterable[tuple[int, StageParameter]]:
        """(value, how it is stored) of the parameters and buffers that the plan places."""
        names = [
            self.graph.values[value].names or (self.graph.values[value].name,)
            for value in self.first_of_kind[block.kind].parameters
        ]
        places = {name: at for at, all_names in enumerate(names) for name in all_names}
        for planned in program.parameters:
            if planned.name not in places:
                raise PlanFileError(f"the plan's parameter {planned.name} is not in the model; plan again")
            value = self.graph.values[block.parameters[places[planned.name]]]
            compute, rest = parse(planned.compute), parse(planned.parameter)
            gradient, optimizer = parse(planned.gradient), parse(planned.optimizer)
            axes = tuple(axis for axis, (at, used) in enumerate(zip(optimizer, compute, strict=True)) if at != used)
            trained = value.kind == "parameter" and value.requires_grad
            zero = 0
            if axes and value.shape and trained:
                zero = 3 if rest[axes[0]] != compute[axes[0]] else 2 if isinstance(gradient[axes[0]], Cut) else 1
            yield (
                value.id,
                StageParameter(
                    value=value.id,
                    shape=value.shape,
                    compute=compute,
                    gradient=tuple("P" if axis in axes else token for axis, token in enumerate(gradient)),
                    zero=zero,
                    zero_axes=axes if zero else (),
                    trained=value.kind == "parameter" and value.requires_grad,
                ),
            )


def _partial_axes(planned: OpPlan) -> frozenset[int]:
    """The axes on which the op's outputs are replicated and their gradients partial sums."""
    return frozenset(
        axis
        for output, gradient in zip(planned.outputs, planned.output_gradients, strict=False)
        for axis, (token, given) in enumerate(zip(parse(output), parse(gradient), strict=False))
        if token == "R" and given == "P"
    )


def _of_all_uses(first: StageParameter, other: StageParameter) -> StageParameter:
    """A tied parameter is stored as its first block uses it. Where another block cuts it, or leaves terms of its
    gradient, the gradient stays a sum of terms until the end of the step."""
    gradient = tuple(
        "P" if kept == "R" and (used != kept or {one, two} == {"R", "P"}) else one
        for kept, used, one, two in zip(first.compute, other.compute, first.gradient, other.gradient, strict=True)
    )
    return replace(first, gradient=gradient)


class _StageBuilder:
    """Builds one stage's program; ``placed`` is where each slot's value lies, and where its gradient must go; ``at``
    the slot of each value for the next reader, ``between`` where blocks meet."""

    def __init__(self, parent: _Builder, index: int) -> None:
        self.parent, self.graph, self.index = parent, parent.graph, index
        self.plan = parent.plan.stages[index]
        self.sizes = tuple(axis.size for axis in self.plan.axes)
        self.reader = UsageReader(self.graph, parent.plan.micro_batch_size, self.sizes)
        self.whole: Placement = ("R",) * len(self.sizes)
        self.placed: dict[int, tuple[Placement, Placement]] = {}
        self.at: dict[int, int] = {}
        self.between: dict[int, int] = {}
        self.num_slots = len(self.graph.values)
        self.pure: dict[int, tuple[bool, ...]] = {}
        self.stored: dict[int, StageParameter] = {}
        self.received: dict[int, tuple[Placement, Placement]] = {}
        self.inputs: dict[int, None] = {}
        self.constants: dict[int, None] = {}
        self.written: dict[int, None] = {}
        self.steps: list[ProgramOp | ProgramMove] = []

    def build(self) -> StageProgram:
        planned = {ref.index: self.parent.programs[ref.program] for ref in self.plan.blocks}
        mine = [self.parent.blocks[ref.index] for ref in self.plan.blocks]
        for block in mine:
            for value, parameter in self.parent.block_parameters(block, planned[block.index]):
                self.stored[value] = _of_all_uses(self.stored[value], parameter) if value in self.stored else parameter
        for block in mine:
            self._add_block(block, planned[block.index])
        sent = sorted(
            value
            for value, readers in self.parent.readers.items()
            if value in self.parent.carrying
            and self.parent.maker.get(value) == self.index
            and any(reader != self.index for reader in readers)
        )
        loss = self.graph.outputs[0]
        makes_loss = self.parent.maker[loss] == self.index
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
        begins, shared, ends = self.parent.lies_between(block, program)
        self.at = {}
        for value, planned in begins.items():
            if value in self.parent.carrying:
                lie = self._lie(value, planned)
                if self._slot(value) not in self.placed:  # an activation of another stage comes as the block wants it
                    self._receive(value, lie)
                self._move(value, lie, block, program)
                if value in shared:
                    self._move(value, self._lie(value, shared[value]), block, program)
        for op, inputs, outputs, passing in self.parent.block_ops(block, program):
            if self._is_needed(op):
                self._add(op, inputs, outputs, passing, block.index, program.recompute)
                for value in op.outputs:
                    if value in shared and value in self.parent.carrying:
                        self._move(value, self._lie(value, shared[value]), block, program)
        for value, planned in ends.items():
            if value in self.parent.carrying:
                self._move(value, self._lie(value, planned), block, program)
        for op in self.graph.ops[block.first_op : block.end_op]:
            self.between.update((value, self.at[value]) for value in op.outputs if value in self.at)
        self.at = {}

    def _slot(self, value: int) -> int:
        """The slot that the next reader of a value finds it in."""
        return self.at.get(value, self.between.get(value, value))

    def _lie(self, value: int, planned: ValuePlan) -> tuple[Placement, Placement]:
        """The plan's placement and that of the gradient, replicated on axes where the value's sizes do not allow the
        cut."""
        placement, shape = parse(planned.placement), self.reader.shape(value)
        gradient = parse(planned.gradient) if planned.gradient else gradient_of(placement)
        for axis in reversed(range(len(self.sizes))):
            if is_legal(shape, placement, self.sizes):
                break
            placement, gradient = (
                tuple("R" if at == axis else token for at, token in enumerate(side)) for side in (placement, gradient)
            )
        return placement, gradient

    def _receive(self, value: int, lie: tuple[Placement, Placement]) -> None:
        forward, backward = self.parent.crosses_as_terms(value)
        self.received[value] = (lie[0] if forward else gradient_of(lie[0]), lie[1] if backward else gradient_of(lie[1]))
        self.pure[value] = (False,) * len(self.sizes)
        self.placed[value] = self.received[value]

    def _move(self, value: int, lie: tuple[Placement, Placement], block: Block, program: BlockProgram) -> None:
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
                )
            )
        self.at[value] = target

    def _new_slot(self, lie: tuple[Placement, Placement]) -> int:
        self.num_slots += 1
        self.placed[self.num_slots - 1] = lie
        return self.num_slots - 1

    def _is_needed(self, op: Op) -> bool:
        """Preparation of data is made where it is read; what writes a buffer runs where it stands."""
        writes = op.target.split(".")[1].endswith("_")
        buffer = writes and self.graph.values[op.inputs[0]].kind == "buffer"
        return buffer or not self.parent.carrying.isdisjoint(op.outputs)

    def _add(
        self,
        op: Op,
        inputs: tuple[Placement, ...],
        outputs: tuple[Placement, ...],
        passing: frozenset[int] | None,
        block: int,
        recompute: Recompute,
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
                alone and not labels and token == "R"
                for alone, labels, token in zip(pure, usage.labels, usage.outputs[at], strict=True)
            )
            if block < 0:
                self.between[value] = self.at.pop(value)
        if op.target.split(".")[1] == "batch_norm" or op.target.split(".")[1].endswith("_"):
            self.written.update((value, None) for value in op.inputs if self.graph.values[value].kind == "buffer")
        scaled = at_micro_batch(op, self.graph.batch, self.parent.plan.micro_batch_size)
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
                    compute=self.whole,
                    gradient=self.whole,
                    zero=0,
                    zero_axes=(),
                    trained=trained,
                )
                self.stored[value] = stored
            self.placed[value] = (stored.compute, stored.gradient)
            if stored.trained:
                self.pure[value] = tuple(token == "P" for token in stored.gradient)
        elif found.kind == "activation" and value in self.parent.carrying:
            if found.requires_grad:
                self.pure[value] = (False,) * len(self.sizes)
        elif found.kind == "activation":
            op = self.parent.op_of[value]
            self._add(op, (self.whole,) * len(op.inputs), (self.whole,) * len(op.outputs), None, -1, "none")
        else:
            (self.inputs if found.kind == "input" else self.constants)[value] = None
            self.placed[value] = (self.whole, self.whole)

    def _send(self, value: int) -> Conversion:
        made, wanted = self.placed[self._slot(value)]
        forward, backward = self.parent.crosses_as_terms(value)
        sent, returned = made if forward else gradient_of(made), wanted if backward else gradient_of(wanted)
        return self._conversion(value, made, sent, returned, wanted)

    def _conversion(
        self, value: int, source: Placement, target: Placement, given: Placement, wanted: Placement
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
