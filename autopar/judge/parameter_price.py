"""What the parameters of a block cost, read from the placements of each, of its gradient and of its optimizer state.

G    axes that shard the optimizer state and not the parameter as ops use it (ZeRO)
D    axes on which an op leaves a partial gradient
parameters sharded over G   all_gather before forward and before a backward that reads them, reduce_scatter after it:
                            per micro-batch
gradients sharded over G    reduce_scatter per micro-batch; all_gather of parameters per step
optimizer sharded over G    reduce_scatter and all_gather per step
D without G                 all_reduce of the stored gradient, per step
optimizer                   the program's bytes per element, at sustained bandwidth
accumulation                reads the new gradient and the sum, writes the sum, per micro-batch where there are several

Collectives are shares of those of a bucket; fp16 programs reduce gradients in fp16.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from autopar.core.errors import CheckError
from autopar.core.placement import PARTIAL, REPLICATE, parse_placements
from autopar.core.plan import BlockProgram, CollectiveKind, ParameterPlan
from autopar.cost.parameter_storage import BUCKET_BYTES
from autopar.graph.ir import Graph
from autopar.judge.context import BlockContext, JudgedBlock, parameter_plans
from autopar.judge.judge_mesh import JudgeMesh, local_shape
from autopar.judge.redistribution_path import PricedCollective


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterPrice:
    """Seconds and bytes of all parameters of a block: per micro-batch (``forward_s``, ``backward_s``,
    ``accumulate_s``) and per step (``reduction_s``, ``optimizer_s``). ``gathered_in_forward_only``: (parameter, its
    all_gather) where the block's own backward does not repeat it."""

    forward_s: float = 0.0
    backward_s: float = 0.0
    reduction_s: float = 0.0
    optimizer_s: float = 0.0
    accumulate_s: float = 0.0
    parameters_bytes: float = 0.0
    gradients_bytes: float = 0.0
    optimizer_bytes: float = 0.0
    microbatch_collectives: tuple[PricedCollective, ...] = ()
    step_collectives: tuple[PricedCollective, ...] = ()
    gathered_in_forward_only: tuple[tuple[int, PricedCollective], ...] = ()

    def __add__(self, other: "ParameterPrice") -> "ParameterPrice":
        """Field by field."""
        names = [field.name for field in fields(self)]
        return ParameterPrice(**{name: getattr(self, name) + getattr(other, name) for name in names})


def price_parameters(context: BlockContext, read_in_backward: frozenset[int]) -> ParameterPrice:
    """Of the parameters that no earlier block of the stage stores. CheckError where their placements contradict each other.

    Of a ZeRO-3 bucket the backward gathers the parameters in ``read_in_backward``, and ``microbatch_collectives`` lists
    those; ``backward_s`` charges for the whole bucket. On a conflicting axis, the gradient of a tied parameter is
    partial."""
    plans = parameter_plans(context.model.graph, context.block, context.program)
    prices = [
        _price_parameter(context, value, planned, read_in_backward)
        for value, planned in plans.items()
        if value not in context.stored_earlier
    ]
    return sum(prices, start=ParameterPrice())


