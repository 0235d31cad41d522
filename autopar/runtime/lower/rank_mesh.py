"""A stage's mesh and its process groups, as one rank sees them.

Groups are created by all ranks of the world, for all stages, in one order (``new_group`` is collective), and are shared
by stages on the same devices. A group over several axes is the flattened one: ranks in row-major order.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch
import torch.distributed as dist

from autopar.core.plan import StagePlan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankMesh:
    """Axis ``names`` and ``sizes``, outermost first; the rank's ``coordinate`` on them, that of ``first_rank`` where it is not
    a member; and per set of axes the name of the process group that the rank is in."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    first_rank: int
    coordinate: tuple[int, ...]
    group_names: dict[tuple[int, ...], str] = field(repr=False)

    @property
    def num_ranks(self) -> int:
        """The number of ranks on the mesh."""
        return prod(self.sizes)

    def contains(self, rank: int) -> bool:
        """Whether a rank of the world is on the mesh."""
        return self.first_rank <= rank < self.first_rank + self.num_ranks

    def degree(self, axes: Sequence[int]) -> int:
        """The number of ranks of a group over these axes."""
        return prod(self.sizes[axis] for axis in axes)

    def rank_in_group(self, axes: Sequence[int]) -> int:
        """The rank's index in its group over these axes."""
        index = 0
        for axis in axes:
            index = index * self.sizes[axis] + self.coordinate[axis]
        return index

    def coordinate_of(self, rank: int) -> tuple[int, ...]:
        """The coordinate on the mesh of a rank of the world."""
        remaining = rank - self.first_rank
        coordinate = []
        for size in reversed(self.sizes):
            remaining, index = divmod(remaining, size)
            coordinate.append(index)
        return tuple(reversed(coordinate))


def axis_groups(first_rank: int, sizes: Sequence[int], axes: Sequence[int]) -> list[tuple[int, ...]]:
    """The ranks of each group over ``axes``.

    >>> axis_groups(4, (2, 2), (0,))
    [(4, 6), (5, 7)]
    """
    ranks = torch.arange(first_rank, first_rank + prod(sizes)).view(*sizes)
    others = [axis for axis in range(len(sizes)) if axis not in axes]
    rows = ranks.permute(*others, *axes).reshape(-1, prod(sizes[axis] for axis in axes))
    return [tuple(row) for row in rows.tolist()]


def make_meshes(stages: Sequence[StagePlan], rank: int) -> tuple[RankMesh, ...]:
    """The mesh of every stage as ``rank`` sees it; collective over the world. Groups with an axis of one rank are left out:
    collectives run over the axes above one."""
    name_of: dict[tuple[int, ...], str] = {}
    meshes = []
    for stage in stages:
        sizes = tuple(axis.size for axis in stage.axes)
        groups: dict[tuple[int, ...], str] = {}
        for count in range(1, len(sizes) + 1):
            for axes in itertools.combinations(range(len(sizes)), count):
                if any(sizes[axis] == 1 for axis in axes):
                    continue
                for ranks in axis_groups(stage.first_device, sizes, axes):
                    if ranks not in name_of:
                        group = dist.new_group(list(ranks))
                        name_of[ranks] = getattr(group, "group_name", "")
                    if rank in ranks:
                        groups[axes] = name_of[ranks]
        mesh = RankMesh(
            names=tuple(axis.name for axis in stage.axes),
            sizes=sizes,
            first_rank=stage.first_device,
            coordinate=(0,) * len(sizes),
            group_names=groups,
        )
        meshes.append(replace(mesh, coordinate=mesh.coordinate_of(rank)) if mesh.contains(rank) else mesh)
    return tuple(meshes)
