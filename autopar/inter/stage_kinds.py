"""Stages with the same count of each kind of block, of which the prices are made once.

A *column* is a kind of block with the parameters that an earlier block of its stage stores; a *type* of stage counts
its blocks by column.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.graph.ir import Block

BlockVariant = tuple[int, frozenset[int]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageKinds:
    """``type_of[first, end]`` is the type of the stage of blocks first..end-1 (-1 where there is none),
    ``counts[type, column]`` its blocks, ``stage_of[type]`` one of its stages."""

    variants: tuple[BlockVariant, ...]
    kind_of: NDArray[np.integer]
    num_blocks: NDArray[np.float64]
    example_of: dict[int, tuple[int, int]]


def count_stage_kinds(blocks: Sequence[Block], stored_elsewhere: Callable[[Block, int], frozenset[int]]) -> StageKinds:
    """The types of all stages; ``held``: parameters of a block that earlier blocks, from one on, store."""
    column_at: dict[BlockVariant, int] = {}
    types: dict[tuple[int, ...], int] = {}
    stage_of: dict[int, tuple[int, int]] = {}
    count = len(blocks)
    type_of = np.full((count + 1, count + 1), -1)
    for first in range(count):
        counts: dict[int, int] = {}
        for end in range(first + 1, count + 1):
            block = blocks[end - 1]
            column = column_at.setdefault((block.kind, stored_elsewhere(block, first)), len(column_at))
            counts[column] = counts.get(column, 0) + 1
            key = tuple(sorted((column << 16) + number for column, number in counts.items()))
            type_of[first, end] = types.setdefault(key, len(types))
            stage_of.setdefault(int(type_of[first, end]), (first, end))
    found = np.zeros((len(types), len(column_at)))
    for key, row in types.items():
        for packed in key:
            found[row, packed >> 16] = packed & 0xFFFF
    return StageKinds(variants=tuple(column_at), kind_of=type_of, num_blocks=found, example_of=stage_of)
