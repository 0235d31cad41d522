"""Rules of losses."""

from collections.abc import Sequence
from dataclasses import replace

from autopar.graph.ir import Op, Value
from autopar.rules.op_sharding_rule import NO_LABEL, KernelCollectives, OpShardingRule
from autopar.rules.rule_builder import ShardingRuleBuilder, replicated_rule


def cross_entropy(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """logits[t, v], target[t] -> loss. Sharded tokens give partial losses.

    Along a sharded vocabulary ranks all-reduce the maximum, then the sum of exponentials and the target's logit (and the
    sum of logits, where labels are smoothed), in fp32 (Shoeybi et al., "Megatron-LM", 2019, section 3). Local form of a
    mean over sharded tokens: the sum of the rank's losses divided by the number of all targets that are not ignored, or
    by the sum of their weights.

    logits[t, v, ...]: the classes cannot be sharded. Weights of classes, which are replicated, multiply the losses of
    the tokens; with smoothed labels also those of its classes, and the classes cannot be sharded."""
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
    row_bytes = shape[0] * 4
    num_sums = 3 if smooth else 2
    return replace(
        rule,
        label_kinds=tuple("collective" if label == v else kind for label, kind in enumerate(rule.label_kinds)),
        kernel_collectives=KernelCollectives(
            forward_bytes=(row_bytes, num_sums * row_bytes), backward_bytes=(), labels=(t,)
        ),
        local_form_labels=(*rule.local_form_labels, v),
    )


def nll_loss(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """log-probabilities[t, v, ...], target[t, ...] -> loss. Local form along t: as a cross entropy's; along v of two
    dims: a rank adds up the tokens' log-probabilities in its part of the vocabulary, zero for targets in others."""
    rule = _loss_by_token(op, inputs, outputs)
    if rule is None:
        return replicated_rule(op, inputs, outputs, known=True)
    if len(inputs[0].shape) > 2 or outputs[0].shape:
        return rule
    t, v = rule.input_labels[0]
    kinds = tuple("sum" if label == v else kind for label, kind in enumerate(rule.label_kinds))
    return replace(rule, label_kinds=kinds, local_form_labels=(t, v))


def _loss_by_token(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule | None:
    """[t, v, ...], target[t, ...] -> loss, where the classes v cannot be sharded. None with weights of classes, and with
    class-probability targets, whose mean is not a sum over tokens divided by one count."""
    shape = inputs[0].shape
    if len(inputs) != 2 or len(shape) < 2 or inputs[1].shape != (shape[0], *shape[2:]):
        return None
    labels = ShardingRuleBuilder()
    is_scalar = not outputs[0].shape
    t, *rest = (labels.new_label("sum" if is_scalar else "parallel") for _ in (shape[0], *shape[2:]))
    v = labels.new_label("replicated")
    averaged = (t, *rest) if is_scalar and op.argument(3, "reduction", 1) == 1 else ()
    return labels.build([(t, v, *rest), (t, *rest)], [() if is_scalar else (t, *rest)], local_form_labels=averaged)


def elementwise_loss(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """mse_loss and the like over equal shapes. Local form of a mean: the sum of the rank's part divided by the full
    count."""
    labels = ShardingRuleBuilder()
    is_scalar = not outputs[0].shape
    if any(value.shape != inputs[0].shape for value in inputs):
        return replicated_rule(op, inputs, outputs, known=False)
    dims = labels.labels_of(inputs[0].shape, "sum" if is_scalar else "parallel")
    position = {"binary_cross_entropy": 3, "binary_cross_entropy_with_logits": 4}.get(op.packet, 2)
    is_mean = is_scalar and op.argument(position, "reduction", 1) == 1
    averaged = tuple(label for label in dims if label != NO_LABEL) if is_mean else ()
    return labels.build([dims for _ in inputs], [() if is_scalar else dims], local_form_labels=averaged)
