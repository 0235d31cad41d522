"""One op under the placements of a plan: local sizes of its labels, the axes that shard it, and whether it is sound.

Labels, of the op's sharding rule, name equal dims of different tensors. All tensors must leave a label at the same local
size, an axis that shards a contracted label must leave the result partial, and an axis that shards the op must leave the
gradient of an input without sharded labels partial.
"""

from dataclasses import dataclass
from itertools import compress
from math import prod

from autopar.core.errors import CheckError
from autopar.core.placement import PARTIAL, REPLICATE, Placements, parse_placements
from autopar.core.plan import OpPlan
from autopar.graph.ir import Op, Value
from autopar.judge.context import BlockContext, shape_at
from autopar.judge.judge_mesh import local_shape
from autopar.rules.op_sharding_rule import NO_LABEL, OpShardingRule
from autopar.rules.registry import sharding_rule


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacedOp:
    """An op with its sharding rule and, per tensor (inputs, then outputs), its value, placements and labels.
    ``local_sizes``: label -> its size on the fullest rank."""

    context: BlockContext
    op: Op
    planned: OpPlan
    rule: OpShardingRule
    values: tuple[Value, ...]
    placements: tuple[Placements, ...]
    local_sizes: dict[int, int]

    @staticmethod
    def of(context: BlockContext, op: Op, planned: OpPlan) -> "PlacedOp":
        """CheckError where the placements contradict each other or the op's rule."""
        graph, sizes = context.model.graph, context.mesh.sizes
        rule = sharding_rule(op, graph.values)
        values = tuple(graph.values[value] for value in (*op.inputs, *op.outputs))
        placements = tuple(parse_placements(text) for text in (*planned.inputs, *planned.outputs))
        local_sizes: dict[int, int] = {}
        labels = (*rule.input_labels, *rule.output_labels)
        for value, placed, labels_of_dims in zip(values, placements, labels, strict=True):
            shape = local_shape(shape_at(graph, value.shape, context.micro_batch), placed, sizes)
            for dim, label in enumerate(labels_of_dims):
                if label != NO_LABEL and local_sizes.setdefault(label, shape[dim]) != shape[dim]:
                    raise CheckError(
                        f"op {op.name}: its tensors shard the same dimension differently: {_placements_text(planned)}"
                    )
        placed_op = PlacedOp(
            context=context,
            op=op,
            planned=planned,
            rule=rule,
            values=values,
            placements=placements,
            local_sizes=local_sizes,
        )
        placed_op._check_partial_sums()
        return placed_op

    def sharded_labels(self, axis: int) -> set[int]:
        """The labels that an axis shards."""
        return {
            labels[dim]
            for placed, labels in zip(self.placements, (*self.rule.input_labels, *self.rule.output_labels), strict=True)
            if (dim := placed[axis].shard_dim) is not None
        } - {NO_LABEL}

    def label_kind(self, label: int) -> str:
        """The kind of a label in the op's rule; "parallel" for one that the rule does not list."""
        return self.rule.label_kinds[label] if label < len(self.rule.label_kinds) else "parallel"

    @property
    def num_shards(self) -> int:
        """By how many ranks the work of the op is divided."""
        sizes = self.context.mesh.sizes
        return prod(compress(sizes, (self._is_sharded(axis) for axis in range(len(sizes)))))

    @property
    def num_fixed_shards(self) -> int:
        """As ``num_shards``, by axes alone that shard a dim which does not grow with the batch."""
        sizes = self.context.mesh.sizes
        return prod(compress(sizes, (self._is_sharded(axis, fixed=True) for axis in range(len(sizes)))))

    def _is_sharded(self, axis: int, *, fixed: bool = False) -> bool:
        """Whether an axis shards a dim of some tensor; ``fixed``: one that does not grow with the batch."""
        batch = self.context.model.graph.batch
        return any(
            (dim := placed[axis].shard_dim) is not None and not (fixed and batch.is_proportional(value.shape[dim]))
            for value, placed in zip(self.values, self.placements, strict=True)
        )

    def _check_partial_sums(self) -> None:
        """CheckError unless, on an axis that shards the op, what lacks the sharded labels is partial: outputs forward,
        gradients of inputs backward."""
        for axis, size in enumerate(self.context.mesh.sizes if self.placements else ()):
            sharded = self.sharded_labels(axis)
            if size > 1 and sharded and not self.rule.view_groups:
                self._check_outputs(axis, sharded)
                self._check_input_gradients(axis)

    def _check_outputs(self, axis: int, sharded_labels: set[int]) -> None:
        """CheckError where the rule does not allow the sharding, or a contraction leaves no partial result."""
        kinds, listed = {self.label_kind(label) for label in sharded_labels}, len(self.rule.label_kinds)
        if len(kinds) > 1 or next(iter(sharded_labels)) >= listed:
            return
        if "replicated" in kinds:
            raise CheckError(
                f"op {self.op.name}: it shards a dimension that its rule does not allow to be sharded: "
                f"{_placements_text(self.planned)}"
            )
        outputs = self.placements[len(self.op.inputs) :]
        if "sum" in kinds and any(output[axis] != PARTIAL for output in outputs):
            raise CheckError(
                f"op {self.op.name}: it shards a contracted dimension, so its result must be partial: "
                f"{_placements_text(self.planned)}"
            )

    def _check_input_gradients(self, axis: int) -> None:
        """CheckError where an input that the axis replicates has a gradient that is not partial."""
        for position, text in enumerate(self.planned.input_gradients):
            if not text or not self.values[position].requires_grad:
                continue
            if self.placements[position][axis] == REPLICATE and parse_placements(text)[axis] != PARTIAL:
                raise CheckError(
                    f"op {self.op.name}: input {position} is replicated in a sharded op, so its gradient must be partial"
                )


def _placements_text(planned: OpPlan) -> str:
    """Placements of inputs and outputs, for messages."""
    return f"{', '.join(planned.inputs)} -> {', '.join(planned.outputs)}"
