"""The builder rules are made with: hands out labels, and finishes an ``OpRule``."""

from collections.abc import Sequence
from typing import Any

from autopar.graph.ir import Op, Value
from autopar.rules.op_sharding_rule import NO_LABEL, LabelKind, OpShardingRule


class ShardingRuleBuilder:
    """Hands out the labels of one rule, with their kinds."""

    def __init__(self) -> None:
        self.kinds: list[LabelKind] = []

    def new_label(self, kind: LabelKind = "parallel") -> int:
        """One label."""
        self.kinds.append(kind)
        return len(self.kinds) - 1

    def labels_of(self, shape: Sequence[int], kind: LabelKind = "parallel") -> tuple[int, ...]:
        """A label for every dim of a shape; dims of size one cannot be sharded."""
        return tuple(self.new_label(kind) if size != 1 else NO_LABEL for size in shape)

    def build(
        self, inputs: Sequence[tuple[int, ...]], outputs: Sequence[tuple[int, ...]], **fields: Any
    ) -> OpShardingRule:
        """The rule of these labels; fields as in ``OpRule``."""
        return OpShardingRule(
            input_labels=tuple(inputs), output_labels=tuple(outputs), label_kinds=tuple(self.kinds), **fields
        )


def broadcast_labels(shape: Sequence[int], target_shape: Sequence[int], labels: Sequence[int]) -> tuple[int, ...]:
    """Labels of a tensor that broadcasts onto one of shape ``onto`` with ``labels``: aligned at the last dim.

    >>> broadcast((4, 1), (2, 4, 8), (0, 1, 2))
    (1, -1)
    """
    skipped = len(target_shape) - len(shape)
    return tuple(
        labels[skipped + dim] if skipped + dim >= 0 and size != 1 and size == target_shape[skipped + dim] else NO_LABEL
        for dim, size in enumerate(shape)
    )


def replicated_rule(op: Op, inputs: Sequence[Value], outputs: Sequence[Value], *, known: bool) -> OpShardingRule:
    """The last resort: nothing can be sharded."""
    labels = ShardingRuleBuilder()
    return labels.build(
        [labels.labels_of(value.shape, "whole") for value in inputs],
        [labels.labels_of(value.shape, "whole") for value in outputs],
        is_known=known,
    )
