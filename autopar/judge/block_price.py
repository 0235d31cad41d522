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
from autopar.judge.block_redistributions import Moves, moves
from autopar.judge.context import Case
from autopar.judge.judge_mesh import Route, Step
from autopar.judge.op_price import price_op
from autopar.judge.parameter_price import ParameterPrice, price_parameters
from autopar.judge.recomputed_ops import Again, again
from autopar.judge.saved_bytes import kept
from autopar.judge.workspace_bytes import passing


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


@dataclass(slots=True)
class _Kernels:
    """What the ops of a block do, by op: seconds of their kernels, calls of the host, collectives inside, and by how many
    ranks their work is divided. ``linears``: the two backward products of each linear op; ``passing_bytes``: at most."""

    forward_s: dict[int, float] = field(default_factory=dict)
    backward_s: dict[int, float] = field(default_factory=dict)
    forward_calls: dict[int, float] = field(default_factory=dict)
    backward_calls: dict[int, float] = field(default_factory=dict)
    forward_steps: dict[int, tuple[Step, ...]] = field(default_factory=dict)
    backward_steps: dict[int, tuple[Step, ...]] = field(default_factory=dict)
    shards: dict[int, tuple[int, int]] = field(default_factory=dict)
    attentions: set[int] = field(default_factory=set)
    products: set[int] = field(default_factory=set)
    linears: dict[int, tuple[float, float]] = field(default_factory=dict)
    passing_bytes: float = 0.0

    @staticmethod
    def of(case: Case, moved: Moves) -> "_Kernels":
        """Of all ops that some rank computes and others do not."""
        found = _Kernels()
        whole: dict[int, float] = {}  # what ops that keep their input cut take whole
        for op_id, size in moved.keep_cut:
            whole[op_id] = max(size, whole.get(op_id, 0.0))
        for op, planned in case.ops():
            price, profile = price_op(case, op, planned), case.ground.profile.ops[op.id]
            found.forward_s[op.id], found.backward_s[op.id] = price.forward_s, price.backward_s
            found.forward_calls[op.id], found.backward_calls[op.id] = _calls(case, op)
            found.forward_steps[op.id], found.backward_steps[op.id] = price.forward_steps, price.backward_steps
            found.shards[op.id] = (price.shards, price.fixed_shards)
            if op.is_attention:
                found.attentions.add(op.id)
            elif profile.forward_flops:
                found.products.add(op.id)
                if price.products_s is not None:
                    found.linears[op.id] = price.products_s
            passed = passing(case, op, planned, price.shards) + whole.get(op.id, 0.0)
            found.passing_bytes = max(found.passing_bytes, passed)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rerun:
    """What the backward is charged for computing again: ops, collectives, and the launches of both."""

    ops: frozenset[int]
    steps: tuple[Step, ...]
    launch_s: float


def price_block(case: Case) -> BlockPrice:
    """CheckError where the program contradicts itself or is of another graph."""
    ground, block, program, mode = case.ground, case.block, case.program, case.program.recompute
    ops = ground.graph.ops[block.first_op : block.end_op]
    aligned = ((program.ops, ops), (program.inputs, block.inputs), (program.outputs, block.outputs))
    if any(len(planned) != len(real) for planned, real in aligned):
        raise CheckError(f"program {program.id!r} does not fit block {block.name}: it is of another graph")
    moved = moves(ground.graph, block, program, case.mesh, case.micro_batch, ground.free)
    kernels = _Kernels.of(case, moved)
    forward = [*_steps(moved.forward), *_inside(kernels.forward_steps)]
    backward = [*_steps(moved.backward), *_inside(kernels.backward_steps)]
    repeated = again(case, moved, frozenset(op for op, steps in kernels.forward_steps.items() if steps))
    repeated_steps = [*_steps(repeated.routes)]
    repeated_steps += _inside({op: kernels.forward_steps[op] for op in sorted(repeated.ops)})
    listed = [*forward, *repeated_steps]
    if mode != "full" and case.selected is None:  # else all ways run again that the backward reads from
        listed += _steps(moved.again)
    parameters = price_parameters(case, repeated.parameters)
    held = kept(case, moved, kernels.shards)

    launch_f, launch_b = _launch_s(case, kernels, moved)
    rerun = _rerun(case, kernels, repeated, repeated_steps, forward, launch_f)
    exchanged_s = _total_s(_inside(kernels.backward_steps)) + _visible_s(case, moved, kernels.linears)
    moved_s = _total_s(forward)
    moved_again_s = _total_s(rerun.steps)
    forward_kernels_s = sum(kernels.forward_s.values()) + moved_s
    again_s = sum(kernels.forward_s[op] for op in rerun.ops) + moved_again_s
    backward_kernels_s = sum(kernels.backward_s.values()) + exchanged_s + parameters.accumulate_s + again_s
    together = sum if ground.execution.launch == "blocking" else max  # blocking: the host waits for each kernel
    busy_f = float(together((forward_kernels_s, launch_f)))
    busy_b = float(together((backward_kernels_s, launch_b + rerun.launch_s)))
    contention = case.mesh.cluster.overlap_contention if ground.execution.overlap else 1.0
    forward_s = _both(busy_f, parameters.forward_s, contention)
    backward_s = _both(busy_b, parameters.backward_s, contention)

    matmul_s, attention_s = (
        sum(kernels.forward_s[op] + kernels.backward_s[op] for op in some)
        + sum(kernels.forward_s[op] for op in some & rerun.ops)
        for some in (kernels.products, kernels.attentions)
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
            activations_s=activations_s,
            launch_s=(busy_f - forward_kernels_s) + (busy_b - backward_kernels_s),
            storage_s=(forward_s - busy_f) + (backward_s - busy_b),
        ),
        reduction_s=parameters.reduction_s,
        optimizer_s=parameters.optimizer_s,
        parameters_bytes=parameters.parameters_bytes,
        gradients_bytes=parameters.gradients_bytes,
        optimizer_bytes=parameters.optimizer_bytes,
        saved_bytes={"none": held.saved + held.core, "selective": held.saved + held.beside, "full": held.inputs}[mode],
        passing_bytes=kernels.passing_bytes
        + {"none": 0.0, "selective": held.core, "full": held.saved + held.core}[mode],
        read_again=repeated.parameters,
        gathered_once=parameters.gathered_once,
        issues=_issues(listed, backward, parameters),
    )


