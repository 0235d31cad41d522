"""Bounds of a constant tensor of a graph, of any size, over boxes of its positions."""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from autopar.graph.bounds.boxes import Bounds, Box, Undecided, position
from autopar.graph.bounds.constants import Call, call_of, shape_of, small_tensors
from autopar.graph.bounds.movement import RULES
from autopar.graph.bounds.pointwise import is_pointwise, operands_of, pointwise
from autopar.graph.bounds.pyramid import Pyramid
from autopar.graph.bounds.strided import View, view_of
from autopar.graph.ir import TracedBatch

_MAX_STEPS = 10_000  # (node, boxes) pairs for one set of boxes: exceeded only where views of views multiply


class ConstantTensors:
    """The tensors of constant ``nodes`` (in execution order) at two samples. Those of at most ``limit`` elements that
    read only such tensors are computed; all others have bounds only."""

    def __init__(self, nodes: Sequence[fx.Node], batch: TracedBatch, limit: int) -> None:
        self._batch = batch
        self._computed = {node: Pyramid(tensor) for node, tensor in small_tensors(nodes, batch, limit).items()}
        self._calls: dict[fx.Node, Call] = {}
        self._views: dict[fx.Node, View | None] = {}

    def bounds(self, node: fx.Node, box: Box) -> Bounds:
        """Bounds of the node's elements in every box; raises Undecided where an op has no rule."""
        return _Walk(self).over(node, box)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Sizes of the node's tensor."""
        return shape_of(node, self._batch)

    def computed(self, node: fx.Node) -> Pyramid | None:
        """The node's elements, None where it has bounds only."""
        return self._computed.get(node)

    def call(self, node: fx.Node) -> Call:
        """The node's call at two samples."""
        if node not in self._calls:
            self._calls[node] = call_of(node, self._batch)
        return self._calls[node]

    def view(self, node: fx.Node) -> View | None:
        """The view that the node is, None where it is none."""
        if node not in self._views:
            result = node.target is operator.getitem
            call = self.call(node.args[0]) if result else self.call(node)  # type: ignore[arg-type]
            self._views[node] = view_of(call, node.args[1] if result else None, self._empty)  # type: ignore[arg-type]
        return self._views[node]

    def _empty(self, node: fx.Node) -> Tensor:
        return torch.empty(self.shape(node), dtype=node.meta["val"].dtype, device="meta")


class _Walk:
    """Bounds over one set of boxes: the ``Sources`` of its ops' rules. Each node is evaluated once for equal boxes."""

    def __init__(self, tensors: ConstantTensors) -> None:
        self._tensors = tensors
        # (node, ids of the spans) -> the box, which it refers to so that the ids stay valid, and the bounds
        self._known: dict[tuple[object, ...], tuple[Box, Bounds]] = {}
        self._origin = position(0)

    def over(self, node: fx.Node, box: Box) -> Bounds:
        """As ``Sources.over``."""
        key = (node, *map(id, box))
        if key not in self._known:
            if len(self._known) >= _MAX_STEPS:
                raise Undecided("too many views of views")
            self._known[key] = box, _with_dims(self._evaluated(node, box), len(box))
        return self._known[key][1]

    def broadcast(self, node: fx.Node, box: Box) -> Bounds:
        """As ``Sources.broadcast``."""
        shape = self.shape(node)
        spans = box[len(box) - len(shape) :]
        return self.over(
            node, tuple(self._origin if size == 1 else span for size, span in zip(shape, spans, strict=True))
        )

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """As ``Sources.shape``."""
        return self._tensors.shape(node)

    def _evaluated(self, node: fx.Node, box: Box) -> Bounds:
        """Bounds from the node's elements, from its op's rule, or from the source of which it is a view."""
        computed = self._tensors.computed(node)
        if computed is not None:
            return computed.over(box)
        if node.target is not operator.getitem:
            call = self._tensors.call(node)
            if call.packet in RULES:
                return RULES[call.packet](call, box, self)
            if is_pointwise(call):
                return pointwise(call, [self.broadcast(operand, box) for operand in operands_of(call)])
        view = self._tensors.view(node)
        if view is None:
            raise Undecided(f"{node.target} has no bounds")
        return self.over(view.source, view.box_of_source(box))


def _with_dims(bounds: Bounds, num_dims: int) -> Bounds:
    """Bounds of shape () for a tensor without dims, of one dim for others: torch's type promotion depends on it."""
    if (bounds.low.dim() > 0) == (num_dims > 0):
        return bounds
    shape = (1,) if num_dims else ()
    low = bounds.low.reshape(shape)
    return Bounds(low=low, high=low if bounds.exact else bounds.high.reshape(shape))
