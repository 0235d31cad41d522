"""Interval arithmetic over tensors (to recognise causal masks): boxes of positions in a tensor, and bounds of the elements
in them; many boxes at once, as entries of tensors.

Example: the 4 x 4 comparison ``column <= row`` over the boxes (rows 2..3, columns 0..1) and (rows 0..1, columns 0..1)
has the bounds low = [True, False], high = [True, True]: all of the first box is True, the second is mixed.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


class Undecided(Exception):  # noqa: N818  # a result, not an error: this folder returns it as None
    """A tensor whose bounds are unknown: an op without a rule, or more boxes than are worth the time."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Span:
    """First and last position along a dim of each box: int64 of shape (boxes,), or (1,) where all boxes agree."""

    first: Tensor
    last: Tensor

    @property
    def single(self) -> bool:
        """Whether the span of every box is known to be a single position."""
        return self.first is self.last


Box: TypeAlias = tuple[Span, ...]  # a span for every dim of the tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bounds:
    """Lower and upper bounds of the elements in each box: in the tensor's dtype, of a shape that broadcasts to one entry
    per box; of shape () exactly for tensors without dims. NaN in either: nothing is known, the elements may be NaN."""

    low: Tensor
    high: Tensor

    @property
    def exact(self) -> bool:
        """Whether the elements of every box are known to be all equal."""
        return self.low is self.high


def exactly(element: Tensor) -> Bounds:
    """Bounds of boxes whose elements all equal ``element``."""
    return Bounds(low=element, high=element)


def position(index: int) -> Span:
    """The span of the single position ``index``, in all boxes."""
    tensor = torch.tensor([index])
    return Span(first=tensor, last=tensor)


def choose(inside: Tensor, outside: Tensor, one: Bounds, other: Bounds) -> Bounds:
    """Bounds of a tensor that has the elements of ``one`` inside a region and those of ``other`` outside of it.
    ``inside`` and ``outside``, bool (boxes,), say which boxes are entirely inside or outside; others have both."""
    if one.exact and other.exact and bool((inside | outside).all()):
        return exactly(torch.where(inside, one.low, other.low))
    low = torch.where(outside, other.low, torch.minimum(one.low, other.low))
    high = torch.where(outside, other.high, torch.maximum(one.high, other.high))
    return Bounds(low=torch.where(inside, one.low, low), high=torch.where(inside, one.high, high))


def widened(bounds: Bounds, unknown: Tensor) -> Bounds:
    """``bounds``, but the full range of the dtype for the boxes that are ``unknown``, bool (boxes,)."""
    low, high = _everything(bounds.low.dtype)
    return Bounds(low=torch.where(unknown, low, bounds.low), high=torch.where(unknown, high, bounds.high))


def _everything(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Bounds that hold for all elements of a dtype: NaN for floating-point ones."""
    if dtype == torch.bool:
        return torch.tensor(False), torch.tensor(True)
    if dtype.is_floating_point:
        return torch.tensor(torch.nan, dtype=dtype), torch.tensor(torch.nan, dtype=dtype)
    limits = torch.iinfo(dtype)
    return torch.tensor(limits.min, dtype=dtype), torch.tensor(limits.max, dtype=dtype)
