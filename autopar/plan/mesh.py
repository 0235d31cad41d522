"""Logical meshes and placements as text: the axes of a stage, and how one tensor lies on them.

A tensor has one token per mesh axis, outermost axis first, written without separators:

    ``S(d)``    cut along tensor dim d over this axis
    ``_S(d,k)`` the same, but strided: dim d is k equal pieces and each piece is cut (a fused q, k, v projection cut by
                heads has k = 3); torch's ``_StridedShard(d, split_factor=k)``
    ``R``       the same on every rank of this axis
    ``P``       every rank holds a term, the value is their sum

>>> parse_placements("S(0)RP_S(2,3)")
('S(0)', 'R', 'P', '_S(2,3)')
>>> format_placements(("S(0)", "R"))
'S(0)R'
>>> shard_dim("S(12)"), shard_dim("_S(2,3)"), shard_dim("R")
(12, 2, None)
"""

import re

import msgspec

_TOKEN = re.compile(r"S\((0|[1-9][0-9]*)\)|_S\((0|[1-9][0-9]*),([1-9][0-9]*)\)|R|P")


class Axis(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mesh axis: ``size`` ranks, named after what it shards most ("dp", "tp", "cp", "ep").

    >>> Axis(name="tp", size=8).size
    8
    """

    name: str
    size: int

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"a mesh axis is named like a variable, not {self.name!r}")
        if self.size < 1:
            raise ValueError(f"mesh axis {self.name} has size {self.size}; the least is 1")


def parse_placements(text: str) -> tuple[str, ...]:
    """Tokens of a placement text, one per mesh axis; ``""`` is a mesh without axes. ValueError names the bad character.

    >>> parse_placements("S(1)X")
    Traceback (most recent call last):
    ValueError: placement 'S(1)X': 'X' at position 4 is none of S(dim), _S(dim,pieces), R, P (one per mesh axis)
    """
    tokens: list[str] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ValueError(
                f"placement {text!r}: {text[position : position + 6]!r} at position {position} is none of "
                "S(dim), _S(dim,pieces), R, P (one per mesh axis)"
            )
        tokens.append(match.group())
        position = match.end()
    return tuple(tokens)


def format_placements(tokens: tuple[str, ...]) -> str:
    """The text of some tokens, the inverse of ``parse_placements``; ValueError on anything that is no token."""
    for token in tokens:
        if _TOKEN.fullmatch(token) is None:
            raise ValueError(f"{token!r} is no placement token; write S(dim), _S(dim,pieces), R or P")
    return "".join(tokens)


def shard_dim(token: str) -> int | None:
    """The tensor dim that a token cuts, None for ``R`` and ``P``."""
    return _shard(token)[0]


def _shard(token: str) -> tuple[int | None, int]:
    """The dim a token cuts (or None) and into how many pieces it sees that dim before it cuts each."""
    match = _TOKEN.fullmatch(token)
    assert match is not None, token
    plain, strided, pieces = match.groups()
    if strided is not None:
        return int(strided), int(pieces)
    return (int(plain), 1) if plain is not None else (None, 1)


def num_ranks(axes: tuple[Axis, ...]) -> int:
    """Ranks of a mesh: the product of its axis sizes, 1 without axes."""
    product = 1
    for axis in axes:
        product *= axis.size
    return product


def local_size(shape: tuple[int, ...], placements: str, axes: tuple[Axis, ...]) -> int:
    """Elements that the fullest rank holds of a tensor: each cut dim is split in turn, rounding up piece by piece.

    >>> local_size((10, 4), "S(0)R", (Axis(name="dp", size=4), Axis(name="tp", size=2)))
    12
    >>> local_size((24, 5), "_S(0,3)", (Axis(name="tp", size=4),))
    30
    >>> local_size((16,), "S(0)_S(0,8)", (Axis(name="dp", size=4), Axis(name="cp", size=2)))
    2
    """
    sizes = list(shape)
    cuts = []
    for at, (token, _) in enumerate(zip(parse_placements(placements), axes, strict=True)):
        dim, pieces = _shard(token)
        if dim is not None:
            cuts.append((pieces, at, dim))
    for pieces, at, dim in sorted(cuts):  # cuts of few pieces lie outside, and leave a rank its share of the pieces
        taken = num_ranks(tuple(axes[outer] for fewer, outer, same in cuts if same == dim and fewer < pieces))
        held = max(1, pieces // taken)
        sizes[dim] = held * -(-sizes[dim] // (held * axes[at].size))
    elements = 1
    for size in sizes:
        elements *= size
    return elements
