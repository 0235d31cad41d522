"""Which elements of a tensor a rank holds.

A placement has a token per mesh axis: "R", "P" or a ``Cut``. ``Cut(dim, pieces)`` sees ``dim`` as ``pieces`` equal
pieces and cuts each into as many chunks as the axis has ranks (``S(d)`` has one piece; a chunk is rounded up, as
torch.chunk does). Cuts of one dim nest: those with fewer pieces lie outside, of equal ones the outer mesh axis does.

    shape (12,), mesh 2 x 2, tokens S(0), _S(0,2):  rank (0, 0) holds 0 1 2, rank (0, 1) holds 3 4 5
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from autopar.plan.mesh import parse_placements, shard_dim


@dataclass(frozen=True, slots=True)
class Cut:
    """Cut along tensor dim ``dim``, seen as ``pieces`` equal pieces.

    >>> str(Cut(0, 1)), str(Cut(2, 3))
    ('S(0)', '_S(2,3)')
    """

    dim: int
    pieces: int = 1

    def __str__(self) -> str:
        return f"S({self.dim})" if self.pieces == 1 else f"_S({self.dim},{self.pieces})"


Token = Cut | str
Placement = tuple[Token, ...]
Shape = Sequence[int]


def parse(text: str) -> Placement:
    """
    >>> parse("S(0)R_S(1,3)")
    (Cut(dim=0, pieces=1), 'R', Cut(dim=1, pieces=3))
    """
    tokens: list[Token] = []
    for token in parse_placements(text):
        dim = shard_dim(token)
        if dim is None:
            tokens.append(token)
        else:
            tokens.append(Cut(dim, int(token[:-1].split(",")[1]) if token.startswith("_") else 1))
    return tuple(tokens)


def text_of(placement: Placement) -> str:
    """The inverse of ``parse``."""
    return "".join(str(token) for token in placement)


def cuts_of(placement: Placement, dim: int) -> list[tuple[int, int]]:
    """(pieces, axis) of the cuts of a dim, outermost first."""
    found = [
        (token.pieces, axis) for axis, token in enumerate(placement) if isinstance(token, Cut) and token.dim == dim
    ]
    return sorted(found)


def local_pieces(placement: Placement, axis: int, sizes: Sequence[int]) -> int:
    """Into how many pieces the cut of ``axis`` sees the local dim: its pieces, less those that cuts outside took
    away."""
    cut = placement[axis]
    assert isinstance(cut, Cut)
    taken = prod(sizes[other] for pieces, other in cuts_of(placement, cut.dim) if pieces < cut.pieces)
    assert cut.pieces % taken == 0, (placement, sizes)
    return cut.pieces // taken


def is_legal(shape: Shape, placement: Placement, sizes: Sequence[int]) -> bool:
    """Whether cuts nest in whole pieces; only the innermost cut of a dim may be uneven, and then none shares its
    atom."""
    for dim, size in enumerate(shape):
        cuts = cuts_of(placement, dim)
        extent, before = size, 1  # elements of one piece of the last atom, and how many of them there are
        chunked = 1  # by how much the last atom is cut
        for at, (pieces, axis) in enumerate(cuts):
            if pieces != before:
                if pieces % (before * chunked) or size % pieces:
                    return False
                before, chunked, extent = pieces, 1, size // pieces
            if extent % sizes[axis] and (
                at + 1 < len(cuts) or chunk_bounds(extent, sizes[axis], sizes[axis] - 1)[1] < 1
            ):
                return False  # nothing can be cut inside an uneven cut, and every rank must hold something
            extent = -(-extent // sizes[axis])
            chunked *= sizes[axis]
    return all(token.dim < len(shape) for token in placement if isinstance(token, Cut))


def chunk_bounds(extent: int, degree: int, coordinate: int) -> tuple[int, int]:
    """(start, length) of chunk ``coordinate`` of ``degree`` chunks of ``extent`` elements.

    >>> [chunk_bounds(5, 4, k) for k in range(4)]
    [(0, 2), (2, 2), (4, 1), (5, 0)]
    """
    chunk = -(-extent // degree)
    start = min(coordinate * chunk, extent)
    return start, min(chunk, extent - start)


def local_shape(shape: Shape, placement: Placement, sizes: Sequence[int], coordinate: Sequence[int]) -> tuple[int, ...]:
    """The shape of what the rank at ``coordinate`` holds."""
    local = list(shape)
    for dim in {token.dim for token in placement if isinstance(token, Cut)}:
        for _, axis in cuts_of(placement, dim):
            pieces = local_pieces(placement, axis, sizes)
            extent = local[dim] // pieces
            local[dim] = pieces * chunk_bounds(extent, sizes[axis], coordinate[axis])[1]
    return tuple(local)


def held(shape: Shape, placement: Placement, sizes: Sequence[int], coordinate: Sequence[int]) -> tuple[Tensor, ...]:
    """Per dim, the global indices that the rank holds, in order (int64, on the CPU)."""
    indices = []
    for dim, size in enumerate(shape):
        index = torch.arange(size)
        for _, axis in cuts_of(placement, dim):
            pieces = index.view(local_pieces(placement, axis, sizes), -1)
            index = pieces.narrow(1, *chunk_bounds(pieces.shape[1], sizes[axis], coordinate[axis])).reshape(-1)
        indices.append(index)
    return tuple(indices)


def local_part(whole: Tensor, placement: Placement, sizes: Sequence[int], coordinate: Sequence[int]) -> Tensor:
    """What the rank holds of a tensor that it has whole."""
    part = whole
    for dim, index in enumerate(held(whole.shape, placement, sizes, coordinate)):
        if len(index) != whole.shape[dim]:
            part = part.index_select(dim, index.to(whole.device))
    return part
