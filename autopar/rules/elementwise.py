"""Rules of ops that work element by element, along one dim, or that reduce: pointwise, norms, softmax, losses."""

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from autopar.graph.ir import Op, Value
from autopar.rules.op_sharding_rule import NO_LABEL, Inside, OpRule
from autopar.rules.rule_builder import Labels, broadcast, replicated

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
    """Channels are independent; a sharded batch exchanges the sum, then that of squared distances from the mean, fp32,
    and the gradients of both."""
    labels = Labels()
    shape = inputs[0].shape
    batch, channel = labels.new("inside"), labels.new()
    dims = (batch, channel, *labels.dims(shape[2:], "whole"))
    exchanged = (shape[1] * 4,) * 2
    return labels.rule(
        [dims, *((channel,) for _ in inputs[1:])],
        [dims],
        inside=Inside(forward_bytes=exchanged, backward_bytes=exchanged, labels=(channel,)),
        local_form=(batch,),
    )


def along(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """softmax, cumsum, sort, topk, argmax ...: the dim acted on is whole, the others parallel."""
    shape = inputs[0].shape
    if not shape:
        return replicated(op, inputs, outputs, known=True)
    position = 2 if op.target.startswith(("aten.topk", "aten.kthvalue")) else 1
    given = op.argument(position, "dim", -1)
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
    """sum and mean: reduced dims give partial results. Local form of a mean: the sum of the rank's part over the whole
    count."""
    shape = inputs[0].shape
    given = op.argument(1, "dim", None)
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
    averaged = tuple(label for label in dims if label != NO_LABEL and labels.kinds[label] == "sum")
    return labels.rule([dims], [out], local_form=averaged if op.target.startswith("aten.mean") else ())


def extremum(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """argmax, amax, max over a dim: that dim is whole."""
    rule = reduce(op, inputs, outputs[:1])
    kinds = tuple("whole" if kind == "sum" else kind for kind in rule.kinds)
    return OpRule(inputs=rule.inputs, outputs=rule.outputs * len(outputs), kinds=kinds)


def cross_entropy(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """logits[t, v], target[t] -> loss: tokens give partial losses; a sharded vocabulary exchanges the maximum, then the
    sum of exponentials and the target's logit (and the sum of logits, where labels are smoothed), fp32 each (Shoeybi et
    al.,
    "Megatron-LM", 2019, section 3). Local form of a mean over cut tokens: the sum of the rank's losses over the count
    of all targets that are not ignored, or over their weights. logits[t, v, ...]: the classes are whole. Weights of
    classes, which every rank holds whole, multiply the tokens' losses; with smoothed labels also its classes' terms, and
    the classes are whole."""
    shape = inputs[0].shape
    weighted = len(inputs) == 3 and len(shape) == 2 and inputs[2].shape == shape[1:] and not inputs[2].requires_grad
    rule = _by_token(op, inputs[:2] if weighted else inputs, outputs)
    if rule is None:
        return replicated(op, inputs, outputs, known=True)
    if weighted:
        rule = replace(rule, inputs=(*rule.inputs, (NO_LABEL,)))
    smooth = op.argument(5, "label_smoothing", 0.0)
    if len(shape) > 2 or (weighted and smooth):
        return rule
    t, v = rule.inputs[0]
    kinds = tuple("inside" if label == v else kind for label, kind in enumerate(rule.kinds))
    rows = shape[0] * 4
    sums = 3 if smooth else 2
    inside = Inside(forward_bytes=(rows, sums * rows), backward_bytes=(), labels=(t,))
    return replace(rule, kinds=kinds, inside=inside, local_form=(*rule.local_form, v))


def _by_token(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule | None:
    """[t, v, ...], target[t, ...] -> loss, the classes v whole; None with weights of classes or targets that are no
    classes, whose means are no sums over tokens with one count."""
    shape = inputs[0].shape
    if len(inputs) != 2 or len(shape) < 2 or inputs[1].shape != (shape[0], *shape[2:]):
        return None
    labels = Labels()
    scalar = not outputs[0].shape
    t, *rest = (labels.new("sum" if scalar else "parallel") for _ in (shape[0], *shape[2:]))
    v = labels.new("whole")
    averaged = (t, *rest) if scalar and op.argument(3, "reduction", 1) == 1 else ()
    return labels.rule([(t, v, *rest), (t, *rest)], [() if scalar else (t, *rest)], local_form=averaged)


def log_softmax(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """As ``along``, but the dim itself may be cut where it is the last: maximum and sum of exponentials are exchanged,
    fp32 each, and in the backward the sum of the gradient. Local form: x - log(all-reduced sum of exp(x))."""
    rule = along(op, inputs, outputs)
    shape = inputs[0].shape
    label = rule.inputs[0][-1] if shape else NO_LABEL
    if label == NO_LABEL or rule.kinds[label] != "whole":
        return rule
    rows = prod(shape[:-1]) * 4
    kinds = tuple("inside" if at == label else kind for at, kind in enumerate(rule.kinds))
    inside = Inside(
        forward_bytes=(rows, rows),
        backward_bytes=(rows,),
        labels=tuple(at for at in rule.inputs[0][:-1] if at != NO_LABEL),
    )
    return replace(rule, kinds=kinds, inside=inside, local_form=(label,))


def nll_loss(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """log-probabilities[t, v, ...], target[t, ...] -> loss. Local form along t: as a cross entropy's; along v of two
    dims: a rank adds up what it has of the tokens' log-probabilities, zero for targets in another part of the
    vocabulary."""
    rule = _by_token(op, inputs, outputs)
    if rule is None:
        return replicated(op, inputs, outputs, known=True)
    if len(inputs[0].shape) > 2 or outputs[0].shape:
        return rule
    t, v = rule.inputs[0]
    kinds = tuple("sum" if label == v else kind for label, kind in enumerate(rule.kinds))
    return replace(rule, kinds=kinds, local_form=(t, v))


def loss(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """mse_loss and kin over equal shapes. Local form of a mean: the sum of the rank's part over the whole count."""
    labels = Labels()
    scalar = not outputs[0].shape
    if any(value.shape != inputs[0].shape for value in inputs):
        return replicated(op, inputs, outputs, known=False)
    dims = labels.dims(inputs[0].shape, "sum" if scalar else "parallel")
    position = {"binary_cross_entropy": 3, "binary_cross_entropy_with_logits": 4}.get(op.packet, 2)
    averages = scalar and op.argument(position, "reduction", 1) == 1
    averaged = tuple(label for label in dims if label != NO_LABEL) if averages else ()
    return labels.rule([dims for _ in inputs], [() if scalar else dims], local_form=averaged)


def over(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """logsumexp, std, var, norms, prod, any ... over some dims: these are whole, the others parallel."""
    shape = inputs[0].shape
    at = 2 if op.target.startswith(("aten.linalg_vector_norm", "aten.norm", "aten.kthvalue")) else 1
    given = op.argument(at, "dim", None)
    if given is None or isinstance(given, (bool, str, float)):
        given = -1 if outputs[0].shape else tuple(range(len(shape)))  # kthvalue and mode: the last dim
    acted = {dim % len(shape) for dim in (given if isinstance(given, tuple) else (given,))} if shape else set()
    acted = acted or set(range(len(shape)))
    labels = Labels()
    dims = tuple(
        labels.new("whole" if dim in acted else "parallel") if size != 1 else NO_LABEL for dim, size in enumerate(shape)
    )
    outs = [
        tuple(NO_LABEL if dim in acted else label for dim, label in enumerate(dims))
        if len(value.shape) == len(shape)
        else tuple(label for dim, label in enumerate(dims) if dim not in acted)
        for value in outputs
    ]
    return labels.rule([dims], outs)


def glu(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """Both halves of a dim are read together: it is whole."""
    shape = inputs[0].shape
    dim = op.argument(1, "dim", -1) % len(shape)
    labels = Labels()
    dims = [labels.new("whole" if at == dim else "parallel") if n != 1 else NO_LABEL for at, n in enumerate(shape)]
    out = [
        (labels.new("whole") if n != 1 else NO_LABEL) if at == dim else dims[at]
        for at, n in enumerate(outputs[0].shape)
    ]
    return labels.rule([tuple(dims)], [tuple(out)])


def prelu(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """x[b, c, ...] with a slope per channel, or one."""
    labels = Labels()
    dims = labels.dims(inputs[0].shape)
    slope = dims[1] if len(dims) > 1 and inputs[1].shape[-1:] == inputs[0].shape[1:2] else NO_LABEL
    return labels.rule([dims, (slope,) * len(inputs[1].shape)], [dims])


def looked_up(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """bucketize(x, edges), searchsorted(edges, x) with a vector of edges: x is element by element, the edges are
    whole."""
    x, edges = (0, 1) if op.target.startswith("aten.bucketize") else (1, 0)
    if len(inputs) != 2 or len(inputs[edges].shape) != 1 or inputs[x].shape != outputs[0].shape:
        return replicated(op, inputs, outputs, known=True)
    labels = Labels()
    dims = labels.dims(inputs[x].shape)
    whole = labels.dims(inputs[edges].shape, "whole")
    return labels.rule([dims, whole] if x == 0 else [whole, dims], [dims])


def transformed(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """Fourier transforms (x, n, dim): the dims transformed are whole, the others parallel."""
    shape = inputs[0].shape
    name = op.packet
    default = tuple(range(len(shape))) if name.endswith("n") else (-2, -1) if name.endswith("2") else -1
    given = op.argument(2, "dim", default)
    given = default if given is None else given
    acted = {dim % len(shape) for dim in (given if isinstance(given, tuple) else (given,))}
    labels = Labels()
    dims = [labels.new("whole" if at in acted else "parallel") if n != 1 else NO_LABEL for at, n in enumerate(shape)]
    out = [
        (labels.new("whole") if n != 1 else NO_LABEL) if at in acted else dims[at]
        for at, n in enumerate(outputs[0].shape)
    ]
    return labels.rule([tuple(dims)], [tuple(out)])


def pairs(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """cdist: a[..., p, m], b[..., r, m] -> [..., p, r]; the dim compared is whole."""
    labels = Labels()
    *lead, p, r = labels.dims(outputs[0].shape)
    whole, m = outputs[0].shape[:-2], labels.new("whole")
    a, b = (broadcast(value.shape[:-2], whole, lead) for value in inputs)
    return labels.rule([(*a, p, m), (*b, r, m)], [(*lead, p, r)])


def cosine(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """cosine_similarity(a, b, dim): both broadcast; the dim compared is whole."""
    rank = max(len(value.shape) for value in inputs)
    dim = op.argument(2, "dim", 1) % rank
    sizes = [max((v.shape[at - rank] for v in inputs if len(v.shape) >= rank - at), default=1) for at in range(rank)]
    labels = Labels()
    dims = [labels.new("whole" if at == dim else "parallel") if n != 1 else NO_LABEL for at, n in enumerate(sizes)]
    return labels.rule(
        [broadcast(value.shape, sizes, dims) for value in inputs], [tuple(d for at, d in enumerate(dims) if at != dim)]
    )
