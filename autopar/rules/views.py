"""Rules of ops that rearrange: reshapes, permutes, expands, splits, slices, concatenations."""

from collections.abc import Sequence

from autopar.graph.ir import Op, Value
from autopar.rules.labels import Labels, argument, broadcast
from autopar.rules.rule import NO_LABEL, OpRule

PASSES = {"passes_gradient": True, "passes_partial": True}


def reshape(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """The smallest runs of dims with equal products are the same elements on both sides."""
    source, target = inputs[0].shape, outputs[0].shape
    labels = Labels()
    before, after = labels.dims(source), labels.dims(target)
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
    return labels.rule([before], [after], compute="free", groups=tuple(groups), **PASSES)


def permute(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """transpose, permute, t, movedim: labels follow their dims."""
    rank = len(inputs[0].shape)
    if op.target.startswith("aten.permute"):
        order = [dim % rank for dim in op.args[1]]
    elif op.target.startswith("aten.transpose"):
        order = list(range(rank))
        first, second = op.args[1] % rank, op.args[2] % rank
        order[first], order[second] = order[second], order[first]
    else:  # t, and the like, of at most two dims
        order = list(reversed(range(rank)))
    labels = Labels()
    dims = labels.dims(inputs[0].shape)
    return labels.rule([dims], [tuple(dims[dim] for dim in order)], compute="free", **PASSES)


def same(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """clone, contiguous, alias, detach, to: one tensor, the same dims."""
    labels = Labels()
    dims = labels.dims(inputs[0].shape)
    sides = [broadcast(value.shape, inputs[0].shape, dims) for value in inputs]
    linear = len(inputs) == 1 and inputs[0].dtype.startswith(("float", "bfloat"))
    passing = PASSES if linear else {}
    return labels.rule(sides, [dims], pointwise=op.target.startswith("aten.to"), **passing)


def expand(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """New and broadcast dims are labels of the output alone."""
    labels = Labels()
    dims = labels.dims(outputs[0].shape)
    return labels.rule([broadcast(inputs[0].shape, outputs[0].shape, dims)], [dims], compute="free", **PASSES)


def split(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """split, chunk, unbind: equal parts of a dim are cut together (strided in the whole); unequal parts are not, and no
    rank may hold some of the parts only."""
    shape = inputs[0].shape
    dim = argument(op, 1 if "unbind" in op.target else 2, "dim", 0) % len(shape)
    labels = Labels()
    dims = list(labels.dims(shape))
    if "unbind" in op.target:
        if dims[dim] != NO_LABEL:
            labels.kinds[dims[dim]] = "whole"
        out = tuple(label for at, label in enumerate(dims) if at != dim)
        return labels.rule([tuple(dims)], [out] * len(outputs), compute="free", **PASSES)
    if len({value.shape for value in outputs}) == 1 and len(outputs) * outputs[0].shape[dim] == shape[dim]:
        part, inner = labels.new("whole"), labels.new()
        out = tuple(inner if at == dim else label for at, label in enumerate(dims))
        return labels.rule(
            [tuple(dims)],
            [out] * len(outputs),
            compute="free",
            groups=(((dims[dim],), (part, inner)),),
            sizes=((part, len(outputs)),),
            **PASSES,
        )
    return _along(labels, dims, dim, inputs, outputs)


def slices(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """slice, select, narrow, flip, pad, cumsum, sort ...: dims that keep their size are parallel but for the one acted on."""
    shape, target = inputs[0].shape, outputs[0].shape
    labels = Labels()
    dims = list(labels.dims(shape))
    if len(shape) == len(target):
        acted = {at for at, (a, b) in enumerate(zip(shape, target, strict=True)) if a != b}
        out = tuple(labels.new("whole") if at in acted and target[at] != 1 else dims[at] for at in range(len(shape)))
        for at in acted:
            if dims[at] != NO_LABEL:
                labels.kinds[dims[at]] = "whole"
        return labels.rule([tuple(dims)], [out], compute="free", **PASSES)
    dim = argument(op, 1, "dim", 0) % len(shape)
    if dims[dim] != NO_LABEL:
        labels.kinds[dims[dim]] = "whole"
    out = tuple(label for at, label in enumerate(dims) if at != dim)
    return labels.rule([tuple(dims)], [out], compute="free", **PASSES)


def concatenate(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """cat and stack: the joined dim stays whole, the others are parallel. cat takes a vector of no elements as nothing."""
    rank = len(outputs[0].shape)
    dim = argument(op, 1, "dim", 0) % rank
    labels = Labels()
    dims = list(labels.dims(outputs[0].shape))
    if dims[dim] != NO_LABEL:
        labels.kinds[dims[dim]] = "whole"
    if "stack" in op.target:
        sides = [tuple(label for at, label in enumerate(dims) if at != dim)] * len(inputs)
    else:
        sides = [
            tuple(
                (labels.new("whole") if size != 1 else NO_LABEL) if at == dim else dims[at]
                for at, size in enumerate(value.shape)
            )
            if value.shape != (0,)
            else (NO_LABEL,)
            for value in inputs
        ]
    return labels.rule(sides, [tuple(dims)])


def _along(labels: Labels, dims: list[int], dim: int, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    if dims[dim] != NO_LABEL:
        labels.kinds[dims[dim]] = "whole"
    outs = [
        tuple(
            (labels.new("whole") if value.shape[dim] != 1 else NO_LABEL) if at == dim else label
            for at, label in enumerate(dims)
        )
        for value in outputs
    ]
    return labels.rule([tuple(dims)], outs, compute="free", **PASSES)
