"""Redistribution on 32 ranks in one process, by torch's ``LocalTensorMode``, against slices of the full tensor."""

import itertools
import random

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._local_tensor import LocalIntNode, LocalTensor, LocalTensorMode  # private; tried on torch 2.13.0
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from autopar.core.local_shape import is_legal
from autopar.core.placement import PARTIAL, REPLICATE, Placements, Shard
from autopar.runtime.lower.rank_mesh import RankMesh
from autopar.runtime.lower.redistribute_tensor import redistribute
from autopar.runtime.lower.shards import local_shard

torch.set_num_threads(1)
SIZES = (2, 4, 4)
NAMES = ("a", "b", "c")
SHAPE = (32, 64, 3)
COORDINATES = dict(enumerate(itertools.product(*map(range, SIZES))))
CHOICES = (REPLICATE, PARTIAL, Shard(0), Shard(1), Shard(0, 2), Shard(1, 4))


@pytest.fixture(scope="module")
def groups():
    """The name of the group over each set of axes; the mode finds those of the other ranks."""
    dist.init_process_group("fake", rank=0, world_size=len(COORDINATES), store=FakeStore())
    mesh = init_device_mesh("cpu", SIZES, mesh_dim_names=NAMES)
    found = {}
    for count in (1, 2, 3):
        for axes in itertools.combinations(range(3), count):
            part = mesh[tuple(NAMES[axis] for axis in axes)]
            found[axes] = (part._flatten() if count > 1 else part).get_group().group_name
    yield found
    dist.destroy_process_group()


def shards(full: Tensor, placements: Placements, rng: torch.Generator) -> dict[int, Tensor]:
    """Rank -> its shard; where the tensor is partial, of an addend with integer elements."""
    summed = [axis for axis, placement in enumerate(placements) if placement == PARTIAL]
    addends: dict[tuple[int, ...], Tensor] = {}
    partial_coordinates = list(itertools.product(*(range(SIZES[axis]) for axis in summed)))
    for each in partial_coordinates[1:]:
        addends[each] = torch.randint(-9, 9, full.shape, generator=rng).to(full.dtype)
    addends[partial_coordinates[0]] = full - sum(addends.values(), torch.zeros(()))
    return {
        rank: local_shard(addends[tuple(place[axis] for axis in summed)], placements, SIZES, place).contiguous()
        for rank, place in COORDINATES.items()
    }


def random_placements(seed: int) -> tuple[Placements, Placements]:
    """A legal pair of placements; Partial targets are Partial in the source too (else ranks run different programs)."""
    rng = random.Random(seed)
    while True:
        source, target = (tuple(rng.choice(CHOICES) for _ in SIZES) for _ in range(2))
        sums = all(new != PARTIAL or old == PARTIAL for old, new in zip(source, target, strict=True))
        if sums and source != target and all(is_legal(SHAPE, one, SIZES) for one in (source, target)):
            return source, target


def check(groups: dict[tuple[int, ...], str], seed: int) -> None:
    source, target = random_placements(seed)
    rng = torch.Generator().manual_seed(seed)
    full = torch.randint(-99, 99, SHAPE, generator=rng).float()
    with LocalTensorMode(len(COORDINATES)):
        place = tuple(
            torch.SymInt(LocalIntNode({rank: one[axis] for rank, one in COORDINATES.items()})) for axis in range(3)
        )
        mesh = RankMesh(names=NAMES, sizes=SIZES, first_rank=0, coordinate=place, group_names=groups)
        redistributed = redistribute(LocalTensor(shards(full, source, rng)), SHAPE, source, target, mesh)
    for one in COORDINATES.values():
        mates = [
            other
            for other, their in COORDINATES.items()
            if all(placement == PARTIAL or mine == at for placement, mine, at in zip(target, one, their, strict=True))
        ]
        value = sum((redistributed._local_tensors[mate] for mate in mates), torch.zeros(()))
        assert torch.equal(value, local_shard(full, target, SIZES, one))


@pytest.mark.parametrize("seed", range(1))
def test_every_rank_of_32_gets_its_shard(groups, seed):
    check(groups, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 40))
def test_every_rank_of_32_gets_its_shard_whatever_the_placements(groups, seed):
    check(groups, seed)
