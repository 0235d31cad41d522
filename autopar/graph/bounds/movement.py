"""Bounds of ops that fill, rearrange, repeat, join or select elements: which elements of its sources a box has.

A rule takes the call, a box of its result and ``Sources``, which gives the bounds of a source over a box of that source,
and returns the bounds of the result. It raises Undecided for arguments that it does not cover.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from autopar.graph.bounds.boxes import Bounds, Box, Span, Undecided, choose, exactly, position
from autopar.graph.bounds.constants import Call
from autopar.graph.bounds.pointwise import cast


class Sources(Protocol):
    """The tensors that a call reads."""

    def over(self, node: fx.Node, box: Box) -> Bounds:
        """Bounds of a source over a box of it."""

    def broadcast(self, node: fx.Node, box: Box) -> Bounds:
        """Bounds of a source over a box of a tensor to which it is broadcast."""

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Sizes of a source."""


def _filled(call: Call, box: Box, sources: Sources) -> Bounds:
    """``ones``, ``zeros``, ``full`` and the like: one number everywhere."""
    fills = {"ones": 1, "ones_like": 1, "new_ones": 1, "zeros": 0, "zeros_like": 0, "new_zeros": 0, "zero": 0}
    if call.packet in fills:
        fill: Any = fills[call.packet]
    elif call.packet == "new_full":
        fill = call.argument(2, "fill_value")
    else:
        fill = call.argument(1, "value" if call.packet == "fill" else "fill_value")
    assert call.dtype is not None
    if isinstance(fill, fx.Node):
        return cast(sources.over(fill, ()), call.dtype)
    return exactly(torch.full((1,), fill, dtype=call.dtype))


def _copied(call: Call, box: Box, sources: Sources) -> Bounds:
    """``copy(destination, source)``, the functional variant of ``destination.copy_(source)``."""
    assert call.dtype is not None
    return cast(sources.broadcast(call.args[1], box), call.dtype)


def _triangle(call: Call, box: Box, sources: Sources) -> Bounds:
    """The source on and below (``tril``) or above (``triu``) the diagonal, zero elsewhere."""
    rows, columns = box[-2:]
    smallest, largest = columns.first - rows.last, columns.last - rows.first  # of column - row
    diagonal = call.argument(1, "diagonal", 0)
    if call.packet == "tril":
        inside, outside = largest <= diagonal, smallest > diagonal
    else:
        inside, outside = smallest >= diagonal, largest < diagonal
    source = sources.over(call.args[0], box)
    return choose(inside, outside, source, exactly(torch.zeros((), dtype=source.low.dtype)))


def _identity(call: Call, box: Box, sources: Sources) -> Bounds:
    """``eye``: one on the diagonal, zero elsewhere."""
    rows, columns = box
    on = (rows.first == columns.last) & (rows.last == columns.first)
    off = (columns.first > rows.last) | (columns.last < rows.first)
    one, zero = (exactly(torch.full((1,), fill, dtype=call.dtype)) for fill in (1, 0))
    return choose(on, off, one, zero)


