"""What one block costs under its program: times, memory and collectives, summed here and nowhere else.

F, C, B      kernels outside and inside attention, and backward, with the moves of activations      (ops, flow)
launches     calls of the host * launch time, + a wait per collective for the slowest host          (_launch_s)
forward      both(max(F + C, launches), gathers)                both(a, b) = max(a, b) + contention * min(a, b)
backward     both(max(B + again, launches), gathers, scatters)  again = 0 | C | A for none | selective | full
             (selective by operation: as full, of what it has not kept)
             A = F + C, or of it what the backward needs (`again`)                           (_rerun)
exchanges    of a linear op's input gradient run beside the product for its weight's, where the program overlaps or is
             sequence parallel, and what is gathered again beside the one for its input's: both(a, b) - a  (_visible_s)
passing      in one op, at most, + what the recompute mode brings back; gathered parameters beside it: `peak`
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Literal

from autopar.core.errors import CheckError
from autopar.graph.ir import Op
from autopar.judge.block_redistributions import BlockRedistributions, find_redistributions
from autopar.judge.context import BlockContext
from autopar.judge.judge_mesh import PricedCollective, RedistributionPath
from autopar.judge.op_price import price_op
from autopar.judge.parameter_price import ParameterPrice, price_parameters
from autopar.judge.recomputed_ops import BackwardRecomputation, find_recomputation
from autopar.judge.saved_bytes import count_saved_bytes
from autopar.judge.workspace_bytes import op_workspace_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuedCollective:
    """A collective, how often a block issues it, and what it moves."""

    collective: PricedCollective
    count: int
    per: Literal["microbatch", "step"]
    of: Literal["activations", "parameters", "gradients"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSeconds:
    """What forward and backward of a micro-batch are made of, recomputation included: kernels, exchanges of
    activations, what launching adds to them (``launch_s``), and what of the parameters' collectives they do not hide
    (``storage_s``).
    The six add up to forward + backward."""

    matmul_s: float
    attention_s: float
    memory_bound_s: float
    redistribution_s: float
    launch_s: float
    exposed_parameters_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPrice:
    """Seconds per micro-batch, seconds per step (reduction, which backward may hide; optimizer), bytes; parameters that
    the backward reads, and gathers of those that it does not (a later block that shares one may)."""

    forward_s: float
    backward_s: float
    reduction_s: float
    optimizer_s: float
    parameters_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    saved_bytes: float
    workspace_bytes: float
    read_in_backward: frozenset[int]
    gathered_in_forward_only: tuple[tuple[int, PricedCollective], ...]
    collectives: tuple[IssuedCollective, ...]
    seconds: BlockSeconds


@dataclass(slots=True)
class _BlockKernels:
    """What the ops of a block do, by op: seconds of their kernels, calls of the host, collectives inside, and by how many
    ranks their work is divided. ``linears``: the two backward products of each linear op; ``passing_bytes``: at most."""

    forward_s: dict[int, float] = field(default_factory=dict)
    backward_s: dict[int, float] = field(default_factory=dict)
    forward_calls: dict[int, float] = field(default_factory=dict)
    backward_calls: dict[int, float] = field(default_factory=dict)
    forward_collectives: dict[int, tuple[PricedCollective, ...]] = field(default_factory=dict)
    backward_collectives: dict[int, tuple[PricedCollective, ...]] = field(default_factory=dict)
    num_shards: dict[int, tuple[int, int]] = field(default_factory=dict)
    attention_ops: set[int] = field(default_factory=set)
    matmul_ops: set[int] = field(default_factory=set)
    linear_backward_s: dict[int, tuple[float, float]] = field(default_factory=dict)
    workspace_bytes: float = 0.0

    @staticmethod
    def of(context: BlockContext, redistributions: BlockRedistributions) -> "_BlockKernels":
        """Of all ops that some rank computes and others do not."""
        found = _BlockKernels()
        whole: dict[int, float] = {}  # what ops that keep their input cut take whole
        for op_id, size in redistributions.regathered_bytes:
            whole[op_id] = max(size, whole.get(op_id, 0.0))
        for op, planned in context.distributed_ops():
            price, profile = price_op(context, op, planned), context.model.profile.ops[op.id]
            found.forward_s[op.id], found.backward_s[op.id] = price.forward_s, price.backward_s
            found.forward_calls[op.id], found.backward_calls[op.id] = _host_calls(context, op)
            found.forward_collectives[op.id], found.backward_collectives[op.id] = (
                price.forward_collectives,
                price.backward_collectives,
            )
            found.num_shards[op.id] = (price.num_shards, price.num_fixed_shards)
            if op.is_attention:
                found.attention_ops.add(op.id)
            elif profile.forward_flops:
                found.matmul_ops.add(op.id)
                if price.linear_backward_s is not None:
                    found.linear_backward_s[op.id] = price.linear_backward_s
            passed = op_workspace_bytes(context, op, planned, price.num_shards) + whole.get(op.id, 0.0)
            found.workspace_bytes = max(found.workspace_bytes, passed)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _ChargedRecompute:
    """What the backward is charged for computing again: ops, collectives, and the launches of both."""

    ops: frozenset[int]
    collectives: tuple[PricedCollective, ...]
    launch_s: float


def price_block(context: BlockContext) -> BlockPrice:
    """CheckError where the program contradicts itself or is of another graph."""
    ground, block, program, mode = context.model, context.block, context.program, context.program.recompute
    ops = ground.graph.ops[block.first_op : block.end_op]
    aligned = ((program.ops, ops), (program.inputs, block.inputs), (program.outputs, block.outputs))
    if any(len(planned) != len(real) for planned, real in aligned):
        raise CheckError(f"program {program.id!r} does not fit block {block.name}: it is of another graph")
    moved = find_redistributions(ground.graph, block, program, context.mesh, context.micro_batch, ground.parameter_free)
    kernels = _BlockKernels.of(context, moved)
    forward = [*_collectives_of(moved.forward_paths), *_collectives_inside_ops(kernels.forward_collectives)]
    backward = [*_collectives_of(moved.backward_paths), *_collectives_inside_ops(kernels.backward_collectives)]
    repeated = find_recomputation(
        context, moved, frozenset(op for op, steps in kernels.forward_collectives.items() if steps)
    )
    repeated_steps = [*_collectives_of(repeated.paths)]
    repeated_steps += _collectives_inside_ops({op: kernels.forward_collectives[op] for op in sorted(repeated.ops)})
    listed = [*forward, *repeated_steps]
    if mode != "full" and context.selective is None:  # else all ways run again that the backward reads from
        listed += _collectives_of(moved.regather_paths)
    parameters = price_parameters(context, repeated.parameters_read)
    held = count_saved_bytes(context, moved, kernels.num_shards)

    launch_f, launch_b = _host_s(context, kernels, moved)
    rerun = _charged_recompute(context, kernels, repeated, repeated_steps, forward, launch_f)
    exchanged_s = _total_s(_collectives_inside_ops(kernels.backward_collectives)) + _exposed_redistribution_s(
        context, moved, kernels.linear_backward_s
    )
    moved_s = _total_s(forward)
    moved_again_s = _total_s(rerun.collectives)
    forward_kernels_s = sum(kernels.forward_s.values()) + moved_s
    again_s = sum(kernels.forward_s[op] for op in rerun.ops) + moved_again_s
    backward_kernels_s = sum(kernels.backward_s.values()) + exchanged_s + parameters.accumulate_s + again_s
    together = sum if ground.execution.launch == "blocking" else max  # blocking: the host waits for each kernel
    busy_f = float(together((forward_kernels_s, launch_f)))
    busy_b = float(together((backward_kernels_s, launch_b + rerun.launch_s)))
    contention = context.mesh.cluster.overlap_contention if ground.execution.overlap else 1.0
    forward_s = _overlapped_s(busy_f, parameters.forward_s, contention)
    backward_s = _overlapped_s(busy_b, parameters.backward_s, contention)

    matmul_s, attention_s = (
        sum(kernels.forward_s[op] + kernels.backward_s[op] for op in some)
        + sum(kernels.forward_s[op] for op in some & rerun.ops)
        for some in (kernels.matmul_ops, kernels.attention_ops)
    )
    activations_s = moved_s + moved_again_s + exchanged_s
    kernels_s = forward_kernels_s + backward_kernels_s
    return BlockPrice(
        forward_s=forward_s,
        backward_s=backward_s,
        seconds=BlockSeconds(
            matmul_s=matmul_s,
            attention_s=attention_s,
            memory_bound_s=max(kernels_s - matmul_s - attention_s - activations_s, 0.0),
            redistribution_s=activations_s,
            launch_s=(busy_f - forward_kernels_s) + (busy_b - backward_kernels_s),
            exposed_parameters_s=(forward_s - busy_f) + (backward_s - busy_b),
        ),
        reduction_s=parameters.reduction_s,
        optimizer_s=parameters.optimizer_s,
        parameters_bytes=parameters.parameters_bytes,
        gradients_bytes=parameters.gradients_bytes,
        optimizer_bytes=parameters.optimizer_bytes,
        saved_bytes={
            "none": held.always_bytes + held.freed_bytes,
            "selective": held.always_bytes + held.selective_only_bytes,
            "full": held.inputs_bytes,
        }[mode],
        workspace_bytes=kernels.workspace_bytes
        + {"none": 0.0, "selective": held.freed_bytes, "full": held.always_bytes + held.freed_bytes}[mode],
        read_in_backward=repeated.parameters_read,
        gathered_in_forward_only=parameters.gathered_in_forward_only,
        collectives=_issued_collectives(listed, backward, parameters),
    )


def _charged_recompute(
    context: BlockContext,
    kernels: _BlockKernels,
    recomputation: BackwardRecomputation,
    recomputed_collectives: list[PricedCollective],
    forward_collectives: list[PricedCollective],
    forward_launch_s: float,
) -> _ChargedRecompute:
    """By the recompute mode: nothing; attention; the whole block, as torch's checkpoint does; or of it what the backward
    needs."""
    mode, launch_s = context.program.recompute, context.mesh.cluster.device.launch_s
    if mode == "none":
        return _ChargedRecompute(ops=frozenset(), collectives=(), launch_s=0.0)
    if mode == "selective" and context.selective is None:
        calls = sum(kernels.forward_calls[op] for op in kernels.attention_ops)
        return _ChargedRecompute(ops=frozenset(kernels.attention_ops), collectives=(), launch_s=calls * launch_s)
    if mode == "full" and context.model.execution.checkpoint != "needed":
        return _ChargedRecompute(
            ops=frozenset(kernels.forward_s), collectives=tuple(forward_collectives), launch_s=forward_launch_s
        )
    calls = context.software.fixed_calls + sum(kernels.forward_calls[op] for op in recomputation.ops)
    calls += context.software.collective_calls * sum(
        _num_awaited_hosts(context, route) for route in recomputation.paths
    )
    return _ChargedRecompute(
        ops=recomputation.ops, collectives=tuple(recomputed_collectives), launch_s=calls * launch_s
    )


def _host_s(
    context: BlockContext, kernels: _BlockKernels, redistributions: BlockRedistributions
) -> tuple[float, float]:
    """Seconds of the host, forward and backward: its calls, and its waits for other ranks' hosts."""
    software, launch_s = context.software, context.mesh.cluster.device.launch_s
    pairs = (
        (kernels.forward_calls, redistributions.forward_paths),
        (kernels.backward_calls, redistributions.backward_paths),
    )
    forward, backward = (
        software.fixed_calls
        + sum(calls.values())
        + software.collective_calls * sum(_num_awaited_hosts(context, route) for route in routes)
        for calls, routes in pairs
    )
    return forward * launch_s, backward * launch_s


