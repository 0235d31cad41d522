"""What an op's planned placements mean by its sharding rule, axis by axis.

On each axis an op does one of three things, and the placements of all its tensors and their gradients follow:

    sharded      along labels of its rule: inputs with a label are sharded, those without replicated with a partial
                 gradient; outputs with a label are sharded, those without partial (or replicated, where the kernel
                 exchanges by itself)
    passing      linear in its inputs: partial sums in, partial sums out
    replicated   every rank computes the same; where everything behind it is replicated too, up to parameters whose
                 gradient may be partial, a partial gradient goes through it (a backward is linear in the gradient)

The candidate that agrees with most planned placements is taken. So an op never runs on placements under which its local
result would be wrong, whatever a plan says: what differs from the plan is converted.
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
    """What an op does on one axis: the placement of each input and output, and of their gradients; ``labels`` it
    shards."""

    inputs: tuple[Placement, ...]
    input_gradients: tuple[Placement, ...]
    outputs: tuple[Placement, ...]
    output_gradients: tuple[Placement, ...]
    labels: frozenset[int]

    @property
    def replicated(self) -> bool:
        return not self.labels and PARTIAL not in self.inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class OpSharding:
    """What an op does on a mesh: the placements it takes and gives, of its tensors and their gradients. ``labels[a]``
    are the labels of its rule sharded on axis a; ``exchanges`` whether some of them are exchanged inside the kernel."""

    rule: OpShardingRule
    inputs: tuple[Placements, ...]
    input_gradients: tuple[Placements, ...]
    outputs: tuple[Placements, ...]
    output_gradients: tuple[Placements, ...]
    labels: tuple[frozenset[int], ...]

    def axes_sharding(self, label: int) -> tuple[int, ...]:
        """The axes that shard a label."""
        return tuple(axis for axis, labels in enumerate(self.labels) if label in labels)

    def partial_axes(self, output: int = 0) -> tuple[int, ...]:
        """The axes on which an output is a partial sum of the op's own making."""
        placements = self.outputs[output]
        return tuple(axis for axis, labels in enumerate(self.labels) if labels and placements[axis] == PARTIAL)


class OpShardingMatcher:
    """Reads usages of ops of one graph at ``micro_batch`` samples on a mesh of ``sizes``."""

    def __init__(self, graph: Graph, micro_batch: int, sizes: Sequence[int]) -> None:
        self.graph, self.micro_batch, self.sizes = graph, micro_batch, tuple(sizes)

    def global_shape(self, value: int) -> tuple[int, ...]:
        """The global shape of a value."""
        return tuple(self.graph.batch.scale(size, self.micro_batch) for size in self.graph.values[value].shape)

    def match(
        self,
        op: Op,
        inputs: Sequence[Placements],
        outputs: Sequence[Placements],
        partial_gradient_passes: Sequence[bool],
    ) -> OpSharding:
        """The usage of ``op`` planned with these placements; ``pure[a]``: on axis a a partial gradient may go through
        it when it is replicated."""
        rule = sharding_rule(op, self.graph.values)
        call = _AxisCandidates(rule, op, self)
        uses = [
            call.best_match(
                axis,
                [placements[axis] for placements in inputs],
                [placements[axis] for placements in outputs],
                partial_gradient_passes[axis],
            )
            if size > 1
            else call.replicated(partial_gradient_passes[axis])
            for axis, size in enumerate(self.sizes)
        ]
        for axis in reversed(range(len(self.sizes))):
            if self._is_legal(op, uses):
                break
            uses[axis] = call.replicated(partial_gradient_passes[axis])
        return OpSharding(
            rule=rule,
            inputs=_placements_per_tensor(use.inputs for use in uses),
            input_gradients=_placements_per_tensor(use.input_gradients for use in uses),
            outputs=_placements_per_tensor(use.outputs for use in uses),
            output_gradients=_placements_per_tensor(use.output_gradients for use in uses),
            labels=tuple(use.labels for use in uses),
        )

    def _is_legal(self, op: Op, per_axis: Sequence[AxisSharding]) -> bool:
        sides = (
            (op.inputs, _placements_per_tensor(use.inputs for use in per_axis)),
            (op.outputs, _placements_per_tensor(use.outputs for use in per_axis)),
        )
        return all(
            is_legal(self.global_shape(value), placements, self.sizes)
            for values, placed in sides
            for value, placements in zip(values, placed, strict=True)
        )


