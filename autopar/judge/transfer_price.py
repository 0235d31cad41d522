"""Transfers between stages as the judge finds them: what crosses a cut, where it lies on both sides, which links it
takes.

Every rank of the receiving stage gets its own part: forward the activation as it lies at the receiver's blocks' inputs,
backward its gradient as it lies at the previous stage's outputs. A value made further back passes through the stages
between. Both runs of devices in one node talk over its links, else the devices of a node share its NICs; the slower of
sending (each sender its share of all parts) and receiving (each receiver its part) counts.
"""

from dataclasses import dataclass

from autopar.core.placement import REPLICATE, Placement, Placements, Shard, parse_placements
from autopar.core.plan import Plan, ValuePlan
from autopar.graph.ir import Block, Graph
from autopar.judge.context import shape_at
from autopar.judge.judge_mesh import JudgeMesh


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTransfer:
    """What one rank receives per micro-batch from a stage, and how long that takes; ``whole_bytes`` is the tensor."""

    time_s: float
    sizes_bytes: tuple[int, ...]


NO_TRANSFER = StageTransfer(time_s=0.0, sizes_bytes=())


def stage_transfers(
    plan: Plan, graph: Graph, blocks: tuple[Block, ...], meshes: list[JudgeMesh], parameter_free: frozenset[int]
) -> list[tuple[StageTransfer, StageTransfer]]:
    """Per stage: to the next stage, and of the gradient to the previous one."""
    crossing = [_boundary_values(graph, blocks, stage.blocks[0].index, parameter_free) for stage in plan.stages]
    found = []
    for at in range(len(plan.stages)):
        forward = (
            _price_transfer(plan, graph, blocks, meshes, at, at + 1, crossing[at + 1])
            if at + 1 < len(meshes)
            else NO_TRANSFER
        )
        backward = _price_transfer(plan, graph, blocks, meshes, at, at - 1, crossing[at]) if at else NO_TRANSFER
        found.append((forward, backward))
    return found


def _boundary_values(
    graph: Graph, blocks: tuple[Block, ...], first: int, parameter_free: frozenset[int]
) -> tuple[int, ...]:
    """Activations with a gradient that blocks before ``first`` make and others read, in order of id."""
    made = {v for block in blocks[:first] for op in graph.ops[block.first_op : block.end_op] for v in op.outputs}
    read = {value for block in blocks[first:] for value in block.inputs}
    return tuple(sorted(v for v in made & read if graph.values[v].requires_grad and v not in parameter_free))


def _price_transfer(
    plan: Plan,
    graph: Graph,
    blocks: tuple[Block, ...],
    meshes: list[JudgeMesh],
    sender: int,
    receiver: int,
    values: tuple[int, ...],
) -> StageTransfer:
    mesh = meshes[receiver]
    sizes = []
    for value in values:
        placements = _received(plan, graph, blocks, receiver, value, forward=receiver > sender)
        tensor = graph.values[value]
        shape = shape_at(graph, tensor.shape, plan.micro_batch_size)
        sizes.append(mesh.local_bytes(shape, tensor.itemsize, placements))
    cluster = mesh.cluster
    per_node = cluster.devices_per_node
    devices = [
        d
        for at in (sender, receiver)
        for d in (meshes[at].first_device, meshes[at].first_device + meshes[at].num_devices - 1)
    ]
    one_node = min(devices) // per_node == max(devices) // per_node
    sending, receiving = meshes[sender].num_devices, mesh.num_devices
    out_s, in_s = (  # the slower side: all parts leave the senders, one reaches each receiver
        float(cluster.transfer_s(num_bytes, same_node=one_node, num_senders=min(count, per_node)))
        for num_bytes, count in ((sum(sizes) * receiving / sending, sending), (sum(sizes), receiving))
    )
    time_s = max(out_s, in_s)
    return StageTransfer(time_s=time_s, sizes_bytes=tuple(sizes))


def _received(
    plan: Plan, graph: Graph, blocks: tuple[Block, ...], stage: int, value: int, *, forward: bool
) -> Placements:
    """How a stage takes a value in (or, backward, its gradient): as its first reader or maker does, sharded by the batch
    alone where it only passes through. What is partial arrives summed, and is as large."""
    refs = plan.stages[stage].blocks
    for ref in refs if forward else reversed(refs):
        block, program = blocks[ref.index], plan.program(ref.program)
        sides: list[tuple[tuple[int, ...], tuple[ValuePlan, ...]]] = [(block.inputs, program.inputs)]
        if not forward:
            sides.insert(0, (block.outputs, program.outputs))
        for values, planned in sides:
            if value in values:
                found = planned[values.index(value)]
                return parse_placements(found.placement if forward else found.gradient)
    axes = plan.stages[stage].axes
    passed: list[Placement] = [REPLICATE] * len(axes)
    grows = next((dim for dim, size in enumerate(graph.values[value].shape) if graph.batch.is_proportional(size)), None)
    if grows is not None and axes[0].name == "dp":
        passed[0] = Shard(grows)
    return tuple(passed)