def _padded(call: Call, box: Box, sources: Sources) -> Bounds:
    """``pad`` with a constant; ``pads`` are the elements added before and after each dim, the last dim first."""
    source, pads = call.args[:2]
    if call.packet == "pad" and call.argument(2, "mode", "constant") != "constant":
        raise Undecided("padding by other than a constant")
    fill = call.argument(3 if call.packet == "pad" else 2, "value") or 0
    spans = list(box)
    inside, outside = torch.tensor([True]), torch.tensor([False])
    for index in range(len(pads) // 2):
        dim = len(box) - 1 - index
        inside_dim, outside_dim, spans[dim] = _part(box[dim], pads[2 * index], sources.shape(source)[dim])
        inside, outside = inside & inside_dim, outside | outside_dim
    if min(pads) < 0:
        raise Undecided("padding that removes elements")
    padding = exactly(torch.full((1,), fill, dtype=call.dtype))
    return choose(inside, outside, sources.over(source, tuple(spans)), padding)


def _flipped(call: Call, box: Box, sources: Sources) -> Bounds:
    """``flip``: positions along some dims in reverse."""
    spans = list(box)
    for dim in call.args[1]:
        final, span = call.shape[dim] - 1, box[dim]
        spans[dim] = Span(first=final - span.last, last=final - span.first)
    return sources.over(call.args[0], tuple(spans))


def _repeated(call: Call, box: Box, sources: Sources) -> Bounds:
    """``x.repeat(n, m)``: copies of the source one after another along each dim."""
    shape = sources.shape(call.args[0])
    spans = box[len(box) - len(shape) :]
    return sources.over(call.args[0], tuple(_modulo(span, size) for span, size in zip(spans, shape, strict=True)))


def _modulo(span: Span, size: int) -> Span:
    """The positions of a span modulo ``size``: all of 0 .. size - 1 where it is in more than one copy."""
    if size == 1:
        return position(0)
    single = span.first // size == span.last // size
    return Span(first=torch.where(single, span.first % size, 0), last=torch.where(single, span.last % size, size - 1))


def _repeated_each(call: Call, box: Box, sources: Sources) -> Bounds:
    """``x.repeat_interleave(n, dim)``: every element n times in a row."""
    repeats, dim = call.args[1], call.argument(2, "dim")
    if type(repeats) is not int or dim is None:
        raise Undecided("repeat_interleave by a tensor, or without a dim")
    spans = list(box)
    spans[dim] = Span(first=spans[dim].first // repeats, last=spans[dim].last // repeats)
    return sources.over(call.args[0], tuple(spans))


def _joined(call: Call, box: Box, sources: Sources) -> Bounds:
    """``cat``, and ``stack``, which joins along a new dim in which every piece has size 1."""
    dim = call.argument(1, "dim", 0) % len(call.shape)
    is_stack = call.packet == "stack"
    pieces = [piece for piece in call.args[0] if is_stack or sources.shape(piece) != (0,)]
    joined: Bounds | None = None
    start = 0
    for piece in pieces:
        size = 1 if is_stack else sources.shape(piece)[dim]
        inside, outside, local = _part(box[dim], start, size)
        spans = list(box)
        spans[dim : dim + 1] = [] if is_stack else [local]
        bounds = sources.over(piece, tuple(spans))
        joined = bounds if joined is None else choose(inside, outside, bounds, joined)
        start += size
    if joined is None:
        raise Undecided("nothing to join")
    return joined


def _scattered(call: Call, box: Box, sources: Sources) -> Bounds:
    """``slice_scatter`` and ``select_scatter``, the functional variants of ``x[:, a:b] = y`` and ``x[:, a] = y``."""
    into, source = call.args[:2]
    dim = call.argument(2, "dim", 0) % len(call.shape)
    spans = list(box)
    if call.packet == "select_scatter":
        index = call.argument(3, "index") % call.shape[dim]
        inside, outside, _ = _part(box[dim], index, 1)
        del spans[dim]
    else:
        if call.argument(5, "step", 1) != 1:
            raise Undecided("slice_scatter with a step")
        start = slice(call.argument(3, "start"), None).indices(call.shape[dim])[0]
        inside, outside, spans[dim] = _part(box[dim], start, sources.shape(source)[dim])
    return choose(inside, outside, sources.over(source, tuple(spans)), sources.over(into, box))


def _part(span: Span, start: int, size: int) -> tuple[Tensor, Tensor, Span]:
    """Which spans are entirely inside ``start <= position < start + size``, which are entirely outside, and their
    positions relative to ``start``, clamped to this part."""
    inside = (span.first >= start) & (span.last < start + size)
    outside = (span.last < start) | (span.first >= start + size)
    first, last = ((end - start).clamp(0, size - 1) for end in (span.first, span.last))
    return inside, outside, Span(first=first, last=last)


def _indexed(call: Call, box: Box, sources: Sources) -> Bounds:
    """``x[i, :, j]`` with integer tensors: the dims to which these broadcast replace the indexed dims if those are
    adjacent, else they come first."""
    source, index_per_dim = call.args
    shape = sources.shape(source)
    indices: dict[int, fx.Node] = {dim: index for dim, index in enumerate(index_per_dim) if index is not None}
    if any(index.meta["val"].dtype in (torch.bool, torch.uint8) for index in indices.values()):
        raise Undecided("indexing by a mask")
    num_dims = max(len(sources.shape(index)) for index in indices.values())
    are_adjacent = max(indices) - min(indices) == len(indices) - 1
    start = min(indices) if are_adjacent else 0
    looked_up = box[start : start + num_dims]
    others = iter((*box[:start], *box[start + num_dims :]))
    return sources.over(
        source,
        tuple(
            _looked_up(sources.broadcast(indices[dim], looked_up), size) if dim in indices else next(others)
            for dim, size in enumerate(shape)
        ),
    )


def _index_selected(call: Call, box: Box, sources: Sources) -> Bounds:
    """``index_select``: positions along one dim by a vector of indices."""
    source, dim, index = call.args
    dim %= len(sources.shape(source))
    spans = list(box)
    spans[dim] = _looked_up(sources.over(index, (box[dim],)), sources.shape(source)[dim])
    return sources.over(source, tuple(spans))


def _looked_up(index: Bounds, size: int) -> Span:
    """The positions along a dim of ``size`` that indices within bounds stand for; negative ones count from its end."""
    low, high = index.low.long(), index.high.long()
    are_negative = high < 0
    first, last = torch.where(are_negative, low + size, low), torch.where(are_negative, high + size, high)
    unknown = (first < 0) | (last >= size)
    first, last = torch.where(unknown, 0, first), torch.where(unknown, size - 1, last)
    return Span(first=torch.atleast_1d(first), last=torch.atleast_1d(last))


def _any_or_all(call: Call, box: Box, sources: Sources) -> Bounds:
    """``any`` and ``all`` along a dim, from the bounds of parts of the dim, until these decide it."""
    source, dim = call.args[0], call.argument(1, "dim")
    shape = sources.shape(source)
    if type(dim) is not int:
        raise Undecided("a reduction of several dims")
    dim %= len(shape)
    spans = list(box) if call.argument(2, "keepdim", False) else [*box[:dim], position(0), *box[dim:]]
    is_any = call.packet == "any"
    total: Bounds | None = None
    for first, last in _from_both_ends(shape[dim]):
        spans[dim] = Span(first=torch.tensor([first]), last=torch.tensor([last]))
        part = cast(sources.over(source, tuple(spans)), torch.bool)
        if total is None:
            total = part
        elif is_any:
            total = Bounds(low=total.low | part.low, high=total.high | part.high)
        else:
            total = Bounds(low=total.low & part.low, high=total.high & part.high)
        if bool(total.low.all() if is_any else ~total.high.any()):
            total = exactly(torch.full_like(total.low, is_any))
            break
    if total is None or call.dtype is None:
        raise Undecided("a reduction of nothing")
    return cast(total, call.dtype)


def _from_both_ends(size: int) -> Iterable[tuple[int, int]]:
    """Parts (first, last) of the positions 0 .. size - 1, alternately from the start and from the end, that double in
    length.

    >>> list(_from_both_ends(8))
    [(0, 0), (7, 7), (1, 2), (5, 6), (3, 4)]
    """
    start, end, length = 0, size, 1
    while start < end:
        length = min(length, end - start)
        yield start, start + length - 1
        start += length
        length = min(length, end - start)
        if length:
            yield end - length, end - 1
        end -= length
        length *= 2


RULES: dict[str, Callable[[Call, Box, Sources], Bounds]] = {
    **dict.fromkeys(("ones", "ones_like", "new_ones", "zeros", "zeros_like", "new_zeros", "zero"), _filled),
    **dict.fromkeys(("full", "full_like", "new_full", "fill"), _filled),
    "copy": _copied,
    "tril": _triangle,
    "triu": _triangle,
    "eye": _identity,
    "pad": _padded,
    "constant_pad_nd": _padded,
    "flip": _flipped,
    "repeat": _repeated,
    "tile": _repeated,
    "repeat_interleave": _repeated_each,
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), _joined),
    "slice_scatter": _scattered,
    "select_scatter": _scattered,
    "index": _indexed,
    "index_select": _index_selected,
    "any": _any_or_all,
    "all": _any_or_all,
}
