"""Rules of ops that look up, pick or count by position: embedding, index, gather, scatter, one_hot, flip, histograms.

An option never permutes rows inside a rank: every element stays where the op puts it, as ranks that read the result
elsewhere rely on its order.
"""

from collections.abc import Sequence
from typing import Any

from autopar.graph.ir import Op, Value
from autopar.rules.op_sharding_rule import NO_LABEL, OpShardingRule
from autopar.rules.rule_builder import ShardingRuleBuilder, broadcast_labels, normalized_dims, replicated_rule


def embedding(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """weight[v, h], ids[...] -> [..., h]. Local form along a sharded vocabulary v: a rank looks up the rows that it has
    and gives zeros for those of other ranks.

    With ``scale_grad_by_freq`` a row's gradient is divided by how often all ids name the row: only h is sharded."""
    labels = ShardingRuleBuilder()
    is_scaled = bool(op.argument(3, "scale_grad_by_freq", False))
    ids = labels.labels_of(inputs[1].shape, "replicated" if is_scaled else "parallel")
    v, h = labels.new_label("replicated" if is_scaled else "sum"), labels.new_label()
    return labels.build([(v, h), ids], [(*ids, h)], local_form_labels=() if is_scaled else (v,))


def index(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """x[v, ...], index[...] -> x[index]: parallel along the dims of the index and along the other dims of x.

    Local form along sharded rows v: as an embedding's, zeros for rows of other ranks."""
    index_per_dim = op.args[1] if len(op.args) > 1 and isinstance(op.args[1], tuple) else ()
    if any(value.dtype == "bool" for value in inputs[1:]):
        return replicated_rule(op, inputs, outputs, known=True)
    if len(index_per_dim) != 1 or len(inputs) != 2:
        return _index_several_dims(index_per_dim, op, inputs, outputs)
    labels = ShardingRuleBuilder()
    looked_up = labels.labels_of(inputs[1].shape)
    rest = labels.labels_of(inputs[0].shape[1:])
    is_floating = inputs[0].dtype.startswith(("float", "bfloat"))
    rows = labels.new_label("sum" if is_floating else "replicated") if inputs[0].shape[0] > 1 else NO_LABEL
    return labels.build(
        [(rows, *rest), looked_up], [(*looked_up, *rest)], local_form_labels=(rows,) if rows != NO_LABEL else ()
    )


def _index_several_dims(
    index_per_dim: tuple[Any, ...], op: Op, inputs: Sequence[Value], outputs: Sequence[Value]
) -> OpShardingRule:
    """x[:, i, j] and the like: dims without an index are parallel, those with one cannot be sharded. The dims to which
    the indices broadcast come in place of the first indexed dim, or first where a dim without an index is between two
    with one."""
    indexed = [dim for dim, entry in enumerate(index_per_dim) if entry is not None]
    if not indexed or len(indexed) != len(inputs) - 1:
        return replicated_rule(op, inputs, outputs, known=True)
    rank = max(len(value.shape) for value in inputs[1:])
    index_shape = tuple(
        max(value.shape[dim - rank] for value in inputs[1:] if len(value.shape) >= rank - dim) for dim in range(rank)
    )
    labels = ShardingRuleBuilder()
    dims = labels.labels_of(inputs[0].shape, replicated=indexed)
    looked_up = labels.labels_of(index_shape)
    are_adjacent = indexed[-1] - indexed[0] == len(indexed) - 1
    start = indexed[0] if are_adjacent else 0
    rest = [label for dim, label in enumerate(dims) if dim not in indexed]
    sides = [broadcast_labels(value.shape, index_shape, looked_up) for value in inputs[1:]]
    return labels.build([dims, *sides], [(*rest[:start], *looked_up, *rest[start:])])


def index_select(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """x picked along ``dim`` by a vector of indices: parallel along the indices and along the other dims of x."""
    shape = inputs[0].shape
    argument = op.argument(1, "dim", 0)
    if not shape or not isinstance(argument, int) or len(inputs) != 2 or len(inputs[1].shape) != 1:
        return replicated_rule(op, inputs, outputs, known=True)
    picked = argument % len(shape)
    labels = ShardingRuleBuilder()
    dims = labels.labels_of(shape, replicated={picked})
    looked_up = labels.labels_of(inputs[1].shape)
    return labels.build([dims, looked_up], [(*dims[:picked], *looked_up, *dims[picked + 1 :])])


def index_add(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """index_add(x, dim, index, source): the dims other than ``dim`` are parallel."""
    shape = inputs[0].shape
    if not shape or len(inputs) != 3 or len(inputs[2].shape) != len(shape):
        return replicated_rule(op, inputs, outputs, known=True)
    acted = {op.argument(1, "dim", 0) % len(shape)}
    labels = ShardingRuleBuilder()
    dims = labels.labels_of(shape, replicated=acted)
    source = labels.labels_like(inputs[2].shape, dims, replicated=acted)
    return labels.build([dims, labels.labels_of(inputs[1].shape, "replicated"), source], [dims])


def histc(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """histc(x, bins, min, max): the counts of shards add up, unless the range is that of x itself (min = max)."""
    labels = ShardingRuleBuilder()
    has_range = op.argument(2, "min", 0) != op.argument(3, "max", 0)
    return labels.build([labels.labels_of(inputs[0].shape, "sum" if has_range else "replicated")], [(NO_LABEL,)])


def gather(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """gather, take_along_dim, scatter and the like: x[...] picked or written along ``dim`` by an index of the same rank.
    Other dims of one size in all tensors are parallel. ``dim`` of x cannot be sharded; the picks of a gather are
    independent."""
    tensors = (*inputs, *outputs)
    rank = len(inputs[0].shape)
    argument = op.argument(2 if op.target.startswith("aten.take_along_dim") else 1, "dim")
    if not rank or type(argument) is not int or any(len(value.shape) != rank for value in tensors):
        return replicated_rule(op, inputs, outputs, known=True)
    acted = argument % rank
    labels = ShardingRuleBuilder()
    shared = [
        labels.new_label() if dim != acted and len({value.shape[dim] for value in tensors}) == 1 else None
        for dim in range(rank)
    ]
    picks = labels.new_label() if op.target.startswith(("aten.gather.", "aten.take_along_dim")) else None

    def labels_of(value: Value, *, has_picks: bool) -> tuple[int, ...]:
        """``has_picks``: the index and the result, whose elements along ``dim`` are the picks of a gather."""
        dims = []
        for dim, size in enumerate(value.shape):
            label = picks if has_picks and dim == acted else shared[dim]
            dims.append(NO_LABEL if size == 1 else label if label is not None else labels.new_label("replicated"))
        return tuple(dims)

    return labels.build(
        [labels_of(value, has_picks=position == 1) for position, value in enumerate(inputs)],
        [labels_of(value, has_picks=True) for value in outputs],
    )


def one_hot(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """index[...] -> [..., classes]: the classes cannot be sharded."""
    labels = ShardingRuleBuilder()
    dims = labels.labels_of(inputs[0].shape)
    return labels.build([dims], [(*dims, *labels.labels_of(outputs[0].shape[-1:], "replicated"))])


def flip_roll_or_tril(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """flip, roll, tril, triu, repeat_interleave by a number or by a vector, which is replicated: the dims acted on cannot be
    sharded, the others are parallel."""
    name = op.packet
    rank = len(inputs[0].shape)
    if name in ("tril", "triu"):
        acted = frozenset((rank - 2, rank - 1))
    else:
        argument = op.argument(1 if name == "flip" else 2, "dim" if name == "repeat_interleave" else "dims", None)
        if argument is None or argument == () or len(outputs[0].shape) != rank:
            return replicated_rule(op, inputs, outputs, known=True)
        acted = normalized_dims(argument, rank)
    labels = ShardingRuleBuilder()
    dims = labels.labels_of(inputs[0].shape, replicated=acted)
    out = labels.labels_like(outputs[0].shape, dims, replicated=acted)
    counts = [labels.labels_of(value.shape, "replicated") for value in inputs[1:]]
    return labels.build([dims, *counts], [out], passes_partial_gradient=True, passes_partial=not counts)
