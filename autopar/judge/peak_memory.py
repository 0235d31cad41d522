"""The peak of a stage's memory, found from the plan's placements and the prices of its blocks.

The backward runs from the last block to the first. While it is in a block, the saved tensors of that block and of all
earlier ones are alive, the gradients of all later ones have been produced, and the workspace is the block's own. The
gathered parameters of two neighbouring blocks are alive at once, in addition to their shards. The gradient of a tied
parameter appears in the last block that uses it; under ZeRO it stays unsharded until the first such block has added its
part, and is reduce-scattered then.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from autopar.core.placement import parse_placements
from autopar.core.plan import Execution, ParameterPlan
from autopar.graph.ir import Graph
from autopar.judge.block_price import BlockPrice
from autopar.judge.context import JudgedBlock
from autopar.judge.judge_mesh import JudgeMesh


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakMoment:
    """The peak of one micro-batch's backward: bytes in addition to what is there before its forward, and how many of them
    are workspace."""

    added_bytes: float
    workspace_bytes: float


@dataclass(slots=True, kw_only=True)
class _GradientMemory:
    """Of one parameter: ``added_bytes`` of gradient that the backward leaves and that were not there before,
    ``unsharded_bytes`` of the gradient before it is reduce-scattered, ``is_scattered_at_once``, whether that happens inside
    the backward, ``gathered_bytes`` of the parameter under ZeRO-3 (else 0), and the positions of the blocks that use it,
    in order."""

    added_bytes: float
    unsharded_bytes: float
    is_scattered_at_once: bool
    gathered_bytes: float
    users: list[int] = field(default_factory=list)


def find_peak(
    graph: Graph,
    blocks: Sequence[JudgedBlock],
    prices: Sequence[BlockPrice],
    mesh: JudgeMesh,
    execution: Execution,
    *,
    accumulates_gradients: bool,
) -> PeakMoment:
    """The peak of a stage of ``blocks``. ``accumulates_gradients``: the sums of gradients are there before the backward."""
    parameters: dict[int, _GradientMemory] = {}
    for position, block in enumerate(blocks):
        plans = block.parameter_plans(graph)
        for value in block.block.parameters:
            tensor = graph.values[value]
            if tensor.kind == "buffer" or not tensor.requires_grad:
                continue
            if value not in parameters and value in plans:
                num_bytes = float(
                    mesh.local_bytes(tensor.shape, tensor.itemsize, parse_placements(plans[value].compute))
                )
                parameters[value] = _gradient_memory(
                    plans[value], num_bytes, tensor.itemsize, mesh, execution, accumulates_gradients
                )
            if value in parameters:
                parameters[value].users.append(position)
    gathered_bytes = [0.0] * len(blocks)
    produced_bytes, waiting_bytes = [0.0] * len(blocks), [0.0] * len(blocks)
    for memory in parameters.values():
        for position in memory.users:
            gathered_bytes[position] += memory.gathered_bytes
        last, first = memory.users[-1], memory.users[0]
        produced_bytes[first if memory.is_scattered_at_once else last] += memory.added_bytes
        for position in range(first, last) if memory.is_scattered_at_once else ():
            waiting_bytes[position] += memory.unsharded_bytes
    saved_bytes, later_bytes = 0.0, sum(produced_bytes)
    moments = [PeakMoment(added_bytes=later_bytes, workspace_bytes=0.0)]  # the end: all gradients, and nothing else
    for position, price in enumerate(prices):
        neighbours = [gathered_bytes[other] for other in (position - 1, position + 1) if 0 <= other < len(blocks)]
        workspace_bytes = price.workspace_bytes + gathered_bytes[position] + max(neighbours, default=0.0)
        saved_bytes += price.saved_bytes
        later_bytes -= produced_bytes[position]
        added_bytes = saved_bytes + later_bytes + waiting_bytes[position] + workspace_bytes
        moments.append(PeakMoment(added_bytes=added_bytes, workspace_bytes=workspace_bytes))
    most = max(moment.added_bytes for moment in moments)
    return next(moment for moment in reversed(moments) if moment.added_bytes >= most * (1 - 1e-9))


def _gradient_memory(
    planned: ParameterPlan,
    num_bytes: float,
    itemsize: int,
    mesh: JudgeMesh,
    execution: Execution,
    accumulates_gradients: bool,
) -> _GradientMemory:
    """Of a parameter of which a rank computes with ``num_bytes``."""
    compute, optimizer, gradient = (
        parse_placements(text) for text in (planned.compute, planned.optimizer, planned.gradient)
    )
    zero_axes = [axis for axis, (used, stepped) in enumerate(zip(compute, optimizer, strict=True)) if used != stepped]
    num_zero_shards = prod(mesh.sizes[axis] for axis in zero_axes)
    is_sharded = bool(zero_axes) and all(gradient[axis] == optimizer[axis] for axis in zero_axes)
    stored_bytes = num_bytes / itemsize * (4 if execution.grads == "fp32" else itemsize)
    stored_bytes /= num_zero_shards if is_sharded else 1
    scattered_at_once = is_sharded and execution.overlap
    added_bytes = 0.0 if accumulates_gradients else stored_bytes
    if is_sharded and not scattered_at_once:  # without overlap, reduce-scattered at the end of the backward
        added_bytes = num_bytes
    return _GradientMemory(
        added_bytes=added_bytes,
        unsharded_bytes=num_bytes,
        is_scattered_at_once=scattered_at_once,
        gathered_bytes=num_bytes if num_zero_shards > 1 and planned.parameter == planned.optimizer else 0.0,
    )