def _collectives_of(paths: Iterable[RedistributionPath]) -> list[PricedCollective]:
    return [step for route in paths for step in route.collectives]


def _collectives_inside_ops(by_op: dict[int, tuple[PricedCollective, ...]]) -> list[PricedCollective]:
    """Of all ops, in their order."""
    return [step for of_op in by_op.values() for step in of_op]


def _total_s(collectives: Iterable[PricedCollective]) -> float:
    return sum(step.time_s for step in collectives)


def _num_awaited_hosts(context: BlockContext, path: RedistributionPath) -> int:
    """Ranks whose host a rank waits for in a move: all where the data axis moves, else those that share its samples."""
    if not path.collectives:
        return 0
    sizes = context.mesh.sizes
    inner = sizes[1:] if context.has_data_axis and not any(0 in step.axes for step in path.collectives) else sizes
    return prod(inner) - 1


def _exposed_redistribution_s(
    context: BlockContext, redistributions: BlockRedistributions, linear_backward_s: dict[int, tuple[float, float]]
) -> float:
    """Seconds of the backward's moves that linear ops' products do not hide; ``linears``: the two of each op."""
    execution, contention = context.model.execution, context.mesh.cluster.overlap_contention
    free = execution.launch != "blocking"
    hides_all, hides_gathered = free and execution.overlap, free and context.is_megatron
    found = 0.0
    for routes, behind, which in (
        (redistributions.backward_paths, redistributions.backward_readers, 1),
        (redistributions.regather_paths, redistributions.regather_readers, 0),
    ):
        for route, readers in zip(routes, behind, strict=True):
            hides = (hides_gathered and readers.only_gathers) or hides_all
            beside = readers.direct if hides and all(op in linear_backward_s for op in readers.reached) else ()
            hidden_s = min(route.time_s, sum(linear_backward_s[op][which] for op in beside))
            found += route.time_s - (1 - contention) * hidden_s
    return found


