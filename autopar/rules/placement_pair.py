"""How a tensor and its gradient are placed on one mesh axis, together, as the backward of an op is conjugate to it:

    forward      gradient
    a shard      the same shard   ``PlacementPair.sharded``: of an ``Atom``
    REPLICATE    REPLICATE        ``REPLICATED``
    REPLICATE    PARTIAL          ``PARTIAL_GRADIENT``: an input of a sharded op that lacks the sharded label
    PARTIAL      REPLICATE        ``PARTIAL_VALUE``: an output of a sharded contraction

There are no other pairs.
"""

from collections.abc import Iterable

import msgspec

from autopar.core.placement import PARTIAL, REPLICATE, Placement, Placements, Shard
from autopar.rules.dim_factors import DimFactor

_UNSHARDED = ((REPLICATE, REPLICATE), (REPLICATE, PARTIAL), (PARTIAL, REPLICATE))


class PlacementPair(msgspec.Struct, frozen=True, cache_hash=True):
    """The placements of a tensor and of its gradient on one axis; ValueError for a pair that no op leaves.

    >>> [str(pair) for pair in (PlacementPair.sharded(Atom(dim=1, size=8)), PARTIAL_GRADIENT)]
    ['S(1)/S(1)', 'R/P']
    """

    forward: Placement
    gradient: Placement

    def __post_init__(self) -> None:
        is_sharded = isinstance(self.forward, Shard) and self.forward == self.gradient
        if not is_sharded and (self.forward, self.gradient) not in _UNSHARDED:
            raise ValueError(f"a tensor placed as {self.forward} has no gradient placed as {self.gradient}")

    @staticmethod
    def sharded(shard: Shard) -> "PlacementPair":
        """Both sharded alike."""
        return PlacementPair(shard, shard)

    @property
    def atom(self) -> DimFactor | None:
        """What is sharded, None where nothing is."""
        return self.forward if isinstance(self.forward, DimFactor) else None

    @property
    def without_size(self) -> "PlacementPair":
        """The placements alone, of an atom without its size."""
        return PlacementPair.sharded(self.forward.shard) if isinstance(self.forward, DimFactor) else self

    def __str__(self) -> str:
        return f"{self.forward}/{self.gradient}"


REPLICATED = PlacementPair(REPLICATE, REPLICATE)
PARTIAL_GRADIENT = PlacementPair(REPLICATE, PARTIAL)
PARTIAL_VALUE = PlacementPair(PARTIAL, REPLICATE)


def forward_placements(pairs: Iterable[PlacementPair]) -> Placements:
    """Where the tensor is, axis by axis."""
    return tuple(pair.forward for pair in pairs)


def gradient_placements(pairs: Iterable[PlacementPair]) -> Placements:
    """Where its gradient is, axis by axis."""
    return tuple(pair.gradient for pair in pairs)
