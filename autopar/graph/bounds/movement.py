"""Bounds of ops that fill, move, repeat, join or select elements: which elements of its sources a box has.

A rule takes the call, the box of its result and ``Sources``, which gives the bounds of a source over a box of its own.
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
        """Bounds of a source over a box of its positions."""

    def broadcast(self, node: fx.Node, box: Box) -> Bounds:
        """Bounds of a source over a box of a tensor that it is broadcast to."""

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Sizes of a source."""


def _filled(call: Call, box: Box, sources: Sources) -> Bounds:
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
    """``copy(destination, source)``, what is left of ``destination.copy_(source)``."""
    assert call.dtype is not None
    return cast(sources.broadcast(call.args[1], box), call.dtype)


def _triangle(call: Call, box: Box, sources: Sources) -> Bounds:
    """The source on and below (``tril``) or above (``triu``) the diagonal, zero elsewhere."""
    rows, columns = box[-2:]
    least, greatest = columns.first - rows.last, columns.last - rows.first  # of column - row
    diagonal = call.argument(1, "diagonal", 0)
    if call.packet == "tril":
        inside, outside = greatest <= diagonal, least > diagonal
    else:
        inside, outside = least >= diagonal, greatest < diagonal
    source = sources.over(call.args[0], box)
    return choose(inside, outside, source, exactly(torch.zeros((), dtype=source.low.dtype)))


def _identity(call: Call, box: Box, sources: Sources) -> Bounds:
    """``eye``: one on the diagonal."""
    rows, columns = box
    on = (rows.first == columns.last) & (rows.last == columns.first)
    off = (columns.first > rows.last) | (columns.last < rows.first)
    one, zero = (exactly(torch.full((1,), fill, dtype=call.dtype)) for fill in (1, 0))
    return choose(on, off, one, zero)


