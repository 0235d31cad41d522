"""Rules of ops that work element by element, along one dim, or that reduce: pointwise, norms, softmax, losses."""

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from autopar.graph.ir import Op, Value
from autopar.rules.op_sharding_rule import NO_LABEL, KernelCollectives, OpShardingRule
from autopar.rules.rule_builder import ShardingRuleBuilder, broadcast_labels, replicated_rule

_LINEAR_OPS = ("aten.mul", "aten.div", "aten.neg", "aten.to")


def pointwise(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """Broadcasting; with one input that wants a gradient a partial gradient passes, and scaling passes partial sums."""
    labels = ShardingRuleBuilder()
    dims = labels.labels_of(outputs[0].shape)
    sides = [broadcast_labels(value.shape, outputs[0].shape, dims) for value in inputs]
    carriers = [at for at, value in enumerate(inputs) if value.requires_grad]
    single = len(carriers) == 1 and inputs[carriers[0]].shape == outputs[0].shape
    return labels.build(
        sides,
        [dims] * len(outputs),
        pointwise=True,
        passes_partial_gradient=single,
        passes_partial=single and len(inputs) == 1 and op.target.startswith(_LINEAR_OPS),
        linear_input=carriers[0] if single else 0,
    )


def normalization(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """layer_norm, rms_norm: the normalised dims are whole."""
    count = len(op.args[1]) if len(op.args) > 1 and isinstance(op.args[1], tuple) else 1
    labels = ShardingRuleBuilder()
    shape = inputs[0].shape
    dims = (*labels.labels_of(shape[: len(shape) - count]), *labels.labels_of(shape[len(shape) - count :], "whole"))
    sides = [dims, *(dims[len(shape) - len(value.shape) :] for value in inputs[1:])]
    return labels.build(sides, [dims])


def group_norm(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """Samples are independent; channels are whole."""
    labels = ShardingRuleBuilder()
    batch = labels.new_label()
    rest = labels.labels_of(inputs[0].shape[1:], "whole")
    return labels.build([(batch, *rest), *((rest[0],) for _ in inputs[1:])], [(batch, *rest)])


def batch_norm(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """Channels are independent; a sharded batch exchanges the sum, then that of squared distances from the mean, fp32,
    and the gradients of both."""
    labels = ShardingRuleBuilder()
    shape = inputs[0].shape
    batch, channel = labels.new_label("inside"), labels.new_label()
    dims = (batch, channel, *labels.labels_of(shape[2:], "whole"))
    exchanged = (shape[1] * 4,) * 2
    return labels.build(
        [dims, *((channel,) for _ in inputs[1:])],
        [dims],
        kernel_collectives=KernelCollectives(forward_bytes=exchanged, backward_bytes=exchanged, labels=(channel,)),
        local_form_labels=(batch,),
    )


def along_one_dim(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """softmax, cumsum, sort, topk, argmax ...: the dim acted on is whole, the others parallel."""
    shape = inputs[0].shape
    if not shape:
        return replicated_rule(op, inputs, outputs, known=True)
    position = 2 if op.target.startswith(("aten.topk", "aten.kthvalue")) else 1
    given = op.argument(position, "dim", -1)
    dim = (given if isinstance(given, int) and not isinstance(given, bool) else -1) % len(shape)
    labels = ShardingRuleBuilder()
    dims = list(labels.labels_of(shape))
    if dims[dim] != NO_LABEL:
        labels.kinds[dims[dim]] = "whole"
    outs = []
    for value in outputs:
        if len(value.shape) == len(shape):
            outs.append(
                tuple(
                    (labels.new_label("whole") if value.shape[at] not in (1, shape[at]) else dims[at])
                    if value.shape[at] != 1
                    else NO_LABEL
                    for at in range(len(shape))
                )
            )
        else:
            outs.append(tuple(label for at, label in enumerate(dims) if at != dim))
    return labels.build([tuple(dims), *(labels.labels_of(v.shape, "whole") for v in inputs[1:])], outs)


def sum_or_mean(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """sum and mean: reduced dims give partial results. Local form of a mean: the sum of the rank's part over the whole
    count."""
    shape = inputs[0].shape
    given = op.argument(1, "dim", None)
    if isinstance(given, str) or given is None or isinstance(given, bool):
        given = tuple(range(len(shape)))
    reduced = {dim % len(shape) for dim in (given if isinstance(given, tuple) else (given,))} if shape else set()
    labels = ShardingRuleBuilder()
    dims = tuple(
        (labels.new_label("sum" if at in reduced else "parallel") if size != 1 else NO_LABEL)
        for at, size in enumerate(shape)
    )
    if len(outputs[0].shape) == len(shape):
        out = tuple(NO_LABEL if at in reduced else label for at, label in enumerate(dims))
    else:
        out = tuple(label for at, label in enumerate(dims) if at not in reduced)
    averaged = tuple(label for label in dims if label != NO_LABEL and labels.kinds[label] == "sum")
    return labels.build([dims], [out], local_form_labels=averaged if op.target.startswith("aten.mean") else ())


def max_or_argmax(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """argmax, amax, max over a dim: that dim is whole."""
    rule = sum_or_mean(op, inputs, outputs[:1])
    kinds = tuple("whole" if kind == "sum" else kind for kind in rule.label_kinds)
    return OpShardingRule(
        input_labels=rule.input_labels, output_labels=rule.output_labels * len(outputs), label_kinds=kinds
    )


def cross_entropy(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """logits[t, v], target[t] -> loss: tokens give partial losses; a sharded vocabulary exchanges the maximum, then the
    sum of exponentials and the target's logit (and the sum of logits, where labels are smoothed), fp32 each (Shoeybi et
    al.,
    "Megatron-LM", 2019, section 3). Local form of a mean over cut tokens: the sum of the rank's losses over the count
    of all targets that are not ignored, or over their weights. logits[t, v, ...]: the classes are whole. Weights of
    classes, which every rank holds whole, multiply the tokens' losses; with smoothed labels also its classes' terms, and
    the classes are whole."""
    shape = inputs[0].shape
    weighted = len(inputs) == 3 and len(shape) == 2 and inputs[2].shape == shape[1:] and not inputs[2].requires_grad
    rule = _loss_by_token(op, inputs[:2] if weighted else inputs, outputs)
    if rule is None:
        return replicated_rule(op, inputs, outputs, known=True)
    if weighted:
        rule = replace(rule, input_labels=(*rule.input_labels, (NO_LABEL,)))
    smooth = op.argument(5, "label_smoothing", 0.0)
    if len(shape) > 2 or (weighted and smooth):
        return rule
    t, v = rule.input_labels[0]
    kinds = tuple("inside" if label == v else kind for label, kind in enumerate(rule.label_kinds))
    rows = shape[0] * 4
    sums = 3 if smooth else 2
    inside = KernelCollectives(forward_bytes=(rows, sums * rows), backward_bytes=(), labels=(t,))
    return replace(rule, label_kinds=kinds, kernel_collectives=inside, local_form_labels=(*rule.local_form_labels, v))


def _loss_by_token(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule | None:
    """[t, v, ...], target[t, ...] -> loss, the classes v whole; None with weights of classes or targets that are no
    classes, whose means are no sums over tokens with one count."""
    shape = inputs[0].shape
    if len(inputs) != 2 or len(shape) < 2 or inputs[1].shape != (shape[0], *shape[2:]):
        return None
    labels = ShardingRuleBuilder()
    scalar = not outputs[0].shape
    t, *rest = (labels.new_label("sum" if scalar else "parallel") for _ in (shape[0], *shape[2:]))
    v = labels.new_label("whole")
    averaged = (t, *rest) if scalar and op.argument(3, "reduction", 1) == 1 else ()
    return labels.build([(t, v, *rest), (t, *rest)], [() if scalar else (t, *rest)], local_form_labels=averaged)


def log_softmax(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """As ``along``, but the dim itself may be cut where it is the last: maximum and sum of exponentials are exchanged,
    fp32 each, and in the backward the sum of the gradient. Local form: x - log(all-reduced sum of exp(x))."""
    rule = along_one_dim(op, inputs, outputs)
    shape = inputs[0].shape
    label = rule.input_labels[0][-1] if shape else NO_LABEL
    if label == NO_LABEL or rule.label_kinds[label] != "whole":
        return rule
    rows = prod(shape[:-1]) * 4
    kinds = tuple("inside" if at == label else kind for at, kind in enumerate(rule.label_kinds))
    inside = KernelCollectives(
        forward_bytes=(rows, rows),
        backward_bytes=(rows,),
        labels=tuple(at for at in rule.input_labels[0][:-1] if at != NO_LABEL),
    )
    return replace(rule, label_kinds=kinds, kernel_collectives=inside, local_form_labels=(label,))


def nll_loss(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """log-probabilities[t, v, ...], target[t, ...] -> loss. Local form along t: as a cross entropy's; along v of two
    dims: a rank adds up what it has of the tokens' log-probabilities, zero for targets in another part of the
    vocabulary."""
    rule = _loss_by_token(op, inputs, outputs)
    if rule is None:
        return replicated_rule(op, inputs, outputs, known=True)
    if len(inputs[0].shape) > 2 or outputs[0].shape:
        return rule
    t, v = rule.input_labels[0]
    kinds = tuple("sum" if label == v else kind for label, kind in enumerate(rule.label_kinds))
    return replace(rule, label_kinds=kinds, local_form_labels=(t, v))


def elementwise_loss(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """mse_loss and kin over equal shapes. Local form of a mean: the sum of the rank's part over the whole count."""
    labels = ShardingRuleBuilder()
    scalar = not outputs[0].shape
    if any(value.shape != inputs[0].shape for value in inputs):
        return replicated_rule(op, inputs, outputs, known=False)
    dims = labels.labels_of(inputs[0].shape, "sum" if scalar else "parallel")
    position = {"binary_cross_entropy": 3, "binary_cross_entropy_with_logits": 4}.get(op.packet, 2)
    averages = scalar and op.argument(position, "reduction", 1) == 1
    averaged = tuple(label for label in dims if label != NO_LABEL) if averages else ()
    return labels.build([dims for _ in inputs], [() if scalar else dims], local_form_labels=averaged)


def over_replicated_dims(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """logsumexp, std, var, norms, prod, any ... over some dims: these are whole, the others parallel."""
    shape = inputs[0].shape
    at = 2 if op.target.startswith(("aten.linalg_vector_norm", "aten.norm", "aten.kthvalue")) else 1
    given = op.argument(at, "dim", None)
    if given is None or isinstance(given, (bool, str, float)):
        given = -1 if outputs[0].shape else tuple(range(len(shape)))  # kthvalue and mode: the last dim
    acted = {dim % len(shape) for dim in (given if isinstance(given, tuple) else (given,))} if shape else set()
    acted = acted or set(range(len(shape)))
    labels = ShardingRuleBuilder()
    dims = tuple(
        labels.new_label("whole" if dim in acted else "parallel") if size != 1 else NO_LABEL
        for dim, size in enumerate(shape)
    )
    outs = [
        tuple(NO_LABEL if dim in acted else label for dim, label in enumerate(dims))
        if len(value.shape) == len(shape)
        else tuple(label for dim, label in enumerate(dims) if dim not in acted)
        for value in outputs
    ]
    return labels.build([dims], outs)


def glu(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """Both halves of a dim are read together: it is whole."""
    shape = inputs[0].shape
    dim = op.argument(1, "dim", -1) % len(shape)
    labels = ShardingRuleBuilder()
    dims = [
        labels.new_label("whole" if at == dim else "parallel") if n != 1 else NO_LABEL for at, n in enumerate(shape)
    ]
    out = [
        (labels.new_label("whole") if n != 1 else NO_LABEL) if at == dim else dims[at]
        for at, n in enumerate(outputs[0].shape)
    ]
    return labels.build([tuple(dims)], [tuple(out)])


def prelu(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """x[b, c, ...] with a slope per channel, or one."""
    labels = ShardingRuleBuilder()
    dims = labels.labels_of(inputs[0].shape)
    slope = dims[1] if len(dims) > 1 and inputs[1].shape[-1:] == inputs[0].shape[1:2] else NO_LABEL
    return labels.build([dims, (slope,) * len(inputs[1].shape)], [dims])


def bucketize(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """bucketize(x, edges), searchsorted(edges, x) with a vector of edges: x is element by element, the edges are
    whole."""
    x, edges = (0, 1) if op.target.startswith("aten.bucketize") else (1, 0)
    if len(inputs) != 2 or len(inputs[edges].shape) != 1 or inputs[x].shape != outputs[0].shape:
        return replicated_rule(op, inputs, outputs, known=True)
    labels = ShardingRuleBuilder()
    dims = labels.labels_of(inputs[x].shape)
    whole = labels.labels_of(inputs[edges].shape, "whole")
    return labels.build([dims, whole] if x == 0 else [whole, dims], [dims])


def fft(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """Fourier transforms (x, n, dim): the dims transformed are whole, the others parallel."""
    shape = inputs[0].shape
    name = op.packet
    default = tuple(range(len(shape))) if name.endswith("n") else (-2, -1) if name.endswith("2") else -1
    given = op.argument(2, "dim", default)
    given = default if given is None else given
    acted = {dim % len(shape) for dim in (given if isinstance(given, tuple) else (given,))}
    labels = ShardingRuleBuilder()
    dims = [
        labels.new_label("whole" if at in acted else "parallel") if n != 1 else NO_LABEL for at, n in enumerate(shape)
    ]
    out = [
        (labels.new_label("whole") if n != 1 else NO_LABEL) if at in acted else dims[at]
        for at, n in enumerate(outputs[0].shape)
    ]
    return labels.build([tuple(dims)], [tuple(out)])


def cdist(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """cdist: a[..., p, m], b[..., r, m] -> [..., p, r]; the dim compared is whole."""
    labels = ShardingRuleBuilder()
    *lead, p, r = labels.labels_of(outputs[0].shape)
    whole, m = outputs[0].shape[:-2], labels.new_label("whole")
    a, b = (broadcast_labels(value.shape[:-2], whole, lead) for value in inputs)
    return labels.build([(*a, p, m), (*b, r, m)], [(*lead, p, r)])


def cosine_similarity(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """cosine_similarity(a, b, dim): both broadcast; the dim compared is whole."""
    rank = max(len(value.shape) for value in inputs)
    dim = op.argument(2, "dim", 1) % rank
    sizes = [max((v.shape[at - rank] for v in inputs if len(v.shape) >= rank - at), default=1) for at in range(rank)]
    labels = ShardingRuleBuilder()
    dims = [
        labels.new_label("whole" if at == dim else "parallel") if n != 1 else NO_LABEL for at, n in enumerate(sizes)
    ]
    return labels.build(
        [broadcast_labels(value.shape, sizes, dims) for value in inputs],
        [tuple(d for at, d in enumerate(dims) if at != dim)],
    )
