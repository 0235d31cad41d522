"""Whether a constant mask of any length is all ones, causal, or neither, by branch and bound over its boxes.

A box of a mask (leading dims x rows x columns) that is all visible or all hidden settles itself: a hidden element
refutes "all", a visible one above the diagonal or a hidden one on or below it refutes "causal". A mixed box is split
into its quarters, down to single elements, which are exact. What is refuted by no box holds for every element: the
answer is a proof, whatever the length.

The mixed boxes of a causal mask are those on its diagonal: a sequence of s takes s / 4 boxes down to 16 positions, and
the s / 16 mixed ones of these are looked at element by element, 16 s in all: 2^24 of the 2^40 elements of s = 2^20.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import torch
from torch import Tensor, fx

from autopar.graph.bounds.boxes import Bounds, Box, Span, Undecided, position
from autopar.graph.bounds.constant_tensors import ConstantTensors
from autopar.graph.bounds.constants import SAMPLES, elements_of
from autopar.graph.ir import TracedBatch

Form = Literal["all", "causal"]

_LIMITS = (2**22, 2**27)  # elements of a tensor that is computed: 4 MiB of booleans; where that decides nothing, 128
_SMALLEST = 16  # side of a box that is split into elements, which is as fast as into quarters
_AT_ONCE = 2**16  # elements
_PER_POSITION = 64  # elements looked at for each row and column before a mask is left undecided: a causal one takes 8
_AT_LEAST = 2**24


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Boxes:
    """Squares of ``side`` rows and columns, the first at ``rows`` and ``columns`` (boxes,), what passes the mask's ends
    left out. ``leading`` (first, last) of each other dim is the same for all. ``each``: every row and column by itself,
    for boxes too small to be split further."""

    leading: tuple[tuple[int, int], ...]
    side: int
    each: bool
    rows: Tensor
    columns: Tensor

    @property
    def looked_at(self) -> int:
        """Entries of the bounds of a box."""
        return self.side**2 if self.each else 1


def mask_form(nodes: Sequence[fx.Node], batch: TracedBatch) -> Form | None:
    """ "all" for a mask that hides nothing at two samples, "causal" for one that hides exactly what is above the
    diagonal, None for any other, and for one that cannot be decided. ``nodes`` are those that compute the mask, in
    execution order, the mask last (``constant_nodes``).

    A boolean mask hides what is False, an additive one what is at most half the least number of its dtype, and shows
    what is 0."""
    mask = nodes[-1]
    if mask.meta["val"].dim() < 2:
        return None
    try:
        sizes = [elements_of(node, batch) for node in nodes]
    except ValueError:
        return None  # not computable at two samples: the mask stays a tensor
    tried = -1
    for limit in _LIMITS:
        computed = sum(size <= limit for size in sizes)
        if computed == tried:
            break
        tried = computed
        try:
            with _one_thread():
                return _form(mask, ConstantTensors(nodes, batch, limit))
        except (Undecided, RuntimeError, ValueError, TypeError, IndexError):
            continue
    return None


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors as short as these take longer in several threads, by far where other programs use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _form(mask: fx.Node, tensors: ConstantTensors) -> Form | None:
    *leading, num_rows, num_columns = tensors.shape(mask)
    forms: set[Form] = {"all", "causal"} if num_rows == num_columns else {"all"}
    side = 1 << (max(num_rows, num_columns) - 1).bit_length()
    start = torch.tensor([0])
    # Samples one by one, as they may well read other elements of what all are made of; heads rather not.
    ends = [[(at, at) for at in range(size)] if size <= SAMPLES else [(0, size - 1)] for size in leading]
    stack = [_Boxes(leading=part, side=side, each=False, rows=start, columns=start) for part in product(*ends)]
    left = max(_PER_POSITION * (num_rows + num_columns), _AT_LEAST)
    while stack and forms:
        boxes = stack.pop()
        left -= len(boxes.rows) * boxes.looked_at
        if left < 0:
            raise Undecided("too many boxes")
        box = _box(boxes, num_rows, num_columns)
        visible, hidden, other = _visibility(tensors.bounds(mask, box))
        rows, columns = box[-2:]
        above, below = columns.last > rows.first, columns.first <= rows.last  # whether the box has such elements
        if bool(other.any()):
            return None
        if bool(hidden.any()):
            forms.discard("all")
        if bool(((visible & above) | (hidden & below)).any()):
            forms.discard("causal")
        mixed = ~(visible | hidden)
        if bool(mixed.any()):
            mixed = mixed.flatten(1).any(1) if mixed.dim() > 1 else mixed
            mixed = mixed.expand(len(boxes.rows))
            mine = replace(boxes, rows=boxes.rows[mixed], columns=boxes.columns[mixed])
            stack.extend(_split(mine, num_rows, num_columns))
    return next((form for form in ("all", "causal") if form in forms), None)


def _box(boxes: _Boxes, num_rows: int, num_columns: int) -> Box:
    """Spans of the boxes (boxes,); of each row and column, of one position: (boxes, side, 1) and (boxes, 1, side)."""
    leading = tuple(
        position(first) if first == last else Span(first=torch.tensor([first]), last=torch.tensor([last]))
        for first, last in boxes.leading
    )
    spans = []
    for starts, size, shape in ((boxes.rows, num_rows, (-1, 1)), (boxes.columns, num_columns, (1, -1))):
        if boxes.each:
            positions = (starts.view(-1, 1, 1) + torch.arange(boxes.side).view(shape)).clamp(max=size - 1)
            spans.append(Span(first=positions, last=positions))
        else:
            spans.append(Span(first=starts, last=(starts + (boxes.side - 1)).clamp(max=size - 1)))
    return (*leading, *spans)


def _visibility(bounds: Bounds) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes that are all visible, all hidden, and that have an element which is neither."""
    low, high = bounds.low, bounds.high
    if low.dtype == torch.bool:
        return low, ~high, torch.zeros_like(low)
    threshold = torch.finfo(low.dtype).min / 2
    return (low == 0) & (high == 0), high <= threshold, (low > threshold) & ((low > 0) | (high < 0))


def _split(boxes: _Boxes, num_rows: int, num_columns: int) -> Iterator[_Boxes]:
    """The quarters of boxes, then their rows and columns, then halves of the leading dims; raises Undecided at last."""
    if boxes.each:
        yield from _split_leading(boxes)
    elif boxes.side <= _SMALLEST:
        for rows, columns in _in_parts(boxes, _AT_ONCE // boxes.side**2):
            yield replace(boxes, each=True, rows=rows, columns=columns)
    else:
        half = boxes.side // 2
        for rows, columns in _in_parts(boxes, _AT_ONCE // 4):
            rows = torch.cat([rows + row for row in (0, 0, half, half)])
            columns = torch.cat([columns + column for column in (0, half, 0, half)])
            within = (rows < num_rows) & (columns < num_columns)
            yield replace(boxes, side=half, rows=rows[within], columns=columns[within])


def _in_parts(boxes: _Boxes, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(boxes.rows.split(size), boxes.columns.split(size), strict=True)


def _split_leading(boxes: _Boxes) -> Iterator[_Boxes]:
    lengths = [last - first for first, last in boxes.leading]
    if not any(lengths):
        raise Undecided("an element that is neither visible nor hidden, or not known")
    at = lengths.index(max(lengths))
    first, last = boxes.leading[at]
    middle = (first + last) // 2
    for part in ((first, middle), (middle + 1, last)):
        yield replace(boxes, leading=(*boxes.leading[:at], part, *boxes.leading[at + 1 :]))
