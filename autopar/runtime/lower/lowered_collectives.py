"""The collectives of a lowered stage, read off its graphs: kind, axes, bytes and how often a micro-batch runs each.

Bytes are of the whole tensor as one group sees it: a gather's output, a reduce-scatter's input.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from autopar.core.plan import CollectiveKind
from autopar.runtime.lower.joint_graph import LoweredStage
from autopar.runtime.lower.rank_mesh import RankMesh
from autopar.runtime.lower.schedule_nodes import hand_over_gradient

_COLLECTIVE_KINDS: dict[str, CollectiveKind] = {
    "all_reduce": "all_reduce",
    "all_gather_into_tensor_out": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
}


@dataclass(frozen=True, slots=True, order=True)
class LoweredCollective:
    """One sort of collective."""

    kind: CollectiveKind
    axes: tuple[str, ...]
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.kind} over {'*'.join(self.axes)} of {self.num_bytes} bytes"


def count_lowered_collectives(lowered: LoweredStage, mesh: RankMesh) -> Counter[LoweredCollective]:
    """How many of each sort one micro-batch runs, forward and backward."""
    return Counter(
        [*_collectives_of_graph(lowered.forward.graph, mesh), *_collectives_of_graph(lowered.backward.graph, mesh)]
    )


def collective_order(lowered: LoweredStage, mesh: RankMesh) -> list[str]:
    """All collectives in the order they run, each with its place in the trace, kind and axes, and which gradients are
    complete in between: what all ranks of a stage must agree on."""
    found = []
    for graph in (lowered.forward.graph, lowered.backward.graph):
        for node in graph.nodes:
            if node.target is hand_over_gradient and node.args[4]:
                found.append(f"gradient {node.args[1]}")
            found += [f"{node.meta['collective']}: {one.kind} {one.axes}" for one in _collective_of_node(node, mesh)]
    return found


def collective_order_by_group(lowered: LoweredStage, mesh: RankMesh) -> dict[str, list[str]]:
    """Per group of the rank, its collectives in the order they run: what the members of the group must agree on. Ranks
    of one stage may differ in bytes: where an axis cuts a dim unevenly, the groups across it move tensors of other
    sizes."""
    group_of = {tuple(mesh.names[axis] for axis in axes): name for axes, name in mesh.group_names.items()}
    found: dict[str, list[str]] = {name: [] for name in group_of.values()}
    for counted in _collectives_in_order(lowered, mesh):
        found[group_of[counted.axes]].append(str(counted))
    return found


def _collectives_in_order(lowered: LoweredStage, mesh: RankMesh) -> Iterator[LoweredCollective]:
    for graph in (lowered.forward.graph, lowered.backward.graph):
        yield from _collectives_of_graph(graph, mesh)


def _collectives_of_graph(graph: fx.Graph, mesh: RankMesh) -> Iterator[LoweredCollective]:
    for node in graph.nodes:
        yield from _collective_of_node(node, mesh)


def _collective_of_node(node: fx.Node, mesh: RankMesh) -> Iterator[LoweredCollective]:
    """The collective that a node starts, if it does."""
    name = str(node.target)
    kind = (
        _COLLECTIVE_KINDS.get(name.split(".")[1])
        if node.op == "call_function" and "_c10d_functional." in name
        else None
    )
    if kind is not None:
        axes = next(axes for axes, group in mesh.group_names.items() if group == str(node.args[-1]))
        size = _num_bytes(node.meta["val"]) * (mesh.degree(axes) if kind == "reduce_scatter" else 1)
        yield LoweredCollective(kind, tuple(mesh.names[axis] for axis in axes), size)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
