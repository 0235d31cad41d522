"""What an op's planned placements mean by its sharding rule, axis by axis.

On each axis an op does one of three things, from which the placements of all its tensors and their gradients follow:

    sharded            along labels of its rule: inputs with such a label are sharded, inputs without replicated with a
                       partial gradient; outputs with such a label are sharded, outputs without partial (or replicated,
                       where the kernel communicates itself)
    partial            linear in its inputs: partial sums in, partial sums out
    replicated         every rank computes the same. A backward is linear in the gradient: where all that the op depends
                       on is replicated too, up to parameters whose gradients may be partial, its gradients may be partial

The candidate that agrees with most planned placements is taken, and the inputs are redistributed to it. So an op never
runs on placements for which its local result would be wrong, whatever a plan says.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from autopar.core.local_shape import is_legal
from autopar.core.placement import PARTIAL, REPLICATE, Placement, Placements, Shard
from autopar.graph.ir import Graph, Op, Value
from autopar.rules.local_forms import can_run_sharded
from autopar.rules.op_sharding_rule import NO_LABEL, OpShardingRule
from autopar.rules.registry import sharding_rule

_LINEAR_IN_ALL = frozenset(("add.Tensor", "sub.Tensor", "cat.default", "stack.default"))
_LINEAR_IN_ONE = frozenset(
    ("sum.default", "sum.dim_IntList", "mean.default", "mean.dim", "neg.default", "mul.Tensor", "mul.Scalar", "div.Tensor",
     "div.Scalar", "to.dtype", "_to_copy.default", "clone.default", "contiguous.default", "alias.default")
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisSharding:
    """What an op does on one axis: the placements of its inputs and outputs and of their gradients. ``labels`` are those of
    its rule that the axis shards."""

    inputs: tuple[Placement, ...]
    input_gradients: tuple[Placement, ...]
    outputs: tuple[Placement, ...]
    output_gradients: tuple[Placement, ...]
    labels: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpSharding:
    """The placements with which an op runs on a mesh, of its inputs and outputs and of their gradients. ``labels[a]`` are
    the labels of its rule that axis a shards."""

    rule: OpShardingRule
    inputs: tuple[Placements, ...]
    input_gradients: tuple[Placements, ...]
    outputs: tuple[Placements, ...]
    output_gradients: tuple[Placements, ...]
    labels: tuple[frozenset[int], ...]

    def axes_sharding(self, label: int) -> tuple[int, ...]:
        """The axes that shard a label of the rule."""
        return tuple(axis for axis, labels in enumerate(self.labels) if label in labels)

    def partial_axes(self, output: int = 0) -> tuple[int, ...]:
        """The axes on which an output is partial because the op shards a label there, not because its inputs are partial."""
        placements = self.outputs[output]
        return tuple(axis for axis, labels in enumerate(self.labels) if labels and placements[axis] == PARTIAL)


class OpShardingMatcher:
    """Finds the shardings with which ops of a graph run, at ``micro_batch`` samples on a mesh of ``sizes``."""

    def __init__(self, graph: Graph, micro_batch: int, sizes: Sequence[int]) -> None:
        self.graph, self.micro_batch, self.sizes = graph, micro_batch, tuple(sizes)

    def global_shape(self, value: int) -> tuple[int, ...]:
        """The global shape of a value at the micro-batch's size."""
        return tuple(self.graph.batch.scale(size, self.micro_batch) for size in self.graph.values[value].shape)

    def match(
        self,
        op: Op,
        inputs: Sequence[Placements],
        outputs: Sequence[Placements],
        partial_gradient_passes: Sequence[bool],
    ) -> OpSharding:
        """The valid sharding of ``op`` that agrees with most of the planned placements of its inputs and outputs.

        ``partial_gradient_passes[a]``: the gradients of the op may be partial on axis a where it is replicated. Axes,
        the innermost first, are replicated until every tensor's shape allows its shards."""
        rule = sharding_rule(op, self.graph.values)
        candidates = _AxisCandidates(rule, op, self)
        per_axis = [
            candidates.best_match(
                axis,
                [placements[axis] for placements in inputs],
                [placements[axis] for placements in outputs],
                partial_gradient_passes[axis],
            )
            if size > 1
            else candidates.replicated(partial_gradient_passes[axis])
            for axis, size in enumerate(self.sizes)
        ]
        for axis in reversed(range(len(self.sizes))):
            if self._is_legal(op, per_axis):
                break
            per_axis[axis] = candidates.replicated(partial_gradient_passes[axis])
        return OpSharding(
            rule=rule,
            inputs=_placements_per_tensor(each.inputs for each in per_axis),
            input_gradients=_placements_per_tensor(each.input_gradients for each in per_axis),
            outputs=_placements_per_tensor(each.outputs for each in per_axis),
            output_gradients=_placements_per_tensor(each.output_gradients for each in per_axis),
            labels=tuple(each.labels for each in per_axis),
        )

    def _is_legal(self, op: Op, per_axis: Sequence[AxisSharding]) -> bool:
        sides = (
            (op.inputs, _placements_per_tensor(each.inputs for each in per_axis)),
            (op.outputs, _placements_per_tensor(each.outputs for each in per_axis)),
        )
        return all(
            is_legal(self.global_shape(value), placements, self.sizes)
            for values, placements_of_values in sides
            for value, placements in zip(values, placements_of_values, strict=True)
        )


