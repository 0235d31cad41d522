"""When a stage holds most, found from the plan's placements and the prices of its blocks.

A backward goes from the last block to the first. While it is in a block, that block and those before it still keep
their tensors, those behind it have left their gradients, and what passes is the block's own. Gathered parameters of
two neighbours are there together, each whole beside the part that stays. A tied parameter leaves its gradient where its
last block is; one that ZeRO cuts stays whole until its first block has added the last term, and only then is cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from autopar.core.placement import parse_placements
from autopar.core.plan import BlockProgram, Execution, ParameterPlan
from autopar.graph.ir import Block, Graph
from autopar.judge.judge_mesh import JudgeMesh


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockMemory:
    """A block of a stage with its program, the first block of its kind, what a micro-batch keeps of it, and what
    passes in it beside gathered parameters."""

    block: Block
    program: BlockProgram
    first_of_kind: Block
    saved_bytes: float
    workspace_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakMoment:
    """The fullest moment of one micro-batch's backward: what lives beside all that is there before it, and how much of
    that passes."""

    added_bytes: float
    workspace_bytes: float


@dataclass(slots=True, kw_only=True)
class _GradientMemory:
    """Of one parameter: bytes that a backward leaves and that were not there before, bytes of a whole term, whether
    terms are cut as they are made, and the blocks that use it, in order."""

    added_bytes: float
    unsharded_bytes: float
    is_scattered_at_once: bool
    users: list[int]


def find_peak(
    graph: Graph, blocks: Sequence[BlockMemory], mesh: JudgeMesh, execution: Execution, *, accumulates_gradients: bool
) -> PeakMoment:
    """``accumulates``: gradients at rest are there before the backward."""
    gradients: dict[int, _GradientMemory] = {}
    weights = [0.0] * len(blocks)
    whole: dict[int, float] = {}
    for at, passage in enumerate(blocks):
        by_name = {name: own for own in passage.first_of_kind.parameters for name in graph.values[own].qualified_names}
        actual = dict(zip(passage.first_of_kind.parameters, passage.block.parameters, strict=True))
        here = {actual[by_name[planned.name]]: planned for planned in passage.program.parameters}
        for value in passage.block.parameters:
            tensor = graph.values[value]
            if tensor.kind == "buffer" or not tensor.requires_grad:
                continue
            if value not in gradients and value in here:
                planned = here[value]
                size = mesh.local_bytes(tensor.shape, tensor.itemsize, parse_placements(planned.compute))
                gradients[value] = _gradient_memory(
                    planned, float(size), tensor.itemsize, mesh, execution, accumulates_gradients
                )
                pieces = _num_zero_shards(planned, mesh)
                whole[value] = float(size) if pieces > 1 and planned.parameter == planned.optimizer else 0.0
            if value in gradients:
                gradients[value].users.append(at)
                weights[at] += whole[value]
    comes, waits = [0.0] * len(blocks), [0.0] * len(blocks)
    for each in gradients.values():
        comes[each.users[0] if each.is_scattered_at_once else each.users[-1]] += each.added_bytes
        for at in range(each.users[0], each.users[-1]) if each.is_scattered_at_once else ():
            waits[at] += each.unsharded_bytes
    kept, left = 0.0, sum(comes)
    moments = [PeakMoment(added_bytes=left, workspace_bytes=0.0)]  # the end: all gradients are there, and nothing else
    for at, passage in enumerate(blocks):
        neighbours = [weights[other] for other in (at - 1, at + 1) if 0 <= other < len(blocks)]
        passing = passage.workspace_bytes + weights[at] + max(neighbours, default=0.0)
        kept += passage.saved_bytes
        left -= comes[at]
        moments.append(PeakMoment(added_bytes=kept + left + waits[at] + passing, workspace_bytes=passing))
    most = max(moment.added_bytes for moment in moments)
    return next(moment for moment in reversed(moments) if moment.added_bytes >= most * (1 - 1e-9))


def _num_zero_shards(planned: ParameterPlan, mesh: JudgeMesh) -> int:
    """Into how many ZeRO cuts the optimizer state."""
    compute, optimizer = parse_placements(planned.compute), parse_placements(planned.optimizer)
    return prod(size for size, used, cut in zip(mesh.sizes, compute, optimizer, strict=True) if used != cut)


def _gradient_memory(
    planned: ParameterPlan,
    size: float,
    itemsize: int,
    mesh: JudgeMesh,
    execution: Execution,
    accumulates_gradients: bool,
) -> _GradientMemory:
    compute, optimizer, gradient = (
        parse_placements(text) for text in (planned.compute, planned.optimizer, planned.gradient)
    )
    cut = [axis for axis, (used, rest) in enumerate(zip(compute, optimizer, strict=True)) if used != rest]
    scattered = bool(cut) and all(gradient[axis] == optimizer[axis] for axis in cut)
    pieces = _num_zero_shards(planned, mesh) if scattered else 1
    at_rest = size / itemsize * (4 if execution.grads == "fp32" else itemsize) / pieces
    at_once = scattered and execution.overlap
    left = (
        size if scattered and not at_once else 0.0 if accumulates_gradients else at_rest
    )  # without overlap, cut at the end
    return _GradientMemory(added_bytes=left, unsharded_bytes=size, is_scattered_at_once=at_once, users=[])
