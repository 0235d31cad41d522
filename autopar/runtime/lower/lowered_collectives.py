"""The collectives of a lowered stage, read off its graphs: kind, axes, bytes and how often a micro-batch runs each.

Bytes are of the whole tensor as one group sees it: a gather's output, a reduce-scatter's input.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from autopar.core.plan import CollectiveKind
from autopar.runtime.lower.joint_graph import Lowered
from autopar.runtime.lower.rank_mesh import Mesh
from autopar.runtime.lower.schedule_nodes import hand_over

_KINDS: dict[str, CollectiveKind] = {
    "all_reduce": "all_reduce",
    "all_gather_into_tensor_out": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
}


@dataclass(frozen=True, slots=True, order=True)
class Counted:
    """One sort of collective."""

    kind: CollectiveKind
    axes: tuple[str, ...]
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.kind} over {'*'.join(self.axes)} of {self.num_bytes} bytes"


def collectives_of(lowered: Lowered, mesh: Mesh) -> Counter[Counted]:
    """How many of each sort one micro-batch runs, forward and backward."""
    return Counter([*_found(lowered.forward.graph, mesh), *_found(lowered.backward.graph, mesh)])


def order_of(lowered: Lowered, mesh: Mesh) -> list[str]:
    """All collectives in the order they run, each with its place in the trace, kind and axes, and which gradients are
    complete in between: what all ranks of a stage must agree on."""
    found = []
    for graph in (lowered.forward.graph, lowered.backward.graph):
        for node in graph.nodes:
            if node.target is hand_over and node.args[4]:
                found.append(f"gradient {node.args[1]}")
            found += [f"{node.meta['collective']}: {one.kind} {one.axes}" for one in _counted(node, mesh)]
    return found


def sequences_of(lowered: Lowered, mesh: Mesh) -> dict[str, list[str]]:
    """Per group of the rank, its collectives in the order they run: what the members of the group must agree on. Ranks
    of one stage may differ in bytes: where an axis cuts a dim unevenly, the groups across it move tensors of other
    sizes."""
    group_of = {tuple(mesh.names[axis] for axis in axes): name for axes, name in mesh.groups.items()}
    found: dict[str, list[str]] = {name: [] for name in group_of.values()}
    for counted in _in_order(lowered, mesh):
        found[group_of[counted.axes]].append(str(counted))
    return found


def _in_order(lowered: Lowered, mesh: Mesh) -> Iterator[Counted]:
    for graph in (lowered.forward.graph, lowered.backward.graph):
        yield from _found(graph, mesh)


def _found(graph: fx.Graph, mesh: Mesh) -> Iterator[Counted]:
    for node in graph.nodes:
        yield from _counted(node, mesh)


def _counted(node: fx.Node, mesh: Mesh) -> Iterator[Counted]:
    """The collective that a node starts, if it does."""
    name = str(node.target)
    kind = _KINDS.get(name.split(".")[1]) if node.op == "call_function" and "_c10d_functional." in name else None
    if kind is not None:
        axes = next(axes for axes, group in mesh.groups.items() if group == str(node.args[-1]))
        size = _bytes(node.meta["val"]) * (mesh.degree(axes) if kind == "reduce_scatter" else 1)
        yield Counted(kind, tuple(mesh.names[axis] for axis in axes), size)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
