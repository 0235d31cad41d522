"""What one block costs under its program: times, memory and collectives.

F, C, B     seconds outside attention, inside it, and of the backward: kernels, redistributions, collectives inside ops
host        seconds of launches: calls of the host * launch time, and waits for the slowest host per collective (`_host_s`)
forward     overlapped(busy(F + C, host), gathers)                busy = max; with blocking launches the sum
backward    overlapped(busy(B + R, host + R's), gathers, scatters)    overlapped(a, b) = max(a, b) + contention * min(a, b)
R           0 | C | F + C, or the part of it that the backward needs, under none | selective | full recomputation
            (selective recomputation by operation: as full, without what it saves) (`_BlockParts.charged_recompute`)
exposed     the collective on a linear op's input gradient overlaps with the product for its weight's, where the program
            overlaps or is sequence parallel, a regathered input with the product for its own gradient
            (`_exposed_redistribution_s`)
workspace   the most that one op needs, and what recomputation restores; gathered parameters come on top in `peak_memory`
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Literal

from autopar.core.errors import CheckError
from autopar.judge.block_kernels import BlockKernels
from autopar.judge.block_redistributions import BlockRedistributions, find_redistributions
from autopar.judge.context import BlockContext
from autopar.judge.parameter_price import ParameterPrice, price_parameters
from autopar.judge.recomputed_ops import BackwardRecomputation, find_recomputation
from autopar.judge.redistribution_path import PricedCollective, RedistributionPath
from autopar.judge.saved_bytes import count_saved_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuedCollective:
    """A collective, how often a block issues it, and what it communicates."""

    collective: PricedCollective
    count: int
    per: Literal["microbatch", "step"]
    of: Literal["activations", "parameters", "gradients"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSeconds:
    """What forward + backward of a micro-batch add up from, recomputation included: kernels of three kinds,
    ``redistribution_s`` (all collectives on activations), ``launch_s`` (what launches add to both), and
    ``exposed_parameters_s`` (what collectives on parameters and their gradients add)."""

    matmul_s: float
    attention_s: float
    memory_bound_s: float
    redistribution_s: float
    launch_s: float
    exposed_parameters_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPrice:
    """A block's seconds per micro-batch (forward, backward) and per step (``reduction_s``, which may overlap with the
    backward, and ``optimizer_s``), its bytes per rank, and its collectives.

    ``read_in_backward``: parameters that the backward reads. ``gathered_in_forward_only``: (parameter, its gather) of
    those that it does not read; a later block that shares one may."""

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


def price_block(context: BlockContext) -> BlockPrice:
    """The price of a block; CheckError where its program contradicts itself or was made for another graph."""
    parts = _BlockParts.of(context)
    mode, kernels, parameters = context.program.recompute, parts.kernels, parts.parameters
    num_shards = {op: (price.num_shards, price.num_fixed_shards) for op, price in kernels.prices.items()}
    saved = count_saved_bytes(context, parts.redistributions, num_shards)
    issued_forward = [*parts.forward_collectives, *parts.recomputed_collectives]
    if mode != "full" and context.selective is None:  # else the recomputed paths include these
        issued_forward += _collectives_of(parts.redistributions.regather_paths)
    forward_s, backward_s, seconds = _block_seconds(parts)
    return BlockPrice(
        forward_s=forward_s,
        backward_s=backward_s,
        seconds=seconds,
        reduction_s=parameters.reduction_s,
        optimizer_s=parameters.optimizer_s,
        parameters_bytes=parameters.parameters_bytes,
        gradients_bytes=parameters.gradients_bytes,
        optimizer_bytes=parameters.optimizer_bytes,
        saved_bytes=saved.saved_under(mode),
        workspace_bytes=kernels.workspace_bytes + saved.restored_under(mode),
        read_in_backward=parts.recomputation.parameters_read,
        gathered_in_forward_only=parameters.gathered_in_forward_only,
        collectives=_issued_collectives([*issued_forward, *parts.backward_collectives], parameters),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _ChargedRecompute:
    """What the backward is charged for recomputation: ops, collectives, and the launches of both."""

    ops: frozenset[int]
    collectives: tuple[PricedCollective, ...]
    launch_s: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _BlockParts:
    """All that is known of a block before it is added up."""

    context: BlockContext
    redistributions: BlockRedistributions
    kernels: BlockKernels
    recomputation: BackwardRecomputation
    parameters: ParameterPrice

    @staticmethod
    def of(context: BlockContext) -> "_BlockParts":
        """CheckError where the program contradicts itself or was made for another graph."""
        model, block, program = context.model, context.block, context.program
        ops = model.graph.ops[block.first_op : block.end_op]
        aligned = ((program.ops, ops), (program.inputs, block.inputs), (program.outputs, block.outputs))
        if any(len(planned) != len(actual) for planned, actual in aligned):
            raise CheckError(f"program {program.id!r} does not fit block {block.name}: it was made for another graph")
        redistributions = find_redistributions(
            model.graph, block, program, context.mesh, context.micro_batch, model.parameter_free
        )
        kernels = BlockKernels.of(context, redistributions)
        communicating = frozenset(op for op, price in kernels.prices.items() if price.forward_collectives)
        recomputation = find_recomputation(context, redistributions, communicating)
        return _BlockParts(
            context=context,
            redistributions=redistributions,
            kernels=kernels,
            recomputation=recomputation,
            parameters=price_parameters(context, recomputation.parameters_read),
        )

    @property
    def forward_collectives(self) -> list[PricedCollective]:
        """On activations, as the forward issues them."""
        return [*_collectives_of(self.redistributions.forward_paths), *self.kernels.forward_collectives]

    @property
    def backward_collectives(self) -> list[PricedCollective]:
        """On activations' gradients, as the backward issues them."""
        return [*_collectives_of(self.redistributions.backward_paths), *self.kernels.backward_collectives]

    @property
    def recomputed_collectives(self) -> list[PricedCollective]:
        """Of the forward, those that the backward issues a second time."""
        inside = (self.kernels.prices[op].forward_collectives for op in sorted(self.recomputation.ops))
        return [*_collectives_of(self.recomputation.paths), *(step for steps in inside for step in steps)]

    def charged_recompute(self, forward_launch_s: float) -> _ChargedRecompute:
        """By the recompute mode: nothing; attention; the whole block, as Megatron-LM's checkpoint does; or what of it the
        backward needs. ``forward_launch_s``: launches of the forward."""
        context, kernels = self.context, self.kernels
        mode, launch_s = context.program.recompute, context.mesh.cluster.device.launch_s
        if mode == "none":
            return _ChargedRecompute(ops=frozenset(), collectives=(), launch_s=0.0)
        if mode == "selective" and context.selective is None:
            calls = sum(kernels.forward_calls[op] for op in kernels.attention_ops)
            return _ChargedRecompute(ops=kernels.attention_ops, collectives=(), launch_s=calls * launch_s)
        if mode == "full" and context.model.execution.checkpoint != "needed":
            return _ChargedRecompute(
                ops=frozenset(kernels.prices), collectives=tuple(self.forward_collectives), launch_s=forward_launch_s
            )
        ops, paths = self.recomputation.ops, self.recomputation.paths
        calls = context.software.fixed_calls + sum(kernels.forward_calls[op] for op in ops)
        calls += context.software.collective_calls * sum(_num_awaited_hosts(context, path) for path in paths)
        return _ChargedRecompute(ops=ops, collectives=tuple(self.recomputed_collectives), launch_s=calls * launch_s)


