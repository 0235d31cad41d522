"""A plan for more ranks than there are, shrunk: the same stages, axes and placements on smaller meshes.

Axis sizes are divided until the ranks suffice, the micro-batch with the data axis, and micro-batches are cut to twice
the stages, so that every action of the schedule still occurs. Placements that count pieces along the batch are
rescaled.
"""

from msgspec.structs import replace

from autopar.core.errors import UsageError
from autopar.core.mesh_axis import Axis, num_ranks
from autopar.core.placement import Placement, Shard, format_placements, parse_placements
from autopar.core.plan import BlockProgram, OpPlan, Plan, StagePlan, ValuePlan, stages_by_submesh


def shrink_plan(plan: Plan, max_ranks: int) -> tuple[Plan, tuple[str, ...]]:
    """The twin on at most ``ranks`` ranks, and what was changed, one line each; the plan itself where it fits.

    Raises UsageError where there are more runs of devices than ranks."""
    runs = stages_by_submesh(plan)
    if len(runs) > max_ranks:
        raise UsageError(
            f"the plan has {len(runs)} stages on devices of their own, more than {max_ranks} ranks; give --ranks"
        )
    sizes = {run[0].first_device: [axis.size for axis in run[0].axes] for run in runs}
    while sum(_product(each) for each in sizes.values()) > max_ranks:
        largest = max(sizes.values(), key=_product)
        at = max(range(len(largest)), key=lambda axis: largest[axis])
        largest[at] //= next(factor for factor in range(2, largest[at] + 1) if largest[at] % factor == 0)
    notes, stages, first_device, device = [], [], {}, 0
    for run in runs:
        first_device[run[0].first_device] = device
        device += _product(sizes[run[0].first_device])
    for at, stage in enumerate(plan.stages):
        axes = tuple(
            Axis(name=axis.name, size=size) for axis, size in zip(stage.axes, sizes[stage.first_device], strict=True)
        )
        if axes != stage.axes:
            notes.append(f"stage {at}: {_axes_text(stage.axes)} -> {_axes_text(axes)}")
        stages.append(
            replace(stage, axes=axes, num_devices=num_ranks(axes), first_device=first_device[stage.first_device])
        )
    micro = _shrunk_micro_batch(plan, tuple(stages))
    step = len(runs) if plan.schedule == "interleaved" else 1
    count = min(plan.microbatches, -(-2 * len(plan.stages) // step) * step)
    if micro != plan.micro_batch_size:
        notes.append(f"micro-batch: {plan.micro_batch_size} -> {micro} samples")
    if count != plan.microbatches:
        notes.append(f"micro-batches: {plan.microbatches} -> {count}")
    if not notes:
        return plan, ()
    programs = tuple(_rescale_placements(program, plan.micro_batch_size, micro) for program in plan.programs)
    twin = replace(
        plan,
        programs=programs,
        stages=tuple(replace(stage, in_flight=min(stage.in_flight, count)) for stage in stages),
        gpus=device,
        microbatches=count,
        micro_batch_size=micro,
        global_batch=count * micro,
    )
    return twin, tuple(notes)


def _product(sizes: list[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def _axes_text(axes: tuple[Axis, ...]) -> str:
    return " x ".join(f"{axis.name} {axis.size}" for axis in axes)


def _shrunk_micro_batch(plan: Plan, stages: tuple[StagePlan, ...]) -> int:
    """The micro-batch with as many samples per rank of the first axis as before, or the old one where that is
    uneven."""
    old = plan.micro_batch_size
    ratios = [
        (new.axes[0].size, before.axes[0].size)
        for new, before in zip(stages, plan.stages, strict=True)
        if new.axes and before.axes[0].size > 1
    ]
    wanted = max((old * new // before for new, before in ratios), default=old)
    fits = wanted > 0 and all(wanted % new == 0 and old * new % before == 0 for new, before in ratios)
    return wanted if fits else old


def _rescale_placements(program: BlockProgram, old: int, new: int) -> BlockProgram:
    if old == new:
        return program

    def rescaled(placement: Placement) -> Placement:
        if not isinstance(placement, Shard) or placement.split_factor == 1 or placement.split_factor % old:
            return placement
        return Shard(placement.dim, placement.split_factor * new // old)

    def text(placements: str) -> str:
        return format_placements(map(rescaled, parse_placements(placements)))

    def values(planned: tuple[ValuePlan, ...]) -> tuple[ValuePlan, ...]:
        return tuple(
            ValuePlan(name=value.name, placement=text(value.placement), gradient=text(value.gradient))
            for value in planned
        )

    ops = tuple(
        OpPlan(
            name=op.name,
            inputs=tuple(map(text, op.inputs)),
            outputs=tuple(map(text, op.outputs)),
            input_gradients=tuple(map(text, op.input_gradients)),
            output_gradients=tuple(map(text, op.output_gradients)),
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
