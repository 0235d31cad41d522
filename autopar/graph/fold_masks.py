"""Recognises attention masks that do not depend on the data and are all ones or causal.

While a model is traced, Hugging Face builds its causal mask as a tensor (batch x 1 x seq x seq), which it does not in a
real run. A mask that depends on no input, parameter or buffer is the same at every step, so its form is decided here,
once, at a batch of two samples; the attention op then gets ``is_causal=True`` in place of a causal mask, and no mask in
place of one that masks nothing. ``bounds.mask_form`` decides it without computing seq x seq elements, whatever the
length.
"""

from typing import Any

from torch import fx

from autopar.graph.bounds.constants import constant_nodes, sources_of
from autopar.graph.bounds.mask_form import Form, mask_form
from autopar.graph.ir import TracedBatch

_ATTENTION = "aten.scaled_dot_product_attention.default"


def fold_masks(graph: fx.Graph, batch: TracedBatch) -> None:
    """Replaces the constant masks of attention ops in place; masks computed alike are decided once."""
    forms = _Forms(batch)
    for node in graph.nodes:
        if str(node.target) != _ATTENTION or (len(node.args) < 4 and "attn_mask" not in node.kwargs):
            continue
        mask = node.args[3] if len(node.args) > 3 else node.kwargs["attn_mask"]
        if not isinstance(mask, fx.Node) or _is_causal(node):
            continue
        bias = _unmasked_bias(mask, forms)
        if bias is not None:
            _set_mask(node, bias, causal=False)
            continue
        form = forms.of(mask)
        if form == "all" or (form == "causal" and _is_square(node)):
            _set_mask(node, None, causal=form == "causal")


class _Forms:
    """The forms of masks; those computed alike are decided once (a model may compute its mask in every layer)."""

    def __init__(self, batch: TracedBatch) -> None:
        self._batch = batch
        self._numbers: dict[Any, int] = {}
        self._number_of: dict[fx.Node, int] = {}
        self._forms: dict[int, Form | None] = {}

    def of(self, mask: fx.Node) -> Form | None:
        """The form of a mask, None for one that is neither all ones nor causal or that depends on the data."""
        nodes = constant_nodes(mask)
        if nodes is None:
            return None
        for node in nodes:
            if node not in self._number_of:
                self._number_of[node] = self._numbers.setdefault(self._key(node), len(self._numbers))
        number = self._number_of[mask]
        if number not in self._forms:
            self._forms[number] = mask_form(nodes, self._batch)
        return self._forms[number]

    def _key(self, node: fx.Node) -> Any:
        """Equal for constant nodes that run the same op on equal arguments, where nodes with equal keys are equal."""
        sources = sources_of(node)
        size = None if sources else str(node.meta["val"])  # an op that reads no elements may still read a size
        numbered = fx.node.map_arg(
            (node.args, node.kwargs), lambda source: ("node", self._number_of[source] if source in sources else None)
        )
        return str(node.target), repr(numbered), size


def _is_causal(node: fx.Node) -> bool:
    return bool(node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False))


def _is_square(node: fx.Node) -> bool:
    """Whether there are as many queries as keys: only then does ``is_causal`` mean the lower triangle."""
    query, key = (argument.meta["val"] for argument in node.args[:2])  # type: ignore[union-attr]
    return query.shape[-2] == key.shape[-2]


def _unmasked_bias(mask: fx.Node, forms: _Forms) -> fx.Node | None:
    """``bias`` of ``where(condition, bias, -inf)`` whose condition is all ones (T5's position bias), else None.

    The condition only broadcasts the bias over the batch, which the attention op does by itself."""
    if str(mask.target) == "aten.contiguous.default":
        mask = mask.all_input_nodes[0]
    if str(mask.target) != "aten.where.ScalarOther":
        return None
    if not all(isinstance(argument, fx.Node) for argument in mask.args[:2]):
        return None
    condition, bias = mask.args[:2]
    return bias if forms.of(condition) == "all" else None  # type: ignore[arg-type, return-value]


def _set_mask(node: fx.Node, mask: fx.Node | None, *, causal: bool) -> None:
    """Gives an attention call another mask; its dropout, scale and grouped-query setting stay."""
    dropout = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
    node.args = (*node.args[:3], mask, dropout, causal)
    node.kwargs = {name: argument for name, argument in node.kwargs.items() if name in ("scale", "enable_gqa")}
