"""Rule of recurrent layers: samples are independent; time, features and weights cannot be sharded."""

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
        or not all(isinstance(state, InputRef) for state in states)
    ):
        return replicated_rule(op, inputs, outputs, known=True)
    batch_dim = 0 if op.args[-1] is True else 1
    if inputs[0].shape[batch_dim] == 1:
        return replicated_rule(op, inputs, outputs, known=True)
    labels = ShardingRuleBuilder()
    batch = labels.new_label()

    def labels_of(value: Value, value_batch_dim: int) -> tuple[int, ...]:
        """Labels of a tensor with the batch in ``value_batch_dim`` (-1: in none)."""
        return tuple(
            batch if dim == value_batch_dim else labels.new_label("replicated") if size != 1 else NO_LABEL
            for dim, size in enumerate(value.shape)
        )

    state_positions = {state.index for state in states}
    sides = [
        labels_of(value, batch_dim if position == 0 else 1 if position in state_positions else -1)
        for position, value in enumerate(inputs)
    ]
    return labels.build(
        sides, [labels_of(value, batch_dim if position == 0 else 1) for position, value in enumerate(outputs)]
    )
