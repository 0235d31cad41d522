"""Transfers between neighbouring stages, and which devices each stage gets.

Every rank of the receiving stage gets its own part of what crosses the cut: forward each activation as the receiver's
blocks take it, backward each gradient as the previous stage's blocks gave the activation. What only passes through a
stage is cut by the batch alone. With parts of p bytes, n_s senders and n_r receivers

    t = max(p n_r / n_s  over what a sender has, p  over what a receiver has)

where two stages inside one node talk over its links, and else the devices of a node share its NICs. As the parts cover
what crosses, T bytes, t is at least T over what all devices of either side have together (`cut_bounds_s`).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from autopar.cluster.cluster import Cluster
from autopar.core.local_shape import local_size
from autopar.graph.boundary_values import boundary_values
from autopar.intra.placement_text import PlacementWriter
from autopar.rules.placement_pair import REPLICATED, PlacementPair

if TYPE_CHECKING:
    from autopar.inter.stage_choice import StageChoice
    from autopar.inter.stage_costs import StageCosts

Floats = NDArray[np.float64]
DeviceStage = tuple[int, int, int]
"""(first block, last block + 1, devices)"""


def first_devices(num_devices: Sequence[int], per_node: int) -> tuple[int, ...]:
    """The first device of each stage. Runs of stages that fill whole nodes follow each other; within a run, in order of
    the stages where none then lies across nodes that needs not, else the larger stages first.

    >>> first_devices((4, 4, 8), 8), first_devices((4, 8, 4), 8)
    ((0, 4, 8), (8, 0, 12))
    """
    found: list[int] = []
    run: list[int] = []
    for at, size in enumerate(num_devices):
        run.append(size)
        if sum(run) % per_node == 0 or at == len(num_devices) - 1:
            start = sum(num_devices[: len(found)])
            found += [start + first for first in _node_aligned_devices(run, per_node)]
            run = []
    return tuple(found)


def _node_aligned_devices(num_devices: Sequence[int], per_node: int) -> tuple[int, ...]:
    in_order = _devices_in_order(num_devices, range(len(num_devices)))
    if all(
        first % per_node + min(size, per_node) <= per_node for first, size in zip(in_order, num_devices, strict=True)
    ):
        return in_order
    return _devices_in_order(num_devices, sorted(range(len(num_devices)), key=lambda at: -num_devices[at]))


def _devices_in_order(num_devices: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    found = [0] * len(num_devices)
    device = 0
    for at in order:
        found[at] = device
        device += num_devices[at]
    return tuple(found)


class StageTransfers:
    """Seconds of the transfers of one book's pipelines; parts of equal cuts and meshes are computed once."""

    def __init__(self, stage_costs: "StageCosts") -> None:
        self.stage_costs = stage_costs
        graph = stage_costs.pricer.graph
        self._boundary_values = [
            tuple(value for value in values if graph.values[value].requires_grad)
            for values in boundary_values(graph, stage_costs.pricer.blocks)
        ]
        self._cache: dict[tuple[object, ...], float] = {}

    def transfer_times_s(
        self, stages: Sequence[DeviceStage], first_devices: Sequence[int], choices: Sequence["StageChoice"]
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(to the next stage, of the gradient to the previous one) per stage; ``firsts``: the first device of each."""
        cluster = self.stage_costs.pricer.cluster
        forward, backward = [0.0] * len(stages), [0.0] * len(stages)
        for at in range(len(stages) - 1):
            cut = stages[at][1]
            one_node = are_in_one_node(cluster, first_devices, stages, (at, at + 1))
            for sender, receiver, times in ((at, at + 1, forward), (at + 1, at, backward)):
                num_bytes = self._bytes_per_rank(cut, stages[receiver], choices[receiver], times is forward)
                times[sender] = self._cached_transfer_s(num_bytes, stages[sender][2], stages[receiver][2], one_node)
        return tuple(forward), tuple(backward)

    def _cached_transfer_s(self, part_bytes: float, senders: int, receivers: int, same_node: bool) -> float:
        key = (part_bytes, senders, receivers, same_node)
        if key not in self._cache:
            self._cache[key] = part_transfer_s(
                self.stage_costs.pricer.cluster, part_bytes, senders, receivers, same_node=same_node
            )
        return self._cache[key]

    def receive_s(self, span: tuple[int, int], num_devices: int, choice: "StageChoice") -> float:
        """Seconds per micro-batch in which a stage of blocks first..end-1 receives its activations and its gradients
        from stages of as many devices on other nodes (or the same, where there is one)."""
        one_node = self.stage_costs.num_devices <= self.stage_costs.pricer.cluster.devices_per_node
        stage, last = (*span, num_devices), len(self.stage_costs.pricer.blocks)
        ways = [(cut, forward) for cut, forward in ((span[0], True), (span[1], False)) if 0 < cut < last]
        parts = [self._bytes_per_rank(cut, stage, choice, forward) for cut, forward in ways]
        return sum(self._cached_transfer_s(part, num_devices, num_devices, one_node) for part in parts)

    def stage_boundary_bounds_s(self, submesh_sizes: Sequence[int]) -> Floats:
        """(stage sizes, L + 1, D + 1): the least seconds that an activation and its gradient together take across the
        cut before block i, with d devices behind it and a stage of so many devices next to it."""
        cluster, gpus, per_node = (
            self.stage_costs.pricer.cluster,
            self.stage_costs.num_devices,
            self.stage_costs.pricer.cluster.devices_per_node,
        )
        graph = self.stage_costs.pricer.graph
        before = gpus - np.arange(gpus + 1)
        between_nodes = (before % per_node == 0) & (gpus > per_node)  # devices fill nodes from the first stage on
        found = np.zeros((len(submesh_sizes), len(self.stage_costs.pricer.blocks) + 1, gpus + 1))
        for cut, values in enumerate(self._boundary_values, 1):
            whole = 0.0
            for value in values:
                shape = [graph.batch.scale(size, self.stage_costs.micro_batch) for size in graph.values[value].shape]
                whole += float(np.prod(shape)) * graph.values[value].itemsize
            for k, size in enumerate(submesh_sizes):
                nodes_s, node_s = (
                    2 * float(cluster.transfer_s(whole / size, same_node=same, num_senders=min(size, per_node)))
                    for same in (False, True)
                )
                fills_nodes = size >= per_node and gpus > per_node
                found[k, cut] = np.where(between_nodes | fills_nodes, nodes_s, min(nodes_s, node_s))
        return found

    def _bytes_per_rank(self, first_block: int, stage: DeviceStage, choice: "StageChoice", forward: bool) -> float:
        """Bytes a rank of the receiving stage gets of all that crosses before block ``cut``."""
        key = (first_block, stage[:2], choice.mesh, choice.boundary, forward)
        if key not in self._cache:
            graph, mesh = self.stage_costs.pricer.graph, choice.mesh
            lie = PlacementWriter(graph, self.stage_costs.micro_batch)
            total = 0
            for value in self._boundary_values[first_block - 1]:
                placements = lie.placement_text(value, self._pairs(value, stage, choice, forward))
                shape = tuple(
                    graph.batch.scale(size, self.stage_costs.micro_batch) for size in graph.values[value].shape
                )
                total += local_size(shape, placements, mesh.sizes) * graph.values[value].itemsize
            self._cache[key] = float(total)
        return self._cache[key]

    def _pairs(self, value: int, stage: DeviceStage, choice: "StageChoice", forward: bool) -> tuple[PlacementPair, ...]:
        """What a crossing value has on the inner axes of a stage: where its first reader or last maker has it."""
        blocks = self.stage_costs.pricer
        run = blocks.blocks[stage[0] : stage[1]]
        for block in run if forward else reversed(run):
            first = blocks.first_of_kind[block.kind]
            for values, known in ((() if forward else block.outputs, first.outputs), (block.inputs, first.inputs)):
                if value in values:
                    column = self.stage_costs.variant(block.kind, blocks.stored_elsewhere(block, stage[0]))
                    tables = self.stage_costs.frontier(column, choice.mesh, 0).tables
                    return tables.boundary_pairs[known[values.index(value)]][choice.boundary]
        return (REPLICATED,) * len(choice.mesh.inner_sizes)


def part_transfer_s(cluster: Cluster, part_bytes: float, senders: int, receivers: int, *, same_node: bool) -> float:
    """Seconds until each of ``receivers`` devices has its part from ``senders``: the slower side's."""
    most = cluster.devices_per_node
    out_s = cluster.transfer_s(part_bytes * receivers / senders, same_node=same_node, num_senders=min(senders, most))
    in_s = cluster.transfer_s(part_bytes, same_node=same_node, num_senders=min(receivers, most))
    return float(max(out_s, in_s))


def are_in_one_node(
    cluster: Cluster, first_devices: Sequence[int], stages: Sequence[DeviceStage], pair: tuple[int, int]
) -> bool:
    """Whether all devices of both stages are of one node; ``firsts``: the first device of each stage."""
    nodes = set()
    for stage in pair:
        nodes |= {
            device // cluster.devices_per_node
            for device in (first_devices[stage], first_devices[stage] + stages[stage][2] - 1)
        }
    return len(nodes) == 1
