"""Recognises attention masks that do not depend on the data: all ones, or causal.

While a model is traced, Hugging Face builds its causal mask as a tensor (batch x 1 x seq x seq) which it would skip
in a real run. A mask that no input reaches is the same at every step, so it is computed here once, at a batch of one
sample, and where it equals the causal mask or hides nothing the attention op gets ``is_causal=True`` or no mask
instead.
"""

from typing import Any

import torch
from torch import Tensor, fx

from autopar.graph.ir import Batch

_MAX_ELEMENTS = 2**27  # of a tensor computed on the way: 128 MiB of booleans
_SHAPE_ONLY = ("aten.new_ones.default", "aten.new_zeros.default", "aten.zeros_like.default", "aten.ones_like.default")
_ATTENTION = "aten.scaled_dot_product_attention.default"


def fold_masks(graph: fx.Graph, batch: Batch) -> None:
    """Replaces constant masks of attention ops in place; each distinct mask is computed once."""
    verdicts: dict[fx.Node, str | None] = {}
    for node in graph.nodes:
        if str(node.target) != _ATTENTION or (len(node.args) < 4 and "attn_mask" not in node.kwargs):
            continue
        mask = node.args[3] if len(node.args) > 3 else node.kwargs["attn_mask"]
        if not isinstance(mask, fx.Node) or _is_causal(node):
            continue
        bias = _unmasked_bias(mask, verdicts, batch)
        if bias is not None:
            _set_mask(node, bias, causal=False)
            continue
        if mask not in verdicts:
            verdicts[mask] = _verdict(mask, batch)
        if verdicts[mask] == "all" or (verdicts[mask] == "causal" and _is_square(node)):
            _set_mask(node, None, causal=verdicts[mask] == "causal")


def _is_causal(node: fx.Node) -> bool:
    return bool(node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False))


def _is_square(node: fx.Node) -> bool:
    """Whether there are as many queries as keys: only then ``is_causal`` means the lower triangle."""
    query, key = (argument.meta["val"] for argument in node.args[:2])  # type: ignore[union-attr]
    return query.shape[-2] == key.shape[-2]


def _unmasked_bias(mask: fx.Node, verdicts: dict[fx.Node, str | None], batch: Batch) -> fx.Node | None:
    """``bias`` of ``where(condition, bias, -inf)`` whose condition is all ones (T5's position bias), else None.

    The condition only spread the bias over the batch; the attention op broadcasts it itself."""
    if str(mask.target) == "aten.contiguous.default":
        mask = mask.all_input_nodes[0]
    if str(mask.target) != "aten.where.ScalarOther" or not all(isinstance(given, fx.Node) for given in mask.args[:2]):
        return None
    condition, bias = mask.args[:2]
    if condition not in verdicts:
        verdicts[condition] = _verdict(condition, batch)  # type: ignore[index, arg-type]
    return bias if verdicts[condition] == "all" else None  # type: ignore[index, return-value]


def _set_mask(node: fx.Node, mask: fx.Node | None, *, causal: bool) -> None:
    dropout = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
    node.args = (*node.args[:3], mask, dropout, causal)
    node.kwargs = {key: given for key, given in node.kwargs.items() if key in ("scale", "enable_gqa")}


def _verdict(mask: fx.Node, batch: Batch) -> str | None:
    """ "all" or "causal" for a constant mask of that form, else None."""
    ancestors = _constant_ancestors(mask)
    if ancestors is None:
        return None
    try:
        tensor = _compute(mask, ancestors, batch)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None  # not computable at one sample: the mask stays a tensor
    if tensor is None or tensor.dim() < 2:
        return None
    if tensor.dtype != torch.bool:
        hidden = tensor <= torch.finfo(tensor.dtype).min / 2
        if not bool(((tensor == 0) | hidden).all()):
            return None
        tensor = ~hidden
    if bool(tensor.all()):
        return "all"
    queries, keys = tensor.shape[-2:]
    if queries == keys and all(_is_lower_triangle(square) for square in tensor.reshape(-1, queries, keys)):
        return "causal"
    return None


def _is_lower_triangle(square: Tensor) -> bool:
    return torch.equal(square, torch.ones_like(square).tril_())


def _constant_ancestors(mask: fx.Node) -> list[fx.Node] | None:
    """The nodes that compute ``mask``, in execution order, or None where a parameter, buffer, input or random number
    takes part in it."""
    found: dict[fx.Node, None] = {}
    stack = [(mask, False)]
    while stack:
        node, expanded = stack.pop()
        if node in found:
            continue
        if node.op != "call_function" or "nondeterministic_seeded" in str(getattr(node.target, "tags", "")):
            return None
        sources = [] if str(node.target) in _SHAPE_ONLY else node.all_input_nodes
        if expanded:
            found[node] = None
        else:
            stack.append((node, True))
            stack.extend((source, False) for source in sources if source not in found)
    return list(found)


def _compute(mask: fx.Node, nodes: list[fx.Node], batch: Batch) -> Tensor | None:
    """The mask at a batch of one sample; None where it would take too much memory."""
    wanted = set(nodes)
    left = {node: sum(user in wanted for user in node.users) for node in nodes}
    tensors: dict[fx.Node, Any] = {}
    for node in nodes:
        value = node.meta["val"]
        elements = 1
        for size in value.shape if isinstance(value, Tensor) else ():
            elements *= batch.scale(size, 1)
        if elements > _MAX_ELEMENTS:
            return None
        if str(node.target) in _SHAPE_ONLY:
            fill = torch.ones if "ones" in str(node.target) else torch.zeros
            tensors[node] = fill([batch.scale(size, 1) for size in value.shape], dtype=value.dtype)
            continue
        args, kwargs = _at_one_sample(node.args, tensors, batch), _at_one_sample(node.kwargs, tensors, batch)
        tensors[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        for source in set(node.all_input_nodes):
            left[source] -= 1
            if not left[source] and source is not mask:
                del tensors[source]
    return tensors[mask]


def _at_one_sample(argument: Any, tensors: dict[fx.Node, Any], batch: Batch) -> Any:
    """An argument of a node with tensors looked up and sizes that grow with the batch scaled to one sample."""
    if isinstance(argument, fx.Node):
        return tensors[argument]
    if isinstance(argument, (tuple, list)):
        return [_at_one_sample(element, tensors, batch) for element in argument]
    if isinstance(argument, dict):
        return {key: _at_one_sample(element, tensors, batch) for key, element in argument.items()}
    return batch.scale(argument, 1) if type(argument) is int else argument
