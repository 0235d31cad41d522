"""The builder that rules are made with: hands out labels and builds an ``OpShardingRule``."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from autopar.graph.ir import Op, Value
from autopar.rules.op_sharding_rule import NO_LABEL, LabelKind, OpShardingRule


class ShardingRuleBuilder:
    """Hands out the labels of one rule, numbered from 0, and records their kinds."""

    def __init__(self) -> None:
        self.kinds: list[LabelKind] = []

    def new_label(self, kind: LabelKind = "parallel") -> int:
        """One new label."""
        self.kinds.append(kind)
        return len(self.kinds) - 1

    def labels_of(
        self, shape: Sequence[int], kind: LabelKind = "parallel", *, replicated: Collection[int] = ()
    ) -> tuple[int, ...]:
        """A new label for every dim of a shape: of kind "replicated" for the dims in ``replicated``, else of ``kind``.
        Dims of size one have no label, as they cannot be sharded.

        >>> builder = ShardingRuleBuilder()
        >>> builder.labels_of((4, 1, 8), replicated={2}), builder.kinds
        ((0, -1, 1), ['parallel', 'replicated'])
        """
        return tuple(
            self.new_label("replicated" if dim in replicated else kind) if size != 1 else NO_LABEL
            for dim, size in enumerate(shape)
        )

    def labels_like(
        self, shape: Sequence[int], labels: Sequence[int], *, replicated: Collection[int]
    ) -> tuple[int, ...]:
        """``labels``, but new ones of kind "replicated" for the dims in ``replicated``, along which ``shape`` has other
        elements than the tensor that ``labels`` are of."""
        return tuple(
            (self.new_label("replicated") if size != 1 else NO_LABEL) if dim in replicated else labels[dim]
            for dim, size in enumerate(shape)
        )

    def build(
        self, inputs: Sequence[tuple[int, ...]], outputs: Sequence[tuple[int, ...]], **fields: Any
    ) -> OpShardingRule:
        """The rule of these labels; ``fields`` are further fields of ``OpShardingRule``."""
        return OpShardingRule(
            input_labels=tuple(inputs), output_labels=tuple(outputs), label_kinds=tuple(self.kinds), **fields
        )


def broadcast_labels(shape: Sequence[int], target_shape: Sequence[int], labels: Sequence[int]) -> tuple[int, ...]:
    """Labels of a tensor of ``shape`` that broadcasts to ``target_shape`` with ``labels``: aligned at the last dim.

    >>> broadcast_labels((4, 1), (2, 4, 8), (0, 1, 2))
    (1, -1)
    """
    skipped = len(target_shape) - len(shape)
    return tuple(
        labels[skipped + dim] if skipped + dim >= 0 and size != 1 and size == target_shape[skipped + dim] else NO_LABEL
        for dim, size in enumerate(shape)
    )


def normalized_dims(dims: int | Iterable[int], rank: int) -> frozenset[int]:
    """A dim argument, one dim or several, as dims counted from 0 of a tensor with ``rank`` dims.

    >>> sorted(normalized_dims((0, -1), 3)), sorted(normalized_dims(-2, 3))
    ([0, 2], [1])
    """
    return frozenset(dim % rank for dim in ((dims,) if isinstance(dims, int) else dims))


def replicated_rule(op: Op, inputs: Sequence[Value], outputs: Sequence[Value], *, known: bool) -> OpShardingRule:
    """The rule of an op that cannot be sharded; ``known`` is False for an op without a rule."""
    labels = ShardingRuleBuilder()
    return labels.build(
        [labels.labels_of(value.shape, "replicated") for value in inputs],
        [labels.labels_of(value.shape, "replicated") for value in outputs],
        is_known=known,
    )
