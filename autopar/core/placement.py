"""Placements, in PyTorch's words: how a tensor is placed on one axis of a mesh; and their text.

A tensor has one placement per mesh axis, outermost axis first, written without separators:

    ``S(d)``    ``Shard(d)``: tensor dim d is split over this axis, a chunk to each rank
    ``_S(d,k)`` ``Shard(d, split_factor=k)``: dim d is k equal pieces and each piece is split over this axis (a fused
                q, k, v projection sharded by heads has k = 3); torch's ``_StridedShard(d, split_factor=k)``
    ``R``       ``REPLICATE``: the same on every rank of this axis
    ``P``       ``PARTIAL``: every rank has an addend, the value is their sum

Nothing else in autopar parses or prints placements. They are immutable, and cheap to hash and compare: they are keys of
the planner's tables. ``local_shape`` derives local shapes from them.

>>> parse_placements("S(0)RP_S(2,3)") == (Shard(0), REPLICATE, PARTIAL, Shard(2, split_factor=3))
True
>>> format_placements((Shard(2, split_factor=3), REPLICATE))
'_S(2,3)R'
"""

import re
from collections.abc import Iterable

import msgspec

_PLACEMENT = re.compile(r"S\((0|[1-9][0-9]*)\)|_S\((0|[1-9][0-9]*),([1-9][0-9]*)\)|R|P")


class Placement(msgspec.Struct, frozen=True, cache_hash=True):
    """How a tensor is placed on one mesh axis: a ``Shard``, ``REPLICATE`` or ``PARTIAL``."""

    @property
    def shard_dim(self) -> int | None:
        """The tensor dim that is sharded; None for ``REPLICATE`` and ``PARTIAL``.

        >>> [placement.shard_dim for placement in parse_placements("S(12)_S(2,3)R")]
        [12, 2, None]
        """
        return None


class Shard(Placement, frozen=True, cache_hash=True):
    """Tensor dim ``dim`` is split over the axis; with a ``split_factor`` of k, each of its k equal pieces is.

    The pieces are those of the full dim. torch's ``split_factor`` counts the pieces of the local dim, which outer shards
    may already have split: it is ``local_shape.local_split_factor``.

    >>> str(Shard(0)), str(Shard(2, split_factor=3))
    ('S(0)', '_S(2,3)')
    """

    dim: int
    split_factor: int = 1

    def __post_init__(self) -> None:
        if self.dim < 0 or self.split_factor < 1:
            raise ValueError(f"no tensor is sharded on dim {self.dim} in {self.split_factor} pieces")

    @property
    def shard_dim(self) -> int:
        """The tensor dim that is sharded."""
        return self.dim

    def __str__(self) -> str:
        return f"S({self.dim})" if self.split_factor == 1 else f"_S({self.dim},{self.split_factor})"


class Replicate(Placement, frozen=True, cache_hash=True):
    """The same on every rank of the axis; use ``REPLICATE``."""

    def __str__(self) -> str:
        return "R"


class Partial(Placement, frozen=True, cache_hash=True):
    """Every rank of the axis has an addend of a sum; use ``PARTIAL``."""

    def __str__(self) -> str:
        return "P"


REPLICATE = Replicate()
PARTIAL = Partial()
Placements = tuple[Placement, ...]
"""Of a tensor on a mesh: one per axis, outermost axis first."""


def parse_placements(text: str) -> Placements:
    """The placements of a text, one per mesh axis; ``""`` is a mesh without axes. ValueError names the bad character.

    >>> parse_placements("S(1)X")
    Traceback (most recent call last):
    ValueError: placement 'S(1)X': 'X' at position 4 is none of S(dim), _S(dim,pieces), R, P (one per mesh axis)
    """
    placements: list[Placement] = []
    position = 0
    while position < len(text):
        match = _PLACEMENT.match(text, position)
        if match is None:
            raise ValueError(
                f"placement {text!r}: {text[position : position + 6]!r} at position {position} is none of "
                "S(dim), _S(dim,pieces), R, P (one per mesh axis)"
            )
        dim, strided_dim, split_factor = match.groups()
        if dim is not None:
            placements.append(Shard(int(dim)))
        elif strided_dim is not None:
            placements.append(Shard(int(strided_dim), int(split_factor)))
        else:
            placements.append(REPLICATE if match.group() == "R" else PARTIAL)
        position = match.end()
    return tuple(placements)


def format_placements(placements: Iterable[Placement]) -> str:
    """The text of placements, one per mesh axis: the inverse of ``parse_placements``."""
    return "".join(map(str, placements))
