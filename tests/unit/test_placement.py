"""Placements and the local shapes that follow from them.

Oracles: texts written by hand; which elements a rank stores, found by sorting all elements of a dim into pieces and
chunks; torch's own DTensor arithmetic, for the shards that it can express; and the judge's arithmetic.
"""

import itertools
import pickle
from math import prod

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Shard as TorchShard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset  # private; tried on torch 2.13.0
from torch.distributed.tensor.placement_types import _StridedShard

from autopar.core.local_shape import is_legal, largest_local_shape, local_shape, local_size
from autopar.core.placement import PARTIAL, REPLICATE, Placements, Shard, format_placements, parse_placements
from autopar.judge.judge_mesh import local_shape as judged_shape
from autopar.rules.dim_factors import DimFactor
from autopar.rules.placement_pair import PARTIAL_GRADIENT, PARTIAL_VALUE, REPLICATED, PlacementPair
from autopar.runtime.lower.shards import global_indices, local_shard

SHARDS = st.builds(Shard, st.integers(0, 20), st.integers(1, 200))
PLACEMENTS = st.lists(st.one_of(SHARDS, st.just(REPLICATE), st.just(PARTIAL)), max_size=5).map(tuple)


# --- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "placements"),
    [
        ("", ()),
        ("R", (REPLICATE,)),
        ("S(0)R", (Shard(0), REPLICATE)),
        ("S(10)P", (Shard(10), PARTIAL)),
        ("_S(2,3)S(0)RR", (Shard(2, split_factor=3), Shard(0), REPLICATE, REPLICATE)),
    ],
)
def test_placements_read_and_print_as_written(text: str, placements: Placements) -> None:
    assert parse_placements(text) == placements
    assert format_placements(placements) == text


@given(PLACEMENTS)
def test_what_is_printed_parses_back(placements: Placements) -> None:
    assert parse_placements(format_placements(placements)) == placements


def test_a_strided_shard_of_one_piece_is_a_shard() -> None:
    assert parse_placements("_S(1,1)") == (Shard(1),)
    assert format_placements(parse_placements("_S(1,1)")) == "S(1)"


@pytest.mark.parametrize("text", ["S", "S()", "S(-1)", "S(01)", "X", "R R", "_S(0)", "_S(0,0)", "S(0,2)"])
def test_bad_placements_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="none of"):
        parse_placements(text)


@pytest.mark.parametrize(("dim", "split_factor"), [(-1, 1), (0, 0)])
def test_no_shard_is_of_a_negative_dim_or_of_no_pieces(dim: int, split_factor: int) -> None:
    with pytest.raises(ValueError, match="no tensor is sharded"):
        Shard(dim, split_factor)


def test_placements_are_values() -> None:
    """Equal ones are one key, also when they come from another process."""
    every = (REPLICATE, PARTIAL, Shard(0), Shard(1), Shard(0, 2), DimFactor(dim=0, size=4), DimFactor(dim=0, size=8))
    every += (REPLICATED, PARTIAL_GRADIENT, PARTIAL_VALUE, PlacementPair.sharded(DimFactor(dim=0, size=4)))
    assert len(set(every)) == len(every)
    for placement in every:
        other = pickle.loads(pickle.dumps(placement))
        assert other == placement
        assert hash(other) == hash(placement)
    with pytest.raises(AttributeError):
        Shard(0).dim = 1  # type: ignore[misc]


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_a_pair_is_one_of_four_kinds() -> None:
    every = (Shard(0), Shard(1), REPLICATE, PARTIAL)
    allowed = set()
    for forward, gradient in itertools.product(every, repeat=2):
        try:
            allowed.add(str(PlacementPair(forward, gradient)))
        except ValueError:
            continue
    assert allowed == {"S(0)/S(0)", "S(1)/S(1)", "R/R", "R/P", "P/R"}


def test_the_size_of_an_atom_is_no_part_of_its_placements() -> None:
    small, large = (PlacementPair.sharded(DimFactor(dim=0, split_factor=3, size=size)) for size in (4, 8))
    assert small != large
    assert small.without_size == large.without_size == PlacementPair.sharded(Shard(0, split_factor=3))
    assert PARTIAL_GRADIENT.without_size == PARTIAL_GRADIENT


# --- local shapes -----------------------------------------------------------------------------------------------------


