"""Seconds that a tensor takes from one stage to the next.

Ranks of the sending stage that hold the same tensor each send a part of it, and the receivers gather it over their fast
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
    """Bytes that cross the cut before each block, whole at the traced batch; (blocks + 1,)."""
    sizes = [0.0]
    for values in boundary_values(graph, blocks):
        carried = [graph.values[value] for value in values if graph.values[value].requires_grad]
        sizes.append(float(sum(prod(value.shape) * value.itemsize for value in carried)))
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
    """``num_bytes`` of the whole micro-batch go to a stage of mesh (data, inner ...), whose inner axes place the
    boundary as ``roles`` say; ``senders`` ranks of a node send at once."""
    if not num_bytes:
        return 0.0
    data, *inner = mesh_sizes
    local = num_bytes / data
    shards = prod(size for size, role in zip(inner, boundary_roles, strict=True) if role != "R")
    time_s = float(cluster.transfer_s(local / prod(inner), same_node=same_node, num_senders=senders))
    whole = tuple(
        1 + at for at, (size, role) in enumerate(zip(inner, boundary_roles, strict=True)) if role == "R" and size > 1
    )
    if whole:
        links = MeshLinks(cluster, prod(mesh_sizes), mesh_sizes, whole)
        time_s += float(links.collective_s("all_gather", local / shards, tuple(range(len(whole)))))
    return time_s
