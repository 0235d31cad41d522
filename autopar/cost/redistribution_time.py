"""Seconds to redistribute a tensor inside a mesh by the cheapest sequence of collectives.

A tensor has a placement per mesh axis. One step changes one axis, or several axes at once with one flattened
collective; bytes are what a rank stores before it, after it for a gather:

    P -> R  all_reduce          P -> S  reduce_scatter          S -> R  all_gather          S -> S'  all_to_all
    R -> S  a local slice, free                                 nothing becomes P

Dims are sharded outermost axis first, so where two axes shard one dim, only the innermost may stop or start. The
cheapest sequence is a shortest path between placements (Floyd-Warshall, for several tensors at once).
"""

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autopar.cluster.cluster import Cluster, RankGroup
from autopar.core.placement import PARTIAL, REPLICATE, Placement, Placements, Shard

Floats = NDArray[np.float64]


class MeshLinks:
    """The axes of one stage that carry activations: their sizes and the links that each set of them crosses."""

    def __init__(self, cluster: Cluster, num_devices: int, axis_sizes: tuple[int, ...], axes: tuple[int, ...]) -> None:
        """``axes``: the positions in ``axis_sizes`` (outermost first) that this object is about, in order."""
        self.cluster = cluster
        self.sizes = tuple(axis_sizes[axis] for axis in axes)
        self._group_of_axes = {
            chosen: cluster.axis_group(num_devices, axis_sizes, tuple(axes[axis] for axis in chosen))
            for count in range(1, len(axes) + 1)
            for chosen in itertools.combinations(range(len(axes)), count)
        }

    def group(self, axes: tuple[int, ...]) -> RankGroup:
        """The group that a collective over these axes, flattened, spans."""
        return self._group_of_axes[axes]

    def collective_s(self, kind: str, num_bytes: Floats | float, axes: tuple[int, ...]) -> Floats:
        """Seconds of a collective over ``axes``, flattened; bytes as in ``CollectiveCurve``."""
        return np.asarray(self.cluster.collective_s(kind, num_bytes, self._group_of_axes[axes]), float)


def redistribute_s(links: MeshLinks, placements: Sequence[Placements], local_bytes: Floats) -> Floats:
    """Seconds between every two of ``placements``: (tensors, from, to); inf where there is no path (only ``PARTIAL``
    cannot be reached from others). ``local_bytes`` (tensors, placements) is what the rank that stores most stores."""
    count = len(placements)
    costs = np.full((len(local_bytes), count, count), np.inf)
    costs[:, np.arange(count), np.arange(count)] = 0.0
    position = {placement: index for index, placement in enumerate(placements)}
    known: dict[tuple[str, tuple[int, ...], bytes], Floats] = {}
    for (axes, _), source in itertools.product(links._group_of_axes.items(), placements):
        for target, kind in _reachable_by_one_collective(source, axes, placements, len(links.sizes)):
            if target in position:
                sizes = local_bytes[:, position[target if kind == "all_gather" else source]]
                key = (kind, axes, sizes.tobytes())
                if key not in known:
                    known[key] = np.zeros_like(sizes) if kind == "slice" else links.collective_s(kind, sizes, axes)
                pair = (slice(None), position[source], position[target])
                costs[pair] = np.minimum(costs[pair], known[key])
    for via in range(count):
        np.minimum(costs, costs[:, :, via, None] + costs[:, None, via, :], out=costs)
    return costs


def _reachable_by_one_collective(
    source: Placements, axes: tuple[int, ...], placements: Sequence[Placements], num_axes: int
) -> list[tuple[Placements, str]]:
    """Placements that one collective over ``axes`` reaches from ``source``, and its kind; all axes change alike."""
    old = source[axes[0]]
    if any(source[axis] != old for axis in axes) or not _is_innermost(source, old, axes, num_axes):
        return []
    found = []
    for new in dict.fromkeys(each[axes[0]] for each in placements):
        if new in (old, PARTIAL):
            continue
        target = tuple(new if axis in axes else source[axis] for axis in range(num_axes))
        if not _is_innermost(target, new, axes, num_axes):
            continue
        if old == PARTIAL:
            kind = "all_reduce" if new == REPLICATE else "reduce_scatter"
        elif old == REPLICATE:
            kind = "slice"
        else:
            kind = "all_gather" if new == REPLICATE else "all_to_all"
        found.append((target, kind))
    return found


def _is_innermost(placements: Placements, changing: Placement, axes: tuple[int, ...], num_axes: int) -> bool:
    """Whether no axis further in than the first of ``axes``, other than they, shards the dim of their placement
    ``changing``."""
    if not isinstance(changing, Shard):
        return True
    return not any(
        axis not in axes and axis > axes[0] and placements[axis].shard_dim == changing.dim for axis in range(num_axes)
    )
