"""Transfers between neighbouring stages, and which devices each stage gets.

Every rank of the receiving stage gets its own part of what crosses the cut: forward each activation as the receiver's
blocks take it, backward each gradient as the previous stage's blocks gave the activation. What only passes through a
stage is cut by the batch alone. Two stages inside one node talk over its links; else the sender's ranks of a node share
its NICs.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from autopar.cluster.cluster import Cluster
from autopar.graph.blocks import crossing
from autopar.inter.lying import Lying
from autopar.plan.mesh import Axis, local_size
from autopar.rules.options import Token

if TYPE_CHECKING:
    from autopar.inter.finish import StageChoice
    from autopar.inter.stages import StageBook

Stage = tuple[int, int, int]
"""(first block, last block + 1, devices)"""


def first_devices(num_devices: Sequence[int], per_node: int) -> tuple[int, ...]:
    """The first device of each stage: in order of the stages where none then lies across nodes that needs not, else the
    larger stages first.

    >>> first_devices((4, 4, 8), 8), first_devices((4, 8, 4), 8)
    ((0, 4, 8), (8, 0, 12))
    """
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
        self, stages: Sequence[Stage], choices: Sequence["StageChoice"]
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(to the next stage, of the gradient to the previous one) per stage."""
        cluster = self.book.blocks.cluster
        firsts = first_devices([devices for _, _, devices in stages], cluster.devices_per_node)
        forward, backward = [0.0] * len(stages), [0.0] * len(stages)
        for at in range(len(stages) - 1):
            cut = stages[at][1]
            one_node = _one_node(cluster, firsts, stages, at)
            for sender, receiver, times in ((at, at + 1, forward), (at + 1, at, backward)):
                num_bytes = self._part_bytes(cut, stages[receiver], choices[receiver], times is forward)
                sharers = min(stages[sender][2], cluster.devices_per_node)
                times[sender] = float(cluster.transfer_s(num_bytes, same_node=one_node, sharers=sharers))
        return tuple(forward), tuple(backward)

    def _part_bytes(self, cut: int, stage: Stage, choice: "StageChoice", forward: bool) -> float:
        """Bytes a rank of the receiving stage gets of all that crosses before block ``cut``."""
        key = (cut, stage[:2], choice.mesh, choice.boundary, forward)
        if key not in self._known:
            graph, mesh = self.book.blocks.graph, choice.mesh
            lie = Lying(graph, self.book.micro_batch)
            axes = tuple(Axis(name=f"axis{at}", size=size) for at, size in enumerate(mesh.sizes))
            total = 0
            for value in self._values[cut - 1]:
                tokens = self._tokens(value, stage, choice, forward)
                text = lie.forward(value, tokens).replace("P", "R")
                shape = tuple(graph.batch.scale(size, self.book.micro_batch) for size in graph.values[value].shape)
                total += local_size(shape, text, axes) * graph.values[value].itemsize
            self._known[key] = float(total)
        return self._known[key]

    def _tokens(self, value: int, stage: Stage, choice: "StageChoice", forward: bool) -> tuple[Token, ...]:
        blocks = self.book.blocks
        run = blocks.blocks[stage[0] : stage[1]]
        for block in run if forward else reversed(run):
            first = blocks.kinds[block.kind]
            for values, known in ((() if forward else block.outputs, first.outputs), (block.inputs, first.inputs)):
                if value in values:
                    column = self.book.column(block.kind, blocks.held(block, stage[0]))
                    tables = self.book.points(column, choice.mesh, 0).tables
                    return tables.boundary_tokens[known[values.index(value)]][choice.boundary]
        return ("R",) * len(choice.mesh.inner)


def _one_node(cluster: Cluster, firsts: Sequence[int], stages: Sequence[Stage], at: int) -> bool:
    """Whether all devices of stages ``at`` and ``at + 1`` are of one node."""
    nodes = set()
    for stage in (at, at + 1):
        nodes |= {
            device // cluster.devices_per_node for device in (firsts[stage], firsts[stage] + stages[stage][2] - 1)
        }
    return len(nodes) == 1
