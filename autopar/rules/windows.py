"""Rules of ops that slide over space or resample it: pools, upsampling, transposed convolution, unfolding, instance
norm.

Spatial dims are not sharded (a window reads its neighbours); samples are independent, and so are channels where the op
treats them alike.
"""

from collections.abc import Sequence

from autopar.graph.ir import Op, Value
from autopar.rules.op_sharding_rule import NO_LABEL, OpShardingRule
from autopar.rules.rule_builder import ShardingRuleBuilder, replicated_rule


def pool(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """Pools and resampling: the dims before the spatial ones are independent; the digit in the op's name is the number
    of spatial dims."""
    num_spatial = next((int(letter) for letter in op.packet if letter.isdigit()), 0)
    shape = inputs[0].shape
    if not 0 < num_spatial < len(shape) or len(inputs) > 1:
        return replicated_rule(op, inputs, outputs, known=True)
    labels = ShardingRuleBuilder()
    lead = labels.labels_of(shape[:-num_spatial])
    space = labels.labels_of(shape[-num_spatial:], "replicated")
    return labels.build(
        [(*lead, *space)],
        [(*lead, *labels.labels_of(value.shape[-num_spatial:], "replicated")) for value in outputs],
    )


def im2col_or_shuffle(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """im2col, col2im, pixel_shuffle and the like: samples are independent, channels and space are mixed."""
    rank = {"im2col": 4, "col2im": 3}.get(op.packet)
    shape = inputs[0].shape
    num_batch_dims = len(shape) - 3 if rank is None else int(len(shape) == rank)
    labels = ShardingRuleBuilder()
    lead = labels.labels_of(shape[:num_batch_dims])
    return labels.build(
        [(*lead, *labels.labels_of(shape[num_batch_dims:], "replicated"))],
        [(*lead, *labels.labels_of(outputs[0].shape[num_batch_dims:], "replicated"))],
    )


def unfold(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """x.unfold(dim, size, step) -> windows along dim, with their elements as a new last dim: the other dims are
    parallel."""
    shape = inputs[0].shape
    acted = op.argument(1, "dimension", 0) % len(shape)
    labels = ShardingRuleBuilder()
    dims = labels.labels_of(shape, replicated={acted})
    out = labels.labels_like(outputs[0].shape, dims, replicated={acted, len(shape)})
    return labels.build([dims], [out], passes_partial_gradient=True, passes_partial=True)


def instance_norm(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """instance_norm(x, weight, bias, mean, var, use_input_stats, ...): every channel of every sample is independent."""
    if op.argument(3, "running_mean") is not None or not op.argument(5, "use_input_stats", True):
        return replicated_rule(op, inputs, outputs, known=True)
    labels = ShardingRuleBuilder()
    batch, channel = labels.labels_of(inputs[0].shape[:2])
    dims = (batch, channel, *labels.labels_of(inputs[0].shape[2:], "replicated"))
    return labels.build([dims, *((channel,) for _ in inputs[1:])], [dims])


def conv_transpose(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """x[b, c_in, ...], w[c_in, c_out / groups, ...], bias[c_out] -> [b, c_out, ...], or without b. Local form along c_in:
    the bias is added on the first rank only."""
    labels = ShardingRuleBuilder()
    num_spatial = len(inputs[1].shape) - 2
    batch = (labels.new_label(),) if len(inputs[0].shape) > num_spatial + 1 else ()
    grouped = op.argument(6, "groups", 1) != 1
    space = labels.labels_of(inputs[0].shape[-num_spatial:], "replicated")
    out_space = labels.labels_of(outputs[0].shape[-num_spatial:], "replicated")
    kernel = labels.labels_of(inputs[1].shape[2:], "replicated")
    c_in = labels.new_label("replicated" if grouped else "sum")
    c_out = labels.new_label("replicated" if grouped else "parallel")
    weight_out = labels.new_label("replicated") if grouped else c_out
    sides = [(*batch, c_in, *space), (c_in, weight_out, *kernel), (c_out,)]
    ks = tuple((label, "k") for label in (c_in, *kernel) if label != NO_LABEL)
    ms = tuple((label, "m") for label in (*batch, *space) if label != NO_LABEL)
    return labels.build(
        sides[: len(inputs)],
        [(*batch, c_out, *out_space)],
        compute="matmul",
        roles=(*ms, (c_out, "n"), *ks),
        local_form_labels=(c_in,) if len(inputs) > 2 and not grouped else (),
    )


def grid_sample(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """x[b, c, ...], grid[b, ..., n] -> [b, c, ...]: samples, channels and the points of the grid are independent."""
    labels = ShardingRuleBuilder()
    batch, channel = labels.labels_of(outputs[0].shape[:2])
    points = labels.labels_of(outputs[0].shape[2:])
    space = labels.labels_of(inputs[0].shape[2:], "replicated")
    return labels.build(
        [(batch, channel, *space), (batch, *points, labels.new_label("replicated"))], [(batch, channel, *points)]
    )


def channel_shuffle(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """Permutes the channels; samples and space are independent."""
    labels = ShardingRuleBuilder()
    dims = labels.labels_of(inputs[0].shape, replicated={1})
    return labels.build([dims], [dims])
