"""What one block costs under its program: times, memory and collectives, summed here and nowhere else.

F, C, B      kernels outside and inside attention, and backward, with the moves of activations      (judge_ops, _flow)
launches     calls of the host * launch time, + a wait per collective for the slowest host
forward      both(max(F + C, launches), gathers)                both(a, b) = max(a, b) + contention * min(a, b)
backward     both(max(B + again, launches), gathers, scatters)  again = 0 | C | A for none | selective | full
             (selective by operation: as full, of what it has not kept)
             A = F + C, or of it what the backward needs (`judge_again`)
exchanges    of a linear op's input gradient run beside the product for its weight's, where the program overlaps or is
             sequence parallel, and what is gathered again beside the one for its input's: both(a, b) - a  (_visible_s)
passing      in one op, at most, + what the recompute mode brings back; gathered parameters beside it: `judge_peak`
"""

from dataclasses import dataclass
from math import prod
from typing import Literal

from autopar.cluster.software import Software, load_software
from autopar.cost.fusion import NOTHING, Saving
from autopar.graph.ir import Block, Graph, OpProfile
from autopar.graph.profile import GraphProfile
from autopar.inter.judge_again import again
from autopar.inter.judge_flow import Moves, kept, moves
from autopar.inter.judge_ops import price_op
from autopar.inter.judge_parameters import ParameterPrice, price_parameters
from autopar.inter.judge_routes import Mesh, Route, Step
from autopar.inter.judge_selected import Selected
from autopar.inter.judge_workspace import passing
from autopar.plan.errors import CheckError
from autopar.plan.plan import BlockProgram, Execution


@dataclass(frozen=True, slots=True, kw_only=True)
class Issue:
    """A collective, how often a block issues it, and what it moves."""

    step: Step
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
    activations_s: float
    launch_s: float
    storage_s: float


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
    passing_bytes: float
    read_again: frozenset[int]
    gathered_once: tuple[tuple[int, Step], ...]
    issues: tuple[Issue, ...]
    seconds: BlockSeconds


