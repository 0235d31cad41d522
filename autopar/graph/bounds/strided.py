"""Views: which element of its source an element of a view is.

A view is its source's memory under other strides. Of a contiguous source, the view's offset and strides, written in the
mixed radix of the source's sizes, are the source's positions as sums of multiples of the view's positions; so one rule
covers every op that returns a view. It holds where no such sum passes the end of a dim (a ``flatten`` does).

Example: ``x[:, 2:].diagonal()`` of a 5 x 5 tensor has offset 2 and stride 6: row = i, column = 2 + i.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx

from autopar.graph.bounds.boxes import Box, Span, position
from autopar.graph.bounds.constants import Call, with_tensors
from autopar.graph.kernel_recorder import storage_key

# Ops that return views, or their input as it is, though their schema does not say so.
_UNSAID = frozenset(("_unsafe_view", "meshgrid", "broadcast_tensors"))


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Position d of the source is ``offsets[d]`` and, for each (dim, factor) of ``sums[d]``, the view's position along
    dim, factor times."""

    source: fx.Node
    offsets: tuple[int, ...]
    sums: tuple[tuple[tuple[int, int], ...], ...]

    def box_of_source(self, box: Box) -> Box:
        """The box of the source in which the elements of the view's box are."""
        return tuple(_span(box, offset, parts) for offset, parts in zip(self.offsets, self.sums, strict=True))


def view_of(call: Call, part: int | None, tensors: Callable[[fx.Node], Tensor]) -> View | None:
    """The view that a call returns (its result number ``part``, of several), or None where it is none; ``tensors``
    gives a contiguous tensor of the size of a node, of which neither elements nor memory are needed (``meta``)."""
    schema = getattr(call.target, "_schema", None)
    if schema is None or schema.is_mutable:
        return None
    if call.packet not in _UNSAID and not any(result.alias_info is not None for result in schema.returns):
        return None
    given: dict[fx.Node, Tensor] = {}

    def tensor(node: fx.Node) -> Tensor:
        return given.setdefault(node, tensors(node))

    args, values = (with_tensors(arguments, tensor) for arguments in (call.args, list(call.kwargs.values())))
    result = call.target(*args, **dict(zip(call.kwargs, values, strict=True)))
    view = result if part is None else result[part]
    for node, source in given.items():
        if storage_key(source) == storage_key(view) and source.dtype == view.dtype:
            return _view(node, source, view)
    return None


def _view(node: fx.Node, source: Tensor, view: Tensor) -> View | None:
    sums: list[list[tuple[int, int]]] = [[] for _ in source.shape]
    offsets = _digits(int(view.storage_offset()), source)
    greatest = list(offsets)
    for dim, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True)):
        if size == 1:
            continue
        for at, factor in enumerate(_digits(stride, source)):
            if factor:
                sums[at].append((dim, factor))
                greatest[at] += factor * (size - 1)
    if any(last >= size for last, size in zip(greatest, source.shape, strict=True)):
        return None
    return View(source=node, offsets=tuple(offsets), sums=tuple(map(tuple, sums)))


def _digits(elements: int, source: Tensor) -> list[int]:
    """A distance in a contiguous tensor's memory as a distance along each dim."""
    digits = []
    for dim, size in enumerate(source.shape):
        step = prod(source.shape[dim + 1 :])
        digits.append(elements // step if size > 1 else 0)
        elements -= digits[-1] * step
    return digits


def _span(box: Box, offset: int, parts: tuple[tuple[int, int], ...]) -> Span:
    if not parts:
        return position(offset)
    if not offset and len(parts) == 1 and parts[0][1] == 1:
        return box[parts[0][0]]
    first = sum((factor * box[dim].first for dim, factor in parts), torch.tensor([offset]))
    if all(box[dim].single for dim, _ in parts):
        return Span(first=first, last=first)
    return Span(first=first, last=sum((factor * box[dim].last for dim, factor in parts), torch.tensor([offset])))
