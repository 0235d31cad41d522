"""Kinds of stages: stages with the same number of blocks of each variant cost the same and are priced once.

A *variant* of a block is its kind together with those of its parameters that an earlier block of its stage stores; a
*kind* of stage is the number of its blocks of each variant.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.graph.ir import Block

BlockVariant = tuple[int, frozenset[int]]
"""A block's kind, and its parameters (values) that an earlier block of the stage stores."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageKinds:
    """``kind_of[i, j]`` (L + 1, L + 1) is the kind of the stage of blocks i..j-1, -1 where j <= i;
    ``num_blocks[kind, variant]`` its blocks of each of ``variants``; ``example_of[kind]`` the first such (i, j)."""

    variants: tuple[BlockVariant, ...]
    kind_of: NDArray[np.integer]
    num_blocks: NDArray[np.float64]
    example_of: dict[int, tuple[int, int]]


def count_stage_kinds(blocks: Sequence[Block], stored_elsewhere: Callable[[Block, int], frozenset[int]]) -> StageKinds:
    """The kinds of all stages. ``stored_elsewhere(block, first_block)``: the parameters of a block that earlier blocks
    of a stage beginning at ``first_block`` store."""
    variants: dict[BlockVariant, int] = {}
    kinds: dict[tuple[int, ...], int] = {}
    example_of: dict[int, tuple[int, int]] = {}
    kind_of = np.full((len(blocks) + 1, len(blocks) + 1), -1)
    for first in range(len(blocks)):
        counts: dict[int, int] = {}
        for end in range(first + 1, len(blocks) + 1):
            block = blocks[end - 1]
            variant = variants.setdefault((block.kind, stored_elsewhere(block, first)), len(variants))
            counts[variant] = counts.get(variant, 0) + 1
            key = tuple(sorted((variant << 16) + count for variant, count in counts.items()))  # packed: hashes faster
            kind_of[first, end] = kinds.setdefault(key, len(kinds))
            example_of.setdefault(int(kind_of[first, end]), (first, end))
    num_blocks = np.zeros((len(kinds), len(variants)))
    for key, kind in kinds.items():
        for packed in key:
            num_blocks[kind, packed >> 16] = packed & 0xFFFF
    return StageKinds(variants=tuple(variants), kind_of=kind_of, num_blocks=num_blocks, example_of=example_of)
