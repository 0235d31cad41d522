"""The attentions of a traced model: heads, head size, sequence, what of keys and values a cache would hold, and which of
them run under a mask that is a tensor.

Programs repeat grouped keys for all query heads before they attend (Hugging Face's ``repeat_kv``). What is cached is
what was there before: from the call's key and value back through ops that only move or repeat elements, the smallest
tensor.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from autopar.graph.bounds.constants import SHAPE_ONLY
from autopar.graph.ir import Graph, Op, Value, ValueKind

LAYOUT_OPS = frozenset(
    (
        "expand", "repeat", "repeat_interleave", "reshape", "view", "_unsafe_view", "unsqueeze", "squeeze", "transpose",
        "permute", "contiguous", "clone", "flatten", "unflatten", "alias",
    )
)  # fmt: skip


_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """``op`` attends ``heads`` heads of ``head_dim`` over ``sequence`` queries and ``key_sequence`` keys; a token's
    keys are ``key_elements`` numbers and its values ``value_elements``. ``moving`` are the ops that repeat keys and
    values for the call, which a kernel that reads the cache does not need. ``masked``: causal, or under a mask that may
    be. ``crossing``: its keys come of a model input that its queries do not come of, as a decoder's from an encoder."""

    op_id: int
    heads: int
    head_dim: int
    query_length: int
    key_length: int
    key_elements_per_token: int
    value_elements_per_token: int
    repeat_ops: tuple[int, ...]
    is_masked: bool
    is_cross_attention: bool

    @property
    def kv_heads(self) -> int:
        return max(self.key_elements_per_token // self.head_dim, 1)


def attention_calls(graph: Graph) -> tuple[AttentionCall, ...]:
    """Calls of scaled dot product attention, in order.

    Example: Llama 3 8B has 32 calls of 32 heads whose keys are 8 * 128 numbers a token."""
    makers = graph.producers()
    origins = _input_dependencies(graph)
    found = []
    for op in graph.ops:
        if not op.is_attention:
            continue
        query, key = (graph.values[value].shape for value in op.inputs[:2])
        samples = graph.batch.traced_size * key[-2]
        (keys, moving_keys), (values, moving_values) = (
            _before_repeats(graph, makers, value) for value in op.inputs[1:3]
        )
        found.append(
            AttentionCall(
                op_id=op.id,
                heads=prod(query[:-2]) // graph.batch.traced_size,
                head_dim=query[-1],
                query_length=query[-2],
                key_length=key[-2],
                key_elements_per_token=keys // samples,
                value_elements_per_token=values // samples,
                repeat_ops=(*moving_keys, *moving_values),
                is_masked=len(op.inputs) > 3 or True in op.args[3:] or dict(op.kwargs).get("is_causal") is True,
                is_cross_attention=not origins[op.inputs[1]] <= origins[op.inputs[0]],
            )
        )
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedCalls:
    """Calls of attention under a mask that is a tensor, in modules of one kind (``layers.0``, ``layers.1`` ...): the
    first one's ``module`` and ``source``, and how many there are. The mask is made at ``mask_source``, from the values
    ``names`` of kind ``origin`` (from inputs, if it reads any). No origin: a mask that is the same at every step, but
    recognised neither as causal nor as all ones."""

    module: str
    source: str
    count: int
    mask_source: str
    origin: ValueKind | None
    names: tuple[str, ...]


def masked_calls(graph: Graph) -> tuple[MaskedCalls, ...]:
    """Calls whose mask was not replaced by ``is_causal`` or by none (``fold_masks``), each kind once, in order.

    Example: Mistral of 32 layers with a window shorter than its sequence has one kind of 32 calls."""
    makers = {value: op for op in graph.ops for value in op.outputs}
    found: dict[tuple[str, ...], MaskedCalls] = {}
    for op in graph.ops:
        if "scaled_dot_product" not in op.target or len(op.inputs) < 4:
            continue
        mask = op.inputs[3]
        origin, names = _origin(graph, makers, mask)
        mask_source = makers[mask].source_location if mask in makers else ""
        kind = (
            op.source_location,
            mask_source,
            *(_NUMBER.sub("*", text) for text in (op.module_path, origin or "", *names)),
        )
        calls = found.get(kind) or MaskedCalls(
            module=op.module_path,
            source=op.source_location,
            count=0,
            mask_source=mask_source,
            origin=origin,
            names=names,
        )
        found[kind] = replace(calls, count=calls.count + 1)
    return tuple(found.values())


def _origin(graph: Graph, makers: Mapping[int, Op], mask: int) -> tuple[ValueKind | None, tuple[str, ...]]:
    """The kind of values that a mask is computed from, and their names."""
    seen: set[int] = set()
    stack = [mask]
    while stack:
        value = stack.pop()
        if value not in seen:
            seen.add(value)
            maker = makers.get(value)
            stack.extend(maker.inputs if maker is not None and maker.target not in SHAPE_ONLY else ())
    leaves: list[Value] = [graph.values[value] for value in sorted(seen)]
    kinds: tuple[ValueKind, ...] = ("input", "parameter", "buffer", "constant")
    for kind in kinds:
        if names := tuple(value.name for value in leaves if value.kind == kind):
            return kind, names
    return None, ()


def _input_dependencies(graph: Graph) -> dict[int, frozenset[int]]:
    """Value -> the model inputs that it is computed from."""
    found = {value.id: frozenset((value.id,) if value.kind == "input" else ()) for value in graph.values}
    for op in graph.ops:
        of_op = frozenset[int]().union(*(found[value] for value in op.inputs))
        found.update(dict.fromkeys(op.outputs, of_op))
    return found


def _before_repeats(graph: Graph, producers: dict[int, Op], value: int) -> tuple[int, list[int]]:
    """Elements of the smallest tensor that ``value`` is moved or repeated from, and the ops between."""
    least, passed, behind = prod(graph.values[value].shape), [], []
    while (op := producers.get(value)) is not None and op.packet in LAYOUT_OPS and len(op.inputs) == 1:
        value = op.inputs[0]
        passed.append(op.id)
        if prod(graph.values[value].shape) < least:
            least, behind = prod(graph.values[value].shape), list(passed)
    return least, behind