def _block_seconds(parts: _BlockParts) -> tuple[float, float, BlockSeconds]:
    """(forward, backward, what they add up from) of a micro-batch."""
    context, kernels, parameters = parts.context, parts.kernels, parts.parameters
    launch_forward_s, launch_backward_s = _host_s(parts)
    charged = parts.charged_recompute(launch_forward_s)
    forward_steps_s, recomputed_steps_s = _total_s(parts.forward_collectives), _total_s(charged.collectives)
    backward_steps_s = _total_s(kernels.backward_collectives) + _exposed_redistribution_s(parts)
    forward_busy_s = kernels.forward_s(kernels.prices) + forward_steps_s
    recompute_s = kernels.forward_s(charged.ops) + recomputed_steps_s
    backward_busy_s = kernels.backward_s(kernels.prices) + backward_steps_s + parameters.accumulate_s + recompute_s
    busy = sum if context.model.execution.launch == "blocking" else max  # blocking: the host waits for each kernel
    forward_compute_s = float(busy((forward_busy_s, launch_forward_s)))
    backward_compute_s = float(busy((backward_busy_s, launch_backward_s + charged.launch_s)))
    contention = context.mesh.cluster.overlap_contention if context.model.execution.overlap else 1.0
    forward_s = _overlapped_s(forward_compute_s, parameters.forward_s, contention)
    backward_s = _overlapped_s(backward_compute_s, parameters.backward_s, contention)

    matmul_s, attention_s = (
        sum(kernels.prices[op].forward_s + kernels.prices[op].backward_s for op in ops)
        + kernels.forward_s(ops & charged.ops)
        for ops in (kernels.matmul_ops, kernels.attention_ops)
    )
    redistribution_s = forward_steps_s + recomputed_steps_s + backward_steps_s
    memory_bound_s = forward_busy_s + backward_busy_s - matmul_s - attention_s - redistribution_s
    seconds = BlockSeconds(
        matmul_s=matmul_s,
        attention_s=attention_s,
        memory_bound_s=max(memory_bound_s, 0.0),
        redistribution_s=redistribution_s,
        launch_s=(forward_compute_s - forward_busy_s) + (backward_compute_s - backward_busy_s),
        exposed_parameters_s=(forward_s - forward_compute_s) + (backward_s - backward_compute_s),
    )
    return forward_s, backward_s, seconds


