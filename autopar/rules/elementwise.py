"""Rules of ops that work element by element, along one dim, or that reduce: pointwise, norms, softmax, losses, look-ups."""

from collections.abc import Sequence
from math import prod

from autopar.graph.ir import Op, Value
from autopar.rules.labels import Labels, argument, broadcast, replicated
from autopar.rules.rule import NO_LABEL, Inside, OpRule

_SCALES = ("aten.mul", "aten.div", "aten.neg", "aten.to")


def pointwise(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """Broadcasting; with one input that wants a gradient a partial gradient passes, and scaling passes partial sums."""
    labels = Labels()
    dims = labels.dims(outputs[0].shape)
    sides = [broadcast(value.shape, outputs[0].shape, dims) for value in inputs]
    carriers = [at for at, value in enumerate(inputs) if value.requires_grad]
    single = len(carriers) == 1 and inputs[carriers[0]].shape == outputs[0].shape
    return labels.rule(
        sides,
        [dims] * len(outputs),
        pointwise=True,
        passes_gradient=single,
        passes_partial=single and len(inputs) == 1 and op.target.startswith(_SCALES),
        carrier=carriers[0] if single else 0,
    )


def norm(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """layer_norm, rms_norm: the normalised dims are whole."""
    count = len(op.args[1]) if len(op.args) > 1 and isinstance(op.args[1], tuple) else 1
    labels = Labels()
    shape = inputs[0].shape
    dims = (*labels.dims(shape[: len(shape) - count]), *labels.dims(shape[len(shape) - count :], "whole"))
    sides = [dims, *(dims[len(shape) - len(value.shape) :] for value in inputs[1:])]
    return labels.rule(sides, [dims])


def group_norm(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """Samples are independent; channels are whole."""
    labels = Labels()
    batch = labels.new()
    rest = labels.dims(inputs[0].shape[1:], "whole")
    return labels.rule([(batch, *rest), *((rest[0],) for _ in inputs[1:])], [(batch, *rest)])


def batch_norm(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """Channels are independent; a sharded batch exchanges sum and sum of squares, as synchronised batch norm does."""
    labels = Labels()
    shape = inputs[0].shape
    batch, channel = labels.new("inside"), labels.new()
    dims = (batch, channel, *labels.dims(shape[2:], "whole"))
    exchanged = 2 * shape[1] * 4
    return labels.rule(
        [dims, *((channel,) for _ in inputs[1:])],
        [dims],
        inside=Inside(forward_bytes=exchanged, backward_bytes=exchanged, labels=(channel,)),
    )


def along(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """softmax, cumsum, sort, topk, argmax ...: the dim acted on is whole, the others parallel."""
    shape = inputs[0].shape
    if not shape:
        return replicated(op, inputs, outputs, known=True)
    position = 2 if op.target.startswith(("aten.topk", "aten.kthvalue")) else 1
    given = argument(op, position, "dim", -1)
    dim = (given if isinstance(given, int) and not isinstance(given, bool) else -1) % len(shape)
    labels = Labels()
    dims = list(labels.dims(shape))
    if dims[dim] != NO_LABEL:
        labels.kinds[dims[dim]] = "whole"
    outs = []
    for value in outputs:
        if len(value.shape) == len(shape):
            outs.append(
                tuple(
                    (labels.new("whole") if value.shape[at] not in (1, shape[at]) else dims[at])
                    if value.shape[at] != 1
                    else NO_LABEL
                    for at in range(len(shape))
                )
            )
        else:
            outs.append(tuple(label for at, label in enumerate(dims) if at != dim))
    return labels.rule([tuple(dims), *(labels.dims(v.shape, "whole") for v in inputs[1:])], outs)


def reduce(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """sum and mean: reduced dims give partial results; means of equal shards are partial averages."""
    shape = inputs[0].shape
    given = argument(op, 1, "dim", None)
    if isinstance(given, str) or given is None or isinstance(given, bool):
        given = tuple(range(len(shape)))
    reduced = {dim % len(shape) for dim in (given if isinstance(given, tuple) else (given,))} if shape else set()
    labels = Labels()
    dims = tuple(
        (labels.new("sum" if at in reduced else "parallel") if size != 1 else NO_LABEL) for at, size in enumerate(shape)
    )
    if len(outputs[0].shape) == len(shape):
        out = tuple(NO_LABEL if at in reduced else label for at, label in enumerate(dims))
    else:
        out = tuple(label for at, label in enumerate(dims) if at not in reduced)
    return labels.rule([dims], [out])


def extremum(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """argmax, amax, max over a dim: that dim is whole."""
    rule = reduce(op, inputs, outputs[:1])
    kinds = tuple("whole" if kind == "sum" else kind for kind in rule.kinds)
    return OpRule(inputs=rule.inputs, outputs=rule.outputs * len(outputs), kinds=kinds)


def embedding(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """weight[v, h], ids[...] -> [..., h]: a shard of the vocabulary looks up what it has, zero otherwise."""
    labels = Labels()
    ids = labels.dims(inputs[1].shape)
    v, h = labels.new("sum"), labels.new()
    return labels.rule([(v, h), ids], [(*ids, h)])


def cross_entropy(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """logits[t, v], target[t] -> loss: tokens give partial losses; a sharded vocabulary exchanges maximum, sum of
    exponentials and the target's logit, fp32 each (Shoeybi et al., "Megatron-LM", 2019, section 3)."""
    if len(inputs[0].shape) != 2 or len(inputs) != 2 or inputs[1].shape != inputs[0].shape[:1]:
        return replicated(op, inputs, outputs, known=False)
    labels = Labels()
    t = labels.new("sum" if not outputs[0].shape else "parallel")
    v = labels.new("inside")
    exchanged = 3 * inputs[0].shape[0] * 4
    return labels.rule(
        [(t, v), (t,)],
        [(t,)] if outputs[0].shape else [()],
        inside=Inside(forward_bytes=exchanged, backward_bytes=0, labels=(t,)),
    )


def loss(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """mse_loss and kin over equal shapes."""
    labels = Labels()
    dims = labels.dims(inputs[0].shape, "parallel" if outputs[0].shape else "sum")
    return labels.rule([dims for _ in inputs], [dims if outputs[0].shape else ()])


def pool(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """Samples and channels are independent; space is whole."""
    labels = Labels()
    lead = labels.dims(inputs[0].shape[:2])
    space = labels.dims(inputs[0].shape[2:], "whole")
    outs = [(*lead, *labels.dims(value.shape[2:], "whole")) for value in outputs]
    return labels.rule([(*lead, *space)], outs)


def routing(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """Ops that route tokens (sort by expert, gather and scatter rows by that order, histogram): every rank routes the
    tokens it holds, which permutes them among themselves and changes no result; other dims of rows are parallel."""
    labels = Labels()
    grown = max((value.shape[0] for value in (*inputs, *outputs) if value.shape), default=0)
    tokens = labels.new()
    rows = {value.shape[0] for value in (*inputs, *outputs) if value.shape and value.shape[0] * 64 > grown}
    widths: dict[int, int] = {}

    def dims(value: Value) -> tuple[int, ...]:
        first = () if not value.shape else (tokens if value.shape[0] in rows else NO_LABEL,)
        rest = tuple(widths.setdefault(size, labels.new()) if size > 1 else NO_LABEL for size in value.shape[1:])
        return (*first, *rest)

    if len(rows) > 1 or prod(inputs[0].shape) == 0:
        return replicated(op, inputs, outputs, known=True)
    return labels.rule([dims(value) for value in inputs], [dims(value) for value in outputs])
