"""The process groups of a stage's mesh, as one rank sees them.

Groups are made by all ranks of the world, for all stages, in one order (``new_group`` is collective), and are shared by
stages on the same devices. A group over several axes is the flattened one: ranks in row-major order.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch
import torch.distributed as dist

from autopar.core.plan import StagePlan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankMesh:
    """Axis ``names`` and ``sizes`` (outermost first), the rank's ``coordinate`` on them (that of the first rank where
    it is not a member), and per set of axes the name of the group that the rank is in."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    first_rank: int
    coordinate: tuple[int, ...]
    group_names: dict[tuple[int, ...], str] = field(repr=False)

    @property
    def num_ranks(self) -> int:
        return prod(self.sizes)

    def contains(self, rank: int) -> bool:
        return self.first_rank <= rank < self.first_rank + self.num_ranks

    def degree(self, axes: Sequence[int]) -> int:
        """Ranks of a group over these axes."""
        return prod(self.sizes[axis] for axis in axes)

    def rank_in_group(self, axes: Sequence[int]) -> int:
        """The rank's place in its group over these axes."""
        place = 0
        for axis in axes:
            place = place * self.sizes[axis] + self.coordinate[axis]
        return place

    def coordinate_of(self, rank: int) -> tuple[int, ...]:
        """Where a rank of the world lies on the mesh."""
        rest = rank - self.first_rank
        found = []
        for size in reversed(self.sizes):
            rest, place = divmod(rest, size)
            found.append(place)
        return tuple(reversed(found))


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
    """The mesh of every stage; collective over the world. Groups of one rank are left out: nothing runs on them."""
    known: dict[tuple[int, ...], str] = {}
    meshes = []
    for stage in stages:
        sizes = tuple(axis.size for axis in stage.axes)
        groups: dict[tuple[int, ...], str] = {}
        for count in range(1, len(sizes) + 1):
            for axes in itertools.combinations(range(len(sizes)), count):
                if any(sizes[axis] == 1 for axis in axes):
                    continue
                for ranks in axis_groups(stage.first_device, sizes, axes):
                    if ranks not in known:
                        group = dist.new_group(list(ranks))
                        known[ranks] = getattr(group, "group_name", "")
                    if rank in ranks:
                        groups[axes] = known[ranks]
        mesh = RankMesh(
            names=tuple(axis.name for axis in stage.axes),
            sizes=sizes,
            first_rank=stage.first_device,
            coordinate=(0,) * len(sizes),
            group_names=groups,
        )
        if mesh.contains(rank):
            mesh = RankMesh(
                names=mesh.names,
                sizes=sizes,
                first_rank=stage.first_device,
                coordinate=mesh.coordinate_of(rank),
                group_names=groups,
            )
        meshes.append(mesh)
    return tuple(meshes)
