"""Placement pairs: the placement of a tensor and that of its gradient on one mesh axis, as the backward of an op is the
conjugate of its forward:

    forward      gradient
    Shard        the same Shard   ``PlacementPair.sharded``, in the search of a ``DimFactor``
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
    """The placements of a tensor and of its gradient on one axis; raises ValueError for other pairs than these.

    >>> [str(pair) for pair in (PlacementPair.sharded(DimFactor(dim=1, size=8)), PARTIAL_GRADIENT)]
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
        """A tensor and its gradient that are sharded alike."""
        return PlacementPair(shard, shard)

    @property
    def factor(self) -> DimFactor | None:
        """The factor that is sharded, None where the tensor is not sharded or its factor's size is not known."""
        return self.forward if isinstance(self.forward, DimFactor) else None

    @property
    def without_size(self) -> "PlacementPair":
        """The pair as it is, that of a factor without its size."""
        return PlacementPair.sharded(self.forward.shard) if isinstance(self.forward, DimFactor) else self

    def __str__(self) -> str:
        return f"{self.forward}/{self.gradient}"


REPLICATED = PlacementPair(REPLICATE, REPLICATE)
PARTIAL_GRADIENT = PlacementPair(REPLICATE, PARTIAL)
PARTIAL_VALUE = PlacementPair(PARTIAL, REPLICATE)


def forward_placements(pairs: Iterable[PlacementPair]) -> Placements:
    """The placements of the tensor, one per mesh axis."""
    return tuple(pair.forward for pair in pairs)


def gradient_placements(pairs: Iterable[PlacementPair]) -> Placements:
    """The placements of its gradient, one per mesh axis."""
    return tuple(pair.gradient for pair in pairs)
