"""Rules of ops that slide over space or resample it: pools, upsampling, transposed convolution, unfolding, instance
norm.

Space is whole (a window reads its neighbours); samples are independent, and channels are wherever the op treats each
alike.
"""

from collections.abc import Sequence

from autopar.graph.ir import Op, Value
from autopar.rules.op_sharding_rule import NO_LABEL, OpShardingRule
from autopar.rules.rule_builder import ShardingRuleBuilder, replicated_rule


def pool(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """Pools and resampling: all dims before space are independent; the name ends with the number of dims of space."""
    name = op.packet
    space = next((int(letter) for letter in name if letter.isdigit()), 0)
    shape = inputs[0].shape
    if not 0 < space < len(shape) or len(inputs) > 1:
        return replicated_rule(op, inputs, outputs, known=True)
    labels = ShardingRuleBuilder()
    lead = labels.labels_of(shape[:-space])
    whole = labels.labels_of(shape[-space:], "whole")
    return labels.build(
        [(*lead, *whole)], [(*lead, *labels.labels_of(value.shape[-space:], "whole")) for value in outputs]
    )


def im2col_or_shuffle(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """im2col, col2im, pixel_shuffle and kin: samples are independent, channels and space mix."""
    rank = {"im2col": 4, "col2im": 3}.get(op.packet)
    shape = inputs[0].shape
    batched = len(shape) - 3 if rank is None else int(len(shape) == rank)
    labels = ShardingRuleBuilder()
    lead = labels.labels_of(shape[:batched])
    return labels.build(
        [(*lead, *labels.labels_of(shape[batched:], "whole"))],
        [(*lead, *labels.labels_of(outputs[0].shape[batched:], "whole"))],
    )


def unfold(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """x.unfold(dim, size, step) -> windows along dim, their elements last: the other dims are parallel."""
    shape = inputs[0].shape
    dim = op.argument(1, "dimension", 0) % len(shape)
    labels = ShardingRuleBuilder()
    dims = [
        labels.new_label("whole" if at == dim else "parallel") if n != 1 else NO_LABEL for at, n in enumerate(shape)
    ]
    out = [
        (labels.new_label("whole") if n != 1 else NO_LABEL) if at in (dim, len(shape)) else dims[at]
        for at, n in enumerate(outputs[0].shape)
    ]
    return labels.build([tuple(dims)], [tuple(out)], passes_partial_gradient=True, passes_partial=True)


def instance_norm(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """instance_norm(x, weight, bias, mean, var, use_input_stats, ...): every channel of every sample for itself."""
    if op.argument(3, "running_mean") is not None or not op.argument(5, "use_input_stats", True):
        return replicated_rule(op, inputs, outputs, known=True)
    labels = ShardingRuleBuilder()
    batch, channel = labels.labels_of(inputs[0].shape[:2])
    dims = (batch, channel, *labels.labels_of(inputs[0].shape[2:], "whole"))
    return labels.build([dims, *((channel,) for _ in inputs[1:])], [dims])


def conv_transpose(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """x[b, c_in, ...], w[c_in, c_out / groups, ...], bias[c_out] -> [b, c_out, ...]. Local form along c_in: the bias
    once."""
    labels = ShardingRuleBuilder()
    batch = labels.new_label()
    grouped = op.argument(6, "groups", 1) != 1
    space = labels.labels_of(inputs[0].shape[2:], "whole")
    out_space = labels.labels_of(outputs[0].shape[2:], "whole")
    kernel = labels.labels_of(inputs[1].shape[2:], "whole")
    c_in, c_out = labels.new_label("whole" if grouped else "sum"), labels.new_label("whole" if grouped else "parallel")
    weight_out = labels.new_label("whole") if grouped else c_out
    sides = [(batch, c_in, *space), (c_in, weight_out, *kernel), (c_out,)]
    ks = tuple((label, "k") for label in (c_in, *kernel) if label != NO_LABEL)
    ms = tuple((label, "m") for label in (batch, *space) if label != NO_LABEL)
    return labels.build(
        sides[: len(inputs)],
        [(batch, c_out, *out_space)],
        compute="matmul",
        roles=(*ms, (c_out, "n"), *ks),
        local_form_labels=(c_in,) if len(inputs) > 2 and not grouped else (),
    )


def grid_sample(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """x[b, c, ...], grid[b, ..., n] -> [b, c, ...]: samples and channels are independent, and so is what is asked
    for."""
    labels = ShardingRuleBuilder()
    batch, channel = labels.labels_of(outputs[0].shape[:2])
    asked = labels.labels_of(outputs[0].shape[2:])
    space = labels.labels_of(inputs[0].shape[2:], "whole")
    return labels.build(
        [(batch, channel, *space), (batch, *asked, labels.new_label("whole"))], [(batch, channel, *asked)]
    )


def channel_shuffle(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """Channels change places; samples and space are independent."""
    labels = ShardingRuleBuilder()
    batch, channels, *space = labels.labels_of(inputs[0].shape)
    labels.kinds[channels] = "whole"
    return labels.build([(batch, channels, *space)], [(batch, channels, *space)])
