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
from autopar.judge.judge_mesh import Mesh


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A block of a stage with its program, the first block of its kind, what a micro-batch keeps of it, and what
    passes in it beside gathered parameters."""

    block: Block
    program: BlockProgram
    first: Block
    saved_bytes: float
    passing_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """The fullest moment of one micro-batch's backward: what lives beside all that is there before it, and how much of
    that passes."""

    bytes_beside: float
    passing_bytes: float


@dataclass(slots=True, kw_only=True)
class _Gradient:
    """Of one parameter: bytes that a backward leaves and that were not there before, bytes of a whole term, whether
    terms are cut as they are made, and the blocks that use it, in order."""

    left_bytes: float
    term_bytes: float
    is_cut: bool
    users: list[int]


def fullest_moment(
    graph: Graph, passages: Sequence[Passage], mesh: Mesh, execution: Execution, *, accumulates: bool
) -> Moment:
    """``accumulates``: gradients at rest are there before the backward."""
    gradients: dict[int, _Gradient] = {}
    weights = [0.0] * len(passages)
    whole: dict[int, float] = {}
    for at, passage in enumerate(passages):
        by_name = {name: own for own in passage.first.parameters for name in graph.values[own].names}
        actual = dict(zip(passage.first.parameters, passage.block.parameters, strict=True))
        here = {actual[by_name[planned.name]]: planned for planned in passage.program.parameters}
        for value in passage.block.parameters:
            tensor = graph.values[value]
            if tensor.kind == "buffer" or not tensor.requires_grad:
                continue
            if value not in gradients and value in here:
                planned = here[value]
                size = mesh.local_bytes(tensor.shape, tensor.itemsize, parse_placements(planned.compute))
                gradients[value] = _gradient(planned, float(size), tensor.itemsize, mesh, execution, accumulates)
                pieces = _pieces(planned, mesh)
                whole[value] = float(size) if pieces > 1 and planned.parameter == planned.optimizer else 0.0
            if value in gradients:
                gradients[value].users.append(at)
                weights[at] += whole[value]
    comes, waits = [0.0] * len(passages), [0.0] * len(passages)
    for each in gradients.values():
        comes[each.users[0] if each.is_cut else each.users[-1]] += each.left_bytes
        for at in range(each.users[0], each.users[-1]) if each.is_cut else ():
            waits[at] += each.term_bytes
    kept, left = 0.0, sum(comes)
    moments = [Moment(bytes_beside=left, passing_bytes=0.0)]  # the end: all gradients are there, and nothing else
    for at, passage in enumerate(passages):
        neighbours = [weights[other] for other in (at - 1, at + 1) if 0 <= other < len(passages)]
        passing = passage.passing_bytes + weights[at] + max(neighbours, default=0.0)
        kept += passage.saved_bytes
        left -= comes[at]
        moments.append(Moment(bytes_beside=kept + left + waits[at] + passing, passing_bytes=passing))
    most = max(moment.bytes_beside for moment in moments)
    return next(moment for moment in reversed(moments) if moment.bytes_beside >= most * (1 - 1e-9))


def _pieces(planned: ParameterPlan, mesh: Mesh) -> int:
    """Into how many ZeRO cuts the optimizer state."""
    compute, optimizer = parse_placements(planned.compute), parse_placements(planned.optimizer)
    return prod(size for size, used, cut in zip(mesh.sizes, compute, optimizer, strict=True) if used != cut)


def _gradient(
    planned: ParameterPlan, size: float, itemsize: int, mesh: Mesh, execution: Execution, accumulates: bool
) -> _Gradient:
    compute, optimizer, gradient = (
        parse_placements(text) for text in (planned.compute, planned.optimizer, planned.gradient)
    )
    cut = [axis for axis, (used, rest) in enumerate(zip(compute, optimizer, strict=True)) if used != rest]
    scattered = bool(cut) and all(gradient[axis] == optimizer[axis] for axis in cut)
    pieces = _pieces(planned, mesh) if scattered else 1
    at_rest = size / itemsize * (4 if execution.grads == "fp32" else itemsize) / pieces
    at_once = scattered and execution.overlap
    left = size if scattered and not at_once else 0.0 if accumulates else at_rest  # without overlap, cut at the end
    return _Gradient(left_bytes=left, term_bytes=size, is_cut=at_once, users=[])
