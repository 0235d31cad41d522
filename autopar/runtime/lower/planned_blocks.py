"""What a plan says of a model's blocks, read against the model's graph.

A plan names its blocks' ops, parameters and values once for all blocks alike (``program``); here each block of the
model gets its own: the placements of its ops, of the values between them and of its parameters, and which stage makes
and which stages read a value. A plan that does not fit the model is refused with PlanFileError.
"""

from collections.abc import Iterable
from math import prod

from autopar.core.errors import PlanFileError
from autopar.core.placement import PARTIAL, REPLICATE, Placements, Shard, parse_placements
from autopar.core.plan import BlockProgram, OpPlan, Plan, Recompute, ValuePlan
from autopar.graph.ir import Block, Graph, Op
from autopar.rules.registry import sharding_rule
from autopar.runtime.lower.stage_program import ParameterSharding


class PlannedBlocks:
    """A plan's blocks over a model's graph; ``carrying`` are the values that depend on a parameter, ``maker`` the stage
    that makes a value, ``readers`` those that read it, ``op_of`` the op that makes it."""

    def __init__(self, plan: Plan, graph: Graph, blocks: tuple[Block, ...]) -> None:
        self.plan, self.graph, self.blocks = plan, graph, blocks
        self.parameter_dependent = graph.depending_on_parameters()
        self.programs = {program.id: program for program in plan.programs}
        self.first_of_kind: dict[int, Block] = {}
        for block in blocks:
            self.first_of_kind.setdefault(block.kind, block)
        stage_of_block = {ref.index: at for at, stage in enumerate(plan.stages) for ref in stage.blocks}
        if set(stage_of_block) != {block.index for block in blocks}:
            raise PlanFileError(f"the plan has {len(stage_of_block)} blocks, the model {len(blocks)}; plan again")
        self.producing_stage: dict[int, int] = {}
        self.producers: dict[int, Op] = {}
        for block in blocks:
            for op in graph.ops[block.first_op : block.end_op]:
                for value in op.outputs:
                    self.producers[value] = op
                    self.producing_stage[value] = stage_of_block[block.index]
        self.reading_stages: dict[int, set[int]] = {}
        for block in blocks:
            for op in graph.ops[block.first_op : block.end_op]:
                for value in op.inputs:
                    self.reading_stages.setdefault(value, set()).add(stage_of_block[block.index])

    def crosses_as_partial(self, value: int) -> tuple[bool, bool]:
        """Whether a value, and its gradient, may cross stages as partial sums: all stages on its way hold as many
        terms."""
        made = self.producing_stage[value]
        last = max(self.reading_stages[value])
        sizes = [tuple(axis.size for axis in self.plan.stages[at].axes) for at in range(made, last + 1)]
        lies = [self._planned_placements(at, value) for at in range(made, last + 1)]
        passed_on = any(lie is None and mesh != sizes[0] for lie, mesh in zip(lies, sizes, strict=True))
        forward, backward = (
            {
                prod(
                    size
                    for size, placement in zip(mesh, parse_placements(lie[side]), strict=True)
                    if placement == PARTIAL
                )
                for lie, mesh in zip(lies, sizes, strict=True)
                if lie is not None and lie[side]
            }
            for side in (0, 1)
        )
        return len(forward) == 1 and not passed_on, len(backward) == 1 and not passed_on

    def _planned_placements(self, stage: int, value: int) -> tuple[str, str] | None:
        """How a stage makes a value or takes it in, None where it only passes it on."""
        for ref in self.plan.stages[stage].blocks:
            block, program = self.blocks[ref.index], self.programs[ref.program]
            for values, planned in ((block.outputs, program.outputs), (block.inputs, program.inputs)):
                if planned and value in values:
                    lie = planned[values.index(value)]
                    return lie.placement, lie.gradient
        return None

    def placements_between_ops(
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

    def ops_with_placements(
        self, block: Block, program: BlockProgram
    ) -> Iterable[tuple[Op, tuple[Placements, ...], tuple[Placements, ...], frozenset[int] | None]]:
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
            passing = _partial_gradient_axes(planned) if planned.output_gradients else None
            inputs, outputs = (tuple(map(parse_placements, texts)) for texts in (planned.inputs, planned.outputs))
            yield op, inputs, outputs, passing

    def recomputation(self, block: Block, program: BlockProgram) -> tuple[Recompute, frozenset[int]]:
        """What the backward computes again of a block, and the ops (ids) whose results stay nevertheless: of selective
        recomputation by product fused attentions and the first, third, ... product with a weight."""
        if program.recompute != "selective" or self.plan.execution.selective == "attention":
            return program.recompute, frozenset()
        products, stays = 0, set()
        for op in self.graph.ops[block.first_op : block.end_op]:
            compute = sharding_rule(op, self.graph.values).compute
            if compute == "attention" and self.plan.execution.attn == "flash":
                stays.add(op.id)
            elif compute == "matmul" and any(self.graph.values[value].kind == "parameter" for value in op.inputs):
                if products % 2 == 0:
                    stays.add(op.id)
                products += 1
        return "full", frozenset(stays)

    def parameter_shardings(self, block: Block, program: BlockProgram) -> Iterable[tuple[int, ParameterSharding]]:
        """(value, how it is stored) of the parameters and buffers that the plan places."""
        names = [
            self.graph.values[value].qualified_names or (self.graph.values[value].name,)
            for value in self.first_of_kind[block.kind].parameters
        ]
        places = {name: at for at, all_names in enumerate(names) for name in all_names}
        for planned in program.parameters:
            if planned.name not in places:
                raise PlanFileError(f"the plan's parameter {planned.name} is not in the model; plan again")
            value = self.graph.values[block.parameters[places[planned.name]]]
            compute, rest = parse_placements(planned.compute), parse_placements(planned.parameter)
            gradient, optimizer = parse_placements(planned.gradient), parse_placements(planned.optimizer)
            axes = tuple(axis for axis, (at, used) in enumerate(zip(optimizer, compute, strict=True)) if at != used)
            trained = value.kind == "parameter" and value.requires_grad
            zero = 0
            if axes and value.shape and trained:
                zero = 3 if rest[axes[0]] != compute[axes[0]] else 2 if isinstance(gradient[axes[0]], Shard) else 1
            yield (
                value.id,
                ParameterSharding(
                    value=value.id,
                    shape=value.shape,
                    compute_placements=compute,
                    gradient_placements=tuple(PARTIAL if axis in axes else each for axis, each in enumerate(gradient)),
                    zero_stage=zero,
                    zero_axes=axes if zero else (),
                    trained=value.kind == "parameter" and value.requires_grad,
                ),
            )


def _partial_gradient_axes(planned: OpPlan) -> frozenset[int]:
    """The axes on which the op's outputs are replicated and their gradients partial sums."""
    return frozenset(
        axis
        for output, gradient in zip(planned.outputs, planned.output_gradients, strict=False)
        for axis, (made, given) in enumerate(zip(parse_placements(output), parse_placements(gradient), strict=False))
        if made == REPLICATE and given == PARTIAL
    )
