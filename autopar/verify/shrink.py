"""Shrinks a plan to fewer ranks: the same stages, axes and placements on smaller meshes.

Axis sizes are divided until the ranks suffice, and the micro-batch with the data axis. Micro-batches are limited to
twice the number of stages, so that every kind of action of the schedule still occurs. Split factors of placements that
count samples are rescaled.
"""

from math import prod

from msgspec.structs import replace

from autopar.core.errors import UsageError
from autopar.core.mesh_axis import Axis, axes_text, num_ranks
from autopar.core.placement import Placement, Shard, format_placements, parse_placements
from autopar.core.plan import BlockProgram, OpPlan, Plan, StagePlan, ValuePlan, stages_by_submesh


def shrink_plan(plan: Plan, max_ranks: int) -> tuple[Plan, tuple[str, ...]]:
    """The plan on at most ``max_ranks`` ranks, and what was changed, one line each; the plan itself where it fits.

    Raises UsageError where it has more submeshes than ranks."""
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
        programs=tuple(
            _rescale_placements(program, plan.micro_batch_size, micro_batch_size) for program in plan.programs
        ),
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


def _rescale_placements(program: BlockProgram, old: int, new: int) -> BlockProgram:
    """The program with split factors that count samples (multiples of ``old``) for a micro-batch of ``new`` samples."""
    if old == new:
        return program

    def rescaled(placement: Placement) -> Placement:
        if not isinstance(placement, Shard) or placement.split_factor == 1 or placement.split_factor % old:
            return placement
        return Shard(placement.dim, placement.split_factor * new // old)

    def rescaled_text(placements: str) -> str:
        return format_placements(map(rescaled, parse_placements(placements)))

    def values(planned: tuple[ValuePlan, ...]) -> tuple[ValuePlan, ...]:
        return tuple(
            ValuePlan(name=value.name, placement=rescaled_text(value.placement), gradient=rescaled_text(value.gradient))
            for value in planned
        )

    ops = tuple(
        OpPlan(
            name=op.name,
            inputs=tuple(map(rescaled_text, op.inputs)),
            outputs=tuple(map(rescaled_text, op.outputs)),
            input_gradients=tuple(map(rescaled_text, op.input_gradients)),
            output_gradients=tuple(map(rescaled_text, op.output_gradients)),
        )
        for op in program.ops
    )
    return replace(
        program,
        ops=ops,
        inputs=values(program.inputs),
        outputs=values(program.outputs),
        shared=values(program.shared),
    )
