"""The noun every sharding rule produces: an op's dimensions as labels, and what sharding a label means.

A rule names the dims of each tensor input and output by small integers (*labels*), as an einsum does:
``linear(x[b, s, k], w[n, k]) -> out[b, s, n]`` is ``inputs=((0, 1, 3), (2, 3)), outputs=((0, 1, 2),)``. Sharding a
label on a mesh axis shards every tensor that has it; an input without it is replicated and its gradient comes out
``Partial``; an output without it comes out ``Partial``. What that does to an op whose label is none of these is its
``kind``:

    parallel   computed independently along it
    sum        contracted: outputs are partial sums
    inside     the kernel must exchange something along it by itself (statistics, softmax sums); see ``Inside``
    whole      cannot be sharded at this op

Views are rules too: ``groups`` says which input labels, row-major, are the same elements as which output labels.
"""

from dataclasses import dataclass
from typing import Literal

LabelKind = Literal["parallel", "sum", "inside", "whole"]
ComputeKind = Literal["matmul", "attention", "memory", "free"]
NO_LABEL = -1  # a dim of size one that broadcasts, or one that no rule may shard


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCollectives:
    """What an op with a sharded ``inside`` label all-reduces by itself, whole bytes of each exchange at the traced
    batch; ``labels`` are the labels of the exchanged tensors, which divide the bytes where they are sharded on other
    axes."""

    forward_bytes: tuple[int, ...]
    backward_bytes: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpShardingRule:
    """How one op may be sharded. ``inputs`` and ``outputs`` give a label per dim of each tensor.

    ``roles`` of a matmul: label -> "b", "m", "n" or "k" (batched, rows, columns, contracted); of attention: label ->
    "b", "h", "q", "k", "d". ``passes_gradient``: a replicated input may have a partial gradient if the output has
    (true of every op that is linear in the gradient of one input). ``passes_partial``: the op is linear in that input,
    so a partial sum may pass through. ``carrier`` is the input these two speak of. ``known`` is False for the last
    resort. ``local_form``: labels along which a rank runs something else than the op itself on its shards; the function
    that made the rule says what.
    """

    input_labels: tuple[tuple[int, ...], ...]
    output_labels: tuple[tuple[int, ...], ...]
    label_kinds: tuple[LabelKind, ...]
    compute: ComputeKind = "memory"
    roles: tuple[tuple[int, str], ...] = ()
    view_groups: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()
    hidden_label_sizes: tuple[
        tuple[int, int], ...
    ] = ()  # sizes of labels that no tensor shows (the 3 of a fused q, k, v)
    kernel_collectives: KernelCollectives | None = None
    passes_partial_gradient: bool = False
    passes_partial: bool = False
    linear_input: int = 0
    pointwise: bool = False
    is_known: bool = True
    local_form_labels: tuple[int, ...] = ()