def price_block(
    graph: Graph,
    profile: GraphProfile,
    block: Block,
    program: BlockProgram,
    mesh: Mesh,
    micro_batch: int,
    execution: Execution,
    free: frozenset[int],
    stored: frozenset[int],
    fused: dict[int, Saving],
    accumulates: bool,
    data_axis: bool,
    balanced: bool,
    stays: tuple[frozenset[int], frozenset[int]],
    disagreed: frozenset[tuple[int, int]],
    read_on: frozenset[int],
    selected: Selected | None = None,
) -> BlockPrice:
    """``free`` values are at hand anywhere, ``stored`` parameters are held by an earlier block of the stage; ``fused``
    is what fusion saves of the ops' traffic, ``data_axis`` whether the first of several axes is the data axis;
    ``balanced``: those that share a sequence share its attention evenly under a causal mask, and the rest is Megatron's
    program, too; ``stays``: see ``judge_workspace.kept_anywhere``; ``disagreed`` as in `judge_parameters`, ``read_on``
    and ``selected`` in `judge_again`."""
    software, device = load_software(execution.fusion), mesh.cluster.device
    ops = graph.ops[block.first_op : block.end_op]
    aligned = ((program.ops, ops), (program.inputs, block.inputs), (program.outputs, block.outputs))
    if any(len(planned) != len(real) for planned, real in aligned):
        raise CheckError(f"program {program.id!r} does not fit block {block.name}: it is of another graph")
    moved = moves(graph, block, program, mesh, micro_batch, free)
    times = [0.0, 0.0, 0.0]
    products = [0.0, 0.0]  # matmuls forward and backward
    core_backward = 0.0
    linears: dict[int, tuple[float, float]] = {}
    alone: dict[int, float] = {}  # seconds of each op's forward kernels
    attending: set[int] = set()
    multiplying: set[int] = set()
    called: dict[int, float] = {}
    forward = [step for route in moved.forward for step in route.steps]
    backward = [step for route in moved.backward for step in route.steps]
    calls = [software.fixed_calls, 0.0, software.fixed_calls]
    exchanged: dict[int, tuple[Step, ...]] = {}
    shards: dict[int, tuple[int, int]] = {}
    largest = 0.0
    for op, planned in zip(ops, program.ops, strict=True):
        if free.issuperset((*op.inputs, *op.outputs)):
            continue
        price = price_op(
            graph, op, profile.ops[op.id], planned, micro_batch, mesh, execution, fused.get(op.id, NOTHING), balanced
        )
        core = "scaled_dot_product" in op.target
        alone[op.id] = price.forward_s
        times[1 if core else 0] += price.forward_s
        times[2] += price.backward_s
        if core:
            attending.add(op.id)
            core_backward += price.backward_s
        elif profile.ops[op.id].forward_flops:
            multiplying.add(op.id)
            if price.products_s is not None:
                linears[op.id] = price.products_s
            products[0] += price.forward_s
            products[1] += price.backward_s
        forward += price.forward_steps
        if price.forward_steps:
            exchanged[op.id] = price.forward_steps
        backward += price.backward_steps
        shards[op.id] = (price.shards, price.fixed_shards)
        before = calls[0]
        _count(calls, profile.ops[op.id], core and execution.attn == "math", core, software)
        called[op.id] = calls[0] - before
        scores = core and execution.attn == "math"
        alone_bytes = passing(graph, profile, op, planned, mesh, micro_batch, *stays, price.shards, materialised=scores)
        largest = max(largest, alone_bytes + max((size for at, size in moved.keep_cut if at == op.id), default=0.0))
    per_score = software.math_attention_bytes_per_score if execution.attn == "math" else 0.0
    held = kept(
        graph, profile, block, program, mesh, micro_batch, moved, free, shards, per_score, balanced, selected, stays[0]
    )
    repeated = again(graph, profile, block, program, moved, free, frozenset(exchanged), read_on, selected)
    rerun = [step for route in repeated.routes for step in route.steps]
    rerun += [step for op in sorted(repeated.ops) for step in exchanged.get(op, ())]
    by_op = program.recompute == "selective" and selected is not None
    listed_again = list(rerun)
    if program.recompute != "full" and not by_op:  # else all ways run again that the backward reads from
        listed_again += [step for route in moved.again for step in route.steps]
    parameters = price_parameters(
        graph, block, program, mesh, execution, stored, accumulates, repeated.parameters, disagreed
    )
    f = times[0] + sum(step.time_s for step in forward)
    steps_s = sum(step.time_s for step in backward) - sum(route.time_s for route in moved.backward)  # inside ops
    exchanged_s = steps_s + _visible_s(moved, linears, mesh.cluster.overlap_contention, execution, balanced)
    b = times[2] + exchanged_s
    full, mode = program.recompute == "full", program.recompute
    needed = by_op or (mode == "full" and execution.checkpoint == "needed")
    rerun_s = sum(alone[op] for op in repeated.ops) + sum(step.time_s for step in rerun) if needed else f + times[1]
    again_s = {"none": 0.0, "selective": rerun_s if by_op else times[1], "full": rerun_s}[mode]
    wait_s = software.collective_calls * device.launch_s
    waiting = [sum(_waiting(route, mesh, data_axis) for route in routes) for routes in (moved.forward, moved.backward)]
    launch_f = calls[0] * device.launch_s + wait_s * waiting[0]
    launch_b = calls[2] * device.launch_s + wait_s * waiting[1]
    launched_s = launch_f
    if needed:
        calls_again = software.fixed_calls + sum(called[op] for op in repeated.ops)
        waiting_again = sum(_waiting(route, mesh, data_axis) for route in repeated.routes)
        launched_s = calls_again * device.launch_s + wait_s * waiting_again
    attention_launched_s = calls[1] * device.launch_s
    launch_b += {"none": 0.0, "selective": launched_s if by_op else attention_launched_s, "full": launched_s}[mode]
    contention = mesh.cluster.overlap_contention if execution.overlap else 1.0
    kernels, launches = (f + times[1], b + parameters.accumulate_s + again_s), (launch_f, launch_b)
    together = sum if execution.launch == "blocking" else max  # blocking: the host waits for each kernel
    busy = [float(together(pair)) for pair in zip(kernels, launches, strict=True)]
    forward_s, backward_s = (
        _both(one, held, contention)
        for one, held in zip(busy, (parameters.forward_s, parameters.backward_s), strict=True)
    )
    whole = set(alone) if full and not needed else repeated.ops if needed else set()
    matmul_s = products[0] + products[1] + sum(alone[op] for op in whole if op in multiplying)
    attended_again_s = (
        times[1] if mode == "selective" and not by_op else sum(alone[op] for op in whole if op in attending)
    )
    attention_s = times[1] + attended_again_s + core_backward
    moved_s = sum(step.time_s for step in forward)
    moved_again_s = sum(step.time_s for step in (rerun if needed else forward)) if full or by_op else 0.0
    activations_s = moved_s + moved_again_s + exchanged_s
    kernels_s = f + times[1] + b + parameters.accumulate_s + again_s
    return BlockPrice(
        forward_s=forward_s,
        backward_s=backward_s,
        seconds=BlockSeconds(
            matmul_s=matmul_s,
            attention_s=attention_s,
            memory_bound_s=max(kernels_s - matmul_s - attention_s - activations_s, 0.0),
            activations_s=activations_s,
            launch_s=sum(busy) - kernels_s,
            storage_s=forward_s + backward_s - sum(busy),
        ),
        reduction_s=parameters.reduction_s,
        optimizer_s=parameters.optimizer_s,
        parameters_bytes=parameters.parameters_bytes,
        gradients_bytes=parameters.gradients_bytes,
        optimizer_bytes=parameters.optimizer_bytes,
        saved_bytes={
            "none": held.saved + held.core,
            "selective": held.saved + held.beside,
            "full": held.inputs,
        }[mode],
        passing_bytes=largest + {"none": 0.0, "selective": held.core, "full": held.saved + held.core}[mode],
        read_again=repeated.parameters,
        gathered_once=parameters.gathered_once,
        issues=_issues([*forward, *listed_again], backward, parameters),
    )


