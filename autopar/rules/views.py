"""Rules of ops that rearrange: reshapes, permutes, expands, splits, slices, concatenations."""

from collections.abc import Sequence

from autopar.graph.ir import Op, Value
from autopar.rules.op_sharding_rule import NO_LABEL, OpShardingRule
from autopar.rules.rule_builder import ShardingRuleBuilder, broadcast_labels, normalized_dims

PASSES_PARTIAL = {"passes_partial_gradient": True, "passes_partial": True}


def reshape(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """view, reshape, flatten, squeeze ...: the shortest sequences of dims with equal products on both sides have the
    same elements, and are a view group each."""
    source, target = inputs[0].shape, outputs[0].shape
    labels = ShardingRuleBuilder()
    before, after = labels.labels_of(source), labels.labels_of(target)
    groups = []
    i = j = 0
    while i < len(source) and j < len(target):
        ins, outs, in_size, out_size = [before[i]], [after[j]], source[i], target[j]
        i, j = i + 1, j + 1
        while in_size != out_size:
            if in_size < out_size and i < len(source):
                ins.append(before[i])
                in_size, i = in_size * source[i], i + 1
            elif j < len(target):
                outs.append(after[j])
                out_size, j = out_size * target[j], j + 1
            else:
                break
        sides = tuple(tuple(label for label in side if label != NO_LABEL) for side in (ins, outs))
        if all(sides):
            groups.append((sides[0], sides[1]))
    return labels.build([before], [after], compute="free", view_groups=tuple(groups), **PASSES_PARTIAL)


def permute(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """transpose, permute, t, movedim ...: labels go with their dims."""
    rank = len(inputs[0].shape)
    name = op.packet
    order = list(range(rank))
    if name == "permute":
        order = [dim % rank for dim in op.args[1]]
    elif name in ("transpose", "swapaxes", "swapdims"):
        first, second = op.args[1] % rank, op.args[2] % rank
        order[first], order[second] = order[second], order[first]
    elif name in ("movedim", "moveaxis"):
        order = _movedim_order(rank, op.args[1], op.args[2])
    elif name in ("mT", "mH", "adjoint"):
        order[-2:] = reversed(order[-2:])
    else:  # t, numpy_T: all dims in reverse
        order.reverse()
    labels = ShardingRuleBuilder()
    dims = labels.labels_of(inputs[0].shape)
    return labels.build([dims], [tuple(dims[dim] for dim in order)], compute="free", **PASSES_PARTIAL)


def _movedim_order(rank: int, sources: int | tuple[int, ...], targets: int | tuple[int, ...]) -> list[int]:
    """The permutation of movedim: the input's dim for each dim of the output."""
    from_dims = sources if isinstance(sources, tuple) else (sources,)
    to_dims = targets if isinstance(targets, tuple) else (targets,)
    moved = {to % rank: dim % rank for dim, to in zip(from_dims, to_dims, strict=True)}
    rest = iter(dim for dim in range(rank) if dim not in moved.values())
    return [moved[dim] if dim in moved else next(rest) for dim in range(rank)]


def copy_or_cast(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """clone, contiguous, alias, detach, to: the output has the dims of the input. Partial sums pass where nothing is
    rounded to an integer or a truth value."""
    labels = ShardingRuleBuilder()
    dims = labels.labels_of(inputs[0].shape)
    sides = [broadcast_labels(value.shape, inputs[0].shape, dims) for value in inputs]
    linear = len(inputs) == 1 and all(
        value.dtype.startswith(("float", "bfloat", "complex")) for value in (*inputs, *outputs)
    )
    passing = PASSES_PARTIAL if linear else {}
    return labels.build(sides, [dims], pointwise=op.target.startswith("aten.to"), **passing)


def expand(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """expand, broadcast_to: new and broadcast dims have labels of the output only."""
    labels = ShardingRuleBuilder()
    dims = labels.labels_of(outputs[0].shape)
    sides = [broadcast_labels(value.shape, outputs[0].shape, dims) for value in inputs]
    passing = PASSES_PARTIAL if len(inputs) == 1 else {}
    return labels.build(sides, [dims], compute="free", **passing)


def repeat(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """repeat, tile: dims that keep their size are parallel; those that are repeated cannot be sharded."""
    source, target = inputs[0].shape, outputs[0].shape
    num_new = len(target) - len(source)
    labels = ShardingRuleBuilder()
    dims, out = [], []
    for dim, size in enumerate(target):
        same = dim >= num_new and source[dim - num_new] == size
        out.append(labels.new_label("parallel" if same else "replicated") if size != 1 else NO_LABEL)
        if same:
            dims.append(out[-1])
        elif dim >= num_new:
            dims.append(labels.new_label("replicated") if source[dim - num_new] != 1 else NO_LABEL)
    return labels.build([tuple(dims)], [tuple(out)], **PASSES_PARTIAL)


def diagonal(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """diagonal(offset, dim1, dim2): the two dims become one, the last; the others are parallel."""
    shape = inputs[0].shape
    acted = normalized_dims(
        [op.argument(position, f"dim{position - 1}", position - 2) for position in (2, 3)], len(shape)
    )
    labels = ShardingRuleBuilder()
    dims = labels.labels_of(shape, replicated=acted)
    last = labels.labels_of(outputs[0].shape[-1:], "replicated")
    return labels.build(
        [dims], [(*(label for dim, label in enumerate(dims) if dim not in acted), *last)], **PASSES_PARTIAL
    )


def diag_embed(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """diag_embed(offset, dim1, dim2): the last dim becomes two; the others are parallel."""
    target = outputs[0].shape
    acted = normalized_dims(
        [op.argument(position, f"dim{position - 1}", position - 4) for position in (2, 3)], len(target)
    )
    labels = ShardingRuleBuilder()
    out = labels.labels_of(target, replicated=acted)
    last = labels.labels_of(inputs[0].shape[-1:], "replicated")
    return labels.build(
        [(*(label for dim, label in enumerate(out) if dim not in acted), *last)], [out], **PASSES_PARTIAL
    )


def split(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """split, chunk, unbind: equal parts of a dim are sharded alike (a strided shard of the input); unequal parts cannot
    be sharded along it, and every rank has a shard of every part."""
    shape = inputs[0].shape
    acted = op.argument(1 if "unbind" in op.target else 2, "dim", 0) % len(shape)
    labels = ShardingRuleBuilder()
    if "unbind" in op.target:
        dims = labels.labels_of(shape, replicated={acted})
        out = (*dims[:acted], *dims[acted + 1 :])
        return labels.build([dims], [out] * len(outputs), compute="free", **PASSES_PARTIAL)
    if len({value.shape for value in outputs}) == 1 and len(outputs) * outputs[0].shape[acted] == shape[acted]:
        dims = labels.labels_of(shape)
        part, inner = labels.new_label("replicated"), labels.new_label()
        return labels.build(
            [dims],
            [(*dims[:acted], inner, *dims[acted + 1 :])] * len(outputs),
            compute="free",
            view_groups=(((dims[acted],), (part, inner)),),
            hidden_label_sizes=((part, len(outputs)),),
            **PASSES_PARTIAL,
        )
    dims = labels.labels_of(shape, replicated={acted})
    parts = [labels.labels_like(value.shape, dims, replicated={acted}) for value in outputs]
    return labels.build([dims], parts, compute="free", **PASSES_PARTIAL)


def slice_or_select(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """slice, narrow: dims that change their size cannot be sharded, the others are parallel. select: the dim that goes
    cannot be sharded."""
    shape, target = inputs[0].shape, outputs[0].shape
    labels = ShardingRuleBuilder()
    if len(shape) == len(target):
        resized = {dim for dim, (before, after) in enumerate(zip(shape, target, strict=True)) if before != after}
        dims = labels.labels_of(shape, replicated=resized)
        out = labels.labels_like(target, dims, replicated=resized)
    else:
        selected = op.argument(1, "dim", 0) % len(shape)
        dims = labels.labels_of(shape, replicated={selected})
        out = (*dims[:selected], *dims[selected + 1 :])
    return labels.build([dims], [out], compute="free", **PASSES_PARTIAL)


def pad(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """pad(x, (before last, after last, before second to last, ...), mode, value): dims that are padded cannot be sharded,
    even where what is added at one end equals what is removed at the other. Partial sums pass unless the padding is a
    constant other than 0, which every rank would add."""
    rank = len(inputs[0].shape)
    amounts = op.argument(1, "pad", ())
    padded = {rank - 1 - position // 2 for position, amount in enumerate(amounts) if amount}
    is_constant = op.packet == "constant_pad_nd" or op.argument(2, "mode", "constant") == "constant"
    value = op.argument(2 if op.packet == "constant_pad_nd" else 3, "value", None)
    labels = ShardingRuleBuilder()
    dims = labels.labels_of(inputs[0].shape, replicated=padded)
    out = labels.labels_like(outputs[0].shape, dims, replicated=padded)
    passes_partial = not (is_constant and value)
    return labels.build([dims], [out], compute="free", passes_partial_gradient=True, passes_partial=passes_partial)


def slice_scatter(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """slice_scatter, select_scatter (x, part, dim, ...): part is written into x along ``dim``, which cannot be
    sharded."""
    shape = inputs[0].shape
    acted = op.argument(2, "dim", 0) % len(shape)
    labels = ShardingRuleBuilder()
    dims = labels.labels_of(shape, replicated={acted})
    if "slice" in op.target:
        part = labels.labels_like(inputs[1].shape, dims, replicated={acted})
    else:
        part = (*dims[:acted], *dims[acted + 1 :])
    return labels.build([dims, part], [dims])


def cat_or_stack(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """cat and stack: the dim along which inputs are joined cannot be sharded, the others are parallel. cat ignores
    vectors without elements."""
    shape = outputs[0].shape
    joined = op.argument(1, "dim", 0) % len(shape)
    labels = ShardingRuleBuilder()
    dims = labels.labels_of(shape, replicated={joined})
    if "stack" in op.target:
        sides = [(*dims[:joined], *dims[joined + 1 :])] * len(inputs)
    else:
        sides = [
            labels.labels_like(value.shape, dims, replicated={joined}) if value.shape != (0,) else (NO_LABEL,)
            for value in inputs
        ]
    return labels.build(sides, [dims])


def complex_view(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """view_as_complex and view_as_real: the real tensor has a last dim of real and imaginary part, which cannot be
    sharded; the other dims are parallel."""
    to_complex = "complex" in op.target
    real, other = (inputs[0], outputs[0]) if to_complex else (outputs[0], inputs[0])
    assert len(real.shape) == len(other.shape) + 1
    labels = ShardingRuleBuilder()
    dims = labels.labels_of(other.shape)
    with_parts = (*dims, labels.new_label("replicated"))
    return labels.build([with_parts if to_complex else dims], [dims if to_complex else with_parts], compute="free")
