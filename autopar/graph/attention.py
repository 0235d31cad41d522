"""The attentions of a traced model: heads, head size, sequence, and what of keys and values a cache would hold.

Programs repeat grouped keys for all query heads before they attend (Hugging Face's ``repeat_kv``). What is cached is
what was there before: from the call's key and value back through ops that only move or repeat elements, the smallest
tensor.
"""

from dataclasses import dataclass
from math import prod

from autopar.graph.ir import Graph, Op

MOVES = frozenset(
    (
        "expand", "repeat", "repeat_interleave", "reshape", "view", "_unsafe_view", "unsqueeze", "squeeze", "transpose",
        "permute", "contiguous", "clone", "flatten", "unflatten", "alias",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """``op`` attends ``heads`` heads of ``head_dim`` over ``sequence`` queries and ``key_sequence`` keys; a token's
    keys are ``key_elements`` numbers and its values ``value_elements``. ``moving`` are the ops that repeat keys and
    values for the call, which a kernel that reads the cache does not need. ``masked``: causal, or under a mask that may
    be. ``crossing``: its keys come of a model input that its queries do not come of, as a decoder's from an encoder."""

    op: int
    heads: int
    head_dim: int
    sequence: int
    key_sequence: int
    key_elements: int
    value_elements: int
    moving: tuple[int, ...]
    masked: bool
    crossing: bool

    @property
    def kv_heads(self) -> int:
        return max(self.key_elements // self.head_dim, 1)


def attention_calls(graph: Graph) -> tuple[AttentionCall, ...]:
    """Calls of scaled dot product attention, in order.

    Example: Llama 3 8B has 32 calls of 32 heads whose keys are 8 * 128 numbers a token."""
    makers = graph.producers()
    origins = _origins(graph)
    found = []
    for op in graph.ops:
        if not op.is_attention:
            continue
        query, key = (graph.values[value].shape for value in op.inputs[:2])
        samples = graph.batch.traced * key[-2]
        (keys, moving_keys), (values, moving_values) = (_cached(graph, makers, value) for value in op.inputs[1:3])
        found.append(
            AttentionCall(
                op=op.id,
                heads=prod(query[:-2]) // graph.batch.traced,
                head_dim=query[-1],
                sequence=query[-2],
                key_sequence=key[-2],
                key_elements=keys // samples,
                value_elements=values // samples,
                moving=(*moving_keys, *moving_values),
                masked=len(op.inputs) > 3 or True in op.args[3:] or dict(op.kwargs).get("is_causal") is True,
                crossing=not origins[op.inputs[1]] <= origins[op.inputs[0]],
            )
        )
    return tuple(found)


def _origins(graph: Graph) -> dict[int, frozenset[int]]:
    """Value -> the model inputs that it is computed from."""
    found = {value.id: frozenset((value.id,) if value.kind == "input" else ()) for value in graph.values}
    for op in graph.ops:
        of_op = frozenset[int]().union(*(found[value] for value in op.inputs))
        found.update(dict.fromkeys(op.outputs, of_op))
    return found


def _cached(graph: Graph, makers: dict[int, Op], value: int) -> tuple[int, list[int]]:
    """Elements of the smallest tensor that ``value`` is moved or repeated from, and the ops between."""
    least, passed, behind = prod(graph.values[value].shape), [], []
    while (op := makers.get(value)) is not None and op.packet in MOVES and len(op.inputs) == 1:
        value = op.inputs[0]
        passed.append(op.id)
        if prod(graph.values[value].shape) < least:
            least, behind = prod(graph.values[value].shape), list(passed)
    return least, behind
