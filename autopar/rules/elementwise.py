"""Rules of ops that compute every element by itself."""

from collections.abc import Sequence

from autopar.graph.ir import Op, Value
from autopar.rules.op_sharding_rule import NO_LABEL, OpShardingRule
from autopar.rules.rule_builder import ShardingRuleBuilder, broadcast_labels, replicated_rule

# Linear in their only tensor; named with their overloads, as a division that rounds (div.Tensor_mode) is not.
_LINEAR_OPS = frozenset(
    {f"aten.{name}.{overload}" for name in ("mul", "multiply", "div", "divide") for overload in ("Tensor", "Scalar")}
    | {"aten.true_divide.Tensor", "aten.true_divide.Scalar", "aten.neg.default", "aten.negative.default"}
)


def pointwise(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """Inputs broadcast to the output. If a single input requires a gradient, that gradient may be partial; a scaling
    passes partial sums."""
    labels = ShardingRuleBuilder()
    dims = labels.labels_of(outputs[0].shape)
    sides = [broadcast_labels(value.shape, outputs[0].shape, dims) for value in inputs]
    with_gradient = [position for position, value in enumerate(inputs) if value.requires_grad]
    single = len(with_gradient) == 1 and inputs[with_gradient[0]].shape == outputs[0].shape
    return labels.build(
        sides,
        [dims] * len(outputs),
        pointwise=True,
        passes_partial_gradient=single,
        passes_partial=single and len(inputs) == 1 and op.target in _LINEAR_OPS,
        linear_input=with_gradient[0] if single else 0,
    )


def prelu(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """x[b, c, ...] with one slope per channel, or one for all."""
    labels = ShardingRuleBuilder()
    dims = labels.labels_of(inputs[0].shape)
    slope = dims[1] if len(dims) > 1 and inputs[1].shape[-1:] == inputs[0].shape[1:2] else NO_LABEL
    return labels.build([dims, (slope,) * len(inputs[1].shape)], [dims])


def bucketize(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """bucketize(x, edges), searchsorted(edges, x) with a vector of edges: parallel along all dims of x; the edges cannot
    be sharded."""
    x, edges = (0, 1) if op.target.startswith("aten.bucketize") else (1, 0)
    if len(inputs) != 2 or len(inputs[edges].shape) != 1 or inputs[x].shape != outputs[0].shape:
        return replicated_rule(op, inputs, outputs, known=True)
    labels = ShardingRuleBuilder()
    dims = labels.labels_of(inputs[x].shape)
    edge = labels.labels_of(inputs[edges].shape, "replicated")
    return labels.build([dims, edge] if x == 0 else [edge, dims], [dims])
