"""The mesh of one stage as the judge sees it: local shapes, priced collectives, redistributions of single tensors."""

from math import prod

from autopar.cluster.cluster import Cluster, RankGroup
from autopar.core.placement import PARTIAL, REPLICATE, Placements, Shard, parse_placements
from autopar.core.plan import CollectiveKind
from autopar.judge.redistribution_path import PricedCollective, RedistributionPath, find_path


def local_shape(shape: tuple[int, ...], placements: Placements, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor on the rank that stores most of it, with an axis of ``sizes`` per placement.

    Axes shard outermost first and round up piece by piece. Shards of fewer pieces are outside those of more, and leave a
    rank its share of the pieces.

    >>> local_shape((24, 5), (Shard(0, split_factor=3),), (4,)), local_shape((10, 4), (Shard(0), REPLICATE), (4, 2))
    ((6, 5), (3, 4))
    >>> eight_samples_of_two = (Shard(0), Shard(0, split_factor=8))  # a rank has 2 samples, half of each
    >>> local_shape((16,), eight_samples_of_two, (4, 2))
    (2,)
    """
    local = list(shape)
    shards = [
        (placement.split_factor, axis, placement.dim)
        for axis, placement in enumerate(placements)
        if isinstance(placement, Shard)
    ]
    for pieces, axis, dim in sorted(shards):
        taken = 1
        for other_pieces, other_axis, other_dim in shards:
            taken *= sizes[other_axis] if other_dim == dim and other_pieces < pieces else 1
        local_pieces = max(1, pieces // taken)
        local[dim] = local_pieces * -(-local[dim] // (local_pieces * sizes[axis]))
    return tuple(local)


class JudgeMesh:
    """The devices of one stage: the sizes of its axes, outermost first, and the links that each set of axes crosses.

    ``prefers_all_to_all``: a tensor sharded on one dim and then on another takes the all_to_all, as at full size, although
    the tiny tensors of a shrunk plan could be gathered and sliced in as little time."""

    def __init__(
        self, cluster: Cluster, sizes: tuple[int, ...], first_device: int, *, prefers_all_to_all: bool = False
    ) -> None:
        self.cluster, self.sizes, self.first_device = cluster, sizes, first_device
        self.prefers_all_to_all = prefers_all_to_all
        self.num_devices = prod(sizes)
        self._groups: dict[tuple[int, ...], RankGroup] = {}
        self._collective_s: dict[tuple[CollectiveKind, float, tuple[int, ...]], float] = {}
        self._paths: dict[tuple[object, ...], RedistributionPath] = {}

    def group_size(self, axes: tuple[int, ...]) -> int:
        """Ranks of a group over ``axes``."""
        return prod(self.sizes[axis] for axis in axes)

    def group(self, axes: tuple[int, ...]) -> RankGroup:
        """The ranks and links of the slowest group over ``axes``."""
        if axes not in self._groups:
            self._groups[axes] = self.cluster.axis_group(self.num_devices, self.sizes, axes, self.first_device)
        return self._groups[axes]

    def collective(
        self, kind: CollectiveKind, num_bytes: float, axes: tuple[int, ...], padded_bytes: float | None = None
    ) -> PricedCollective | None:
        """One collective, timed by ``num_bytes`` and listed with ``padded_bytes`` (default: the same), its bytes where
        all parts are equal. None where the axes have a single rank or there are no bytes."""
        axes = tuple(axis for axis in axes if self.sizes[axis] > 1)
        if not axes or num_bytes <= 0:
            return None
        key = (kind, num_bytes, axes)
        if key not in self._collective_s:
            self._collective_s[key] = float(self.cluster.collective_s(kind, num_bytes, self.group(axes)))
        listed_bytes = num_bytes if padded_bytes is None else padded_bytes
        return PricedCollective(kind=kind, axes=axes, num_bytes=listed_bytes, time_s=self._collective_s[key])

    def local_bytes(self, shape: tuple[int, ...], itemsize: int, placements: Placements) -> int:
        """Bytes of a tensor on the rank that stores most of it."""
        return itemsize * prod(local_shape(shape, placements, self.sizes))

    def redistribution_path(
        self, shape: tuple[int, ...], itemsize: int, source: Placements, target: Placements
    ) -> RedistributionPath:
        """The cheapest path of a tensor of full ``shape``; CheckError where there is none (a partial sum that nothing
        made)."""
        key = (shape, itemsize, source, target)
        if key not in self._paths:

            def price(before: Placements, after: Placements, axes: tuple[int, ...]) -> PricedCollective | None:
                return self._price_change(shape, itemsize, before, after, axes)

            self._paths[key] = find_path(source, target, price=price, prefers_all_to_all=self.prefers_all_to_all)
        return self._paths[key]

    def parse(self, text: str) -> Placements:
        """The ``canonical`` placements of a text; () of an empty one."""
        return self.canonical(parse_placements(text))

    def canonical(self, placements: Placements) -> Placements:
        """``placements`` with ``REPLICATE`` on axes of one rank, where all placements mean the same."""
        pairs = zip(placements, self.sizes, strict=bool(placements))
        return tuple(REPLICATE if size == 1 else placement for placement, size in pairs)

    def _price_change(
        self, shape: tuple[int, ...], itemsize: int, before: Placements, after: Placements, axes: tuple[int, ...]
    ) -> PricedCollective | None:
        """The collective that changes ``axes`` between two placements; None where a slice or zeros do it."""
        old, new = before[axes[0]], after[axes[0]]
        if old == REPLICATE:
            return None
        if new == REPLICATE and old != PARTIAL:
            padded = self.local_bytes(shape, itemsize, before) * self.group_size(axes)
            return self.collective("all_gather", self.local_bytes(shape, itemsize, after), axes, padded)
        num_bytes = self.local_bytes(shape, itemsize, before)
        if not isinstance(new, Shard):
            return self.collective("all_reduce", num_bytes, axes)
        kind: CollectiveKind = "reduce_scatter" if old == PARTIAL else "all_to_all"
        full, part = (local_shape(shape, placements, self.sizes)[new.dim] for placements in (before, after))
        return self.collective(kind, num_bytes, axes, num_bytes * part * self.group_size(axes) / max(full, 1))
