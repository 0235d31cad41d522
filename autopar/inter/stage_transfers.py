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
from autopar.graph.boundary_values import crossing
from autopar.intra.placement_text import Lying
from autopar.rules.placement_pair import REPLICATED, PlacementPair

if TYPE_CHECKING:
    from autopar.inter.stage_choice import StageChoice
    from autopar.inter.stage_costs import StageBook

Floats = NDArray[np.float64]
Stage = tuple[int, int, int]
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
            found += [start + first for first in _run_devices(run, per_node)]
            run = []
    return tuple(found)


def _run_devices(num_devices: Sequence[int], per_node: int) -> tuple[int, ...]:
    in_order = _placed(num_devices, range(len(num_devices)))
    if all(
        first % per_node + min(size, per_node) <= per_node for first, size in zip(in_order, num_devices, strict=True)
    ):
        return in_order
    return _placed(num_devices, sorted(range(len(num_devices)), key=lambda at: -num_devices[at]))


def _placed(num_devices: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    found = [0] * len(num_devices)
    device = 0
    for at in order:
        found[at] = device
        device += num_devices[at]
    return tuple(found)


class Transfers:
    """Seconds of the transfers of one book's pipelines; parts of equal cuts and meshes are computed once."""

    def __init__(self, book: "StageBook") -> None:
        self.book = book
        graph = book.blocks.graph
        self._values = [
            tuple(value for value in values if graph.values[value].requires_grad)
            for values in crossing(graph, book.blocks.blocks)
        ]
        self._known: dict[tuple[object, ...], float] = {}

    def seconds(
        self, stages: Sequence[Stage], firsts: Sequence[int], choices: Sequence["StageChoice"]
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(to the next stage, of the gradient to the previous one) per stage; ``firsts``: the first device of each."""
        cluster = self.book.blocks.cluster
        forward, backward = [0.0] * len(stages), [0.0] * len(stages)
        for at in range(len(stages) - 1):
            cut = stages[at][1]
            one_node = in_one_node(cluster, firsts, stages, (at, at + 1))
            for sender, receiver, times in ((at, at + 1, forward), (at + 1, at, backward)):
                num_bytes = self._part_bytes(cut, stages[receiver], choices[receiver], times is forward)
                times[sender] = self._slower_s(num_bytes, stages[sender][2], stages[receiver][2], one_node)
        return tuple(forward), tuple(backward)

    def _slower_s(self, part_bytes: float, senders: int, receivers: int, one_node: bool) -> float:
        key = (part_bytes, senders, receivers, one_node)
        if key not in self._known:
            self._known[key] = slower_s(self.book.blocks.cluster, part_bytes, senders, receivers, one_node=one_node)
        return self._known[key]

    def received_s(self, blocks: tuple[int, int], devices: int, choice: "StageChoice") -> float:
        """Seconds per micro-batch in which a stage of blocks first..end-1 receives its activations and its gradients
        from stages of as many devices on other nodes (or the same, where there is one)."""
        one_node = self.book.gpus <= self.book.blocks.cluster.devices_per_node
        stage, last = (*blocks, devices), len(self.book.blocks.blocks)
        ways = [(cut, forward) for cut, forward in ((blocks[0], True), (blocks[1], False)) if 0 < cut < last]
        parts = [self._part_bytes(cut, stage, choice, forward) for cut, forward in ways]
        return sum(self._slower_s(part, devices, devices, one_node) for part in parts)

    def cut_bounds_s(self, sizes: Sequence[int]) -> Floats:
        """(stage sizes, L + 1, D + 1): the least seconds that an activation and its gradient together take across the
        cut before block i, with d devices behind it and a stage of so many devices next to it."""
        cluster, gpus, per_node = self.book.blocks.cluster, self.book.gpus, self.book.blocks.cluster.devices_per_node
        graph = self.book.blocks.graph
        before = gpus - np.arange(gpus + 1)
        between_nodes = (before % per_node == 0) & (gpus > per_node)  # devices fill nodes from the first stage on
        found = np.zeros((len(sizes), len(self.book.blocks.blocks) + 1, gpus + 1))
        for cut, values in enumerate(self._values, 1):
            whole = 0.0
            for value in values:
                shape = [graph.batch.scale(size, self.book.micro_batch) for size in graph.values[value].shape]
                whole += float(np.prod(shape)) * graph.values[value].itemsize
            for k, size in enumerate(sizes):
                nodes_s, node_s = (
                    2 * float(cluster.transfer_s(whole / size, same_node=same, sharers=min(size, per_node)))
                    for same in (False, True)
                )
                fills_nodes = size >= per_node and gpus > per_node
                found[k, cut] = np.where(between_nodes | fills_nodes, nodes_s, min(nodes_s, node_s))
        return found

    def _part_bytes(self, cut: int, stage: Stage, choice: "StageChoice", forward: bool) -> float:
        """Bytes a rank of the receiving stage gets of all that crosses before block ``cut``."""
        key = (cut, stage[:2], choice.mesh, choice.boundary, forward)
        if key not in self._known:
            graph, mesh = self.book.blocks.graph, choice.mesh
            lie = Lying(graph, self.book.micro_batch)
            total = 0
            for value in self._values[cut - 1]:
                placements = lie.forward(value, self._pairs(value, stage, choice, forward))
                shape = tuple(graph.batch.scale(size, self.book.micro_batch) for size in graph.values[value].shape)
                total += local_size(shape, placements, mesh.sizes) * graph.values[value].itemsize
            self._known[key] = float(total)
        return self._known[key]

    def _pairs(self, value: int, stage: Stage, choice: "StageChoice", forward: bool) -> tuple[PlacementPair, ...]:
        """What a crossing value has on the inner axes of a stage: where its first reader or last maker has it."""
        blocks = self.book.blocks
        run = blocks.blocks[stage[0] : stage[1]]
        for block in run if forward else reversed(run):
            first = blocks.kinds[block.kind]
            for values, known in ((() if forward else block.outputs, first.outputs), (block.inputs, first.inputs)):
                if value in values:
                    column = self.book.column(block.kind, blocks.held(block, stage[0]))
                    tables = self.book.points(column, choice.mesh, 0).tables
                    return tables.boundary_pairs[known[values.index(value)]][choice.boundary]
        return (REPLICATED,) * len(choice.mesh.inner)


def slower_s(cluster: Cluster, part_bytes: float, senders: int, receivers: int, *, one_node: bool) -> float:
    """Seconds until each of ``receivers`` devices has its part from ``senders``: the slower side's."""
    most = cluster.devices_per_node
    out_s = cluster.transfer_s(part_bytes * receivers / senders, same_node=one_node, sharers=min(senders, most))
    in_s = cluster.transfer_s(part_bytes, same_node=one_node, sharers=min(receivers, most))
    return float(max(out_s, in_s))


def in_one_node(cluster: Cluster, firsts: Sequence[int], stages: Sequence[Stage], pair: tuple[int, int]) -> bool:
    """Whether all devices of both stages are of one node; ``firsts``: the first device of each stage."""
    nodes = set()
    for stage in pair:
        nodes |= {
            device // cluster.devices_per_node for device in (firsts[stage], firsts[stage] + stages[stage][2] - 1)
        }
    return len(nodes) == 1
