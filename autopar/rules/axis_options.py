"""The options of one op on one mesh axis, from its sharding rule: a placement pair for each of its tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.graph.ir import Op, Value
from autopar.rules.dim_factors import DimFactor, DimFactorization, shared_factors
from autopar.rules.op_sharding_rule import OpShardingRule
from autopar.rules.placement_pair import PARTIAL_GRADIENT, PARTIAL_VALUE, REPLICATED, PlacementPair


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisOption:
    """One choice for one op on one axis: the placement pairs of its ``inputs`` and ``outputs``. ``labels`` are the labels
    that it shards (none: every rank runs the full op); ``max_shards`` is the size that it divides at the traced batch;
    ``runs_kernel_collectives``: whether the kernel then runs the collectives of ``OpShardingRule.kernel_collectives``."""

    inputs: tuple[PlacementPair, ...]
    outputs: tuple[PlacementPair, ...]
    labels: tuple[int, ...] = ()
    max_shards: int = 0
    runs_kernel_collectives: bool = False

    @property
    def is_sharded(self) -> bool:
        """Whether the option shards the op along a label."""
        return bool(self.labels)


def axis_options(
    op: Op,
    rule: OpShardingRule,
    factorization: DimFactorization,
    call_index: int,
    inputs: Sequence[Value],
    outputs: Sequence[Value],
) -> tuple[AxisOption, ...]:
    """All options of an op, which is call ``call_index`` of ``factorization``, with its ``inputs`` and ``outputs``: the
    first replicates it, others shard one factor, or pass a partial sum or partial gradient through a linear op."""
    options = [AxisOption(inputs=(REPLICATED,) * len(inputs), outputs=(REPLICATED,) * len(outputs))]
    grouped = {label for group in rule.view_groups for side in group for label in side}
    for label, kind in enumerate(rule.label_kinds):
        if (
            kind == "replicated"
            or label in grouped
            or not any(label in dims for dims in (*rule.input_labels, *rule.output_labels))
        ):
            continue
        for split_factor, size in factorization.factors_of_label(call_index, label):
            if size > 1:
                split_factors = {label: split_factor}
                options.append(_sharded_option(rule, split_factors, split_factors, size, inputs, outputs))
    for input_split_factors, output_split_factors, size in shared_factors(factorization, call_index, rule):
        labels = (*input_split_factors, *output_split_factors)
        if not any(_label_kind(rule, label) == "replicated" for label in labels):
            options.append(_sharded_option(rule, input_split_factors, output_split_factors, size, inputs, outputs))
    if rule.passes_partial_gradient and inputs and inputs[rule.linear_input].requires_grad:
        options.append(_linear_option(PARTIAL_GRADIENT, rule, inputs, outputs))
    if rule.passes_partial and inputs and inputs[rule.linear_input].kind == "activation":
        options.append(_linear_option(PARTIAL_VALUE, rule, inputs, outputs))
    if op.target.startswith(("aten.add.Tensor", "aten.sub.Tensor")) and len(inputs) == 2 and not outputs[0].shape:
        # The sum of two partial losses is a partial loss.
        options.append(AxisOption(inputs=(PARTIAL_VALUE, PARTIAL_VALUE), outputs=(PARTIAL_VALUE,)))
    return tuple(dict.fromkeys(options))


def _label_kind(rule: OpShardingRule, label: int) -> str:
    return rule.label_kinds[label] if label < len(rule.label_kinds) else "parallel"


def _sharded_option(
    rule: OpShardingRule,
    input_split_factors: dict[int, int],
    output_split_factors: dict[int, int],
    size: int,
    inputs: Sequence[Value],
    outputs: Sequence[Value],
) -> AxisOption:
    """The option that shards a factor of ``size``, given by the split factor of each label that has it. Inputs without
    such a label are replicated with a partial gradient; outputs without one are partial, or replicated where the kernel
    runs collectives."""
    split_factors = {**input_split_factors, **output_split_factors}
    has_collectives = any(_label_kind(rule, label) == "collective" for label in split_factors)
    is_in_outputs = any(label in dims for label in output_split_factors for dims in rule.output_labels)
    unsharded_output = REPLICATED if has_collectives and rule.output_labels and not is_in_outputs else PARTIAL_VALUE
    return AxisOption(
        inputs=tuple(
            _sharded_pair(dims, split_factors, size) or (PARTIAL_GRADIENT if value.requires_grad else REPLICATED)
            for dims, value in zip(rule.input_labels, inputs, strict=True)
        ),
        outputs=tuple(
            _sharded_pair(dims, split_factors, size) or unsharded_output
            for dims, value in zip(rule.output_labels, outputs, strict=True)
        ),
        labels=tuple(sorted(split_factors)),
        max_shards=size,
        runs_kernel_collectives=has_collectives,
    )


def _sharded_pair(dims: tuple[int, ...], split_factors: dict[int, int], size: int) -> PlacementPair | None:
    """The pair of a tensor with labels ``dims``: sharded along the first one that has a split factor, None where none
    has."""
    for dim, label in enumerate(dims):
        if label in split_factors:
            return PlacementPair.sharded(DimFactor(dim=dim, split_factor=split_factors[label], size=size))
    return None


def _linear_option(
    pair: PlacementPair, rule: OpShardingRule, inputs: Sequence[Value], outputs: Sequence[Value]
) -> AxisOption:
    """The option that gives ``pair`` to the linear input and to all outputs, and replicates the other inputs."""
    return AxisOption(
        inputs=tuple(pair if position == rule.linear_input else REPLICATED for position in range(len(inputs))),
        outputs=tuple(pair for _ in outputs),
    )