def _padded(call: Call, box: Box, sources: Sources) -> Bounds:
    """``pad`` with a constant: pairs of elements before and after each dim, the last dim first."""
    source, pads = call.args[:2]
    if call.packet == "pad" and call.argument(2, "mode", "constant") != "constant":
        raise Undecided("padding that is no constant")
    fill = call.argument(3 if call.packet == "pad" else 2, "value") or 0
    spans = list(box)
    inside, outside = torch.tensor([True]), torch.tensor([False])
    for at in range(len(pads) // 2):
        dim = len(box) - 1 - at
        within, without, spans[dim] = _part(box[dim], pads[2 * at], sources.shape(source)[dim])
        inside, outside = inside & within, outside | without
    if min(pads) < 0:
        raise Undecided("padding that removes elements")
    padding = exactly(torch.full((1,), fill, dtype=call.dtype))
    return choose(inside, outside, sources.over(source, tuple(spans)), padding)


def _flipped(call: Call, box: Box, sources: Sources) -> Bounds:
    spans = list(box)
    for dim in call.args[1]:
        end, span = call.shape[dim] - 1, box[dim]
        spans[dim] = Span(first=end - span.last, last=end - span.first)
    return sources.over(call.args[0], tuple(spans))


def _repeated(call: Call, box: Box, sources: Sources) -> Bounds:
    """``x.repeat(n, m)``: copies of the source side by side."""
    shape = sources.shape(call.args[0])
    spans = box[len(box) - len(shape) :]
    return sources.over(call.args[0], tuple(_within(span, size) for span, size in zip(spans, shape, strict=True)))


def _within(span: Span, size: int) -> Span:
    """Positions modulo ``size``: all of them where the span is in more than one copy."""
    if size == 1:
        return position(0)
    one = span.first // size == span.last // size
    return Span(first=torch.where(one, span.first % size, 0), last=torch.where(one, span.last % size, size - 1))


def _repeated_each(call: Call, box: Box, sources: Sources) -> Bounds:
    """``x.repeat_interleave(n, dim)``: every element n times."""
    repeats, dim = call.args[1], call.argument(2, "dim")
    if type(repeats) is not int or dim is None:
        raise Undecided("repeat_interleave by a tensor, or of a flattened one")
    spans = list(box)
    spans[dim] = Span(first=spans[dim].first // repeats, last=spans[dim].last // repeats)
    return sources.over(call.args[0], tuple(spans))


def _joined(call: Call, box: Box, sources: Sources) -> Bounds:
    """``cat`` and, each along a new dim of size 1, ``stack``."""
    dim = call.argument(1, "dim", 0) % len(call.shape)
    stacked = call.packet == "stack"
    pieces = [piece for piece in call.args[0] if stacked or sources.shape(piece) != (0,)]
    found: Bounds | None = None
    start = 0
    for piece in pieces:
        size = 1 if stacked else sources.shape(piece)[dim]
        inside, outside, local = _part(box[dim], start, size)
        spans = list(box)
        spans[dim : dim + 1] = [] if stacked else [local]
        bounds = sources.over(piece, tuple(spans))
        found = bounds if found is None else choose(inside, outside, bounds, found)
        start += size
    if found is None:
        raise Undecided("nothing to join")
    return found


def _scattered(call: Call, box: Box, sources: Sources) -> Bounds:
    """``slice_scatter`` and ``select_scatter``: what is left of ``x[:, a:b] = y`` and ``x[:, a] = y``."""
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
    """Where a span is inside and outside of ``start <= position < start + size``, and its positions from there."""
    inside = (span.first >= start) & (span.last < start + size)
    outside = (span.last < start) | (span.first >= start + size)
    ends = ((end - start).clamp(0, size - 1) for end in (span.first, span.last))
    return inside, outside, Span(first=next(ends), last=next(ends))


def _indexed(call: Call, box: Box, sources: Sources) -> Bounds:
    """``x[i, :, j]`` with integer tensors: their broadcast dims stand in the place of the indexed ones if these are
    neighbours, else first."""
    source, given = call.args
    shape = sources.shape(source)
    indices: dict[int, fx.Node] = {dim: index for dim, index in enumerate(given) if index is not None}
    if any(index.meta["val"].dtype in (torch.bool, torch.uint8) for index in indices.values()):
        raise Undecided("indexing by a mask")
    num_dims = max(len(sources.shape(index)) for index in indices.values())
    neighbours = max(indices) - min(indices) == len(indices) - 1
    start = min(indices) if neighbours else 0
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
    source, dim, index = call.args
    dim %= len(sources.shape(source))
    spans = list(box)
    spans[dim] = _looked_up(sources.over(index, (box[dim],)), sources.shape(source)[dim])
    return sources.over(source, tuple(spans))


def _looked_up(index: Bounds, size: int) -> Span:
    """Positions of a dim of ``size`` that indices within bounds mean; negative ones count from its end."""
    low, high = index.low.long(), index.high.long()
    turned = high < 0
    first, last = torch.where(turned, low + size, low), torch.where(turned, high + size, high)
    unsure = (first < 0) | (last >= size)
    first, last = torch.where(unsure, 0, first), torch.where(unsure, size - 1, last)
    return Span(first=torch.atleast_1d(first), last=torch.atleast_1d(last))


def _any_or_all(call: Call, box: Box, sources: Sources) -> Bounds:
    """Whether any, or all, elements along a dim are true, from bounds of parts that double in length from either end."""
    source, dim = call.args[0], call.argument(1, "dim")
    shape = sources.shape(source)
    if type(dim) is not int:
        raise Undecided("a reduction of several dims")
    dim %= len(shape)
    spans = list(box) if call.argument(2, "keepdim", False) else [*box[:dim], position(0), *box[dim:]]
    is_any = call.packet == "any"
    found: Bounds | None = None
    for first, last in _from_both_ends(shape[dim]):
        spans[dim] = Span(first=torch.tensor([first]), last=torch.tensor([last]))
        part = cast(sources.over(source, tuple(spans)), torch.bool)
        if found is None:
            found = part
        elif is_any:
            found = Bounds(low=found.low | part.low, high=found.high | part.high)
        else:
            found = Bounds(low=found.low & part.low, high=found.high & part.high)
        if bool(found.low.all() if is_any else ~found.high.any()):
            found = exactly(torch.full_like(found.low, is_any))
            break
    if found is None or call.dtype is None:
        raise Undecided("a reduction of nothing")
    return cast(found, call.dtype)


def _from_both_ends(size: int) -> Iterable[tuple[int, int]]:
    """Parts of 0 .. size - 1 (first and last position), 1, 1, 2, 4 ... long from the start and from the end.

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
