"""Transfers between neighbouring stages, and which devices each stage gets.

Every rank of the receiving stage gets its own part of the boundary values: forward each activation as the receiver's
blocks place it, backward each gradient as the blocks of the previous stage placed the activation. What only passes
through a stage is sharded by the batch alone. With parts of p bytes, n_s senders and n_r receivers

    t = max(p n_r / n_s  over the bandwidth of a sender, p  over the bandwidth of a receiver)

where two stages inside one node use its links, and else the devices of a node share its NICs. As the parts together
cover the boundary values, T bytes, t is at least T over the bandwidth of all devices of either side
(`StageTransfers.stage_boundary_bounds_s`).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autopar.cluster.cluster import Cluster
from autopar.core.local_shape import local_size
from autopar.graph.boundary_values import boundary_values
from autopar.inter.block_pricer import StageMesh
from autopar.inter.frontier_cache import UNPRICED, FrontierCache
from autopar.inter.stage_choice import StageChoice
from autopar.inter.stage_span import DeviceStage
from autopar.intra.placement_text import PlacementWriter
from autopar.rules.placement_pair import REPLICATED, PlacementPair

Floats = NDArray[np.float64]


def first_devices(num_devices: Sequence[int], per_node: int) -> tuple[int, ...]:
    """The first device of each stage, from the number of devices of each. Groups of stages that fill whole nodes follow
    each other; within a group the stages are in order where then none spans more nodes than it must, else the larger
    stages come first.

    >>> first_devices((4, 4, 8), 8), first_devices((4, 8, 4), 8)
    ((0, 4, 8), (8, 0, 12))
    """
    found: list[int] = []
    group: list[int] = []
    for index, size in enumerate(num_devices):
        group.append(size)
        if sum(group) % per_node == 0 or index == len(num_devices) - 1:
            start = sum(num_devices[: len(found)])
            found += [start + first for first in _node_aligned_devices(group, per_node)]
            group = []
    return tuple(found)


def _node_aligned_devices(num_devices: Sequence[int], per_node: int) -> tuple[int, ...]:
    """`first_devices` of one group of stages, from 0 on."""
    in_order = _devices_in_order(num_devices, range(len(num_devices)))
    if all(
        first % per_node + min(size, per_node) <= per_node for first, size in zip(in_order, num_devices, strict=True)
    ):
        return in_order
    return _devices_in_order(num_devices, sorted(range(len(num_devices)), key=lambda stage: -num_devices[stage]))


def _devices_in_order(num_devices: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """The first device of each stage where the stages get devices in the given order."""
    found = [0] * len(num_devices)
    device = 0
    for stage in order:
        found[stage] = device
        device += num_devices[stage]
    return tuple(found)


class StageTransfers:
    """Seconds of the transfers of pipelines at one micro-batch size; parts of equal placements and meshes are computed
    once."""

    def __init__(self, frontiers: FrontierCache) -> None:
        self._frontiers, self._pricer = frontiers, frontiers.pricer
        graph, setting = frontiers.pricer.graph, frontiers.setting
        self._micro_batch, self._num_devices = setting.micro_batch, setting.num_devices
        self._boundary_values = [
            tuple(value for value in values if graph.values[value].requires_grad)
            for values in boundary_values(graph, frontiers.pricer.blocks)
        ]
        self._part_bytes: dict[tuple[int, tuple[int, int], StageMesh, int, bool], float] = {}
        self._times_s: dict[tuple[float, int, int, bool], float] = {}

    def release(self) -> None:
        """Free what was computed."""
        self._part_bytes.clear()
        self._times_s.clear()

    def transfer_times_s(
        self, stages: Sequence[DeviceStage], first_devices: Sequence[int], choices: Sequence[StageChoice]
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Seconds per micro-batch of each stage's transfer of activations to the next stage, and of gradients to the
        previous one; all arguments have an item per stage."""
        forward, backward = [0.0] * len(stages), [0.0] * len(stages)
        for index in range(len(stages) - 1):
            boundary = stages[index].end_block
            same_node = are_in_one_node(self._pricer.cluster, first_devices, stages, (index, index + 1))
            for sender, receiver, times in ((index, index + 1, forward), (index + 1, index, backward)):
                num_bytes = self._bytes_per_rank(
                    boundary, stages[receiver], choices[receiver], forward=times is forward
                )
                times[sender] = self._transfer_s(
                    num_bytes, stages[sender].num_devices, stages[receiver].num_devices, same_node
                )
        return tuple(forward), tuple(backward)

    def _transfer_s(self, part_bytes: float, senders: int, receivers: int, same_node: bool) -> float:
        key = (part_bytes, senders, receivers, same_node)
        if key not in self._times_s:
            self._times_s[key] = part_transfer_s(
                self._pricer.cluster, part_bytes, senders, receivers, same_node=same_node
            )
        return self._times_s[key]

    def receive_s(self, span: tuple[int, int], num_devices: int, choice: StageChoice) -> float:
        """Seconds per micro-batch in which a stage of blocks ``span[0] <= i < span[1]`` receives its activations and
        its gradients, each from a stage of as many devices on other nodes (or the same, where there is one)."""
        same_node = self._num_devices <= self._pricer.cluster.devices_per_node
        num_blocks = len(self._pricer.blocks)
        parts = [
            self._bytes_per_rank(boundary, DeviceStage(*span, num_devices), choice, forward=forward)
            for boundary, forward in ((span[0], True), (span[1], False))
            if 0 < boundary < num_blocks
        ]
        return sum(self._transfer_s(part, num_devices, num_devices, same_node) for part in parts)

    def stage_boundary_bounds_s(self, submesh_sizes: Sequence[int]) -> Floats:
        """(submesh sizes, L + 1, D + 1): seconds that a micro-batch's activations and gradients together take at least
        across the stage boundary before block i, with d devices behind it and a stage of that submesh size next to
        it."""
        cluster, gpus, per_node = self._pricer.cluster, self._num_devices, self._pricer.cluster.devices_per_node
        before = gpus - np.arange(gpus + 1)
        between_nodes = (before % per_node == 0) & (gpus > per_node)  # devices fill nodes from the first stage on
        found = np.zeros((len(submesh_sizes), len(self._pricer.blocks) + 1, gpus + 1))
        for boundary, values in enumerate(self._boundary_values, 1):
            num_bytes = 0.0
            for value in values:
                num_bytes += float(np.prod(self._shape(value))) * self._pricer.graph.values[value].itemsize
            for k, size in enumerate(submesh_sizes):
                nodes_s, node_s = (
                    2 * float(cluster.transfer_s(num_bytes / size, same_node=same, num_senders=min(size, per_node)))
                    for same in (False, True)
                )
                fills_nodes = size >= per_node and gpus > per_node
                found[k, boundary] = np.where(between_nodes | fills_nodes, nodes_s, min(nodes_s, node_s))
        return found

    def _shape(self, value: int) -> tuple[int, ...]:
        """The unsharded shape of a value at this micro-batch size."""
        graph = self._pricer.graph
        return tuple(graph.batch.scale(size, self._micro_batch) for size in graph.values[value].shape)

    def _bytes_per_rank(self, first_block: int, stage: DeviceStage, choice: StageChoice, *, forward: bool) -> float:
        """Bytes that a rank of the receiving stage gets of all values across the boundary before ``first_block``."""
        key = (first_block, stage[:2], choice.mesh, choice.boundary, forward)
        if key not in self._part_bytes:
            graph, writer = self._pricer.graph, PlacementWriter(self._pricer.graph, self._micro_batch)
            total = 0
            for value in self._boundary_values[first_block - 1]:
                pairs = self._placement_pairs(value, stage, choice, forward=forward)
                placements = writer.placement_text(value, pairs)
                local = local_size(self._shape(value), placements, choice.mesh.sizes)
                total += local * graph.values[value].itemsize
            self._part_bytes[key] = float(total)
        return self._part_bytes[key]

    def _placement_pairs(
        self, value: int, stage: DeviceStage, choice: StageChoice, *, forward: bool
    ) -> tuple[PlacementPair, ...]:
        """The placement pairs of a boundary value on the inner axes of a stage: those of the first block that reads it,
        or of the last one that makes or reads it."""
        first_block, end_block, _ = stage
        blocks = self._pricer.blocks[first_block:end_block]
        for block in blocks if forward else reversed(blocks):
            of_kind = self._pricer.first_of_kind[block.kind]
            outputs = () if forward else block.outputs
            for values, values_of_kind in ((outputs, of_kind.outputs), (block.inputs, of_kind.inputs)):
                if value in values:
                    variant = self._frontiers.variant(block.kind, self._pricer.stored_elsewhere(block, first_block))
                    tables = self._frontiers.frontier(variant, choice.mesh, UNPRICED).tables
                    return tables.boundary_pairs[values_of_kind[values.index(value)]][choice.boundary]
        return (REPLICATED,) * len(choice.mesh.inner_sizes)


def part_transfer_s(cluster: Cluster, part_bytes: float, senders: int, receivers: int, *, same_node: bool) -> float:
    """Seconds until each of ``receivers`` devices has its part from ``senders``: those of the slower side."""
    per_node = cluster.devices_per_node
    sent_bytes = part_bytes * receivers / senders
    send_s = cluster.transfer_s(sent_bytes, same_node=same_node, num_senders=min(senders, per_node))
    receive_s = cluster.transfer_s(part_bytes, same_node=same_node, num_senders=min(receivers, per_node))
    return float(max(send_s, receive_s))


def are_in_one_node(
    cluster: Cluster, first_devices: Sequence[int], stages: Sequence[DeviceStage], pair: tuple[int, int]
) -> bool:
    """Whether all devices of the two stages ``pair`` are in one node."""
    nodes = set()
    for stage in pair:
        last_device = first_devices[stage] + stages[stage].num_devices - 1
        nodes |= {device // cluster.devices_per_node for device in (first_devices[stage], last_device)}
    return len(nodes) == 1
