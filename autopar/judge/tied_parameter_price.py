"""Tied parameters: redistributions inside a stage, and gradients exchanged between stages.

A stage stores a tied parameter as its first block places it. A block that places it differently redistributes it once per
micro-batch, a second time where its backward reads the parameter and has not saved it, and redistributes its gradient
back.

Where several stages store it, each receives the others' gradients once per step, after they have been reduced, and adds
them up: a rank receives its own shard, the rows that ZeRO leaves it, in the precision of the optimizer's copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from autopar.core.placement import PARTIAL, REPLICATE, Placements, parse_placements
from autopar.core.plan import ParameterPlan
from autopar.graph.ir import Graph, Value
from autopar.judge.context import JudgedBlock
from autopar.judge.judge_mesh import JudgeMesh, local_shape
from autopar.judge.redistribution_path import PricedCollective
from autopar.judge.transfer_price import transfer_s

MASTER_BYTES = 4
"""Bytes per element of the optimizer's copy: fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TiedGradientTransfer:
    """The gradient of a tied parameter on its way from stage ``source`` to stage ``target``: bytes that the fullest rank
    of the target receives, and seconds until all have theirs."""

    source: int
    target: int
    num_bytes: int
    time_s: float


def tied_gradient_transfers(
    graph: Graph, stages: Sequence[Sequence[JudgedBlock]], meshes: Sequence[JudgeMesh]
) -> tuple[TiedGradientTransfer, ...]:
    """Of all trained parameters that several stages store, by parameter, source and target."""
    shard_bytes: dict[int, dict[int, int]] = {}  # parameter -> stage -> bytes of the fullest rank's shard
    for stage, (blocks, mesh) in enumerate(zip(stages, meshes, strict=True)):
        for block in blocks:
            for value, planned in block.parameter_plans(graph).items():
                if graph.values[value].requires_grad:
                    num_bytes = _gradient_shard_bytes(graph.values[value], planned, mesh)
                    shard_bytes.setdefault(value, {}).setdefault(stage, num_bytes)
    return tuple(
        TiedGradientTransfer(
            source=source,
            target=target,
            num_bytes=by_stage[target],
            time_s=transfer_s(meshes[source], meshes[target], by_stage[target]),
        )
        for _, by_stage in sorted(shard_bytes.items())
        for source in by_stage
        for target in by_stage
        if source != target
    )


def _gradient_shard_bytes(tensor: Value, planned: ParameterPlan, mesh: JudgeMesh) -> int:
    """Bytes of the fullest rank's shard of a gradient in its optimizer placement."""
    compute, optimizer = parse_placements(planned.compute), parse_placements(planned.optimizer)
    sizes = list(local_shape(tensor.shape, compute, mesh.sizes))
    num_shards = prod(size for size, used, zero in zip(mesh.sizes, compute, optimizer, strict=True) if used != zero)
    if num_shards > 1 and sizes:  # a scalar has no rows
        sizes[0] = -(-sizes[0] // num_shards)
    return prod(sizes) * max(tensor.itemsize, MASTER_BYTES)


def tied_redistributions(
    graph: Graph,
    blocks: Sequence[JudgedBlock],
    read_in_backward: Sequence[frozenset[int]],
    conflicting_axes: frozenset[tuple[int, int]],
    mesh: JudgeMesh,
) -> tuple[tuple[PricedCollective, ...], ...]:
    """Per block of a stage, the collectives that redistribute tied parameters and their gradients in a micro-batch.

    ``read_in_backward``: per block, the parameters (of the first of its kind) that its backward reads;
    ``conflicting_axes``: as ``parameter_price.find_conflicting_axes`` returns them."""
    stored: dict[int, ParameterPlan] = {}
    found = []
    for block, read in zip(blocks, read_in_backward, strict=True):
        steps: list[PricedCollective] = []
        own_parameter = {value: own for own, value in block.actual_parameters.items()}
        for value, planned in block.parameter_plans(graph).items():
            if graph.values[value].kind != "parameter":
                continue
            own = own_parameter[value]
            first = stored.setdefault(value, planned)
            if first.compute != planned.compute:
                gradient = _stored_gradient_placements(first, value, conflicting_axes)
                steps += _redistribute_parameter(
                    graph.values[own], block, stored=first, planned=planned, mesh=mesh, is_read_in_backward=own in read
                )
                steps += _redistribute_gradient(graph, block, own, gradient, mesh)
        found.append(tuple(steps))
    return tuple(found)


def _redistribute_parameter(
    tensor: Value,
    block: JudgedBlock,
    *,
    stored: ParameterPlan,
    planned: ParameterPlan,
    mesh: JudgeMesh,
    is_read_in_backward: bool,
) -> list[PricedCollective]:
    """From the stored copy to the placement that a block reads, once or, for its backward, twice."""
    path = mesh.redistribution_path(
        tensor.shape, tensor.itemsize, mesh.parse(stored.compute), mesh.parse(planned.compute)
    )
    is_saved = block.program.recompute != "full" and stored.parameter == stored.compute
    return list(path.collectives) * (2 if is_read_in_backward and not is_saved else 1)


def _redistribute_gradient(
    graph: Graph, block: JudgedBlock, own: int, stored_gradient: Placements, mesh: JudgeMesh
) -> list[PricedCollective]:
    """From every placement in which ops of a block leave the gradient of parameter ``own`` (of the first block of its
    kind) to that of the stored copy."""
    tensor, first = graph.values[own], block.first_of_kind
    texts = {
        text
        for op, planned in zip(graph.ops[first.first_op : first.end_op], block.program.ops, strict=True)
        for value, text in zip(op.inputs, planned.input_gradients, strict=True)
        if value == own and text
    }
    steps: list[PricedCollective] = []
    for text in sorted(texts):
        source = mesh.parse(text)
        # where the stored gradient is partial, any placement is an addend of it as it is, with zeros elsewhere
        target = tuple(
            left if stored == PARTIAL else stored
            for left, stored in zip(source, mesh.canonical(stored_gradient), strict=True)
        )
        steps += mesh.redistribution_path(tensor.shape, tensor.itemsize, source, target).collectives
    return steps


def _stored_gradient_placements(
    stored: ParameterPlan, value: int, conflicting_axes: frozenset[tuple[int, int]]
) -> Placements:
    """Placements of the stored copy's gradient after a micro-batch: partial where ZeRO or another block makes it so."""
    roles = [parse_placements(text) for text in (stored.compute, stored.gradient, stored.optimizer)]
    return tuple(
        PARTIAL if used != optimizer or (used == REPLICATE and (value, axis) in conflicting_axes) else gradient
        for axis, (used, gradient, optimizer) in enumerate(zip(*roles, strict=True))
    )