def _overlapped_s(compute_s: float, communication_s: float, contention: float) -> float:
    return max(compute_s, communication_s) + contention * min(compute_s, communication_s)


def _host_calls(context: BlockContext, op: Op) -> tuple[float, float]:
    """An op's calls of the host, forward and backward."""
    profile, software = context.model.profile.ops[op.id], context.software
    if context.materialises_scores(op):
        return software.math_attention_forward_calls, software.math_attention_backward_calls
    return float(profile.forward_kernels or software.view_calls), float(profile.backward_kernels)


def _issued_collectives(
    forward: list[PricedCollective], backward: list[PricedCollective], parameters: ParameterPrice
) -> tuple[IssuedCollective, ...]:
    """``forward`` as often as it runs, computed again included."""
    found = [
        IssuedCollective(collective=step, count=1, per="microbatch", of="activations") for step in (*forward, *backward)
    ]
    found += [
        IssuedCollective(collective=step, count=1, per="microbatch", of=_storage_role(step))
        for step in parameters.microbatch_collectives
    ]
    return (
        *found,
        *(
            IssuedCollective(collective=step, count=1, per="step", of=_storage_role(step))
            for step in parameters.step_collectives
        ),
    )


def _storage_role(collective: PricedCollective) -> Literal["parameters", "gradients"]:
    return "parameters" if collective.kind == "all_gather" else "gradients"
