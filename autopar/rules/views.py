"""Rules of ops that rearrange: reshapes, permutes, expands, splits, slices, concatenations."""

from collections.abc import Sequence

from autopar.graph.ir import Op, Value
from autopar.rules.op_sharding_rule import NO_LABEL, OpShardingRule
from autopar.rules.rule_builder import ShardingRuleBuilder, broadcast_labels

PASSES_PARTIAL = {"passes_partial_gradient": True, "passes_partial": True}


def reshape(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """The smallest runs of dims with equal products are the same elements on both sides."""
    source, target = inputs[0].shape, outputs[0].shape
    labels = ShardingRuleBuilder()
    before, after = labels.labels_of(source), labels.labels_of(target)
    groups = []
    i = j = 0
    while i < len(source) and j < len(target):
        ins, outs, left, right = [before[i]], [after[j]], source[i], target[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right and i < len(source):
                ins.append(before[i])
                left, i = left * source[i], i + 1
            elif j < len(target):
                outs.append(after[j])
                right, j = right * target[j], j + 1
            else:
                break
        sides = tuple(tuple(label for label in side if label != NO_LABEL) for side in (ins, outs))
        if all(sides):
            groups.append((sides[0], sides[1]))
    return labels.build([before], [after], compute="free", view_groups=tuple(groups), **PASSES_PARTIAL)


def permute(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """transpose, permute, t, movedim: labels follow their dims."""
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
    else:  # t, and the like: all dims the other way round
        order.reverse()
    labels = ShardingRuleBuilder()
    dims = labels.labels_of(inputs[0].shape)
    return labels.build([dims], [tuple(dims[dim] for dim in order)], compute="free", **PASSES_PARTIAL)


def _movedim_order(rank: int, sources: int | tuple[int, ...], targets: int | tuple[int, ...]) -> list[int]:
    given = sources if isinstance(sources, tuple) else (sources,)
    wanted = targets if isinstance(targets, tuple) else (targets,)
    places = {to % rank: dim % rank for dim, to in zip(given, wanted, strict=True)}
    rest = iter(dim for dim in range(rank) if dim not in places.values())
    return [places[at] if at in places else next(rest) for at in range(rank)]


def copy_or_cast(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """clone, contiguous, alias, detach, to: one tensor, the same dims."""
    labels = ShardingRuleBuilder()
    dims = labels.labels_of(inputs[0].shape)
    sides = [broadcast_labels(value.shape, inputs[0].shape, dims) for value in inputs]
    linear = len(inputs) == 1 and inputs[0].dtype.startswith(("float", "bfloat"))
    passing = PASSES_PARTIAL if linear else {}
    return labels.build(sides, [dims], pointwise=op.target.startswith("aten.to"), **passing)


def expand(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """New and broadcast dims are labels of the output alone."""
    labels = ShardingRuleBuilder()
    dims = labels.labels_of(outputs[0].shape)
    sides = [broadcast_labels(value.shape, outputs[0].shape, dims) for value in inputs]
    passing = PASSES_PARTIAL if len(inputs) == 1 else {}
    return labels.build(sides, [dims], compute="free", **passing)


def repeat(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """repeat, tile: dims that stay as they are are parallel; those that are repeated are whole."""
    source, target = inputs[0].shape, outputs[0].shape
    labels = ShardingRuleBuilder()
    dims, out = [], []
    for at, size in enumerate(target):
        before = at - (len(target) - len(source))
        same = before >= 0 and source[before] == size
        out.append(labels.new_label("parallel" if same else "whole") if size != 1 else NO_LABEL)
        if before >= 0:
            dims.append(out[-1] if same else labels.new_label("whole") if source[before] != 1 else NO_LABEL)
    return labels.build([tuple(dims)], [tuple(out)], **PASSES_PARTIAL)


def diagonal(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """diagonal(offset, dim1, dim2): the two dims become one, the last; the others are parallel."""
    shape = inputs[0].shape
    acted = [op.argument(at, f"dim{at - 1}", at - 2) % len(shape) for at in (2, 3)]
    labels = ShardingRuleBuilder()
    dims = tuple(
        labels.new_label("whole" if at in acted else "parallel") if n != 1 else NO_LABEL for at, n in enumerate(shape)
    )
    last = labels.new_label("whole") if outputs[0].shape[-1] != 1 else NO_LABEL
    return labels.build([dims], [(*(d for at, d in enumerate(dims) if at not in acted), last)], **PASSES_PARTIAL)


def diag_embed(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """diag_embed(offset, dim1, dim2): the last dim becomes two; the others are parallel."""
    target = outputs[0].shape
    acted = [op.argument(at, f"dim{at - 1}", at - 4) % len(target) for at in (2, 3)]
    labels = ShardingRuleBuilder()
    out = tuple(
        labels.new_label("whole" if at in acted else "parallel") if n != 1 else NO_LABEL for at, n in enumerate(target)
    )
    last = labels.new_label("whole") if inputs[0].shape[-1] != 1 else NO_LABEL
    return labels.build([(*(d for at, d in enumerate(out) if at not in acted), last)], [out], **PASSES_PARTIAL)


def split(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """split, chunk, unbind: equal parts of a dim are cut together (strided in the whole); unequal parts are not, and no
    rank may hold some of the parts only."""
    shape = inputs[0].shape
    dim = op.argument(1 if "unbind" in op.target else 2, "dim", 0) % len(shape)
    labels = ShardingRuleBuilder()
    dims = list(labels.labels_of(shape))
    if "unbind" in op.target:
        if dims[dim] != NO_LABEL:
            labels.kinds[dims[dim]] = "whole"
        out = tuple(label for at, label in enumerate(dims) if at != dim)
        return labels.build([tuple(dims)], [out] * len(outputs), compute="free", **PASSES_PARTIAL)
    if len({value.shape for value in outputs}) == 1 and len(outputs) * outputs[0].shape[dim] == shape[dim]:
        part, inner = labels.new_label("whole"), labels.new_label()
        out = tuple(inner if at == dim else label for at, label in enumerate(dims))
        return labels.build(
            [tuple(dims)],
            [out] * len(outputs),
            compute="free",
            view_groups=(((dims[dim],), (part, inner)),),
            hidden_label_sizes=((part, len(outputs)),),
            **PASSES_PARTIAL,
        )
    return _split_unevenly(labels, dims, dim, inputs, outputs)


def slice_select_or_pad(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """slice, select, narrow, flip, pad, cumsum, sort ...: dims that keep their size are parallel but for the one acted
    on."""
    shape, target = inputs[0].shape, outputs[0].shape
    labels = ShardingRuleBuilder()
    dims = list(labels.labels_of(shape))
    if len(shape) == len(target):
        acted = {at for at, (a, b) in enumerate(zip(shape, target, strict=True)) if a != b}
        left = {at: labels.new_label("whole") if target[at] != 1 else NO_LABEL for at in sorted(acted)}
        out = tuple(left.get(at, label) for at, label in enumerate(dims))
        for at in acted:
            if dims[at] != NO_LABEL:
                labels.kinds[dims[at]] = "whole"
        return labels.build([tuple(dims)], [out], compute="free", **PASSES_PARTIAL)
    dim = op.argument(1, "dim", 0) % len(shape)
    if dims[dim] != NO_LABEL:
        labels.kinds[dims[dim]] = "whole"
    out = tuple(label for at, label in enumerate(dims) if at != dim)
    return labels.build([tuple(dims)], [out], compute="free", **PASSES_PARTIAL)


def slice_scatter(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """slice_scatter, select_scatter (x, part, dim, ...): part is written into x along ``dim``, which is whole."""
    shape = inputs[0].shape
    dim = op.argument(2, "dim", 0) % len(shape)
    labels = ShardingRuleBuilder()
    dims = [
        labels.new_label("whole" if at == dim else "parallel") if n != 1 else NO_LABEL for at, n in enumerate(shape)
    ]
    part = [dims[at] for at in range(len(shape)) if at != dim]
    if "slice" in op.target:
        part.insert(dim, labels.new_label("whole") if inputs[1].shape[dim] != 1 else NO_LABEL)
    return labels.build([tuple(dims), tuple(part)], [tuple(dims)])


def cat_or_stack(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """cat and stack: the joined dim stays whole, the others are parallel. cat takes a vector of no elements as
    nothing."""
    rank = len(outputs[0].shape)
    dim = op.argument(1, "dim", 0) % rank
    labels = ShardingRuleBuilder()
    dims = list(labels.labels_of(outputs[0].shape))
    if dims[dim] != NO_LABEL:
        labels.kinds[dims[dim]] = "whole"
    if "stack" in op.target:
        sides = [tuple(label for at, label in enumerate(dims) if at != dim)] * len(inputs)
    else:
        sides = [
            tuple(
                (labels.new_label("whole") if size != 1 else NO_LABEL) if at == dim else dims[at]
                for at, size in enumerate(value.shape)
            )
            if value.shape != (0,)
            else (NO_LABEL,)
            for value in inputs
        ]
    return labels.build(sides, [tuple(dims)])


def _split_unevenly(
    labels: ShardingRuleBuilder, dims: list[int], dim: int, inputs: Sequence[Value], outputs: Sequence[Value]
) -> OpShardingRule:
    if dims[dim] != NO_LABEL:
        labels.kinds[dims[dim]] = "whole"
    outs = [
        tuple(
            (labels.new_label("whole") if value.shape[dim] != 1 else NO_LABEL) if at == dim else label
            for at, label in enumerate(dims)
        )
        for value in outputs
    ]
    return labels.build([tuple(dims)], outs, compute="free", **PASSES_PARTIAL)


def complex_view(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """view_as_complex and view_as_real: the last dim of the real tensor holds both parts, the others are the same."""
    real, other = (inputs[0], outputs[0]) if "complex" in op.target else (outputs[0], inputs[0])
    labels = ShardingRuleBuilder()
    dims = labels.labels_of(other.shape)
    sides = [(*dims, labels.new_label("whole")), dims]
    assert len(real.shape) == len(other.shape) + 1
    return labels.build([sides[0 if real is inputs[0] else 1]], [sides[1 if real is inputs[0] else 0]], compute="free")
