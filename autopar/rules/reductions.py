"""Rules of ops that reduce, normalise, scan or transform along some of their dims."""

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from autopar.graph.ir import Op, Value
from autopar.rules.op_sharding_rule import NO_LABEL, KernelCollectives, OpShardingRule
from autopar.rules.rule_builder import ShardingRuleBuilder, broadcast_labels, normalized_dims, replicated_rule


def normalization(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """layer_norm, rms_norm: the normalised dims, which are the last, cannot be sharded."""
    count = len(op.args[1]) if len(op.args) > 1 and isinstance(op.args[1], tuple) else 1
    labels = ShardingRuleBuilder()
    shape = inputs[0].shape
    dims = labels.labels_of(shape, replicated=range(len(shape) - count, len(shape)))
    sides = [dims, *(dims[len(shape) - len(value.shape) :] for value in inputs[1:])]
    return labels.build(sides, [dims])


def group_norm(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """Samples are independent; channels and space cannot be sharded."""
    labels = ShardingRuleBuilder()
    batch = labels.new_label()
    rest = labels.labels_of(inputs[0].shape[1:], "replicated")
    return labels.build([(batch, *rest), *((rest[0],) for _ in inputs[1:])], [(batch, *rest)])


def batch_norm(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """Channels are independent. Local form along a sharded batch: ranks all-reduce the sum, then the sum of squared
    distances from the mean, in fp32, and in the backward the gradients of both."""
    labels = ShardingRuleBuilder()
    shape = inputs[0].shape
    batch, channel = labels.new_label("collective"), labels.new_label()
    dims = (batch, channel, *labels.labels_of(shape[2:], "replicated"))
    num_bytes = (shape[1] * 4,) * 2
    return labels.build(
        [dims, *((channel,) for _ in inputs[1:])],
        [dims],
        kernel_collectives=KernelCollectives(forward_bytes=num_bytes, backward_bytes=num_bytes, labels=(channel,)),
        local_form_labels=(batch,),
    )


def along_one_dim(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """softmax, cumsum, sort, topk, argmax ...: the dim acted on cannot be sharded, the others are parallel."""
    shape = inputs[0].shape
    if not shape:
        return replicated_rule(op, inputs, outputs, known=True)
    position = 2 if op.target.startswith(("aten.topk", "aten.kthvalue")) else 1
    argument = op.argument(position, "dim", -1)
    acted = (argument if isinstance(argument, int) and not isinstance(argument, bool) else -1) % len(shape)
    labels = ShardingRuleBuilder()
    dims = labels.labels_of(shape, replicated={acted})
    outs = []
    for value in outputs:
        if len(value.shape) == len(shape):
            resized = {dim for dim, size in enumerate(value.shape) if size not in (1, shape[dim])}
            like = labels.labels_like(value.shape, dims, replicated=resized)
            outs.append(tuple(label if size != 1 else NO_LABEL for label, size in zip(like, value.shape, strict=True)))
        else:
            outs.append(tuple(label for dim, label in enumerate(dims) if dim != acted))
    return labels.build([dims, *(labels.labels_of(value.shape, "replicated") for value in inputs[1:])], outs)


def log_softmax(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """As ``along_one_dim``, but the dim acted on may be sharded where it is the last: ranks all-reduce the maximum and
    the sum of exponentials, in fp32, and in the backward the sum of the gradient. Local form: x - log(all-reduced sum of
    exp(x))."""
    rule = along_one_dim(op, inputs, outputs)
    shape = inputs[0].shape
    acted = rule.input_labels[0][-1] if shape else NO_LABEL
    if acted == NO_LABEL or rule.label_kinds[acted] != "replicated":
        return rule
    row_bytes = prod(shape[:-1]) * 4
    collectives = KernelCollectives(
        forward_bytes=(row_bytes, row_bytes),
        backward_bytes=(row_bytes,),
        labels=tuple(label for label in rule.input_labels[0][:-1] if label != NO_LABEL),
    )
    return replace(
        rule,
        label_kinds=tuple("collective" if label == acted else kind for label, kind in enumerate(rule.label_kinds)),
        kernel_collectives=collectives,
        local_form_labels=(acted,),
    )


def sum_or_mean(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """sum and mean: reduced dims, which are all where none is named, give partial results. Local form of a mean: the sum of
    the rank's part divided by the full count."""
    shape = inputs[0].shape
    argument = op.argument(1, "dim", None)
    if isinstance(argument, str) or argument is None or isinstance(argument, bool):
        argument = tuple(range(len(shape)))
    reduced = (normalized_dims(argument, len(shape)) if shape else frozenset()) or frozenset(range(len(shape)))
    labels = ShardingRuleBuilder()
    dims = tuple(
        labels.new_label("sum" if dim in reduced else "parallel") if size != 1 else NO_LABEL
        for dim, size in enumerate(shape)
    )
    averaged = tuple(label for label in dims if label != NO_LABEL and labels.kinds[label] == "sum")
    return labels.build(
        [dims],
        [_without_reduced(dims, reduced, outputs[0])],
        local_form_labels=averaged if op.target.startswith("aten.mean") else (),
    )


def max_or_argmax(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """argmax, amax, max over some dims, which cannot be sharded."""
    rule = sum_or_mean(op, inputs, outputs[:1])
    return OpShardingRule(
        input_labels=rule.input_labels,
        output_labels=rule.output_labels * len(outputs),
        label_kinds=tuple("replicated" if kind == "sum" else kind for kind in rule.label_kinds),
    )


def over_replicated_dims(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """logsumexp, std, var, norms, prod, any ... over some dims, which cannot be sharded; the others are parallel."""
    shape = inputs[0].shape
    position = 2 if op.target.startswith(("aten.linalg_vector_norm", "aten.norm", "aten.kthvalue")) else 1
    argument = op.argument(position, "dim", None)
    if argument is None or isinstance(argument, (bool, str, float)):
        argument = -1 if outputs[0].shape else tuple(range(len(shape)))  # kthvalue and mode: the last dim
    acted = (normalized_dims(argument, len(shape)) if shape else frozenset()) or frozenset(range(len(shape)))
    labels = ShardingRuleBuilder()
    dims = labels.labels_of(shape, replicated=acted)
    return labels.build([dims], [_without_reduced(dims, acted, value) for value in outputs])


def _without_reduced(dims: Sequence[int], reduced: frozenset[int], output: Value) -> tuple[int, ...]:
    """Labels of a reduction's output, which has the reduced dims with size one (keepdim) or not at all."""
    if len(output.shape) == len(dims):
        return tuple(NO_LABEL if dim in reduced else label for dim, label in enumerate(dims))
    return tuple(label for dim, label in enumerate(dims) if dim not in reduced)


def glu(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """Gated linear unit: both halves of a dim are read together, so it cannot be sharded."""
    shape = inputs[0].shape
    acted = {op.argument(1, "dim", -1) % len(shape)}
    labels = ShardingRuleBuilder()
    dims = labels.labels_of(shape, replicated=acted)
    return labels.build([dims], [labels.labels_like(outputs[0].shape, dims, replicated=acted)])


def fft(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """Fourier transforms (x, n, dim): the transformed dims cannot be sharded, the others are parallel."""
    shape = inputs[0].shape
    name = op.packet
    default = tuple(range(len(shape))) if name.endswith("n") else (-2, -1) if name.endswith("2") else -1
    argument = op.argument(2, "dim", default)
    acted = normalized_dims(default if argument is None else argument, len(shape))
    labels = ShardingRuleBuilder()
    dims = labels.labels_of(shape, replicated=acted)
    return labels.build([dims], [labels.labels_like(outputs[0].shape, dims, replicated=acted)])


def cdist(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """cdist: a[..., p, m], b[..., r, m] -> [..., p, r]; m cannot be sharded."""
    labels = ShardingRuleBuilder()
    *lead, p, r = labels.labels_of(outputs[0].shape)
    lead_shape, m = outputs[0].shape[:-2], labels.new_label("replicated")
    a, b = (broadcast_labels(value.shape[:-2], lead_shape, lead) for value in inputs)
    return labels.build([(*a, p, m), (*b, r, m)], [(*lead, p, r)])


def cosine_similarity(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """cosine_similarity(a, b, dim): both broadcast; the dim compared cannot be sharded."""
    rank = max(len(value.shape) for value in inputs)
    compared = op.argument(2, "dim", 1) % rank
    shapes = [(1,) * (rank - len(value.shape)) + value.shape for value in inputs]
    shape = tuple(max(sizes) for sizes in zip(*shapes, strict=True))
    labels = ShardingRuleBuilder()
    dims = labels.labels_of(shape, replicated={compared})
    return labels.build(
        [broadcast_labels(value.shape, shape, dims) for value in inputs],
        [tuple(label for dim, label in enumerate(dims) if dim != compared)],
    )
