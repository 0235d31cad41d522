"""Tied parameters: what brings the one stored copy of a stage to each further use, and copies of stages together.

A tied parameter is stored as the first block of the stage uses it. A block that wants it otherwise moves it there once
per micro-batch, again in the backward where that reads it and does not keep it, and moves its gradient back.

Where several stages hold it, each gets the other's gradient once per step, after it has been reduced, and adds them up:
a rank gets its own part, the rows that ZeRO leaves it, as precise as the optimizer's copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from autopar.core.placement import PARTIAL, REPLICATE, Placements, parse_placements
from autopar.core.plan import BlockProgram, ParameterPlan, Plan
from autopar.graph.ir import Block, Graph, Value
from autopar.judge.judge_mesh import JudgeMesh, local_shape
from autopar.judge.redistribution_path import PricedCollective

MASTER_BYTES = 4
"""An element of the optimizer's copy: fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedBlock:
    """A block of a stage, its program, the first block of its kind, and the parameters (of that) its backward reads."""

    block: Block
    program: BlockProgram
    first_of_kind: Block
    read_in_backward: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TiedGradientTransfer:
    """What the fullest rank of stage ``target`` gets of a gradient of stage ``source``, and how long that takes."""

    source: int
    target: int
    num_bytes: int
    time_s: float


def tied_gradient_transfers(
    plan: Plan, graph: Graph, blocks: Sequence[Block], meshes: Sequence[JudgeMesh]
) -> tuple[TiedGradientTransfer, ...]:
    """Of all trained parameters that several stages hold, by parameter, source and target."""
    kinds: dict[int, Block] = {}
    for block in blocks:
        kinds.setdefault(block.kind, block)
    parts: dict[int, dict[int, int]] = {}  # parameter -> stage -> bytes
    for at, (stage, mesh) in enumerate(zip(plan.stages, meshes, strict=True)):
        for ref in stage.blocks:
            block = blocks[ref.index]
            first = kinds[block.kind]
            use = JudgedBlock(
                block=block, program=plan.program(ref.program), first_of_kind=first, read_in_backward=frozenset()
            )
            alike = dict(zip(first.parameters, block.parameters, strict=True))
            for own, planned in _parameter_plans(graph, use).items():
                if graph.values[own].requires_grad:
                    parts.setdefault(alike[own], {}).setdefault(
                        at, _gradient_shard_bytes(graph.values[own], planned, mesh)
                    )
    return tuple(
        TiedGradientTransfer(
            source=source,
            target=target,
            num_bytes=held[target],
            time_s=_transfer_s(meshes[source], meshes[target], held[target]),
        )
        for _, held in sorted(parts.items())
        for source in held
        for target in held
        if source != target
    )


def _transfer_s(source: JudgeMesh, target: JudgeMesh, num_bytes: int) -> float:
    """Seconds until every rank of ``target`` has its ``num_bytes``: links inside a node, or its NICs, which devices share."""
    per_node = source.cluster.devices_per_node
    last = [mesh.first_device + mesh.num_devices - 1 for mesh in (source, target)]
    same_node = max(last) // per_node == min(source.first_device, target.first_device) // per_node
    sides = ((num_bytes * target.num_devices / source.num_devices, source), (num_bytes, target))
    return max(
        float(mesh.cluster.transfer_s(size, same_node=same_node, num_senders=min(mesh.num_devices, per_node)))
        for size, mesh in sides
    )


def _gradient_shard_bytes(tensor: Value, planned: ParameterPlan, mesh: JudgeMesh) -> int:
    """Bytes of the fullest rank's part of a gradient as the optimizer steps it."""
    compute, optimizer = parse_placements(planned.compute), parse_placements(planned.optimizer)
    sizes = list(local_shape(tensor.shape, compute, mesh.sizes))
    pieces = prod(size for size, used, cut in zip(mesh.sizes, compute, optimizer, strict=True) if used != cut)
    if pieces > 1 and sizes:  # a scalar has no rows
        sizes[0] = -(-sizes[0] // pieces)
    return prod(sizes) * max(tensor.itemsize, MASTER_BYTES)


def tied_redistributions(
    graph: Graph, blocks: Sequence[JudgedBlock], conflicting_axes: frozenset[tuple[int, int]], mesh: JudgeMesh
) -> tuple[tuple[PricedCollective, ...], ...]:
    """Per block, its moves of tied parameters in a micro-batch; ``disagreed`` as in `parameters`."""
    held: dict[int, ParameterPlan] = {}
    found = []
    for use in blocks:
        steps: list[PricedCollective] = []
        alike = dict(zip(use.first_of_kind.parameters, use.block.parameters, strict=True))
        for own, planned in _parameter_plans(graph, use).items():
            value = alike[own]
            stored = held.setdefault(value, planned)
            if stored.compute != planned.compute:
                steps += _redistribute_tied(
                    graph, use, own, stored, planned, _stored_gradient_placements(stored, value, conflicting_axes), mesh
                )
        found.append(tuple(steps))
    return tuple(found)


def _redistribute_tied(
    graph: Graph,
    block: JudgedBlock,
    own: int,
    stored: ParameterPlan,
    planned: ParameterPlan,
    gradient: Placements,
    mesh: JudgeMesh,
) -> list[PricedCollective]:
    tensor = graph.values[own]
    there = mesh.redistribution_path(
        tensor.shape, tensor.itemsize, mesh.parse(stored.compute), mesh.parse(planned.compute)
    )
    kept = block.program.recompute != "full" and stored.parameter == stored.compute
    steps = list(there.collectives) * (1 if kept or own not in block.read_in_backward else 2)
    ops = graph.ops[block.first_of_kind.first_op : block.first_of_kind.end_op]
    given = {
        text
        for op, at_op in zip(ops, block.program.ops, strict=True)
        for value, text in zip(op.inputs, at_op.input_gradients, strict=True)
        if value == own and text
    }
    for text in sorted(given):
        left = mesh.parse(text)
        # a part of a gradient is an addend of it as it stands, among zeros
        target = tuple(one if two == PARTIAL else two for one, two in zip(left, mesh.canonical(gradient), strict=True))
        steps += mesh.redistribution_path(tensor.shape, tensor.itemsize, left, target).collectives
    return steps


def _stored_gradient_placements(
    stored: ParameterPlan, value: int, conflicting_axes: frozenset[tuple[int, int]]
) -> Placements:
    """Where a micro-batch leaves the gradient of the stored copy: partial wherever ZeRO or another use makes it so."""
    roles = [parse_placements(text) for text in (stored.compute, stored.gradient, stored.optimizer)]
    return tuple(
        PARTIAL if used != optimizer or (used == REPLICATE and (value, axis) in conflicting_axes) else left
        for axis, (used, left, optimizer) in enumerate(zip(*roles, strict=True))
    )


def _parameter_plans(graph: Graph, block: JudgedBlock) -> dict[int, ParameterPlan]:
    """By parameter of the first block of the kind."""
    by_name = {name: own for own in block.first_of_kind.parameters for name in graph.values[own].qualified_names}
    trained = {own for own in block.first_of_kind.parameters if graph.values[own].kind == "parameter"}
    return {
        by_name[planned.name]: planned
        for planned in block.program.parameters
        if planned.name in by_name and by_name[planned.name] in trained
    }