def _price_parameter(
    context: BlockContext, value: int, planned: ParameterPlan, read_in_backward: frozenset[int]
) -> ParameterPrice:
    """The price of one parameter or buffer; CheckError where its placements contradict each other."""
    mesh, execution, tensor = context.mesh, context.model.execution, context.model.graph.values[value]
    compute, optimizer = parse_placements(planned.compute), parse_placements(planned.optimizer)
    size = mesh.local_bytes(tensor.shape, tensor.itemsize, compute)
    if tensor.kind == "buffer" or not tensor.requires_grad:
        return ParameterPrice(parameters_bytes=size)
    partial = _partial_axes(context, value, planned)
    zero_axes = tuple(axis for axis, (a, b) in enumerate(zip(compute, optimizer, strict=True)) if a != b)
    _check_storage(context.program, planned, zero_axes, partial, mesh)
    stage3 = planned.parameter == planned.optimizer and bool(zero_axes)
    stage2 = _is_gradient_sharded(planned, zero_axes)

    elements, shards = size / tensor.itemsize, mesh.group_size(zero_axes)
    gradient = elements * (4 if execution.grads == "fp32" else tensor.itemsize)
    master = 4 if tensor.itemsize < 4 else 0
    state = elements * (master + (8 if execution.optimizer == "adamw" else 0))
    stepped = context.software.optimizer_bytes_half if tensor.itemsize < 4 else context.software.optimizer_bytes_full
    stepped -= 16 if execution.optimizer == "sgd" else 0
    added = (elements * tensor.itemsize + 2 * gradient) / (shards if stage2 or stage3 else 1)

    sent = elements * tensor.itemsize if execution.dtype == "fp16" else gradient
    rows = local_shape(tensor.shape, compute, mesh.sizes)[0] if zero_axes and tensor.shape else shards
    padding = -(-rows // shards) * shards / rows  # every rank's shard has as many rows as the first's
    gather = _bucket_share(mesh, "all_gather", size, zero_axes, padding)
    scatter = _bucket_share(mesh, "reduce_scatter", sent, zero_axes, padding)
    other_partial = tuple(axis for axis in partial if axis not in zero_axes)
    charged_reduce = _bucket_share(mesh, "all_reduce", sent / shards, other_partial)
    summed_axes = tuple(
        axis
        for axis in range(len(compute))
        if axis not in zero_axes
        and (axis in partial or (compute[axis] == REPLICATE and (value, axis) in context.conflicting_axes))
    )
    issued_reduce = _bucket_share(mesh, "all_reduce", sent / shards, summed_axes, padding)
    regathers = stage3 and value in read_in_backward
    per_microbatch = (gather if stage3 else None, gather if regathers else None, scatter if stage2 or stage3 else None)
    per_step = (None if stage3 else gather, None if stage2 or stage3 else scatter, issued_reduce)
    device = mesh.cluster.device
    return ParameterPrice(
        forward_s=_seconds_of(gather) if stage3 else 0.0,
        backward_s=(_seconds_of(gather) if stage3 else 0.0) + (_seconds_of(scatter) if stage2 or stage3 else 0.0),
        reduction_s=_seconds_of(charged_reduce) + (0.0 if stage2 or stage3 else _seconds_of(scatter)),
        optimizer_s=float(device.memory_bound_s(elements * stepped / shards))
        + (0.0 if stage3 else _seconds_of(gather)),
        accumulate_s=float(device.memory_bound_s(added)) if context.accumulates_gradients else 0.0,
        parameters_bytes=size / (shards if stage3 else 1),
        gradients_bytes=gradient / (shards if stage2 else 1),
        optimizer_bytes=state / shards,
        microbatch_collectives=tuple(step for step in per_microbatch if step),
        step_collectives=tuple(step for step in per_step if step),
        gathered_in_forward_only=((value, gather),) if stage3 and gather and not regathers else (),
    )


def find_conflicting_axes(graph: Graph, blocks: Sequence[JudgedBlock]) -> frozenset[tuple[int, int]]:
    """(parameter, axis) on which blocks of one stage place a tied parameter differently, or one leaves its gradient
    partial and another does not."""
    first_plans: dict[int, ParameterPlan] = {}
    found = set()
    for block in blocks:
        for value, planned in block.parameter_plans(graph).items():
            first = first_plans.setdefault(value, planned)
            if first is planned:
                continue
            sides = [
                zip(parse_placements(plan.compute), parse_placements(plan.gradient), strict=True)
                for plan in (first, planned)
            ]
            for axis, ((compute, gradient), (other_compute, other_gradient)) in enumerate(zip(*sides, strict=True)):
                if compute != other_compute or {gradient, other_gradient} == {REPLICATE, PARTIAL}:
                    found.add((value, axis))
    return frozenset(found)


def _bucket_share(
    mesh: JudgeMesh, kind: CollectiveKind, num_bytes: float, axes: tuple[int, ...], padding: float = 1.0
) -> PricedCollective | None:
    """A tensor's share of its bucket's collective; None where the axes have a single rank. Padded to equal shards it has
    ``padding`` times its bytes."""
    step = mesh.collective(kind, num_bytes, axes, num_bytes * padding)
    bucket = mesh.collective(kind, float(BUCKET_BYTES), axes)
    return None if step is None or bucket is None else replace(step, time_s=bucket.time_s * num_bytes / BUCKET_BYTES)


def _seconds_of(collective: PricedCollective | None) -> float:
    """0 where nothing is issued."""
    return 0.0 if collective is None else collective.time_s


def _is_gradient_sharded(planned: ParameterPlan, zero_axes: tuple[int, ...]) -> bool:
    """Whether ZeRO shards the stored gradient, too."""
    gradient, optimizer = parse_placements(planned.gradient), parse_placements(planned.optimizer)
    return bool(zero_axes) and all(gradient[axis] == optimizer[axis] for axis in zero_axes)


def _partial_axes(context: BlockContext, value: int, planned: ParameterPlan) -> tuple[int, ...]:
    """D: axes on which some op leaves a parameter's gradient partial (a replicated gradient of another op then counts on
    the first rank alone). CheckError where an op reads the parameter in another placement than planned."""
    partial_axes: set[int] = set()
    ops = context.model.graph.ops[context.block.first_op : context.block.end_op]
    for op, op_plan in zip(ops, context.program.ops, strict=True):
        for position, read in enumerate(op.inputs):
            if read != value:
                continue
            if op_plan.inputs[position] != planned.compute:
                raise CheckError(
                    f"op {op.name} reads {planned.name} as {op_plan.inputs[position]}, "
                    f"the plan places it as {planned.compute}"
                )
            gradient = parse_placements(op_plan.input_gradients[position])
            partial_axes.update(
                axis for axis, placement in enumerate(gradient) if placement == PARTIAL and context.mesh.sizes[axis] > 1
            )
    return tuple(sorted(partial_axes))


def _check_storage(
    program: BlockProgram,
    planned: ParameterPlan,
    zero_axes: tuple[int, ...],
    partial_axes: tuple[int, ...],
    mesh: JudgeMesh,
) -> None:
    """CheckError where ZeRO shards a parameter over an axis that leaves its gradient complete, or where the parameter or
    its gradient is stored in a placement that is not its compute or optimizer placement."""
    if any(mesh.sizes[axis] > 1 and axis not in partial_axes for axis in zero_axes):
        raise CheckError(
            f"program {program.id!r}: ZeRO shards {planned.name} over an axis on which its gradient is not partial"
        )
    for role, text in (("parameter", planned.parameter), ("gradient", planned.gradient)):
        compute, optimizer = parse_placements(planned.compute), parse_placements(planned.optimizer)
        for axis, placement in enumerate(parse_placements(text)):
            known = (compute[axis], optimizer[axis], *([PARTIAL] if role == "gradient" else []))
            if placement not in known:
                raise CheckError(
                    f"program {program.id!r}: the {role} of {planned.name} is placed as {text}, which is neither its compute nor its optimizer placement"
                )
