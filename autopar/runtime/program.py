"""What each stage computes: its ops with their usages, how every reader takes every value, and what crosses stages.

All ranks derive the programs of all stages, from the plan and the graph alone, so sender and receiver of a value agree
on its placements at both ends: the sender's are those its maker leaves it in, the receiver's those its first reader
wants (partial sums are reduced before they are sent, and gradients, too).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from autopar.graph.ir import Block, Graph, Op
from autopar.graph.literals import resolve
from autopar.plan.errors import PlanFileError, UsageError
from autopar.plan.plan import BlockProgram, OpPlan, Plan, Recompute, StagePlan
from autopar.rules.labels import argument
from autopar.runtime.kernels import at_micro_batch
from autopar.runtime.layout import Cut, Placement, parse
from autopar.runtime.move import Conversion
from autopar.runtime.usage import Usage, UsageReader, gradient_of, settled


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramOp:
    """An op of a stage; ``conversions`` say how it takes each of its inputs, shapes are global. ``block`` is the block that runs it, -1 for
    the preparation of data that another block holds."""

    op: Op
    usage: Usage
    conversions: tuple[Conversion, ...]
    output_shapes: tuple[tuple[int, ...], ...]
    block: int
    recompute: Recompute


@dataclass(frozen=True, slots=True, kw_only=True)
class StageParameter:
    """A parameter or buffer of a stage. ``compute`` is where its ops use it, ``gradient`` where one micro-batch leaves its
    gradient before ZeRO cuts it; ``zero`` (0 to 3) is the stage of ZeRO over ``zero_axes``, which cut dim 0 of what
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
    """An activation made in stage ``maker`` and read in stage ``reader``, with its placement on either's mesh."""

    value: int
    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool
    maker: int
    reader: int
    sent: Placement
    received: Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class StageProgram:
    """A stage's computation on one micro-batch. ``received`` and ``sent`` are activations, by value; ``send_conversions``
    bring a value from where its maker leaves it to its ``sent`` placement. ``loss`` is how the loss lies, None where
    another stage makes it; ``random``: some op drops out; ``shapes`` are the global shapes of inputs and of what crosses stages."""

    index: int
    plan: StagePlan
    ops: tuple[ProgramOp, ...]
    parameters: tuple[StageParameter, ...]
    buffers: tuple[StageParameter, ...]
    written: tuple[int, ...]
    constants: tuple[int, ...]
    inputs: tuple[int, ...]
    received: tuple[int, ...]
    received_placements: tuple[Placement, ...]
    sent: tuple[int, ...]
    send_conversions: tuple[Conversion, ...]
    loss: Placement | None
    random: bool
    shapes: dict[int, tuple[int, ...]]


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
        for reader in programs:
            for value, placement in zip(reader.received, reader.received_placements, strict=True):
                maker = programs[self.maker[value]]
                conversion = maker.send_conversions[maker.sent.index(value)]
                found = self.graph.values[value]
                yield Crossing(
                    value=value,
                    shape=conversion.shape,
                    dtype=found.dtype,
                    requires_grad=found.requires_grad,
                    maker=maker.index,
                    reader=reader.index,
                    sent=conversion.target,
                    received=placement,
                )

    def block_ops(
        self, block: Block, program: BlockProgram
    ) -> Iterable[tuple[Op, tuple[Placement, ...], tuple[Placement, ...], frozenset[int]]]:
        """Each op of a block with its planned placements, and the axes on which a partial gradient is to go through it."""
        ops = self.graph.ops[block.first_op : block.end_op]
        if len(ops) != len(program.ops) or program.kind != block.kind:
            raise PlanFileError(
                f"program {program.id} of the plan has {len(program.ops)} ops of kind {program.kind}, block {block.name} of "
                f"the model {len(ops)} of kind {block.kind}; plan again"
            )
        for op, planned in zip(ops, program.ops, strict=True):
            if len(planned.inputs) != len(op.inputs) or len(planned.outputs) != len(op.outputs):
                raise PlanFileError(f"the plan's op {planned.name} does not fit the model's {op.name}; plan again")
            passing = _partial_axes(planned)
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


def _is_random(op: Op) -> bool:
    """Whether an op draws random numbers; UsageError for one whose numbers would depend on the plan."""
    probability = {"dropout": 1, "scaled_dot_product_attention": 4}.get(op.target.split(".")[1])
    if probability is not None:
        return bool(argument(op, probability, "dropout_p", 0.0)) and (probability > 1 or bool(op.args[2]))
    if torch.Tag.nondeterministic_seeded in getattr(resolve(op.target), "tags", ()):
        raise UsageError(
            f"{op.target}{' at ' + op.source if op.source else ''} draws random numbers that would differ from rank to "
            "rank; use torch.nn.functional.dropout, or draw them outside and pass them as inputs"
        )
    return False


def _partial_axes(planned: OpPlan) -> frozenset[int]:
    """The axes on which the op's outputs are replicated and their gradients partial sums."""
    return frozenset(
        axis
        for output, gradient in zip(planned.outputs, planned.output_gradients, strict=False)
        for axis, (token, given) in enumerate(zip(parse(output), parse(gradient), strict=False))
        if token == "R" and given == "P"
    )


