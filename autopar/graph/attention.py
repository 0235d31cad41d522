"""The attention calls of a traced model: heads, head size, sequence lengths, the keys and values that a cache would
store, and which calls have a mask that is a tensor.

Models repeat grouped keys for all query heads before they attend (Hugging Face's ``repeat_kv``); a cache stores them
unrepeated: the smallest tensor on the path from the call's key or value back through ops that only rearrange or repeat
elements.
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
    """One call of scaled dot product attention, per sample: op ``op_id``, ``heads`` query heads of ``head_dim``,
    ``query_length`` queries and ``key_length`` keys. The keys of a token have ``key_elements_per_token`` elements over
    all heads, its values ``value_elements_per_token``. ``repeat_ops`` are the ops that repeat keys and values for the
    call; a kernel that reads the cache does not run them. ``is_masked``: causal, or with a mask tensor, which may be
    causal. ``is_cross_attention``: its keys depend on a model input that its queries do not, as in a decoder that
    attends to an encoder."""

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
        """Key/value heads: fewer than ``heads`` in grouped-query attention."""
        return max(self.key_elements_per_token // self.head_dim, 1)


def attention_calls(graph: Graph) -> tuple[AttentionCall, ...]:
    """Calls of scaled dot product attention, in execution order.

    Example: Llama 3 8B has 32 calls of 32 heads whose keys are 8 * 128 elements per token."""
    producers = graph.producers()
    dependencies = _input_dependencies(graph)
    calls = []
    for op in graph.ops:
        if not op.is_attention:
            continue
        query, key = (graph.values[value].shape for value in op.inputs[:2])
        samples = graph.batch.traced_size * key[-2]
        (keys, key_repeats), (values, value_repeats) = (
            _before_repeats(graph, producers, value) for value in op.inputs[1:3]
        )
        calls.append(
            AttentionCall(
                op_id=op.id,
                heads=prod(query[:-2]) // graph.batch.traced_size,
                head_dim=query[-1],
                query_length=query[-2],
                key_length=key[-2],
                key_elements_per_token=keys // samples,
                value_elements_per_token=values // samples,
                repeat_ops=(*key_repeats, *value_repeats),
                is_masked=len(op.inputs) > 3 or True in op.args[3:] or dict(op.kwargs).get("is_causal") is True,
                is_cross_attention=not dependencies[op.inputs[1]] <= dependencies[op.inputs[0]],
            )
        )
    return tuple(calls)


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedCalls:
    """Attention calls whose mask is a tensor, in modules whose paths differ only by numbers (``layers.0``, ``layers.1``
    ...): the path ``module`` and the file and line ``source`` of the first, and their number ``count``. The mask is
    computed at ``mask_source`` from the values ``names`` of kind ``origin``: of the kinds that it depends on, the first
    of input, parameter, buffer, constant. ``origin`` is None for a mask that depends on no value: it is the same at
    every step, but was recognised neither as causal nor as all ones."""

    module: str
    source: str
    count: int
    mask_source: str
    origin: ValueKind | None
    names: tuple[str, ...]


def masked_calls(graph: Graph) -> tuple[MaskedCalls, ...]:
    """Calls whose mask ``fold_masks`` did not replace by ``is_causal`` or drop, equal ones counted together, in order.

    Example: Mistral of 32 layers with a window shorter than its sequence gives one entry that counts 32 calls."""
    producers = graph.producers()
    by_kind: dict[tuple[str, ...], MaskedCalls] = {}
    for op in graph.ops:
        if "scaled_dot_product" not in op.target or len(op.inputs) < 4:
            continue
        mask = op.inputs[3]
        origin, names = _origin(graph, producers, mask)
        mask_source = producers[mask].source_location if mask in producers else ""
        kind = (
            op.source_location,
            mask_source,
            *(_NUMBER.sub("*", text) for text in (op.module_path, origin or "", *names)),
        )
        calls = by_kind.get(kind) or MaskedCalls(
            module=op.module_path,
            source=op.source_location,
            count=0,
            mask_source=mask_source,
            origin=origin,
            names=names,
        )
        by_kind[kind] = replace(calls, count=calls.count + 1)
    return tuple(by_kind.values())


def _origin(graph: Graph, producers: Mapping[int, Op], mask: int) -> tuple[ValueKind | None, tuple[str, ...]]:
    """The first kind of values that a mask is computed from, and their names; (None, ()) where it depends on none."""
    seen: set[int] = set()
    stack = [mask]
    while stack:
        value = stack.pop()
        if value not in seen:
            seen.add(value)
            producer = producers.get(value)
            stack.extend(producer.inputs if producer is not None and producer.target not in SHAPE_ONLY else ())
    leaves: list[Value] = [graph.values[value] for value in sorted(seen)]
    kinds: tuple[ValueKind, ...] = ("input", "parameter", "buffer", "constant")
    for kind in kinds:
        if names := tuple(value.name for value in leaves if value.kind == kind):
            return kind, names
    return None, ()


def _input_dependencies(graph: Graph) -> dict[int, frozenset[int]]:
    """Value id -> ids of the model inputs that it is computed from."""
    dependencies = {value.id: frozenset((value.id,) if value.kind == "input" else ()) for value in graph.values}
    for op in graph.ops:
        of_op = frozenset[int]().union(*(dependencies[value] for value in op.inputs))
        dependencies.update(dict.fromkeys(op.outputs, of_op))
    return dependencies


def _before_repeats(graph: Graph, producers: dict[int, Op], value: int) -> tuple[int, list[int]]:
    """Elements of the smallest tensor that ``value`` is rearranged or repeated from, and the ops between the two."""
    smallest, passed, repeat_ops = prod(graph.values[value].shape), [], []
    while (op := producers.get(value)) is not None and op.packet in LAYOUT_OPS and len(op.inputs) == 1:
        value = op.inputs[0]
        passed.append(op.id)
        if prod(graph.values[value].shape) < smallest:
            smallest, repeat_ops = prod(graph.values[value].shape), list(passed)
    return smallest, repeat_ops
