"""Rule of recurrent layers: samples are independent; time, features and weights are whole."""

from collections.abc import Sequence

from autopar.graph.ir import InputRef, Op, Value
from autopar.rules.op_sharding_rule import NO_LABEL, OpShardingRule
from autopar.rules.rule_builder import ShardingRuleBuilder, replicated_rule


def recurrent(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> OpShardingRule:
    """lstm, gru, rnn_tanh, rnn_relu (x, states, weights, has_biases, layers, dropout, train, bidirectional,
    batch_first) -> (out, states ...): x[b, t, f] or x[t, b, f]; states[layers, b, h]."""
    states = op.args[1] if isinstance(op.args[1], tuple) else (op.args[1],)
    if (
        not op.target.endswith(".input")
        or len(inputs[0].shape) != 3
        or not all(isinstance(s, InputRef) for s in states)
    ):
        return replicated_rule(op, inputs, outputs, known=True)
    at = 0 if op.args[-1] is True else 1
    if inputs[0].shape[at] == 1:
        return replicated_rule(op, inputs, outputs, known=True)
    labels = ShardingRuleBuilder()
    batch = labels.new_label()

    def dims(value: Value, where: int) -> tuple[int, ...]:
        return tuple(
            batch if dim == where else labels.new_label("whole") if size != 1 else NO_LABEL
            for dim, size in enumerate(value.shape)
        )

    carried = {state.index for state in states}
    sides = [
        dims(value, at) if number == 0 else dims(value, 1 if number in carried else -1)
        for number, value in enumerate(inputs)
    ]
    return labels.build(sides, [dims(value, at if number == 0 else 1) for number, value in enumerate(outputs)])