def _rerun(
    case: Case, kernels: _Kernels, repeated: Again, repeated_steps: list[Step], forward: list[Step], launch_f: float
) -> _Rerun:
    """By the recompute mode: nothing; attention; the whole block, as torch's checkpoint does; or of it what the backward
    needs."""
    mode, launch_s = case.program.recompute, case.mesh.cluster.device.launch_s
    if mode == "none":
        return _Rerun(ops=frozenset(), steps=(), launch_s=0.0)
    if mode == "selective" and case.selected is None:
        calls = sum(kernels.forward_calls[op] for op in kernels.attentions)
        return _Rerun(ops=frozenset(kernels.attentions), steps=(), launch_s=calls * launch_s)
    if mode == "full" and case.ground.execution.checkpoint != "needed":
        return _Rerun(ops=frozenset(kernels.forward_s), steps=tuple(forward), launch_s=launch_f)
    calls = case.software.fixed_calls + sum(kernels.forward_calls[op] for op in repeated.ops)
    calls += case.software.collective_calls * sum(_waiting(case, route) for route in repeated.routes)
    return _Rerun(ops=repeated.ops, steps=tuple(repeated_steps), launch_s=calls * launch_s)


def _launch_s(case: Case, kernels: _Kernels, moved: Moves) -> tuple[float, float]:
    """Seconds of the host, forward and backward: its calls, and its waits for other ranks' hosts."""
    software, launch_s = case.software, case.mesh.cluster.device.launch_s
    pairs = ((kernels.forward_calls, moved.forward), (kernels.backward_calls, moved.backward))
    forward, backward = (
        software.fixed_calls
        + sum(calls.values())
        + software.collective_calls * sum(_waiting(case, route) for route in routes)
        for calls, routes in pairs
    )
    return forward * launch_s, backward * launch_s


def _steps(routes: Iterable[Route]) -> list[Step]:
    return [step for route in routes for step in route.steps]


def _inside(steps: dict[int, tuple[Step, ...]]) -> list[Step]:
    """Of all ops, in their order."""
    return [step for of_op in steps.values() for step in of_op]


def _total_s(steps: Iterable[Step]) -> float:
    return sum(step.time_s for step in steps)


def _waiting(case: Case, route: Route) -> int:
    """Ranks whose host a rank waits for in a move: all where the data axis moves, else those that share its samples."""
    if not route.steps:
        return 0
    sizes = case.mesh.sizes
    inner = sizes[1:] if case.has_data_axis and not any(0 in step.axes for step in route.steps) else sizes
    return prod(inner) - 1


def _visible_s(case: Case, moved: Moves, linears: dict[int, tuple[float, float]]) -> float:
    """Seconds of the backward's moves that linear ops' products do not hide; ``linears``: the two of each op."""
    execution, contention = case.ground.execution, case.mesh.cluster.overlap_contention
    free = execution.launch != "blocking"
    hides_all, hides_gathered = free and execution.overlap, free and case.as_megatron
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


def _calls(case: Case, op: Op) -> tuple[float, float]:
    """An op's calls of the host, forward and backward."""
    profile, software = case.ground.profile.ops[op.id], case.software
    if case.materialises(op):
        return software.math_attention_forward_calls, software.math_attention_backward_calls
    return float(profile.forward_kernels or software.view_calls), float(profile.backward_kernels)


def _issues(forward: list[Step], backward: list[Step], parameters: ParameterPrice) -> tuple[Issue, ...]:
    """``forward`` as often as it runs, computed again included."""
    found = [Issue(step=step, count=1, per="microbatch", of="activations") for step in (*forward, *backward)]
    found += [Issue(step=step, count=1, per="microbatch", of=_moved(step)) for step in parameters.microbatch_steps]
    return (*found, *(Issue(step=step, count=1, per="step", of=_moved(step)) for step in parameters.once_steps))


def _moved(step: Step) -> Literal["parameters", "gradients"]:
    return "parameters" if step.kind == "all_gather" else "gradients"
