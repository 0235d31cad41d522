"""Views: the position in its source of each element of a view.

A view is its source's storage with other strides. If the source is contiguous, the view's offset and strides, written in
the mixed radix of the source's sizes, give the source's positions as sums of multiples of the view's positions; so one
rule covers every op that returns a view. It is valid where no such sum passes the end of a dim (in a ``flatten`` one
does).

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

# Ops that return views, or their input itself, though their schema does not say so.
_UNDECLARED_VIEWS = frozenset(("_unsafe_view", "meshgrid", "broadcast_tensors"))


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The source's position along dim d is ``offsets[d]`` + the sum over (dim, factor) in ``sums[d]`` of factor * the
    view's position along dim."""

    source: fx.Node
    offsets: tuple[int, ...]
    sums: tuple[tuple[tuple[int, int], ...], ...]

    def box_of_source(self, box: Box) -> Box:
        """The box of the source that has the elements of a box of the view."""
        return tuple(_span(box, offset, parts) for offset, parts in zip(self.offsets, self.sums, strict=True))


def view_of(call: Call, part: int | None, tensors: Callable[[fx.Node], Tensor]) -> View | None:
    """The view that a call returns (as its result number ``part``, if it has several), or None where it returns none
    that ``View`` can describe; ``tensors`` gives a contiguous tensor of a node's shape and dtype, which may be a meta
    tensor."""
    schema = getattr(call.target, "_schema", None)
    if schema is None or schema.is_mutable:
        return None
    if call.packet not in _UNDECLARED_VIEWS and not any(result.alias_info is not None for result in schema.returns):
        return None
    sources: dict[fx.Node, Tensor] = {}

    def tensor(node: fx.Node) -> Tensor:
        return sources.setdefault(node, tensors(node))

    args, values = (with_tensors(arguments, tensor) for arguments in (call.args, list(call.kwargs.values())))
    result = call.target(*args, **dict(zip(call.kwargs, values, strict=True)))
    view = result if part is None else result[part]
    for node, source in sources.items():
        if storage_key(source) == storage_key(view) and source.dtype == view.dtype:
            return _view(node, source, view)
    return None


def _view(node: fx.Node, source: Tensor, view: Tensor) -> View | None:
    """``view`` as a view of ``source``, the tensor of ``node``; None where a sum passes the end of a dim."""
    sums: list[list[tuple[int, int]]] = [[] for _ in source.shape]
    offsets = _digits(int(view.storage_offset()), source)
    largest = list(offsets)
    for dim, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True)):
        if size == 1:
            continue
        for source_dim, factor in enumerate(_digits(stride, source)):
            if factor:
                sums[source_dim].append((dim, factor))
                largest[source_dim] += factor * (size - 1)
    if any(last >= size for last, size in zip(largest, source.shape, strict=True)):
        return None
    return View(source=node, offsets=tuple(offsets), sums=tuple(map(tuple, sums)))


def _digits(elements: int, source: Tensor) -> list[int]:
    """A distance of ``elements`` in a contiguous tensor's storage as a distance along each of its dims."""
    digits = []
    for dim, size in enumerate(source.shape):
        step = prod(source.shape[dim + 1 :])
        digits.append(elements // step if size > 1 else 0)
        elements -= digits[-1] * step
    return digits


def _span(box: Box, offset: int, parts: tuple[tuple[int, int], ...]) -> Span:
    """The span along one dim of the source; ``parts`` are that dim's entry of ``View.sums``."""
    if not parts:
        return position(offset)
    if not offset and len(parts) == 1 and parts[0][1] == 1:
        return box[parts[0][0]]
    first = sum((factor * box[dim].first for dim, factor in parts), torch.tensor([offset]))
    if all(box[dim].single for dim, _ in parts):
        return Span(first=first, last=first)
    return Span(first=first, last=sum((factor * box[dim].last for dim, factor in parts), torch.tensor([offset])))
