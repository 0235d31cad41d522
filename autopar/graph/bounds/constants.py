"""The constant part of a graph at a batch of two samples: which nodes depend on no input, their sizes and arguments, and
the elements of those small enough to be computed.

Two samples, not one: a mask that differs between samples, or joins them into one sequence, differs in the second."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from autopar.graph.ir import TracedBatch

SAMPLES = 2

# Ops that read only the size and dtype of their input, and the function that makes their result.
SHAPE_ONLY = {
    "aten.new_ones.default": torch.ones,
    "aten.new_zeros.default": torch.zeros,
    "aten.zeros_like.default": torch.zeros,
    "aten.ones_like.default": torch.ones,
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Call:
    """The call of a node at two samples; tensors among ``args`` and ``kwargs`` are nodes. ``shape`` and ``dtype`` are
    those of its result, () and None where it has several."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: tuple[int, ...]
    dtype: torch.dtype | None

    @property
    def packet(self) -> str:
        """The name without namespace and overload: ``tril`` of ``aten.tril.default``; "" for other than aten ops."""
        namespace, _, rest = str(self.target).partition(".")
        return rest.split(".")[0] if namespace == "aten" else ""

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument, by its position or else by its name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


def call_of(node: fx.Node, batch: TracedBatch) -> Call:
    """The call of a node at two samples; raises ValueError where a size is not an integer there."""
    value = node.meta["val"]
    is_tensor = isinstance(value, Tensor)
    return Call(
        target=node.target,  # type: ignore[arg-type]
        args=tuple(_at_two_samples(argument, batch) for argument in node.args),
        kwargs={name: _at_two_samples(argument, batch) for name, argument in node.kwargs.items()},
        shape=shape_of(node, batch) if is_tensor else (),
        dtype=value.dtype if is_tensor else None,
    )


def shape_of(node: fx.Node, batch: TracedBatch) -> tuple[int, ...]:
    """Sizes of the node's tensor at two samples."""
    return tuple(batch.scale(size, SAMPLES) for size in node.meta["val"].shape)


def _at_two_samples(argument: Any, batch: TracedBatch) -> Any:
    if isinstance(argument, (tuple, list)):
        return [_at_two_samples(element, batch) for element in argument]
    return batch.scale(argument, SAMPLES) if type(argument) is int else argument


def with_tensors(argument: Any, tensors: Callable[[fx.Node], Any]) -> Any:
    """An argument of a ``Call`` with ``tensors(node)`` in place of every node."""
    if isinstance(argument, fx.Node):
        return tensors(argument)
    if isinstance(argument, (tuple, list)):
        return [with_tensors(element, tensors) for element in argument]
    return argument


def constant_nodes(mask: fx.Node) -> list[fx.Node] | None:
    """The nodes that compute ``mask``, in execution order, or None where it depends on a parameter, buffer, input or
    random number."""
    ordered: dict[fx.Node, None] = {}
    stack = [(mask, False)]
    while stack:
        node, expanded = stack.pop()
        if node in ordered:
            continue
        if node.op != "call_function" or "nondeterministic_seeded" in str(getattr(node.target, "tags", "")):
            return None
        if expanded:
            ordered[node] = None
        else:
            stack.append((node, True))
            stack.extend((source, False) for source in sources_of(node) if source not in ordered)
    return list(ordered)


def sources_of(node: fx.Node) -> list[fx.Node]:
    """The nodes whose elements those of ``node`` depend on."""
    return [] if str(node.target) in SHAPE_ONLY else node.all_input_nodes


def small_tensors(nodes: Sequence[fx.Node], batch: TracedBatch, limit: int) -> dict[fx.Node, Tensor]:
    """The elements of constant ``nodes`` (in execution order) that can be computed from tensors of at most ``limit``
    elements: of the last node, and of those that nodes which are not computed read.

    Raises what torch raises where a node cannot be computed at two samples."""
    among = set(nodes)
    readers = {node: sum(user in among and node in sources_of(user) for user in node.users) for node in nodes}
    computed: set[fx.Node] = set()
    tensors: dict[fx.Node, Any] = {}
    for node in nodes:
        sources = set(sources_of(node))
        if elements_of(node, batch) > limit or not sources <= computed:
            continue
        computed.add(node)
        call = call_of(node, batch)
        fill = SHAPE_ONLY.get(str(node.target))
        if fill is not None:
            tensors[node] = fill(call.shape, dtype=call.dtype)
        else:
            args, kwargs = (with_tensors(part, tensors.__getitem__) for part in (call.args, list(call.kwargs.values())))
            tensors[node] = call.target(*args, **dict(zip(call.kwargs, kwargs, strict=True)))
        for source in sources:
            readers[source] -= 1
            if not readers[source]:
                del tensors[source]
    return {node: tensor for node, tensor in tensors.items() if isinstance(tensor, Tensor)}


def elements_of(node: fx.Node, batch: TracedBatch) -> int:
    """The number of elements of the node's tensor at two samples, of the largest where it has several; raises
    ValueError where a size is not an integer there."""
    value = node.meta["val"]
    results = [value] if isinstance(value, Tensor) else value if isinstance(value, (tuple, list)) else []
    tensors = (result for result in results if isinstance(result, Tensor))
    return max((prod(batch.scale(size, SAMPLES) for size in tensor.shape) for tensor in tensors), default=1)
