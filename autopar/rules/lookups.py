"""Rules of ops that look up, pick or count by position: embedding, index, gather, scatter, one_hot, flip, histograms.

They hold value by value: an option never permutes rows inside a rank, as a reader elsewhere would see another order.
"""

from collections.abc import Sequence
from typing import Any

from autopar.graph.ir import Op, Value
from autopar.rules.op_sharding_rule import NO_LABEL, OpShardingRule
from autopar.rules.rule_builder import ShardingRuleBuilder, broadcast_labels, replicated_rule


def embedding(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """weight[v, h], ids[...] -> [..., h]: a shard of the vocabulary looks up what it has, zero otherwise (its local
    form)."""
    labels = ShardingRuleBuilder()
    ids = labels.labels_of(inputs[1].shape)
    v, h = labels.new_label("sum"), labels.new_label()
    return labels.build([(v, h), ids], [(*ids, h)], local_form_labels=(v,))


def index(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """x[v, ...], index[...] -> x[index]: the rows that are asked for are independent, and so are the other dims.

    Local form of cut rows v: as a look-up in a part of a vocabulary, zeros for the rows that others hold."""
    places = op.args[1] if len(op.args) > 1 and isinstance(op.args[1], tuple) else ()
    if any(value.dtype == "bool" for value in inputs[1:]):
        return replicated_rule(op, inputs, outputs, known=True)
    if len(places) != 1 or len(inputs) != 2:
        return _index_several_dims(places, op, inputs, outputs)
    labels = ShardingRuleBuilder()
    asked = labels.labels_of(inputs[1].shape)
    rest = labels.labels_of(inputs[0].shape[1:])
    floats = inputs[0].dtype.startswith(("float", "bfloat"))
    rows = labels.new_label("sum" if floats else "whole") if inputs[0].shape[0] > 1 else NO_LABEL
    return labels.build(
        [(rows, *rest), asked], [(*asked, *rest)], local_form_labels=(rows,) if rows != NO_LABEL else ()
    )


def _index_several_dims(
    places: tuple[Any, ...], op: Op, inputs: Sequence[Value], outputs: Sequence[Value]
) -> OpShardingRule:
    """x[:, i, j] and kin: dims without an index are parallel, those with one whole; the dims of the indices, which
    broadcast, stand where the first of them stood, or in front where a dim without an index lies between them."""
    indexed = [at for at, place in enumerate(places) if place is not None]
    if not indexed or len(indexed) != len(inputs) - 1:
        return replicated_rule(op, inputs, outputs, known=True)
    rank = max(len(value.shape) for value in inputs[1:])
    asked_shape = tuple(
        max(value.shape[at - rank] for value in inputs[1:] if len(value.shape) >= rank - at) for at in range(rank)
    )
    labels = ShardingRuleBuilder()
    dims = tuple(
        NO_LABEL if size == 1 else labels.new_label("whole" if at in indexed else "parallel")
        for at, size in enumerate(inputs[0].shape)
    )
    asked = labels.labels_of(asked_shape)
    together = indexed[-1] - indexed[0] == len(indexed) - 1
    start = indexed[0] if together else 0
    rest = [label for at, label in enumerate(dims) if at not in indexed]
    sides = [broadcast_labels(value.shape, asked_shape, asked) for value in inputs[1:]]
    return labels.build([dims, *sides], [(*rest[:start], *asked, *rest[start:])])


def index_select(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """x picked along ``dim`` by a vector: what is asked for is independent, and so are the other dims."""
    shape = inputs[0].shape
    dim = op.argument(1, "dim", 0)
    if not shape or not isinstance(dim, int) or len(inputs) != 2 or len(inputs[1].shape) != 1:
        return replicated_rule(op, inputs, outputs, known=True)
    labels = ShardingRuleBuilder()
    dims = [
        labels.new_label("whole" if at == dim % len(shape) else "parallel") if n != 1 else NO_LABEL
        for at, n in enumerate(shape)
    ]
    asked = labels.labels_of(inputs[1].shape)[0]
    return labels.build(
        [tuple(dims), (asked,)], [tuple(asked if at == dim % len(shape) else d for at, d in enumerate(dims))]
    )


def index_add(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """index_add(x, dim, index, source): the dims other than ``dim`` are parallel."""
    shape = inputs[0].shape
    dim = op.argument(1, "dim", 0)
    if not shape or len(inputs) != 3 or len(inputs[2].shape) != len(shape):
        return replicated_rule(op, inputs, outputs, known=True)
    labels = ShardingRuleBuilder()
    dims = [
        labels.new_label("whole" if at == dim % len(shape) else "parallel") if n != 1 else NO_LABEL
        for at, n in enumerate(shape)
    ]
    source = [
        (labels.new_label("whole") if n != 1 else NO_LABEL) if at == dim % len(shape) else dims[at]
        for at, n in enumerate(inputs[2].shape)
    ]
    return labels.build([tuple(dims), labels.labels_of(inputs[1].shape, "whole"), tuple(source)], [tuple(dims)])


def histc(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """histc(x, bins, min, max): counts of parts add up, unless the range is that of x itself (min = max)."""
    labels = ShardingRuleBuilder()
    fixed = op.argument(2, "min", 0) != op.argument(3, "max", 0)
    return labels.build([labels.labels_of(inputs[0].shape, "sum" if fixed else "whole")], [(NO_LABEL,)])


def gather(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """gather, scatter, index_select and kin: x[...] picked along ``dim`` by an index of the same rank. A dim of one
    size in all tensors is parallel; ``dim`` is whole, but that each element a gather asks for is independent."""
    tensors = (*inputs, *outputs)
    rank = len(inputs[0].shape)
    dim = op.argument(2 if op.target.startswith("aten.take_along_dim") else 1, "dim")
    if not rank or type(dim) is not int or any(len(value.shape) != rank for value in tensors):
        return replicated_rule(op, inputs, outputs, known=True)
    labels = ShardingRuleBuilder()
    shared = [
        labels.new_label() if at != dim % rank and len({value.shape[at] for value in tensors}) == 1 else None
        for at in range(rank)
    ]
    picked = labels.new_label() if op.target.startswith(("aten.gather.", "aten.take_along_dim")) else None

    def dims(value: Value, *, asks: bool) -> tuple[int, ...]:
        found = []
        for at, size in enumerate(value.shape):
            label = picked if asks and at == dim % rank else shared[at]
            found.append(NO_LABEL if size == 1 else label if label is not None else labels.new_label("whole"))
        return tuple(found)

    return labels.build(
        [dims(value, asks=at == 1) for at, value in enumerate(inputs)], [dims(value, asks=True) for value in outputs]
    )


def one_hot(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """index[...] -> [..., classes]: the classes are whole."""
    labels = ShardingRuleBuilder()
    dims = labels.labels_of(inputs[0].shape)
    last = outputs[0].shape[-1]
    return labels.build([dims], [(*dims, labels.new_label("whole") if last != 1 else NO_LABEL)])


def flip_roll_or_tril(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """flip, roll, tril, triu, repeat_interleave by a number: the dims acted on are whole, the others parallel."""
    name = op.packet
    rank = len(inputs[0].shape)
    if name in ("tril", "triu"):
        acted = {rank - 2, rank - 1}
    else:
        given = op.argument(1 if name == "flip" else 2, "dim" if name == "repeat_interleave" else "dims", None)
        if given is None or given == () or len(outputs[0].shape) != rank:
            return replicated_rule(op, inputs, outputs, known=True)
        acted = {dim % rank for dim in (given if isinstance(given, tuple) else (given,))}
    labels = ShardingRuleBuilder()
    dims = tuple(
        NO_LABEL if size == 1 else labels.new_label("whole" if at in acted else "parallel")
        for at, size in enumerate(inputs[0].shape)
    )
    out = tuple(
        (NO_LABEL if size == 1 else labels.new_label("whole")) if at in acted else dims[at]
        for at, size in enumerate(outputs[0].shape)
    )
    return labels.build([dims], [out], passes_partial_gradient=True, passes_partial=True)
