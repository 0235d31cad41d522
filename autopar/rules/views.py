"""Rules of ops that rearrange: reshapes, permutes, expands, splits, slices, concatenations."""

from collections.abc import Sequence

from autopar.graph.ir import Op, Value
from autopar.rules.op_sharding_rule import NO_LABEL, OpRule
from autopar.rules.rule_builder import Labels, broadcast

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
    name = op.packet
    order = list(range(rank))
    if name == "permute":
        order = [dim % rank for dim in op.args[1]]
    elif name in ("transpose", "swapaxes", "swapdims"):
        first, second = op.args[1] % rank, op.args[2] % rank
        order[first], order[second] = order[second], order[first]
    elif name in ("movedim", "moveaxis"):
        order = _moved(rank, op.args[1], op.args[2])
    elif name in ("mT", "mH", "adjoint"):
        order[-2:] = reversed(order[-2:])
    else:  # t, and the like: all dims the other way round
        order.reverse()
    labels = Labels()
    dims = labels.dims(inputs[0].shape)
    return labels.rule([dims], [tuple(dims[dim] for dim in order)], compute="free", **PASSES)


def _moved(rank: int, sources: int | tuple[int, ...], targets: int | tuple[int, ...]) -> list[int]:
    given = sources if isinstance(sources, tuple) else (sources,)
    wanted = targets if isinstance(targets, tuple) else (targets,)
    places = {to % rank: dim % rank for dim, to in zip(given, wanted, strict=True)}
    rest = iter(dim for dim in range(rank) if dim not in places.values())
    return [places[at] if at in places else next(rest) for at in range(rank)]


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
    sides = [broadcast(value.shape, outputs[0].shape, dims) for value in inputs]
    passing = PASSES if len(inputs) == 1 else {}
    return labels.rule(sides, [dims], compute="free", **passing)


def repeat(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """repeat, tile: dims that stay as they are are parallel; those that are repeated are whole."""
    source, target = inputs[0].shape, outputs[0].shape
    labels = Labels()
    dims, out = [], []
    for at, size in enumerate(target):
        before = at - (len(target) - len(source))
        same = before >= 0 and source[before] == size
        out.append(labels.new("parallel" if same else "whole") if size != 1 else NO_LABEL)
        if before >= 0:
            dims.append(out[-1] if same else labels.new("whole") if source[before] != 1 else NO_LABEL)
    return labels.rule([tuple(dims)], [tuple(out)], **PASSES)


def diagonal(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """diagonal(offset, dim1, dim2): the two dims become one, the last; the others are parallel."""
    shape = inputs[0].shape
    acted = [op.argument(at, f"dim{at - 1}", at - 2) % len(shape) for at in (2, 3)]
    labels = Labels()
    dims = tuple(
        labels.new("whole" if at in acted else "parallel") if n != 1 else NO_LABEL for at, n in enumerate(shape)
    )
    last = labels.new("whole") if outputs[0].shape[-1] != 1 else NO_LABEL
    return labels.rule([dims], [(*(d for at, d in enumerate(dims) if at not in acted), last)], **PASSES)


def diag_embed(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """diag_embed(offset, dim1, dim2): the last dim becomes two; the others are parallel."""
    target = outputs[0].shape
    acted = [op.argument(at, f"dim{at - 1}", at - 4) % len(target) for at in (2, 3)]
    labels = Labels()
    out = tuple(
        labels.new("whole" if at in acted else "parallel") if n != 1 else NO_LABEL for at, n in enumerate(target)
    )
    last = labels.new("whole") if inputs[0].shape[-1] != 1 else NO_LABEL
    return labels.rule([(*(d for at, d in enumerate(out) if at not in acted), last)], [out], **PASSES)


def split(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """split, chunk, unbind: equal parts of a dim are cut together (strided in the whole); unequal parts are not, and no
    rank may hold some of the parts only."""
    shape = inputs[0].shape
    dim = op.argument(1 if "unbind" in op.target else 2, "dim", 0) % len(shape)
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
    """slice, select, narrow, flip, pad, cumsum, sort ...: dims that keep their size are parallel but for the one acted
    on."""
    shape, target = inputs[0].shape, outputs[0].shape
    labels = Labels()
    dims = list(labels.dims(shape))
    if len(shape) == len(target):
        acted = {at for at, (a, b) in enumerate(zip(shape, target, strict=True)) if a != b}
        left = {at: labels.new("whole") if target[at] != 1 else NO_LABEL for at in sorted(acted)}
        out = tuple(left.get(at, label) for at, label in enumerate(dims))
        for at in acted:
            if dims[at] != NO_LABEL:
                labels.kinds[dims[at]] = "whole"
        return labels.rule([tuple(dims)], [out], compute="free", **PASSES)
    dim = op.argument(1, "dim", 0) % len(shape)
    if dims[dim] != NO_LABEL:
        labels.kinds[dims[dim]] = "whole"
    out = tuple(label for at, label in enumerate(dims) if at != dim)
    return labels.rule([tuple(dims)], [out], compute="free", **PASSES)


def written(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """slice_scatter, select_scatter (x, part, dim, ...): part is written into x along ``dim``, which is whole."""
    shape = inputs[0].shape
    dim = op.argument(2, "dim", 0) % len(shape)
    labels = Labels()
    dims = [labels.new("whole" if at == dim else "parallel") if n != 1 else NO_LABEL for at, n in enumerate(shape)]
    part = [dims[at] for at in range(len(shape)) if at != dim]
    if "slice" in op.target:
        part.insert(dim, labels.new("whole") if inputs[1].shape[dim] != 1 else NO_LABEL)
    return labels.rule([tuple(dims), tuple(part)], [tuple(dims)])


def concatenate(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """cat and stack: the joined dim stays whole, the others are parallel. cat takes a vector of no elements as
    nothing."""
    rank = len(outputs[0].shape)
    dim = op.argument(1, "dim", 0) % rank
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


def complex_view(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """view_as_complex and view_as_real: the last dim of the real tensor holds both parts, the others are the same."""
    real, other = (inputs[0], outputs[0]) if "complex" in op.target else (outputs[0], inputs[0])
    labels = Labels()
    dims = labels.dims(other.shape)
    sides = [(*dims, labels.new("whole")), dims]
    assert len(real.shape) == len(other.shape) + 1
    return labels.rule([sides[0 if real is inputs[0] else 1]], [sides[1 if real is inputs[0] else 0]], compute="free")
