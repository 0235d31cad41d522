"""What a rank stores of a tensor: the local shapes that follow from its placements on a mesh of ``sizes``.

``Shard(dim, split_factor=k)`` takes the dim as k equal pieces and splits each into as many chunks as the axis has
ranks, as torch.chunk does: all of the first chunk's length, rounded up, but for the last ones, which may be short or
empty. Shards of one dim nest: those of a smaller split factor are outside, of equal ones the outer mesh axis is. A
shard inside another finds fewer pieces on a rank, and splits those.

    shape (12,), mesh 2 x 2, S(0)_S(0,2):  rank (0, 0) stores 0 1 2, rank (0, 1) stores 3 4 5

The judge has its own arithmetic (``judge.judge_mesh``), so that one checks the other.
"""

from collections.abc import Sequence
from math import prod

from autopar.core.placement import Placement, Shard


def nested_shards(placements: Sequence[Placement], dim: int) -> list[tuple[int, int]]:
    """(split factor, axis) of the shards of a tensor dim, outermost first.

    >>> nested_shards((Shard(0, split_factor=8), Shard(0), Shard(1)), 0)
    [(1, 1), (8, 0)]
    """
    return sorted(
        (placement.split_factor, axis)
        for axis, placement in enumerate(placements)
        if isinstance(placement, Shard) and placement.dim == dim
    )


def local_split_factor(placements: Sequence[Placement], axis: int, sizes: Sequence[int]) -> int:
    """How many pieces of the dim a rank has before the shard of ``axis`` splits them: outer shards took the others.

    >>> local_split_factor((Shard(0), Shard(0, split_factor=8)), 1, (4, 2))
    2
    """
    shard = placements[axis]
    assert isinstance(shard, Shard)
    outside = prod(
        sizes[other] for factor, other in nested_shards(placements, shard.dim) if factor < shard.split_factor
    )
    assert shard.split_factor % outside == 0, (placements, sizes)
    return shard.split_factor // outside


def chunk_bounds(extent: int, degree: int, coordinate: int) -> tuple[int, int]:
    """(start, length) of chunk ``coordinate`` of ``degree`` chunks of ``extent`` elements.

    >>> [chunk_bounds(5, 4, k) for k in range(4)]
    [(0, 2), (2, 2), (4, 1), (5, 0)]
    """
    chunk = -(-extent // degree)
    start = min(coordinate * chunk, extent)
    return start, min(chunk, extent - start)


def is_legal(shape: Sequence[int], placements: Sequence[Placement], sizes: Sequence[int]) -> bool:
    """Whether shards nest without splitting a piece of an outer one and every rank stores at least one element. Only the
    innermost shard of a dim may be uneven, and then no other shard of the dim has its split factor."""
    for dim, size in enumerate(shape):
        shards = nested_shards(placements, dim)
        extent, factor = size, 1  # elements of a piece of the last split factor, and that factor
        chunked = 1  # into how many chunks a piece is split so far
        for position, (split_factor, axis) in enumerate(shards):
            if split_factor != factor:
                if split_factor % (factor * chunked) or size % split_factor:
                    return False
                factor, chunked, extent = split_factor, 1, size // split_factor
            if extent % sizes[axis] and (
                position + 1 < len(shards) or chunk_bounds(extent, sizes[axis], sizes[axis] - 1)[1] < 1
            ):
                return False
            extent = -(-extent // sizes[axis])
            chunked *= sizes[axis]
    return all(placement.dim < len(shape) for placement in placements if isinstance(placement, Shard))


def local_shape(
    shape: Sequence[int], placements: Sequence[Placement], sizes: Sequence[int], coordinate: Sequence[int]
) -> tuple[int, ...]:
    """The local shape on the rank at mesh ``coordinate`` of a tensor of global ``shape``; the placements are legal.

    >>> [local_shape((5, 3), (Shard(0),), (2,), (rank,)) for rank in range(2)]
    [(3, 3), (2, 3)]
    """
    local = list(shape)
    for dim in {placement.dim for placement in placements if isinstance(placement, Shard)}:
        for _, axis in nested_shards(placements, dim):
            pieces = local_split_factor(placements, axis, sizes)
            local[dim] = pieces * chunk_bounds(local[dim] // pieces, sizes[axis], coordinate[axis])[1]
    return tuple(local)


def largest_local_shape(shape: Sequence[int], placements: Sequence[Placement], sizes: Sequence[int]) -> tuple[int, ...]:
    """The local shape on the rank that stores most, which is the first. Placements that are not legal (no plan has them,
    but the search may ask) are rounded up, piece by piece.

    >>> largest_local_shape((24, 5), (Shard(0, split_factor=3),), (4,))
    (6, 5)
    >>> largest_local_shape((16,), (Shard(0), Shard(0, split_factor=8)), (4, 2))  # half of each of 2 pieces of 2
    (2,)
    """
    local = list(shape)
    shards = sorted(
        (placement.split_factor, axis, placement.dim)
        for axis, placement in enumerate(placements)
        if isinstance(placement, Shard)
    )
    for split_factor, axis, dim in shards:
        outside = 1
        for factor, other, same in shards:
            if same == dim and factor < split_factor:
                outside *= sizes[other]
        pieces = max(1, split_factor // outside)
        local[dim] = pieces * -(-local[dim] // (pieces * sizes[axis]))
    return tuple(local)


def local_size(shape: Sequence[int], placements: Sequence[Placement], sizes: Sequence[int]) -> int:
    """Elements of a tensor on the rank that stores most of it.

    >>> local_size((10, 4), (Shard(0), Shard(1)), (4, 2))
    6
    """
    return prod(largest_local_shape(shape, placements, sizes))