def _waiting(route: Route, mesh: Mesh, data_axis: bool) -> int:
    """Ranks whose host a rank waits for in a move: all where the data axis moves, else those that share its samples."""
    if not route.steps:
        return 0
    inner = mesh.sizes[1:] if data_axis and not any(0 in step.axes for step in route.steps) else mesh.sizes
    return prod(inner) - 1


def _visible_s(
    moved: Moves,
    linears: dict[int, tuple[float, float]],
    contention: float,
    execution: Execution,
    as_megatron: bool,
) -> float:
    """Seconds of the backward's moves that linear ops' products do not hide; ``linears``: the two of each op."""
    free = execution.launch != "blocking"
    hides_all, hides_gathered = free and execution.overlap, free and as_megatron
    found = 0.0
    for routes, behind, which in ((moved.backward, moved.backward_behind, 1), (moved.again, moved.again_behind, 0)):
        for route, readers in zip(routes, behind, strict=True):
            hides = (hides_gathered and readers.gathers) or hides_all
            beside = readers.ops if hides and all(op in linears for op in readers.led_to) else ()
            hidden_s = min(route.time_s, sum(linears[op][which] for op in beside))
            found += route.time_s - (1 - contention) * hidden_s
    return found


def _both(compute_s: float, communication_s: float, contention: float) -> float:
    return max(compute_s, communication_s) + contention * min(compute_s, communication_s)


def _count(calls: list[float], profile: OpProfile, materialised: bool, core: bool, software: Software) -> None:
    """Add an op's calls: forward, those of attention among them, backward."""
    forward, backward = float(profile.forward_kernels), float(profile.backward_kernels)
    if materialised:
        forward, backward = software.math_attention_forward_calls, software.math_attention_backward_calls
    elif not profile.forward_kernels:
        forward = software.view_calls
    calls[0] += forward
    calls[1] += forward if core else 0.0
    calls[2] += backward


def _issues(forward: list[Step], backward: list[Step], parameters: ParameterPrice) -> tuple[Issue, ...]:
    """``forward`` as often as it runs, computed again included."""
    found = [Issue(step=step, count=1, per="microbatch", of="activations") for step in (*forward, *backward)]
    found += [Issue(step=step, count=1, per="microbatch", of=_moved(step)) for step in parameters.microbatch_steps]
    return (*found, *(Issue(step=step, count=1, per="step", of=_moved(step)) for step in parameters.once_steps))


def _moved(step: Step) -> Literal["parameters", "gradients"]:
    return "parameters" if step.kind == "all_gather" else "gradients"
