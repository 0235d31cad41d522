"""What a plan says of a model's blocks, read against the model's graph.

A plan names the ops, parameters and values of equal blocks once, in one ``BlockProgram``; here each block of the model
gets its own: the placements of its ops, of the values between them and of its parameters, and which stage produces and
which stages read a value. A plan that does not fit the model is refused with PlanFileError.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from autopar.core.errors import PlanFileError
from autopar.core.placement import PARTIAL, REPLICATE, Placements, Shard, parse_placements
from autopar.core.plan import BlockProgram, OpPlan, Plan, Recompute, ValuePlan
from autopar.graph.ir import Block, Graph, Op
from autopar.rules.registry import sharding_rule
from autopar.runtime.lower.op_sharding import replicate_partial_axes
from autopar.runtime.lower.stage_program import ParameterSharding
from autopar.runtime.lower.value_placements import ValuePlacements


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedOp:
    """An op with the placements that the plan gives its inputs and outputs.

    ``partial_gradient_axes``: where the op is replicated and its outputs have partial gradients; None where the plan
    does not say. ``regathered_inputs`` and ``saves_result`` are as in ``ProgramOp``."""

    op: Op
    inputs: tuple[Placements, ...]
    outputs: tuple[Placements, ...]
    partial_gradient_axes: frozenset[int] | None = None
    regathered_inputs: tuple[int, ...] = ()
    saves_result: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedBlock:
    """A block of the model as the plan runs it: its ops in order, and how values are placed at its begin (``inputs``), for
    several readers inside it (``shared``) and at its end (``outputs``), by value, as far as the plan says. ``recompute``
    is "full" also where selective recomputation recomputes all but the ops that save their results."""

    index: int
    recompute: Recompute
    ops: tuple[PlannedOp, ...]
    inputs: dict[int, ValuePlan]
    shared: dict[int, ValuePlan]
    outputs: dict[int, ValuePlan]

    @property
    def regathered(self) -> frozenset[int]:
        """The values that some op saves sharded and regathers in the backward."""
        return frozenset(planned.op.inputs[at] for planned in self.ops for at in planned.regathered_inputs)


class PlannedBlocks:
    """A plan's blocks over a model's graph. By value: ``parameter_dependent`` are those computed from parameters,
    ``producing_stage`` and ``producers`` the stage and the op that compute one, ``reading_stages`` those that read it."""

    def __init__(self, plan: Plan, graph: Graph, blocks: tuple[Block, ...]) -> None:
        self.plan, self.graph, self.blocks = plan, graph, blocks
        self.parameter_dependent = graph.depending_on_parameters()
        self.programs = {program.id: program for program in plan.programs}
        self.first_of_kind: dict[int, Block] = {}
        for block in blocks:
            self.first_of_kind.setdefault(block.kind, block)
        stage_of_block = {ref.index: at for at, stage in enumerate(plan.stages) for ref in stage.blocks}
        if set(stage_of_block) != {block.index for block in blocks}:
            raise PlanFileError(f"the plan has {len(stage_of_block)} blocks, the model has {len(blocks)}; plan again")
        self.producing_stage: dict[int, int] = {}
        self.producers: dict[int, Op] = {}
        self.reading_stages: dict[int, set[int]] = {}
        for block in blocks:
            stage = stage_of_block[block.index]
            for op in self._ops(block):
                self.producers.update((value, op) for value in op.outputs)
                self.producing_stage.update((value, stage) for value in op.outputs)
                for value in op.inputs:
                    self.reading_stages.setdefault(value, set()).add(stage)

    def _ops(self, block: Block) -> tuple[Op, ...]:
        return self.graph.ops[block.first_op : block.end_op]

    def transfer_placements(self, value: int, placements: ValuePlacements) -> ValuePlacements:
        """The placements with which a value and its gradient are transferred between stages: ``placements``, with Partial
        reduced to Replicate unless all stages from the producer to the last reader have equally many addends."""
        first, last = self.producing_stage[value], max(self.reading_stages[value])
        meshes = [tuple(axis.size for axis in self.plan.stages[stage].axes) for stage in range(first, last + 1)]
        planned = [self._planned_value(stage, value) for stage in range(first, last + 1)]
        passed_on = any(each is None and mesh != meshes[0] for each, mesh in zip(planned, meshes, strict=True))
        known = [(each, mesh) for each, mesh in zip(planned, meshes, strict=True) if each is not None]
        num_addends = {_num_addends(each.placement, mesh) for each, mesh in known if each.placement}
        num_gradient_addends = {_num_addends(each.gradient, mesh) for each, mesh in known if each.gradient}

        def reduced(placements: Placements, num_addends: set[int]) -> Placements:
            return placements if len(num_addends) == 1 and not passed_on else replicate_partial_axes(placements)

        return ValuePlacements(
            value=reduced(placements.value, num_addends), gradient=reduced(placements.gradient, num_gradient_addends)
        )

    def _planned_value(self, stage: int, value: int) -> ValuePlan | None:
        """How a value is placed at the boundary of a block of a stage, None where the stage only passes it on."""
        for ref in self.plan.stages[stage].blocks:
            block, program = self.blocks[ref.index], self.programs[ref.program]
            for values, planned in ((block.outputs, program.outputs), (block.inputs, program.inputs)):
                if planned and value in values:
                    return planned[values.index(value)]
        return None

    def planned_block(self, block: Block, program: BlockProgram) -> PlannedBlock:
        """A block as its program runs it; PlanFileError where the program is of another block."""
        inputs, shared, outputs = self._placements_between_ops(block, program)
        recompute, saved_ops = self._recomputation(block, program)
        return PlannedBlock(
            index=block.index,
            recompute=recompute,
            ops=tuple(self._planned_ops(block, program, saved_ops)),
            inputs=inputs,
            shared=shared,
            outputs=outputs,
        )

    def _placements_between_ops(
        self, block: Block, program: BlockProgram
    ) -> tuple[dict[int, ValuePlan], dict[int, ValuePlan], dict[int, ValuePlan]]:
        """A block's inputs, shared values and outputs as the program places them, by value; {} where it does not."""
        first = self.first_of_kind[block.kind]
        value_of = dict(zip(first.inputs, block.inputs, strict=True))
        for op, first_op in zip(self._ops(block), self._ops(first), strict=True):
            value_of.update(zip(first_op.outputs, op.outputs, strict=True))
        by_name = {self.graph.values[of_first].name: value for of_first, value in value_of.items()}
        unknown = [planned.name for planned in program.shared if planned.name not in by_name]
        sides = ((program.inputs, block.inputs), (program.outputs, block.outputs))
        if unknown or any(planned and len(planned) != len(values) for planned, values in sides):
            raise PlanFileError(
                f"program {program.id} of the plan does not fit block {block.name} of the model; plan again"
            )
        shared = {by_name[planned.name]: planned for planned in program.shared}
        inputs, outputs = (dict(zip(values, planned, strict=True)) if planned else {} for planned, values in sides)
        return inputs, shared, outputs

    def _recomputation(self, block: Block, program: BlockProgram) -> tuple[Recompute, frozenset[int]]:
        """What the backward recomputes of a block, and the ops (ids) that save their results nevertheless. Selective
        recomputation by products saves fused attention and the first, third, ... product with a weight."""
        if program.recompute != "selective" or self.plan.execution.selective == "attention":
            return program.recompute, frozenset()
        num_products, saved_ops = 0, set()
        for op in self._ops(block):
            compute = sharding_rule(op, self.graph.values).compute
            if compute == "attention" and self.plan.execution.attn == "flash":
                saved_ops.add(op.id)
            elif compute == "matmul" and any(self.graph.values[value].kind == "parameter" for value in op.inputs):
                if num_products % 2 == 0:
                    saved_ops.add(op.id)
                num_products += 1
        return "full", frozenset(saved_ops)

    def _planned_ops(self, block: Block, program: BlockProgram, saved_ops: frozenset[int]) -> Iterable[PlannedOp]:
        ops = self._ops(block)
        if len(ops) != len(program.ops) or program.kind != block.kind:
            raise PlanFileError(
                f"program {program.id} of the plan has {len(program.ops)} ops of kind {program.kind}, block {block.name} of "
                f"the model {len(ops)} of kind {block.kind}; plan again"
            )
        for op, planned in zip(ops, program.ops, strict=True):
            if len(planned.inputs) != len(op.inputs) or len(planned.outputs) != len(op.outputs):
                raise PlanFileError(f"the plan's op {planned.name} does not fit the model's {op.name}; plan again")
            yield PlannedOp(
                op=op,
                inputs=tuple(map(parse_placements, planned.inputs)),
                outputs=tuple(map(parse_placements, planned.outputs)),
                partial_gradient_axes=_partial_gradient_axes(planned) if planned.output_gradients else None,
                regathered_inputs=planned.regathered,
                saves_result=op.id in saved_ops,
            )

    def parameter_shardings(self, block: Block, program: BlockProgram) -> Iterable[tuple[int, ParameterSharding]]:
        """(value, how it is stored) of the parameters and buffers of a block that the plan places; ZeRO's stage and axes
        are read off the placements of optimizer state, gradient and parameter that differ from those the ops use."""
        names = [
            self.graph.values[value].qualified_names or (self.graph.values[value].name,)
            for value in self.first_of_kind[block.kind].parameters
        ]
        positions = {name: at for at, all_names in enumerate(names) for name in all_names}
        for planned in program.parameters:
            if planned.name not in positions:
                raise PlanFileError(f"the plan's parameter {planned.name} is not in the model; plan again")
            value = self.graph.values[block.parameters[positions[planned.name]]]
            compute, stored = parse_placements(planned.compute), parse_placements(planned.parameter)
            gradient, optimizer = parse_placements(planned.gradient), parse_placements(planned.optimizer)
            axes = tuple(axis for axis, (own, used) in enumerate(zip(optimizer, compute, strict=True)) if own != used)
            trained = value.kind == "parameter" and value.requires_grad
            zero_stage = 0
            if axes and value.shape and trained:
                first = axes[0]
                zero_stage = 3 if stored[first] != compute[first] else 2 if isinstance(gradient[first], Shard) else 1
            yield (
                value.id,
                ParameterSharding(
                    value=value.id,
                    shape=value.shape,
                    compute_placements=compute,
                    gradient_placements=tuple(PARTIAL if axis in axes else each for axis, each in enumerate(gradient)),
                    zero_stage=zero_stage,
                    zero_axes=axes if zero_stage else (),
                    trained=trained,
                ),
            )


def _num_addends(placements: str, axis_sizes: Sequence[int]) -> int:
    """How many addends a value with these placements (as text) is the sum of: the product of its partial axes."""
    return prod(
        size for size, placement in zip(axis_sizes, parse_placements(placements), strict=True) if placement == PARTIAL
    )


def _partial_gradient_axes(planned: OpPlan) -> frozenset[int]:
    """The axes on which an output of the op is replicated and its gradient partial."""
    return frozenset(
        axis
        for output, gradient in zip(planned.outputs, planned.output_gradients, strict=False)
        for axis, (value_placement, gradient_placement) in enumerate(
            zip(parse_placements(output), parse_placements(gradient), strict=False)
        )
        if value_placement == REPLICATE and gradient_placement == PARTIAL
    )
