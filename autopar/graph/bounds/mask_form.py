"""Whether a constant mask of any length is all ones, causal, or neither, by branch and bound over its boxes.

An element of a mask is visible if its query attends to its key, else masked. A box (leading dims x rows x columns) that
is all visible or all masked is decided: a masked element refutes "all", a visible one above the diagonal or a masked one
on or below it refutes "causal". A mixed box is split into quarters, down to single elements, which are exact. A form
that no box refutes holds for every element: the result is a proof, whatever the length.

The mixed boxes of a causal mask are those on its diagonal: a sequence of length s takes s / 4 boxes down to a side of
16, and the s / 16 mixed ones of these are evaluated element by element, 16 s elements: 2^24 of the 2^40 of s = 2^20.
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

_LIMITS = (2**22, 2**27)  # elements of a tensor that is computed: 4 MiB of booleans; if that is not enough, 128 MiB
_SMALLEST_SIDE = 16  # a box of this side is split into elements, which is as fast as into quarters
_ELEMENTS_AT_ONCE = 2**16
# Bounds evaluated before a mask is left undecided: this many per row and column (a causal mask takes 8), or the minimum.
_EVALUATIONS_PER_POSITION = 64
_MIN_EVALUATIONS = 2**24


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Boxes:
    """Squares of ``side`` rows and columns that begin at ``rows`` and ``columns``, int64 (boxes,), clipped to the mask.
    ``leading`` is the (first, last) position along each other dim, the same for all boxes. ``is_by_element``: bounds are
    those of every element, for boxes too small to be split further."""

    leading: tuple[tuple[int, int], ...]
    side: int
    is_by_element: bool
    rows: Tensor
    columns: Tensor

    @property
    def num_bounds(self) -> int:
        """Entries of the bounds of a box."""
        return self.side**2 if self.is_by_element else 1


def mask_form(nodes: Sequence[fx.Node], batch: TracedBatch) -> Form | None:
    """The form of a mask at two samples: "all" where every element is visible, "causal" where exactly the elements above
    the diagonal are masked, None for any other mask and for one that cannot be decided. ``nodes`` are those that compute
    the mask, in execution order, the mask last (``constant_nodes``).

    In a boolean mask False is masked; in an additive one elements of at most half the least number of the dtype are
    masked and those equal to 0 are visible."""
    mask = nodes[-1]
    if mask.meta["val"].dim() < 2:
        return None
    try:
        sizes = [elements_of(node, batch) for node in nodes]
    except ValueError:
        return None  # not computable at two samples: the mask stays a tensor
    num_tried = -1
    for limit in _LIMITS:
        num_computed = sum(size <= limit for size in sizes)
        if num_computed == num_tried:
            break
        num_tried = num_computed
        try:
            with _one_thread():
                return _form(mask, ConstantTensors(nodes, batch, limit))
        except (Undecided, RuntimeError, ValueError, TypeError, IndexError):
            continue
    return None


@contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread: on tensors as short as these several are slower, much slower where other programs use the
    cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _form(mask: fx.Node, tensors: ConstantTensors) -> Form | None:
    """The form of a mask by branch and bound; raises Undecided after too many evaluations."""
    *leading, num_rows, num_columns = tensors.shape(mask)
    forms: set[Form] = {"all", "causal"} if num_rows == num_columns else {"all"}
    side = 1 << (max(num_rows, num_columns) - 1).bit_length()
    start = torch.tensor([0])
    # Samples one by one, as each may read other elements of the mask's sources; heads together, as they rarely do.
    ends = [[(index, index) for index in range(size)] if size <= SAMPLES else [(0, size - 1)] for size in leading]
    stack = [_Boxes(leading=part, side=side, is_by_element=False, rows=start, columns=start) for part in product(*ends)]
    remaining = max(_EVALUATIONS_PER_POSITION * (num_rows + num_columns), _MIN_EVALUATIONS)
    while stack and forms:
        boxes = stack.pop()
        remaining -= len(boxes.rows) * boxes.num_bounds
        if remaining < 0:
            raise Undecided("too many boxes")
        box = _box(boxes, num_rows, num_columns)
        visible, masked, other = _visibility(tensors.bounds(mask, box))
        rows, columns = box[-2:]
        above, below = columns.last > rows.first, columns.first <= rows.last  # whether the box has such elements
        if bool(other.any()):
            return None
        if bool(masked.any()):
            forms.discard("all")
        if bool(((visible & above) | (masked & below)).any()):
            forms.discard("causal")
        mixed = ~(visible | masked)
        if bool(mixed.any()):
            mixed = mixed.flatten(1).any(1) if mixed.dim() > 1 else mixed
            mixed = mixed.expand(len(boxes.rows))
            mixed_boxes = replace(boxes, rows=boxes.rows[mixed], columns=boxes.columns[mixed])
            stack.extend(_split(mixed_boxes, num_rows, num_columns))
    return next((form for form in ("all", "causal") if form in forms), None)


def _box(boxes: _Boxes, num_rows: int, num_columns: int) -> Box:
    """The spans of the boxes, of shape (boxes,); by element, those of rows are (boxes, side, 1) and those of columns
    (boxes, 1, side), a single position each."""
    leading = tuple(
        position(first) if first == last else Span(first=torch.tensor([first]), last=torch.tensor([last]))
        for first, last in boxes.leading
    )
    spans = []
    for starts, size, shape in ((boxes.rows, num_rows, (-1, 1)), (boxes.columns, num_columns, (1, -1))):
        if boxes.is_by_element:
            positions = (starts.view(-1, 1, 1) + torch.arange(boxes.side).view(shape)).clamp(max=size - 1)
            spans.append(Span(first=positions, last=positions))
        else:
            spans.append(Span(first=starts, last=(starts + (boxes.side - 1)).clamp(max=size - 1)))
    return (*leading, *spans)


def _visibility(bounds: Bounds) -> tuple[Tensor, Tensor, Tensor]:
    """Which boxes are all visible, which are all masked, and which have an element that is neither; bool tensors."""
    low, high = bounds.low, bounds.high
    if low.dtype == torch.bool:
        return low, ~high, torch.zeros_like(low)
    threshold = torch.finfo(low.dtype).min / 2
    return (low == 0) & (high == 0), high <= threshold, (low > threshold) & ((low > 0) | (high < 0))


def _split(boxes: _Boxes, num_rows: int, num_columns: int) -> Iterator[_Boxes]:
    """Splits boxes into quarters, then into elements, then along their leading dims; raises Undecided for single
    elements."""
    if boxes.is_by_element:
        yield from _split_leading(boxes)
    elif boxes.side <= _SMALLEST_SIDE:
        for rows, columns in _in_parts(boxes, _ELEMENTS_AT_ONCE // boxes.side**2):
            yield replace(boxes, is_by_element=True, rows=rows, columns=columns)
    else:
        half = boxes.side // 2
        for rows, columns in _in_parts(boxes, _ELEMENTS_AT_ONCE // 4):
            rows = torch.cat([rows + row for row in (0, 0, half, half)])
            columns = torch.cat([columns + column for column in (0, half, 0, half)])
            inside = (rows < num_rows) & (columns < num_columns)
            yield replace(boxes, side=half, rows=rows[inside], columns=columns[inside])


def _in_parts(boxes: _Boxes, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows and columns of ``size`` boxes at a time."""
    return zip(boxes.rows.split(size), boxes.columns.split(size), strict=True)


def _split_leading(boxes: _Boxes) -> Iterator[_Boxes]:
    """The halves of boxes along the longest of their leading dims."""
    lengths = [last - first for first, last in boxes.leading]
    if not any(lengths):
        raise Undecided("an element that is neither visible nor masked, or not known")
    dim = lengths.index(max(lengths))
    first, last = boxes.leading[dim]
    middle = (first + last) // 2
    for part in ((first, middle), (middle + 1, last)):
        yield replace(boxes, leading=(*boxes.leading[:dim], part, *boxes.leading[dim + 1 :]))
