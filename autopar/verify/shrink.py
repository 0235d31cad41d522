"""Shrinks a plan to fewer ranks: the same stages, axes and placements on smaller meshes.

Axis sizes are divided until the ranks suffice, and the micro-batch with the data axis. Micro-batches are limited to
twice the number of stages, so that every kind of action of the schedule still occurs. Split factors of placements that
count samples are rescaled.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeVar

from msgspec.structs import replace

from autopar.core.errors import PlanFileError, UsageError
from autopar.core.mesh_axis import Axis, axes_text, num_ranks
from autopar.core.placement import Placement, Shard, format_placements, parse_placements
from autopar.core.plan import BlockProgram, OpPlan, ParameterPlan, Plan, StagePlan, ValuePlan, stages_by_submesh
from autopar.graph.ir import Graph, Op
from autopar.graph.split_into_blocks import split_into_blocks

_Planned = TypeVar("_Planned", ValuePlan, ParameterPlan)


def shrink_plan(plan: Plan, max_ranks: int, trace_model: Callable[[], Graph]) -> tuple[Plan, tuple[str, ...]]:
    """The plan on at most ``max_ranks`` ranks, and what was changed, one line each; the plan itself where it fits.
    ``trace_model`` returns the graph of the plan's model; it is called where split factors may have to be rescaled.

    Raises UsageError where it has more submeshes than ranks, PlanFileError where the plan is of another model."""
    submeshes = stages_by_submesh(plan)
    if len(submeshes) > max_ranks:
        raise UsageError(
            f"the plan's pipeline needs {len(submeshes)} ranks, one per submesh, --ranks gives {max_ranks}; raise "
            "--ranks"
        )
    stages = _shrink_stages(plan, max_ranks)
    micro_batch_size = _shrunk_micro_batch(plan, stages)
    multiple = len(submeshes) if plan.schedule == "interleaved" else 1
    num_microbatches = min(plan.microbatches, -(-2 * len(plan.stages) // multiple) * multiple)
    changes = [
        f"stage {index}: {axes_text(before.axes, every=True)} -> {axes_text(after.axes, every=True)}"
        for index, (before, after) in enumerate(zip(plan.stages, stages, strict=True))
        if before.axes != after.axes
    ]
    if micro_batch_size != plan.micro_batch_size:
        changes.append(f"micro-batch size: {plan.micro_batch_size} -> {micro_batch_size} samples")
    if num_microbatches != plan.microbatches:
        changes.append(f"micro-batches: {plan.microbatches} -> {num_microbatches}")
    if not changes:
        return plan, ()
    shrunk = replace(
        plan,
        programs=_rescale_programs(plan, micro_batch_size, trace_model),
        stages=tuple(replace(stage, in_flight=min(stage.in_flight, num_microbatches)) for stage in stages),
        gpus=max(stage.first_device + stage.num_devices for stage in stages),
        microbatches=num_microbatches,
        micro_batch_size=micro_batch_size,
        global_batch=num_microbatches * micro_batch_size,
    )
    return shrunk, tuple(changes)


def _shrink_stages(plan: Plan, max_ranks: int) -> tuple[StagePlan, ...]:
    """The stages on meshes that have at most ``max_ranks`` ranks together, one submesh behind the other."""
    sizes = {stages[0].first_device: [axis.size for axis in stages[0].axes] for stages in stages_by_submesh(plan)}
    while sum(map(prod, sizes.values())) > max_ranks:
        largest_mesh = max(sizes.values(), key=prod)
        axis = max(range(len(largest_mesh)), key=lambda axis: largest_mesh[axis])
        size = largest_mesh[axis]
        largest_mesh[axis] //= next(factor for factor in range(2, size + 1) if size % factor == 0)
    first_device, num_devices = {}, 0
    for old_first_device, mesh in sizes.items():
        first_device[old_first_device] = num_devices
        num_devices += prod(mesh)
    stages = []
    for stage in plan.stages:
        axes = tuple(
            Axis(name=axis.name, size=size) for axis, size in zip(stage.axes, sizes[stage.first_device], strict=True)
        )
        stages.append(
            replace(stage, axes=axes, num_devices=num_ranks(axes), first_device=first_device[stage.first_device])
        )
    return tuple(stages)


def _shrunk_micro_batch(plan: Plan, stages: tuple[StagePlan, ...]) -> int:
    """The micro-batch size with as many samples per rank of the first axis as in the plan; the plan's own where that is
    not a whole number. ``stages`` are the shrunk ones."""
    planned = plan.micro_batch_size
    degrees = [
        (after.axes[0].size, before.axes[0].size)
        for after, before in zip(stages, plan.stages, strict=True)
        if after.axes and before.axes[0].size > 1
    ]
    shrunk = max((planned * after // before for after, before in degrees), default=planned)
    is_even = shrunk > 0 and all(shrunk % after == 0 and planned * after % before == 0 for after, before in degrees)
    return shrunk if is_even else planned


def _rescale_programs(plan: Plan, micro_batch_size: int, trace_model: Callable[[], Graph]) -> tuple[BlockProgram, ...]:
    """The plan's programs for another micro-batch size; PlanFileError where they do not fit the model's graph."""
    if micro_batch_size == plan.micro_batch_size or not _has_split_factors(plan):
        return plan.programs
    graph = trace_model()
    first_ops: dict[int, Sequence[Op]] = {}
    for block in split_into_blocks(graph):
        first_ops.setdefault(block.kind, graph.ops[block.first_op : block.end_op])
    factors = _SplitFactors(graph=graph, first_ops=first_ops, old=plan.micro_batch_size, new=micro_batch_size)
    try:
        return tuple(map(factors.rescale_program, plan.programs))
    except (KeyError, IndexError, ValueError):
        raise PlanFileError("the plan's blocks are not those of the model; plan again") from None


def _has_split_factors(plan: Plan) -> bool:
    return any("_S(" in text for program in plan.programs for text in _placement_texts(program))


def _placement_texts(program: BlockProgram) -> Iterator[str]:
    """All placements of a program."""
    for op in program.ops:
        yield from (*op.inputs, *op.outputs, *op.input_gradients, *op.output_gradients)
    for value in (*program.inputs, *program.outputs, *program.shared):
        yield from (value.placement, value.gradient)
    for parameter in program.parameters:
        yield from (parameter.compute, parameter.parameter, parameter.gradient, parameter.optimizer)


@dataclass(frozen=True, slots=True, kw_only=True)
class _SplitFactors:
    """Rescales the split factors that count samples from micro-batches of ``old`` samples to ``new``.

    A factor k counts samples where the size of its dim is proportional to the batch, k is a multiple of ``old``, and the
    k pieces do not grow with the batch. ``first_ops`` are the ops of the first block of each kind."""

    graph: Graph
    first_ops: Mapping[int, Sequence[Op]]
    old: int
    new: int

    def rescale_program(self, program: BlockProgram) -> BlockProgram:
        """The program with all split factors that count samples rescaled."""
        shapes = {name: value.shape for value in self.graph.values for name in (value.name, *value.qualified_names)}

        def values(planned: tuple[ValuePlan, ...]) -> tuple[ValuePlan, ...]:
            return tuple(self._rescale_fields(each, shapes[each.name], ("placement", "gradient")) for each in planned)

        fields = ("compute", "parameter", "gradient", "optimizer")
        return replace(
            program,
            ops=tuple(
                self._rescale_op(planned, op)
                for planned, op in zip(program.ops, self.first_ops[program.kind], strict=True)
            ),
            parameters=tuple(self._rescale_fields(each, shapes[each.name], fields) for each in program.parameters),
            inputs=values(program.inputs),
            outputs=values(program.outputs),
            shared=values(program.shared),
        )

    def _rescale_op(self, planned: OpPlan, op: Op) -> OpPlan:
        inputs = [self.graph.values[value].shape for value in op.inputs]
        outputs = [self.graph.values[value].shape for value in op.outputs]

        def rescaled(texts: tuple[str, ...], shapes: list[tuple[int, ...]]) -> tuple[str, ...]:
            return tuple(map(self._rescale_text, texts, shapes))

        return replace(
            planned,
            inputs=rescaled(planned.inputs, inputs),
            outputs=rescaled(planned.outputs, outputs),
            input_gradients=rescaled(planned.input_gradients, inputs),
            output_gradients=rescaled(planned.output_gradients, outputs),
        )

    def _rescale_fields(self, planned: _Planned, shape: tuple[int, ...], fields: tuple[str, ...]) -> _Planned:
        return replace(planned, **{field: self._rescale_text(getattr(planned, field), shape) for field in fields})

    def _rescale_text(self, placements: str, shape: tuple[int, ...]) -> str:
        return format_placements(self._rescale(placement, shape) for placement in parse_placements(placements))

    def _rescale(self, placement: Placement, shape: tuple[int, ...]) -> Placement:
        if not isinstance(placement, Shard) or placement.split_factor == 1:
            return placement
        size, batch = shape[placement.dim], self.graph.batch
        pieces_per_sample, remainder = divmod(placement.split_factor, self.old)
        if remainder or not batch.is_proportional(size) or size % (batch.traced_size * pieces_per_sample):
            return placement
        return Shard(placement.dim, pieces_per_sample * self.new)
