"""What one mesh axis can do to one op: the op's rule as a list of options, each a placement pair per tensor."""

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.graph.ir import Op, Value
from autopar.rules.dim_factors import DimFactor, DimFactorization, shared_factors
from autopar.rules.op_sharding_rule import OpShardingRule
from autopar.rules.placement_pair import PARTIAL_GRADIENT, PARTIAL_VALUE, REPLICATED, PlacementPair


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisOption:
    """One choice of one op on one axis. ``labels`` are the labels it divides (none: the op is replicated), ``size`` the
    traced number of parts it can be split into at most, ``inside`` whether the kernel then exchanges
    ``OpRule.inside``."""

    inputs: tuple[PlacementPair, ...]
    outputs: tuple[PlacementPair, ...]
    labels: tuple[int, ...] = ()
    max_shards: int = 0
    runs_kernel_collectives: bool = False

    @property
    def is_sharded(self) -> bool:
        return bool(self.labels)


def axis_options(
    op: Op,
    rule: OpShardingRule,
    factorization: DimFactorization,
    call_index: int,
    inputs: Sequence[Value],
    outputs: Sequence[Value],
) -> tuple[AxisOption, ...]:
    """All options of call ``number`` of ``cuts``; the first is "replicated"."""
    options = [AxisOption(inputs=(REPLICATED,) * len(inputs), outputs=(REPLICATED,) * len(outputs))]
    grouped = {label for group in rule.view_groups for side in group for label in side}
    for label, kind in enumerate(rule.label_kinds):
        if (
            kind == "whole"
            or label in grouped
            or not any(label in dims for dims in (*rule.input_labels, *rule.output_labels))
        ):
            continue
        for repeats, size in factorization.factors_of_label(call_index, label):
            if size > 1:
                options.append(_sharded_option(rule, {label: repeats}, {label: repeats}, size, inputs, outputs))
    for ins, outs, size in shared_factors(factorization, call_index, rule):
        if not any(_label_kind(rule, label) == "whole" for label in (*ins, *outs)):
            options.append(_sharded_option(rule, ins, outs, size, inputs, outputs))
    if rule.passes_partial_gradient and inputs and inputs[rule.linear_input].requires_grad:
        options.append(_linear_option(PARTIAL_GRADIENT, rule, inputs, outputs))
    if rule.passes_partial and inputs and inputs[rule.linear_input].kind == "activation":
        options.append(_linear_option(PARTIAL_VALUE, rule, inputs, outputs))
    if op.target.startswith(("aten.add.Tensor", "aten.sub.Tensor")) and len(inputs) == 2 and not outputs[0].shape:
        # losses that are summed may stay partial sums
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
    kinds = {_label_kind(rule, label) for label in (*input_split_factors, *output_split_factors)}
    inside = "inside" in kinds
    shows = any(label in dims for label in output_split_factors for dims in rule.output_labels)
    lacking = REPLICATED if inside and rule.output_labels and not shows else PARTIAL_VALUE
    return AxisOption(
        inputs=tuple(
            _sharded_pair(dims, {**input_split_factors, **output_split_factors}, size)
            or (PARTIAL_GRADIENT if value.requires_grad else REPLICATED)
            for dims, value in zip(rule.input_labels, inputs, strict=True)
        ),
        outputs=tuple(
            _sharded_pair(dims, {**input_split_factors, **output_split_factors}, size) or lacking
            for dims, value in zip(rule.output_labels, outputs, strict=True)
        ),
        labels=tuple(sorted({*input_split_factors, *output_split_factors})),
        max_shards=size,
        runs_kernel_collectives=inside,
    )


def _sharded_pair(dims: tuple[int, ...], split_factors: dict[int, int], size: int) -> PlacementPair | None:
    """Of a tensor with labels ``dims``, sharded along the first that has a split factor; None where none has."""
    for dim, label in enumerate(dims):
        if label in split_factors:
            return PlacementPair.sharded(DimFactor(dim=dim, split_factor=split_factors[label], size=size))
    return None


def _linear_option(
    pair: PlacementPair, rule: OpShardingRule, inputs: Sequence[Value], outputs: Sequence[Value]
) -> AxisOption:
    """The carrier and all outputs alike, other inputs replicated."""
    return AxisOption(
        inputs=tuple(pair if at == rule.linear_input else REPLICATED for at in range(len(inputs))),
        outputs=tuple(pair for _ in outputs),
    )
