"""Seconds that a boundary tensor takes from one stage to the next, by scatter-gather.

Ranks of the sending stage that have the same tensor send a part of it each, and the receivers gather it over their fast
links (Narayanan et al., "Efficient Large-Scale Language Model Training", 2021, section 4.1); where the boundary is
sharded each rank needs its part only:

    t = transfer(bytes / (data ranks * inner ranks)) + all_gather(bytes / data ranks / shards, over replicated axes)
"""

from math import prod

import numpy as np
from numpy.typing import NDArray

from autopar.cluster.cluster import Cluster
from autopar.cost.redistribution_time import MeshLinks
from autopar.graph.boundary_values import boundary_values
from autopar.graph.ir import Block, Graph


def stage_boundary_bytes(graph: Graph, blocks: tuple[Block, ...]) -> NDArray[np.float64]:
    """Unsharded bytes, at the traced batch, of the values with a gradient that cross the boundary before each block;
    (blocks + 1,), 0 at both ends."""
    sizes = [0.0]
    for values in boundary_values(graph, blocks):
        crossing = [graph.values[value] for value in values if graph.values[value].requires_grad]
        sizes.append(float(sum(prod(value.shape) * value.itemsize for value in crossing)))
    sizes += [0.0] * (len(blocks) + 1 - len(sizes))
    return np.array(sizes)


def scatter_gather_s(
    cluster: Cluster,
    num_bytes: float,
    mesh_sizes: tuple[int, ...],
    boundary_roles: tuple[str, ...],
    *,
    senders: int,
    same_node: bool,
) -> float:
    """Seconds that ``num_bytes`` (unsharded, of a micro-batch) take to a stage of mesh sizes (data, inner ...), on whose
    inner axes the boundary is replicated ("R" in ``boundary_roles``) or sharded; ``senders`` ranks of a node send at
    once."""
    if not num_bytes:
        return 0.0
    data, *inner = mesh_sizes
    local = num_bytes / data
    shards = prod(size for size, role in zip(inner, boundary_roles, strict=True) if role != "R")
    time_s = float(cluster.transfer_s(local / prod(inner), same_node=same_node, num_senders=senders))
    replicated = tuple(
        1 + axis
        for axis, (size, role) in enumerate(zip(inner, boundary_roles, strict=True))
        if role == "R" and size > 1
    )
    if replicated:
        links = MeshLinks(cluster, prod(mesh_sizes), mesh_sizes, replicated)
        time_s += float(links.collective_s("all_gather", local / shards, tuple(range(len(replicated)))))
    return time_s