class _StageBuilder:
    """Builds one stage's program; ``placed`` is where each value lies, and where its gradient must go."""

    def __init__(self, parent: _Builder, index: int) -> None:
        self.parent, self.graph, self.index = parent, parent.graph, index
        self.plan = parent.plan.stages[index]
        self.sizes = tuple(axis.size for axis in self.plan.axes)
        self.reader = UsageReader(self.graph, parent.plan.micro_batch_size, self.sizes)
        self.whole: Placement = ("R",) * len(self.sizes)
        self.placed: dict[int, tuple[Placement, Placement]] = {}
        self.pure: dict[int, tuple[bool, ...]] = {}
        self.stored: dict[int, StageParameter] = {}
        self.received: dict[int, Placement] = {}
        self.inputs: dict[int, None] = {}
        self.constants: dict[int, None] = {}
        self.written: dict[int, None] = {}
        self.ops: list[ProgramOp] = []

    def build(self) -> StageProgram:
        planned = {ref.index: self.parent.programs[ref.program] for ref in self.plan.blocks}
        mine = [self.parent.blocks[ref.index] for ref in self.plan.blocks]
        for block in mine:
            for value, parameter in self.parent.block_parameters(block, planned[block.index]):
                self.stored.setdefault(value, parameter)
        for block in mine:
            for op, inputs, outputs, passing in self.parent.block_ops(block, planned[block.index]):
                if self._is_needed(op):
                    self._add(op, inputs, outputs, passing, block.index, planned[block.index].recompute)
        sent = sorted(
            value
            for value, readers in self.parent.readers.items()
            if value in self.parent.carrying
            and self.parent.maker.get(value) == self.index
            and any(reader != self.index for reader in readers)
        )
        loss = self.graph.outputs[0]
        kept = [self.stored[value] for value in sorted(self.stored)]
        return StageProgram(
            index=self.index,
            plan=self.plan,
            ops=tuple(self.ops),
            parameters=tuple(p for p in kept if self.graph.values[p.value].kind == "parameter"),
            buffers=tuple(p for p in kept if self.graph.values[p.value].kind == "buffer"),
            written=tuple(self.written),
            constants=tuple(self.constants),
            inputs=tuple(self.inputs),
            received=tuple(self.received),
            received_placements=tuple(settled(placement, self.sizes) for placement in self.received.values()),
            sent=tuple(sent),
            send_conversions=tuple(self._send(value) for value in sent),
            loss=settled(self.placed[loss][0], self.sizes) if self.parent.maker[loss] == self.index else None,
            random=any(_is_random(op.op) for op in self.ops),
            shapes={value: self.reader.shape(value) for value in (*self.inputs, *self.received, *sent)},
        )

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
        passing: frozenset[int],
        block: int,
        recompute: Recompute,
    ) -> None:
        for value in op.inputs:
            self._provide(value)
        carriers = [self.pure[value] for value in op.inputs if self.graph.values[value].requires_grad]
        pure = [all(each[axis] for each in carriers) for axis in range(len(self.sizes))]
        usage = self.reader.read(op, inputs, outputs, [alone or axis in passing for axis, alone in enumerate(pure)])
        conversions = []
        for at, value in enumerate(op.inputs):
            if value not in self.placed:  # an activation of another stage comes as its first reader wants it
                self.received[value] = gradient_of(usage.inputs[at])
                self.placed[value] = (self.received[value], self.received[value])
            made, wanted = self.placed[value]
            conversions.append(self._conversion(value, made, usage.inputs[at], usage.input_gradients[at], wanted))
        for at, value in enumerate(op.outputs):
            self.placed[value] = (usage.outputs[at], usage.output_gradients[at])
            self.pure[value] = tuple(
                alone and not labels and token == "R"
                for alone, labels, token in zip(pure, usage.labels, usage.outputs[at], strict=True)
            )
        if op.target.split(".")[1] == "batch_norm" or op.target.split(".")[1].endswith("_"):
            self.written.update((value, None) for value in op.inputs if self.graph.values[value].kind == "buffer")
        scaled = at_micro_batch(op, self.graph.batch, self.parent.plan.micro_batch_size)
        self.ops.append(
            ProgramOp(
                op=scaled,
                usage=usage,
                conversions=tuple(conversions),
                output_shapes=tuple(self.reader.shape(value) for value in op.outputs),
                block=block,
                recompute=recompute,
            )
        )

    def _provide(self, value: int) -> None:
        """Makes sure that a value is there: stored, to be received, an input, or prepared here from the inputs."""
        if value in self.placed:
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
            self._add(op, (self.whole,) * len(op.inputs), (self.whole,) * len(op.outputs), frozenset(), -1, "none")
        else:
            (self.inputs if found.kind == "input" else self.constants)[value] = None
            self.placed[value] = (self.whole, self.whole)

    def _send(self, value: int) -> Conversion:
        made, wanted = self.placed[value]
        sent = gradient_of(made)
        return self._conversion(value, made, sent, sent, wanted)

    def _conversion(
        self, value: int, source: Placement, target: Placement, given: Placement, wanted: Placement
    ) -> Conversion:
        """From the maker's placement to the reader's; the gradient from what the reader gives to what the maker wants."""
        grad = self.graph.values[value].requires_grad
        return Conversion(
            shape=self.reader.shape(value),
            source=settled(source, self.sizes),
            target=settled(target, self.sizes),
            gradient_source=settled(given, self.sizes) if grad else (),
            gradient_target=settled(wanted, self.sizes) if grad else (),
        )
