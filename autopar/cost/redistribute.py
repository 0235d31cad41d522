"""Seconds to bring a tensor from one placement to another inside a mesh, as the cheapest sequence of collectives.

A placement is a token per mesh axis: "R", "P" or an Atom. One step changes one axis, or several axes at once with one
flattened collective; bytes are what a rank holds before it, after it for a gather:

    P -> R  all_reduce          P -> S  reduce_scatter          S -> R  all_gather          S -> S'  all_to_all
    R -> S  a local slice, free                                 nothing becomes P

Axes are cut outermost first, so where two axes share an atom only the innermost of them may leave or join it. The
cheapest sequence is a shortest path over all placements (Floyd-Warshall, for several tensors at once).
"""

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autopar.cluster.cluster import Cluster, Group
from autopar.rules.atoms import Atom

Floats = NDArray[np.float64]
Placement = tuple[Atom | str, ...]


class MeshLinks:
    """The axes of one stage that carry activations: their sizes and the links that each set of them crosses."""

    def __init__(self, cluster: Cluster, num_devices: int, axis_sizes: tuple[int, ...], axes: tuple[int, ...]) -> None:
        """``axes`` are the positions in ``axis_sizes`` (outermost first) that this object speaks of, in order."""
        self.cluster = cluster
        self.sizes = tuple(axis_sizes[axis] for axis in axes)
        self._groups = {
            chosen: cluster.axis_group(num_devices, axis_sizes, tuple(axes[axis] for axis in chosen))
            for count in range(1, len(axes) + 1)
            for chosen in itertools.combinations(range(len(axes)), count)
        }

    def group(self, axes: tuple[int, ...]) -> Group:
        """The group that a collective over these axes, flattened, spans."""
        return self._groups[axes]

    def collective_s(self, kind: str, num_bytes: Floats | float, axes: tuple[int, ...]) -> Floats:
        return np.asarray(self.cluster.collective_s(kind, num_bytes, self._groups[axes]), float)


def redistribute_s(links: MeshLinks, placements: Sequence[Placement], local_bytes: Floats) -> Floats:
    """Seconds between every two placements: (tensors, from, to); inf where there is no way (only "P" cannot be reached
    from others). ``local_bytes`` (tensors, placements) is what the fullest rank holds."""
    count = len(placements)
    costs = np.full((len(local_bytes), count, count), np.inf)
    costs[:, np.arange(count), np.arange(count)] = 0.0
    position = {placement: at for at, placement in enumerate(placements)}
    known: dict[tuple[str, tuple[int, ...], bytes], Floats] = {}
    for (axes, _), source in itertools.product(links._groups.items(), placements):
        for target, kind in _steps(source, axes, placements, len(links.sizes)):
            if target in position:
                held = local_bytes[:, position[target if kind == "all_gather" else source]]
                key = (kind, axes, held.tobytes())
                if key not in known:
                    known[key] = np.zeros_like(held) if kind == "slice" else links.collective_s(kind, held, axes)
                at = (slice(None), position[source], position[target])
                costs[at] = np.minimum(costs[at], known[key])
    for via in range(count):
        np.minimum(costs, costs[:, :, via, None] + costs[:, None, via, :], out=costs)
    return costs


def _steps(
    source: Placement, axes: tuple[int, ...], placements: Sequence[Placement], num_axes: int
) -> list[tuple[Placement, str]]:
    """Placements one collective over ``axes`` reaches, and its kind; all moving axes must hold the same token."""
    token = source[axes[0]]
    if any(source[axis] != token for axis in axes) or not _innermost(source, token, axes, num_axes):
        return []
    found = []
    targets: dict[Atom | str, None] = dict.fromkeys(placement[axes[0]] for placement in placements)
    for target in targets:
        if target == token or target == "P":
            continue
        result = tuple(target if axis in axes else source[axis] for axis in range(num_axes))
        if not _innermost(result, target, axes, num_axes):
            continue
        if token == "P":
            kind = "all_reduce" if target == "R" else "reduce_scatter"
        elif token == "R":
            kind = "slice"
        else:
            kind = "all_gather" if target == "R" else "all_to_all"
        found.append((result, kind))
    return found


def _innermost(placement: Placement, token: Atom | str, axes: tuple[int, ...], num_axes: int) -> bool:
    """Whether no axis inside the moving ones, and none between them, shards the same dim."""
    if isinstance(token, str):
        return True
    return not any(
        axis not in axes and axis > axes[0] and isinstance(other := placement[axis], Atom) and other.dim == token.dim
        for axis in range(num_axes)
    )
