"""The collectives of a lowered stage, read off its graphs: kind, axes, bytes and how often a micro-batch runs each.

Bytes are of the whole tensor as one group sees it: a gather's output, a reduce-scatter's input.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from autopar.plan.plan import CollectiveKind
from autopar.runtime.joint import Lowered
from autopar.runtime.mesh import Mesh

_KINDS: dict[str, CollectiveKind] = {
    "all_reduce": "all_reduce",
    "all_gather_into_tensor": "all_gather",
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


def sequence_of(lowered: Lowered, mesh: Mesh) -> list[str]:
    """All collectives in the order they run: what the members of a group must agree on."""
    return [str(found) for graph in (lowered.forward.graph, lowered.backward.graph) for found in _found(graph, mesh)]


def _found(graph: fx.Graph, mesh: Mesh) -> Iterator[Counted]:
    axes_of = {name: axes for axes, name in mesh.groups.items()}
    for node in graph.nodes:
        name = str(node.target)
        if node.op != "call_function" or not name.startswith("_c10d_functional."):
            continue
        kind = _KINDS.get(name.split(".")[1])
        if kind is None:
            continue
        axes = axes_of[str(node.args[-1])]
        size = _bytes(node.meta["val"]) * (mesh.degree(axes) if kind == "reduce_scatter" else 1)
        yield Counted(kind, tuple(mesh.names[axis] for axis in axes), size)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
