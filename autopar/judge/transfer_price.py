"""Transfers between stages: which values cross a stage boundary, how both sides place them, which links carry them.

Every rank of the receiving stage gets its own shard: forward the activation as the blocks of the receiver read it,
backward its gradient as the blocks of the previous stage take it. A value made further back passes through the stages
between. Two stages inside one node use its links; otherwise the devices of a node share its NICs. The slower of sending
(each sender its share of all shards) and receiving (each receiver its shard) counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.core.placement import REPLICATE, Placement, Placements, Shard, parse_placements
from autopar.core.plan import Plan, ValuePlan
from autopar.graph.ir import Block, Graph
from autopar.judge.context import shape_at
from autopar.judge.judge_mesh import JudgeMesh


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTransfer:
    """What one rank receives per micro-batch from a stage: bytes of each tensor, and seconds of all of them."""

    time_s: float
    sizes_bytes: tuple[int, ...]


NO_TRANSFER = StageTransfer(time_s=0.0, sizes_bytes=())


def stage_transfers(
    plan: Plan,
    graph: Graph,
    blocks: Sequence[Block],
    meshes: Sequence[JudgeMesh],
    parameter_free: frozenset[int],
) -> list[tuple[StageTransfer, StageTransfer]]:
    """Per stage: of activations to the next stage, and of their gradients to the previous one."""
    boundaries = [_boundary_values(graph, blocks, stage.blocks[0].index, parameter_free) for stage in plan.stages]
    receiving = _ReceivingStages(plan, graph, blocks)

    def price(sender: int, receiver: int) -> StageTransfer:
        """Between neighbours; nothing at the ends of the pipeline."""
        if not 0 <= receiver < len(meshes):
            return NO_TRANSFER
        sizes = receiving.shard_bytes(receiver, meshes[receiver], boundaries[max(sender, receiver)], sender < receiver)
        return StageTransfer(time_s=transfer_s(meshes[sender], meshes[receiver], sum(sizes)), sizes_bytes=sizes)

    return [(price(stage, stage + 1), price(stage, stage - 1)) for stage in range(len(plan.stages))]


def transfer_s(senders: JudgeMesh, receivers: JudgeMesh, num_bytes: int) -> float:
    """Seconds until every rank of ``receivers`` has its ``num_bytes``."""
    cluster, ends = receivers.cluster, []
    for mesh in (senders, receivers):
        ends += [mesh.first_device, mesh.first_device + mesh.num_devices - 1]
    same_node = min(ends) // cluster.devices_per_node == max(ends) // cluster.devices_per_node
    sides = ((num_bytes * receivers.num_devices / senders.num_devices, senders), (num_bytes, receivers))
    return max(
        float(
            cluster.transfer_s(
                side_bytes, same_node=same_node, num_senders=min(mesh.num_devices, cluster.devices_per_node)
            )
        )
        for side_bytes, mesh in sides
    )


def _boundary_values(
    graph: Graph, blocks: Sequence[Block], first: int, parameter_free: frozenset[int]
) -> tuple[int, ...]:
    """Activations with a gradient that blocks before ``first`` make and others read, in order of id."""
    made = {v for block in blocks[:first] for op in graph.ops[block.first_op : block.end_op] for v in op.outputs}
    read = {value for block in blocks[first:] for value in block.inputs}
    return tuple(sorted(v for v in made & read if graph.values[v].requires_grad and v not in parameter_free))


class _ReceivingStages:
    """How the stages of a plan take in the values that cross their boundaries."""

    def __init__(self, plan: Plan, graph: Graph, blocks: Sequence[Block]) -> None:
        self._plan, self._graph, self._blocks = plan, graph, blocks

    def shard_bytes(self, stage: int, mesh: JudgeMesh, values: Sequence[int], is_forward: bool) -> tuple[int, ...]:
        """Bytes that the fullest rank of a stage receives of each value, or of its gradient."""
        sizes = []
        for value in values:
            tensor, placements = self._graph.values[value], self._received_placements(stage, value, is_forward)
            shape = shape_at(self._graph, tensor.shape, self._plan.micro_batch_size)
            sizes.append(mesh.local_bytes(shape, tensor.itemsize, placements))
        return tuple(sizes)

    def _received_placements(self, stage: int, value: int, is_forward: bool) -> Placements:
        """Placements in which a stage receives a value (backward: its gradient): those of its first reader or its maker;
        sharded by the batch alone where it only passes through. A partial value is summed first, and is as large."""
        refs = self._plan.stages[stage].blocks
        for ref in refs if is_forward else reversed(refs):
            block, program = self._blocks[ref.index], self._plan.program(ref.program)
            sides: list[tuple[tuple[int, ...], tuple[ValuePlan, ...]]] = [(block.inputs, program.inputs)]
            if not is_forward:
                sides.insert(0, (block.outputs, program.outputs))
            for values, planned in sides:
                if value in values:
                    value_plan = planned[values.index(value)]
                    return parse_placements(value_plan.placement if is_forward else value_plan.gradient)
        axes, shape = self._plan.stages[stage].axes, self._graph.values[value].shape
        placements: list[Placement] = [REPLICATE] * len(axes)
        batch_dim = next((dim for dim, size in enumerate(shape) if self._graph.batch.is_proportional(size)), None)
        if batch_dim is not None and axes[0].name == "dp":
            placements[0] = Shard(batch_dim)
        return tuple(placements)