def _host_s(parts: _BlockParts) -> tuple[float, float]:
    """Seconds of the host, forward and backward: its calls, and its waits for other ranks' hosts."""
    context, kernels, redistributions = parts.context, parts.kernels, parts.redistributions
    software, launch_s = context.software, context.mesh.cluster.device.launch_s
    forward, backward = (
        software.fixed_calls
        + sum(calls.values())
        + software.collective_calls * sum(_num_awaited_hosts(context, path) for path in paths)
        for calls, paths in (
            (kernels.forward_calls, redistributions.forward_paths),
            (kernels.backward_calls, redistributions.backward_paths),
        )
    )
    return forward * launch_s, backward * launch_s


def _collectives_of(paths: Iterable[RedistributionPath]) -> list[PricedCollective]:
    """The collectives of several paths in order."""
    return [step for path in paths for step in path.collectives]


def _total_s(collectives: Iterable[PricedCollective]) -> float:
    """Seconds of collectives one after the other."""
    return sum(step.time_s for step in collectives)


def _num_awaited_hosts(context: BlockContext, path: RedistributionPath) -> int:
    """Ranks whose hosts a rank waits for in a redistribution: all where it spans the data axis, else those that share its
    samples."""
    if not path.collectives:
        return 0
    sizes = context.mesh.sizes
    inner = sizes[1:] if context.has_data_axis and not any(0 in step.axes for step in path.collectives) else sizes
    return prod(inner) - 1


def _exposed_redistribution_s(parts: _BlockParts) -> float:
    """Seconds of the backward's redistributions and regathers that do not overlap with products of linear ops."""
    context, redistributions = parts.context, parts.redistributions
    execution, contention = context.model.execution, context.mesh.cluster.overlap_contention
    is_async = execution.launch != "blocking"
    overlaps_all, overlaps_gathers = is_async and execution.overlap, is_async and context.is_megatron
    exposed_s = 0.0
    for paths, readers_of_paths, product in (
        (redistributions.backward_paths, redistributions.backward_readers, 1),
        (redistributions.regather_paths, redistributions.regather_readers, 0),
    ):
        for path, readers in zip(paths, readers_of_paths, strict=True):
            overlaps = overlaps_all or (overlaps_gathers and readers.only_gathers)
            linear = all(parts.kernels.linear_backward_s(op) is not None for op in readers.reached)
            products = [parts.kernels.linear_backward_s(op) for op in readers.direct] if overlaps and linear else []
            product_s = sum(seconds[product] for seconds in products if seconds is not None)
            exposed_s += path.time_s - (1 - contention) * min(path.time_s, product_s)
    return exposed_s


def _overlapped_s(compute_s: float, communication_s: float, contention: float) -> float:
    """Seconds of both at once: max(a, b) + contention * min(a, b)."""
    return max(compute_s, communication_s) + contention * min(compute_s, communication_s)


def _issued_collectives(
    activations: Iterable[PricedCollective], parameters: ParameterPrice
) -> tuple[IssuedCollective, ...]:
    """Those on activations, then those on parameters and gradients: per micro-batch, per step."""
    return (
        *(IssuedCollective(collective=step, count=1, per="microbatch", of="activations") for step in activations),
        *(
            IssuedCollective(collective=step, count=1, per="microbatch", of=_storage_role(step))
            for step in parameters.microbatch_collectives
        ),
        *(
            IssuedCollective(collective=step, count=1, per="step", of=_storage_role(step))
            for step in parameters.step_collectives
        ),
    )


def _storage_role(collective: PricedCollective) -> Literal["parameters", "gradients"]:
    """Gathers are of parameters, everything else of gradients."""
    return "parameters" if collective.kind == "all_gather" else "gradients"
