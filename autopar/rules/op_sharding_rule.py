"""The noun that every rule function returns: an op's dims as labels, and what sharding a label means.

A rule names the dims of each tensor input and output by small integers (*labels*), as an einsum does:
``linear(x[b, s, k], w[n, k]) -> out[b, s, n]`` is ``input_labels=((0, 1, 3), (2, 3)), output_labels=((0, 1, 2),)``.
Sharding a label over a mesh axis shards every tensor that has it. An input without it is replicated, with a partial
gradient; an output without it is partial. What sharding a label means for the op is its *kind*:

    parallel     computed independently along it
    sum          contracted: outputs without it are partial sums
    collective   the kernel must run collectives along it (statistics, softmax sums): see ``KernelCollectives``
    replicated   cannot be sharded at this op

Views are rules too: ``view_groups`` says which input labels, row-major, have the same elements as which output labels.
"""

from dataclasses import dataclass
from typing import Literal

LabelKind = Literal["parallel", "sum", "collective", "replicated"]
ComputeKind = Literal["matmul", "attention", "memory", "free"]
NO_LABEL = -1  # a dim of size one that broadcasts, or one that no rule may shard


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCollectives:
    """What an op with a sharded label of kind "collective" all-reduces by itself: the bytes of each all-reduce at the
    traced batch, with no other label sharded. ``labels`` are the labels of the reduced tensors, which divide these bytes
    where they are sharded over other axes."""

    forward_bytes: tuple[int, ...]
    backward_bytes: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpShardingRule:
    """How one op may be sharded.

    ``input_labels`` and ``output_labels`` have a label for each dim of each tensor, ``label_kinds`` a kind for each
    label. ``roles`` of a matmul: label -> "b", "m", "n" or "k" (batched, rows, columns, contracted); of attention: label
    -> "b", "h", "q", "k" or "d". ``hidden_label_sizes`` are the sizes of labels that no tensor shows (the 3 of a fused
    q, k, v).

    ``passes_partial_gradient``: a replicated input may have a partial gradient if the output has (true of every op that
    is linear in the gradient of one input). ``passes_partial``: the op is linear in that input, so its result may be
    partial if the input is. Both are about the input at position ``linear_input``.

    ``local_form_labels`` are the labels along which a rank runs something else than the op itself on its shards; the
    rule function says what. ``is_known`` is False for an op that has no rule and is replicated.
    """

    input_labels: tuple[tuple[int, ...], ...]
    output_labels: tuple[tuple[int, ...], ...]
    label_kinds: tuple[LabelKind, ...]
    compute: ComputeKind = "memory"
    roles: tuple[tuple[int, str], ...] = ()
    view_groups: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()
    hidden_label_sizes: tuple[tuple[int, int], ...] = ()
    kernel_collectives: KernelCollectives | None = None
    passes_partial_gradient: bool = False
    passes_partial: bool = False
    linear_input: int = 0
    pointwise: bool = False
    is_known: bool = True
    local_form_labels: tuple[int, ...] = ()
