"""The least and greatest elements of a tensor over boxes of its positions.

Level k of the pyramid has the least and the greatest element of every aligned block of 2^k positions along each dim. A
box of n positions along a dim is inside at most two adjacent blocks of the first level with 2^k >= n, so a look-up reads
two blocks per dim; it is exact for single elements and for aligned blocks.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import product

import torch
from torch import Tensor

from autopar.graph.bounds.boxes import Bounds, Box, exactly


class Pyramid:
    """``tensor`` and its levels, made as they are needed; the levels take at most twice the memory of the tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self._dims = [dim for dim, size in enumerate(tensor.shape) if size > 1]
        squeezed = tensor.reshape([tensor.shape[dim] for dim in self._dims] or ([1] if tensor.dim() else []))
        self._levels = [exactly(squeezed)]

    def over(self, box: Box) -> Bounds:
        """Bounds of the tensor's elements in every box."""
        if not self._dims:
            return self._levels[0]
        spans = [box[dim] for dim in self._dims]
        if all(span.single for span in spans):
            return self._at(0, *2 * (torch.broadcast_tensors(*(span.first for span in spans)),))
        ends = torch.broadcast_tensors(*(end for span in spans for end in (span.first, span.last)))
        firsts, lasts = ends[::2], ends[1::2]
        lengths = reduce(torch.maximum, (last - first for first, last in zip(firsts, lasts, strict=True)))
        levels = range(int(lengths.min()).bit_length(), int(lengths.max()).bit_length() + 1)
        if len(levels) == 1:
            return self._at(levels[0], firsts, lasts)
        low = torch.empty_like(lengths, dtype=self._levels[0].low.dtype)
        high = low.clone()
        for level in levels:
            at_level = (lengths < 1 << level) & (lengths >= (1 << level) // 2)
            bounds = self._at(level, [first[at_level] for first in firsts], [last[at_level] for last in lasts])
            low[at_level], high[at_level] = bounds.low, bounds.high
        return Bounds(low=low, high=high)

    def _at(self, level: int, firsts: Sequence[Tensor], lasts: Sequence[Tensor]) -> Bounds:
        """Bounds of boxes of at most 2^level positions per dim, from their first and last positions along each dim."""
        if not level:
            return exactly(self._levels[0].low[tuple(firsts)])
        blocks = self._level(level)
        ends = [(first >> level, last >> level) for first, last in zip(firsts, lasts, strict=True)]
        low = high = None
        for corner in product(*ends):
            least, greatest = blocks.low[corner], blocks.high[corner]
            low = least if low is None else torch.minimum(low, least)
            high = greatest if high is None else torch.maximum(high, greatest)
        assert low is not None
        assert high is not None
        return Bounds(low=low, high=high)

    def _level(self, level: int) -> Bounds:
        """The least and greatest elements of the blocks of a level."""
        while len(self._levels) <= level:
            below = self._levels[-1]
            low, high = _halved(below.low, torch.minimum), _halved(below.high, torch.maximum)
            self._levels.append(Bounds(low=low, high=high))
        return self._levels[level]


def _halved(tensor: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Pairs of neighbours combined along every dim; a last one without a neighbour stays as it is."""
    for dim, size in enumerate(tensor.shape):
        even, odd = (tensor.index_select(dim, torch.arange(start, size, 2)) for start in (0, 1))
        if size % 2:
            odd = torch.cat((odd, even.narrow(dim, -1, 1)), dim)
        tensor = combine(even, odd)
    return tensor
