"""Rules of ops that slide over space or resample it: pools, upsampling, transposed convolution, unfolding, instance
norm.

Space is whole (a window reads its neighbours); samples are independent, and channels are wherever the op treats each
alike.
"""

from collections.abc import Sequence

from autopar.graph.ir import Op, Value
from autopar.rules.op_sharding_rule import NO_LABEL, OpRule
from autopar.rules.rule_builder import Labels, replicated


def pool(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """Pools and resampling: all dims before space are independent; the name ends with the number of dims of space."""
    name = op.packet
    space = next((int(letter) for letter in name if letter.isdigit()), 0)
    shape = inputs[0].shape
    if not 0 < space < len(shape) or len(inputs) > 1:
        return replicated(op, inputs, outputs, known=True)
    labels = Labels()
    lead = labels.dims(shape[:-space])
    whole = labels.dims(shape[-space:], "whole")
    return labels.rule([(*lead, *whole)], [(*lead, *labels.dims(value.shape[-space:], "whole")) for value in outputs])


def unfold(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """im2col, col2im, pixel_shuffle and kin: samples are independent, channels and space mix."""
    rank = {"im2col": 4, "col2im": 3}.get(op.packet)
    shape = inputs[0].shape
    batched = len(shape) - 3 if rank is None else int(len(shape) == rank)
    labels = Labels()
    lead = labels.dims(shape[:batched])
    return labels.rule(
        [(*lead, *labels.dims(shape[batched:], "whole"))],
        [(*lead, *labels.dims(outputs[0].shape[batched:], "whole"))],
    )


def sliding(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """x.unfold(dim, size, step) -> windows along dim, their elements last: the other dims are parallel."""
    shape = inputs[0].shape
    dim = op.argument(1, "dimension", 0) % len(shape)
    labels = Labels()
    dims = [labels.new("whole" if at == dim else "parallel") if n != 1 else NO_LABEL for at, n in enumerate(shape)]
    out = [
        (labels.new("whole") if n != 1 else NO_LABEL) if at in (dim, len(shape)) else dims[at]
        for at, n in enumerate(outputs[0].shape)
    ]
    return labels.rule([tuple(dims)], [tuple(out)], passes_gradient=True, passes_partial=True)


def instance_norm(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """instance_norm(x, weight, bias, mean, var, use_input_stats, ...): every channel of every sample for itself."""
    if op.argument(3, "running_mean") is not None or not op.argument(5, "use_input_stats", True):
        return replicated(op, inputs, outputs, known=True)
    labels = Labels()
    batch, channel = labels.dims(inputs[0].shape[:2])
    dims = (batch, channel, *labels.dims(inputs[0].shape[2:], "whole"))
    return labels.rule([dims, *((channel,) for _ in inputs[1:])], [dims])


def transposed(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """x[b, c_in, ...], w[c_in, c_out / groups, ...], bias[c_out] -> [b, c_out, ...]. Local form along c_in: the bias
    once."""
    labels = Labels()
    batch = labels.new()
    grouped = op.argument(6, "groups", 1) != 1
    space = labels.dims(inputs[0].shape[2:], "whole")
    out_space = labels.dims(outputs[0].shape[2:], "whole")
    kernel = labels.dims(inputs[1].shape[2:], "whole")
    c_in, c_out = labels.new("whole" if grouped else "sum"), labels.new("whole" if grouped else "parallel")
    weight_out = labels.new("whole") if grouped else c_out
    sides = [(batch, c_in, *space), (c_in, weight_out, *kernel), (c_out,)]
    ks = tuple((label, "k") for label in (c_in, *kernel) if label != NO_LABEL)
    ms = tuple((label, "m") for label in (batch, *space) if label != NO_LABEL)
    return labels.rule(
        sides[: len(inputs)],
        [(batch, c_out, *out_space)],
        compute="matmul",
        roles=(*ms, (c_out, "n"), *ks),
        local_form=(c_in,) if len(inputs) > 2 and not grouped else (),
    )


def grid_sample(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """x[b, c, ...], grid[b, ..., n] -> [b, c, ...]: samples and channels are independent, and so is what is asked
    for."""
    labels = Labels()
    batch, channel = labels.dims(outputs[0].shape[:2])
    asked = labels.dims(outputs[0].shape[2:])
    space = labels.dims(inputs[0].shape[2:], "whole")
    return labels.rule([(batch, channel, *space), (batch, *asked, labels.new("whole"))], [(batch, channel, *asked)])


def channel_shuffle(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpRule:
    """Channels change places; samples and space are independent."""
    labels = Labels()
    batch, channels, *space = labels.dims(inputs[0].shape)
    labels.kinds[channels] = "whole"
    return labels.rule([(batch, channels, *space)], [(batch, channels, *space)])
