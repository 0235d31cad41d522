"""What the parameters of a block cost, read from where the plan keeps each, its gradient and its optimizer state.

G    axes over which the optimizer state is cut and the use is not
D    axes on which a use leaves a partial gradient
parameters cut over G   all_gather before forward and before a backward that reads them, reduce_scatter after it:
                        per micro-batch
gradients cut over G    reduce_scatter per micro-batch; all_gather of parameters per step
optimizer cut over G    reduce_scatter and all_gather per step
D without G             all_reduce of the gradient at rest, per step
optimizer               the program's bytes an element, at sustained bandwidth
accumulation            reads the new gradient and the sum, writes the sum, per micro-batch where there are several

Collectives are parts of those of a bucket; fp16 programs reduce gradients in fp16.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from autopar.core.errors import CheckError
from autopar.core.placement import PARTIAL, REPLICATE, parse_placements
from autopar.core.plan import BlockProgram, CollectiveKind, ParameterPlan
from autopar.cost.parameter_storage import BUCKET_BYTES
from autopar.graph.ir import Block, Graph
from autopar.judge.context import BlockContext
from autopar.judge.judge_mesh import JudgeMesh, local_shape
from autopar.judge.redistribution_path import PricedCollective


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterPrice:
    """Seconds and bytes of all parameters of a block; ``gathered_once`` (parameter, gather) that the block's own
    backward does not repeat."""

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
        names = [field.name for field in fields(self)]
        return ParameterPrice(**{name: getattr(self, name) + getattr(other, name) for name in names})


def price_parameters(context: BlockContext, read_in_backward: frozenset[int]) -> ParameterPrice:
    """``microbatch_steps`` gathers again only those that the backward reads (``read_again``), while its seconds charge for
    the whole bucket. Where blocks of the stage disagree on a tied parameter, its gradient is a sum of terms."""
    planned = _plans_by_value(context.model.graph, context.block, context.program)
    found = [
        _price_parameter(context, value, at, read_in_backward)
        for value, at in planned.items()
        if value not in context.stored_earlier
    ]
    return sum(found, start=ParameterPrice())


def _price_parameter(
    context: BlockContext, value: int, planned: ParameterPlan, read_in_backward: frozenset[int]
) -> ParameterPrice:
    """The price of one parameter or buffer."""
    mesh, execution, tensor = context.mesh, context.model.execution, context.model.graph.values[value]
    compute, optimizer = parse_placements(planned.compute), parse_placements(planned.optimizer)
    size = mesh.local_bytes(tensor.shape, tensor.itemsize, compute)
    if tensor.kind == "buffer" or not tensor.requires_grad:
        return ParameterPrice(parameters_bytes=size)
    partial = _partial_axes(context, value, planned)
    cut = tuple(axis for axis, (a, b) in enumerate(zip(compute, optimizer, strict=True)) if a != b)
    _check_storage(context.program, planned, cut, partial, mesh)
    stage3, stage2 = planned.parameter == planned.optimizer and bool(cut), _is_gradient_sharded(planned, cut)

    elements, shards = size / tensor.itemsize, mesh.group_size(cut)
    gradient = elements * (4 if execution.grads == "fp32" else tensor.itemsize)
    master = 4 if tensor.itemsize < 4 else 0
    state = elements * (master + (8 if execution.optimizer == "adamw" else 0))
    stepped = context.software.optimizer_bytes_half if tensor.itemsize < 4 else context.software.optimizer_bytes_full
    stepped -= 16 if execution.optimizer == "sgd" else 0
    added = (elements * tensor.itemsize + 2 * gradient) / (shards if stage2 or stage3 else 1)

    sent = elements * tensor.itemsize if execution.dtype == "fp16" else gradient
    rows = local_shape(tensor.shape, compute, mesh.sizes)[0] if cut and tensor.shape else shards
    padding = -(-rows // shards) * shards / rows  # every rank's part of the rows is as large as the first's
    gather = _bucket_share(mesh, "all_gather", size, cut, padding)
    scatter = _bucket_share(mesh, "reduce_scatter", sent, cut, padding)
    rest = _bucket_share(mesh, "all_reduce", sent / shards, tuple(axis for axis in partial if axis not in cut))
    terms = tuple(
        axis
        for axis in range(len(compute))
        if axis not in cut
        and (axis in partial or (compute[axis] == REPLICATE and (value, axis) in context.conflicting_axes))
    )
    summed = _bucket_share(mesh, "all_reduce", sent / shards, terms, padding)
    twice = stage3 and value in read_in_backward
    each = (gather if stage3 else None, gather if twice else None, scatter if stage2 or stage3 else None)
    once = (None if stage3 else gather, None if stage2 or stage3 else scatter, summed)
    device = mesh.cluster.device
    return ParameterPrice(
        forward_s=_seconds_of(gather) if stage3 else 0.0,
        backward_s=(_seconds_of(gather) if stage3 else 0.0) + (_seconds_of(scatter) if stage2 or stage3 else 0.0),
        reduction_s=_seconds_of(rest) + (0.0 if stage2 or stage3 else _seconds_of(scatter)),
        optimizer_s=float(device.memory_bound_s(elements * stepped / shards))
        + (0.0 if stage3 else _seconds_of(gather)),
        accumulate_s=float(device.memory_bound_s(added)) if context.accumulates_gradients else 0.0,
        parameters_bytes=size / (shards if stage3 else 1),
        gradients_bytes=gradient / (shards if stage2 else 1),
        optimizer_bytes=state / shards,
        microbatch_collectives=tuple(step for step in each if step),
        step_collectives=tuple(step for step in once if step),
        gathered_in_forward_only=((value, gather),) if stage3 and gather and not twice else (),
    )


def find_conflicting_axes(
    graph: Graph, blocks: Sequence[tuple[Block, BlockProgram, Block]]
) -> frozenset[tuple[int, int]]:
    """(parameter, axis) on which blocks of one stage, each with its program and the first block of its kind, use a tied
    parameter differently: one cuts it, or leaves terms of its gradient, and another does not."""
    seen: dict[int, ParameterPlan] = {}
    found = set()
    for block, program, first in blocks:
        alike = dict(zip(first.parameters, block.parameters, strict=True))
        for value, planned in _plans_by_value(graph, first, program).items():
            other = seen.setdefault(alike[value], planned)
            if other is planned:
                continue
            sides = [
                zip(parse_placements(each.compute), parse_placements(each.gradient), strict=True)
                for each in (other, planned)
            ]
            for axis, (one, two) in enumerate(zip(*sides, strict=True)):
                if one[0] != two[0] or {one[1], two[1]} == {REPLICATE, PARTIAL}:
                    found.add((alike[value], axis))
    return frozenset(found)


def _bucket_share(
    mesh: JudgeMesh, kind: CollectiveKind, num_bytes: float, axes: tuple[int, ...], padding: float = 1.0
) -> PricedCollective | None:
    """A tensor's share of its bucket's collective; ``padding`` times its bytes make equal parts."""
    step, bucket = (
        mesh.collective(kind, num_bytes, axes, num_bytes * padding),
        mesh.collective(kind, float(BUCKET_BYTES), axes),
    )
    return None if step is None or bucket is None else replace(step, time_s=bucket.time_s * num_bytes / BUCKET_BYTES)


def _seconds_of(collective: PricedCollective | None) -> float:
    return 0.0 if collective is None else collective.time_s


def _is_gradient_sharded(planned: ParameterPlan, zero_axes: tuple[int, ...]) -> bool:
    gradient, optimizer = parse_placements(planned.gradient), parse_placements(planned.optimizer)
    return bool(zero_axes) and all(gradient[axis] == optimizer[axis] for axis in zero_axes)


def _plans_by_value(graph: Graph, block: Block, program: BlockProgram) -> dict[int, ParameterPlan]:
    by_name = {name: value for value in block.parameters for name in _names(graph, value)}
    found = {}
    for planned in program.parameters:
        if planned.name not in by_name:
            raise CheckError(f"program {program.id!r}: block {block.name} has no parameter {planned.name}")
        found[by_name[planned.name]] = planned
    return found


def _names(graph: Graph, value: int) -> tuple[str, ...]:
    return graph.values[value].qualified_names or (graph.values[value].name,)


def _partial_axes(context: BlockContext, value: int, planned: ParameterPlan) -> tuple[int, ...]:
    """D: where some use of a parameter leaves a term of its gradient (one that leaves all of it counts on the first
    rank); all uses must take the parameter as it is planned."""
    found: set[int] = set()
    ops = context.model.graph.ops[context.block.first_op : context.block.end_op]
    for op, at_op in zip(ops, context.program.ops, strict=True):
        for at, read in enumerate(op.inputs):
            if read == value:
                if at_op.inputs[at] != planned.compute:
                    raise CheckError(
                        f"op {op.name} reads {planned.name} as {at_op.inputs[at]}, the plan keeps {planned.compute}"
                    )
                gradient = parse_placements(at_op.input_gradients[at])
                found.update(
                    axis for axis, one in enumerate(gradient) if one == PARTIAL and context.mesh.sizes[axis] > 1
                )
    return tuple(sorted(found))


def _check_storage(
    program: BlockProgram,
    planned: ParameterPlan,
    zero_axes: tuple[int, ...],
    partial_axes: tuple[int, ...],
    mesh: JudgeMesh,
) -> None:
    wrong = [axis for axis in zero_axes if mesh.sizes[axis] > 1 and axis not in partial_axes]
    if wrong:
        raise CheckError(f"program {program.id!r}: {planned.name} is sharded over an axis that does not replicate it")
    for role, text in (("parameter", planned.parameter), ("gradient", planned.gradient)):
        compute, optimizer = parse_placements(planned.compute), parse_placements(planned.optimizer)
        for axis, placement in enumerate(parse_placements(text)):
            known = (compute[axis], optimizer[axis], *([PARTIAL] if role == "gradient" else []))
            if placement not in known:
                raise CheckError(f"program {program.id!r}: the {role} of {planned.name} is placed as {text}")