def stored(size: int, shards: list[tuple[int, int, int]]) -> list[int]:
    """The elements of a dim of ``size`` that one rank stores, of ``shards``: (split factor, ranks, the rank's place),
    outermost first. Every element is in a piece, and each piece of what is there so far is chunked."""
    elements = list(range(size))
    for factor, ranks, place in shards:
        pieces = itertools.groupby(elements, key=lambda element: element * factor // size)
        chunks = [torch.tensor(list(piece)).chunk(ranks) for _, piece in pieces]
        elements = [int(e) for piece in chunks if place < len(piece) for e in piece[place]]
    return elements


def drawn(draw: st.DrawFn) -> tuple[tuple[int, ...], Placements, tuple[int, ...]]:
    """A shape, placements and the sizes of a mesh, not always legal."""
    sizes = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    shape = tuple(draw(st.lists(st.sampled_from((1, 6, 8, 12, 24, 30, 48)), min_size=2, max_size=2)))
    shards = st.builds(Shard, st.integers(0, 1), st.sampled_from((1, 1, 2, 3, 4, 6, 8)))
    placement = st.one_of(shards, shards, st.just(REPLICATE), st.just(PARTIAL))
    return shape, tuple(draw(placement) for _ in sizes), sizes


cases = st.composite(drawn)()
legal_cases = cases.filter(lambda case: is_legal(*case))


@settings(max_examples=200, deadline=None)
@given(legal_cases)
def test_every_rank_stores_what_its_placements_say(case: tuple[tuple[int, ...], Placements, tuple[int, ...]]) -> None:
    shape, placements, sizes = case
    full = torch.arange(prod(shape)).reshape(shape)
    counts = torch.zeros(prod(shape), dtype=torch.int64)
    for coordinate in itertools.product(*map(range, sizes)):
        expected = [
            stored(size, [(factor, sizes[axis], coordinate[axis]) for factor, axis in sorted(_shards(placements, dim))])
            for dim, size in enumerate(shape)
        ]
        found = global_indices(shape, placements, sizes, coordinate)
        assert [index.tolist() for index in found] == expected
        assert local_shape(shape, placements, sizes, coordinate) == tuple(map(len, expected))
        part = local_shard(full, placements, sizes, coordinate)
        assert part.numel() > 0
        counts[part.flatten()] += 1
    replicas = prod(size for placement, size in zip(placements, sizes, strict=True) if placement.shard_dim is None)
    assert counts.eq(replicas).all()


def _shards(placements: Placements, dim: int) -> list[tuple[int, int]]:
    return [
        (placement.split_factor, axis)
        for axis, placement in enumerate(placements)
        if isinstance(placement, Shard) and placement.dim == dim
    ]


@settings(max_examples=200, deadline=None)
@given(legal_cases)
def test_the_first_rank_stores_most(case: tuple[tuple[int, ...], Placements, tuple[int, ...]]) -> None:
    shape, placements, sizes = case
    shapes = [local_shape(shape, placements, sizes, at) for at in itertools.product(*map(range, sizes))]
    assert largest_local_shape(shape, placements, sizes) == shapes[0] == max(shapes, key=prod)
    assert local_size(shape, placements, sizes) == prod(shapes[0])


@settings(max_examples=300, deadline=None)
@given(cases)
def test_planner_and_judge_count_alike(case: tuple[tuple[int, ...], Placements, tuple[int, ...]]) -> None:
    assert largest_local_shape(*case) == judged_shape(*case)


@settings(max_examples=200, deadline=None)
@given(legal_cases)
def test_local_shapes_are_those_of_torch(case: tuple[tuple[int, ...], Placements, tuple[int, ...]]) -> None:
    """torch splits left to right, and counts the pieces that a rank has: what it can say are shards that nest in the
    order of their axes."""
    shape, placements, sizes = case
    expected = []
    for axis, placement in enumerate(placements):
        expected.append(torch.distributed.tensor.Replicate())
        if isinstance(placement, Shard):
            outside = [at for factor, at in _shards(placements, placement.dim) if factor < placement.split_factor]
            assume(all(at < axis for at in outside))
            factor = placement.split_factor // prod(sizes[at] for at in outside)
            strided = _StridedShard(placement.dim, split_factor=factor)
            expected[-1] = TorchShard(placement.dim) if factor == 1 else strided
    for coordinate in itertools.product(*map(range, sizes)):
        there, start = _compute_local_shape_and_global_offset(shape, sizes, list(coordinate), expected)
        assert local_shape(shape, placements, sizes, coordinate) == there
        assert tuple(int(index[0]) for index in global_indices(shape, placements, sizes, coordinate)) == start


@pytest.mark.parametrize("rows", [8, 16, 24])
def test_fsdp_over_tensor_parallelism_is_placed_as_torch_places_it(rows: int) -> None:
    """torch's ``[_StridedShard(0, split_factor=2), Shard(0)]``: sharded over the inner axis first."""
    theirs = [_StridedShard(0, split_factor=2), TorchShard(0)]
    for coordinate in itertools.product(range(4), range(2)):
        there, (start,) = _compute_local_shape_and_global_offset((rows,), (4, 2), list(coordinate), theirs)
        (index,) = global_indices((rows,), parse_placements("_S(0,2)S(0)"), (4, 2), coordinate)
        assert (len(index),) == there
        assert int(index[0]) == start


@pytest.mark.parametrize(
    ("shape", "text", "sizes", "legal"),
    [
        ((10,), "S(0)", (4,), True),  # 3 3 3 1
        ((9,), "S(0)", (4,), False),  # 3 3 3 and nothing
        ((10,), "S(0)S(0)", (4, 2), False),  # inside an uneven shard
        ((14,), "S(0)S(0)", (2, 4), True),  # 7 = 2 2 2 1: the innermost alone
        ((12,), "_S(0,5)", (2,), False),  # no five equal pieces
        ((16,), "S(0)_S(0,8)", (4, 2), True),  # each of 4 ranks has 2 of the 8 pieces
        ((24,), "S(0)_S(0,3)", (2, 2), False),  # 2 ranks cannot share 3 pieces
        ((8, 8), "S(2)", (2,), False),  # no such dim
    ],
)
def test_shards_nest_in_whole_pieces_and_leave_no_rank_empty(
    shape: tuple[int, ...], text: str, sizes: tuple[int, ...], legal: bool
) -> None:
    assert is_legal(shape, parse_placements(text), sizes) == legal