def _placements_per_tensor(per_axis: Iterable[Sequence[Placement]]) -> tuple[Placements, ...]:
    """Transposes placements by axis and tensor to placements by tensor and axis."""
    return tuple(zip(*per_axis, strict=True))


class _AxisCandidates:
    """What one op may do on an axis by its rule, and how well that agrees with a plan."""

    def __init__(self, rule: OpShardingRule, op: Op, matcher: OpShardingMatcher) -> None:
        self.rule, self.op, self.matcher = rule, op, matcher
        values = matcher.graph.values
        self.inputs: list[Value] = [values[value] for value in op.inputs]
        self.outputs: list[Value] = [values[value] for value in op.outputs]
        self.label_sizes = self._label_sizes()

    def _label_sizes(self) -> dict[int, int]:
        batch, micro_batch = self.matcher.graph.batch, self.matcher.micro_batch
        sizes = {label: batch.scale(size, micro_batch) for label, size in self.rule.hidden_label_sizes}
        for values, labels in ((self.op.inputs, self.rule.input_labels), (self.op.outputs, self.rule.output_labels)):
            for value, dims in zip(values, labels, strict=True):
                sizes.update(
                    (label, size)
                    for label, size in zip(dims, self.matcher.global_shape(value), strict=True)
                    if label != NO_LABEL
                )
        return sizes

    def best_match(
        self, axis: int, inputs: Sequence[Placement], outputs: Sequence[Placement], partial_gradient_passes: bool
    ) -> AxisSharding:
        """Of all that the op may do on ``axis``, what agrees with most of these placements of its inputs and outputs."""
        candidates = [self.replicated(partial_gradient_passes)]
        if PARTIAL in inputs and self._is_linear():
            candidates.append(self._partial_through())
        sides = zip((*inputs, *outputs), (*self.rule.input_labels, *self.rule.output_labels), strict=True)
        shards = dict.fromkeys((shard, dims) for shard, dims in sides if isinstance(shard, Shard))
        for shard, dims in shards:
            factors = self._split_factors(dims, shard, self.matcher.sizes[axis])
            if factors is not None and can_run_sharded(self.op, self.rule, factors):
                candidates.append(self._sharded(factors))

        def num_agreeing(candidate: AxisSharding) -> int:
            placements = (*candidate.inputs, *candidate.outputs)
            return sum(own == planned for own, planned in zip(placements, (*inputs, *outputs), strict=True))

        return max(candidates, key=num_agreeing)

    def replicated(self, partial_gradient_passes: bool) -> AxisSharding:
        """The op replicated on an axis, with replicated or partial gradients."""
        gradient: Placement = PARTIAL if partial_gradient_passes else REPLICATE
        return AxisSharding(
            inputs=(REPLICATE,) * len(self.inputs),
            input_gradients=(gradient,) * len(self.inputs),
            outputs=(REPLICATE,) * len(self.outputs),
            output_gradients=(gradient,) * len(self.outputs),
            labels=frozenset(),
        )

    def _is_linear(self) -> bool:
        name = self.op.target.removeprefix("aten.")
        floating = [value.dtype.startswith(("float", "bfloat", "complex")) for value in (*self.inputs, *self.outputs)]
        if not all(floating):
            return False
        if name in _LINEAR_IN_ALL:
            return len(self.inputs) > 1 or name in ("cat.default", "stack.default")
        return len(self.inputs) == 1 and (
            name in _LINEAR_IN_ONE or (self.rule.passes_partial and bool(self.rule.output_labels))
        )

    def _partial_through(self) -> AxisSharding:
        return AxisSharding(
            inputs=(PARTIAL,) * len(self.inputs),
            input_gradients=(REPLICATE,) * len(self.inputs),
            outputs=(PARTIAL,) * len(self.outputs),
            output_gradients=(REPLICATE,) * len(self.outputs),
            labels=frozenset(),
        )

    def _split_factors(self, dims: Sequence[int], shard: Shard, degree: int) -> dict[int, int] | None:
        """Label -> split factor of all labels that are sharded when a tensor whose dims have the labels ``dims`` is sharded
        as ``shard`` over ``degree`` ranks; None where the op cannot run so."""
        label = dims[shard.dim] if shard.dim < len(dims) else NO_LABEL
        if label == NO_LABEL or self._is_unshardable(label):
            return None
        group = next((group for group in self.rule.view_groups if any(label in side for side in group)), None)
        if group is None:
            divides = self.label_sizes[label] % shard.split_factor == 0
            return {label: shard.split_factor} if divides and self.label_sizes[label] >= degree else None
        own_side = next(side for side in group if label in side)
        num_pieces = shard.split_factor * prod(self.label_sizes[other] for other in own_side[: own_side.index(label)])
        factors: dict[int, int] = {}
        for side in group:
            label_and_factor = self._label_at(side, num_pieces, degree)
            if label_and_factor is None or self._is_unshardable(label_and_factor[0]):
                return None
            factors[label_and_factor[0]] = label_and_factor[1]
        # A label that no tensor shows counts the outputs of a split, which a shard would give to different ranks.
        shown = {label for dims in (*self.rule.input_labels, *self.rule.output_labels) for label in dims}
        return factors if self.rule.compute == "attention" or shown.issuperset(factors) else None

    def _label_at(self, side: Sequence[int], num_pieces: int, degree: int) -> tuple[int, int] | None:
        """The label of one side of a view, and its split factor, that are sharded when the flattened side is sharded in
        ``num_pieces`` pieces; None where the pieces, or their ``degree`` chunks, do not divide it."""
        outer_size = 1
        for label in side:
            size = self.label_sizes[label]
            if outer_size <= num_pieces < outer_size * size:
                factor, remainder = divmod(num_pieces, outer_size)
                if remainder or size % factor or (size // factor) % degree:
                    return None
                return label, factor
            outer_size *= size
        return None

    def _is_unshardable(self, label: int) -> bool:
        return label < len(self.rule.label_kinds) and self.rule.label_kinds[label] == "replicated"

    def _sharded(self, factors: dict[int, int]) -> AxisSharding:
        in_kernel = any(
            label < len(self.rule.label_kinds) and self.rule.label_kinds[label] == "collective" for label in factors
        )
        shown = any(label in dims for dims in self.rule.output_labels for label in factors)
        unlabelled = REPLICATE if in_kernel and not shown else PARTIAL
        inputs = [_shard(dims, factors) for dims in self.rule.input_labels]
        outputs = tuple(_shard(dims, factors) or unlabelled for dims in self.rule.output_labels)
        return AxisSharding(
            inputs=tuple(shard or REPLICATE for shard in inputs),
            input_gradients=tuple(
                shard or (PARTIAL if value.requires_grad else REPLICATE)
                for shard, value in zip(inputs, self.inputs, strict=True)
            ),
            outputs=outputs,
            output_gradients=replicate_partial_axes(outputs),
            labels=frozenset(factors),
        )


def _shard(dims: Sequence[int], factors: dict[int, int]) -> Shard | None:
    """The shard of a tensor whose dims have the labels ``dims``: of the first dim with a split factor; None where none
    has one."""
    for dim, label in enumerate(dims):
        if label in factors:
            return Shard(dim, factors[label])
    return None


def replicate_unit_axes(placements: Placements, sizes: Sequence[int]) -> Placements:
    """``placements`` with Replicate on axes of one rank, where all placements mean the same."""
    return tuple(REPLICATE if size == 1 else each for each, size in zip(placements, sizes, strict=True))


def replicate_partial_axes(placements: Placements) -> Placements:
    """``placements`` with Replicate for Partial: of a sum after its reduction, and of the gradient of a value whose
    readers need no other."""
    return tuple(REPLICATE if placement == PARTIAL else placement for placement in placements)
