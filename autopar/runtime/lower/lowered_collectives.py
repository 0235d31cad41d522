"""The collectives of a lowered stage, read off its graphs: kind, axes, bytes and how often a micro-batch runs each.

Bytes are those of the full tensor as one group sees it: a gather's output, a reduce-scatter's input.
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
    """A collective of one kind and size over the group of some mesh axes."""

    kind: CollectiveKind
    axes: tuple[str, ...]
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.kind} over {'*'.join(self.axes)} of {self.num_bytes} bytes"


def count_lowered_collectives(lowered: LoweredStage, mesh: RankMesh) -> Counter[LoweredCollective]:
    """How often one micro-batch runs each collective, forward and backward."""
    return Counter(_collectives_in_order(lowered, mesh))


def collective_order(lowered: LoweredStage, mesh: RankMesh) -> list[str]:
    """All collectives in the order in which they run, each with its number in the trace, kind and axes, and between them
    the gradients that become complete: what all ranks of a stage must agree on."""
    order = []
    for graph in (lowered.forward.graph, lowered.backward.graph):
        for node in graph.nodes:
            if node.target is hand_over_gradient and node.args[4]:
                order.append(f"gradient {node.args[1]}")
            collectives = _collective_of_node(node, mesh)
            order += [f"{node.meta['collective']}: {each.kind} {each.axes}" for each in collectives]
    return order


def collective_order_by_group(lowered: LoweredStage, mesh: RankMesh) -> dict[str, list[str]]:
    """Per process group of the rank, its collectives in the order in which they run: what the members of the group must
    agree on. Ranks of one stage may differ in bytes: where an axis shards a dim unevenly, the groups of the other axes
    communicate tensors of different sizes."""
    group_of = {tuple(mesh.names[axis] for axis in axes): name for axes, name in mesh.group_names.items()}
    by_group: dict[str, list[str]] = {name: [] for name in group_of.values()}
    for collective in _collectives_in_order(lowered, mesh):
        by_group[group_of[collective.axes]].append(str(collective))
    return by_group


def _collectives_in_order(lowered: LoweredStage, mesh: RankMesh) -> Iterator[LoweredCollective]:
    for graph in (lowered.forward.graph, lowered.backward.graph):
        for node in graph.nodes:
            yield from _collective_of_node(node, mesh)


def _collective_of_node(node: fx.Node, mesh: RankMesh) -> Iterator[LoweredCollective]:
    """The collective that a node starts, if it starts one."""
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