def _placements_per_tensor(per_axis: Iterable[Sequence[Placement]]) -> tuple[Placements, ...]:
    return tuple(zip(*per_axis, strict=True))


class _AxisCandidates:
    """One op with its rule: makes and compares what it may do on an axis."""

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
        candidates = [self.replicated(partial_gradient_passes)]
        if PARTIAL in inputs and self._is_linear():
            candidates.append(self._partial_through())
        sides = zip((*inputs, *outputs), (*self.rule.input_labels, *self.rule.output_labels), strict=True)
        shards = dict.fromkeys((shard, dims) for shard, dims in sides if isinstance(shard, Shard))
        for shard, dims in shards:
            factors = self._split_factors(dims, shard, self.matcher.sizes[axis])
            if factors is not None and can_run_sharded(self.op, self.rule, factors):
                candidates.append(self._sharded(factors))

        def agreeing(use: AxisSharding) -> int:
            return sum(
                have == planned for have, planned in zip((*use.inputs, *use.outputs), (*inputs, *outputs), strict=True)
            )

        return max(candidates, key=agreeing)

    def replicated(self, partial_gradient_passes: bool) -> AxisSharding:
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
        """label -> split factor, when the tensor of ``dims`` is sharded so; None where the op cannot run like that."""
        label = dims[shard.dim] if shard.dim < len(dims) else NO_LABEL
        if label == NO_LABEL or self._is_unshardable(label):
            return None
        group = next((group for group in self.rule.view_groups if any(label in side for side in group)), None)
        if group is None:
            divides = self.label_sizes[label] % shard.split_factor == 0
            return {label: shard.split_factor} if divides and self.label_sizes[label] >= degree else None
        here = next(side for side in group if label in side)
        start = shard.split_factor * prod(self.label_sizes[other] for other in here[: here.index(label)])
        factors: dict[int, int] = {}
        for side in group:
            found = self._label_at(side, start, degree)
            if found is None or self._is_unshardable(found[0]):
                return None
            factors[found[0]] = found[1]
        # A label that no tensor shows stands for whole outputs of a split, which a shard would give to different ranks.
        shown = {label for dims in (*self.rule.input_labels, *self.rule.output_labels) for label in dims}
        return factors if self.rule.compute == "attention" or shown.issuperset(factors) else None

    def _label_at(self, side: Sequence[int], start: int, degree: int) -> tuple[int, int] | None:
        """The label of a side, and its split factor, that a shard of the flattened side in ``start`` pieces is of."""
        before = 1
        for label in side:
            size = self.label_sizes[label]
            if before <= start < before * size:
                factor, rest = divmod(start, before)
                if rest or size % factor or (size // factor) % degree:
                    return None
                return label, factor
            before *= size
        return None

    def _is_unshardable(self, label: int) -> bool:
        return label < len(self.rule.label_kinds) and self.rule.label_kinds[label] == "whole"

    def _sharded(self, factors: dict[int, int]) -> AxisSharding:
        inside = any(
            label < len(self.rule.label_kinds) and self.rule.label_kinds[label] == "inside" for label in factors
        )
        shown = any(label in dims for dims in self.rule.output_labels for label in factors)
        lacking = REPLICATE if inside and not shown else PARTIAL
        inputs = [_shard(dims, factors) for dims in self.rule.input_labels]
        outputs = tuple(_shard(dims, factors) or lacking for dims in self.rule.output_labels)
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
    """Of a tensor with labels ``dims``, that of the first with a split factor; None where none has."""
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
