"""What one mesh axis can do to one op: the op's rule as a list of options, each a placement pair per tensor."""

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.graph.ir import Op, Value
from autopar.rules.dim_factors import Atom, Cuts, matched_atoms
from autopar.rules.op_sharding_rule import OpRule
from autopar.rules.placement_pair import PARTIAL_GRADIENT, PARTIAL_VALUE, REPLICATED, PlacementPair


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One choice of one op on one axis. ``labels`` are the labels it divides (none: the op is replicated), ``size`` the
    traced number of parts it can be split into at most, ``inside`` whether the kernel then exchanges
    ``OpRule.inside``."""

    inputs: tuple[PlacementPair, ...]
    outputs: tuple[PlacementPair, ...]
    labels: tuple[int, ...] = ()
    size: int = 0
    inside: bool = False

    @property
    def sharded(self) -> bool:
        return bool(self.labels)


def op_options(
    op: Op, rule: OpRule, cuts: Cuts, number: int, inputs: Sequence[Value], outputs: Sequence[Value]
) -> tuple[Option, ...]:
    """All options of call ``number`` of ``cuts``; the first is "replicated"."""
    options = [Option(inputs=(REPLICATED,) * len(inputs), outputs=(REPLICATED,) * len(outputs))]
    grouped = {label for group in rule.groups for side in group for label in side}
    for label, kind in enumerate(rule.kinds):
        if kind == "whole" or label in grouped or not any(label in dims for dims in (*rule.inputs, *rule.outputs)):
            continue
        for repeats, size in cuts.of_label(number, label):
            if size > 1:
                options.append(_sharded(rule, {label: repeats}, {label: repeats}, size, inputs, outputs))
    for ins, outs, size in matched_atoms(cuts, number, rule):
        if not any(_kind(rule, label) == "whole" for label in (*ins, *outs)):
            options.append(_sharded(rule, ins, outs, size, inputs, outputs))
    if rule.passes_gradient and inputs and inputs[rule.carrier].requires_grad:
        options.append(_passing(PARTIAL_GRADIENT, rule, inputs, outputs))
    if rule.passes_partial and inputs and inputs[rule.carrier].kind == "activation":
        options.append(_passing(PARTIAL_VALUE, rule, inputs, outputs))
    if op.target.startswith(("aten.add.Tensor", "aten.sub.Tensor")) and len(inputs) == 2 and not outputs[0].shape:
        # losses that are summed may stay partial sums
        options.append(Option(inputs=(PARTIAL_VALUE, PARTIAL_VALUE), outputs=(PARTIAL_VALUE,)))
    return tuple(dict.fromkeys(options))


def _kind(rule: OpRule, label: int) -> str:
    return rule.kinds[label] if label < len(rule.kinds) else "parallel"


def _sharded(
    rule: OpRule,
    ins: dict[int, int],
    outs: dict[int, int],
    size: int,
    inputs: Sequence[Value],
    outputs: Sequence[Value],
) -> Option:
    kinds = {_kind(rule, label) for label in (*ins, *outs)}
    inside = "inside" in kinds
    shows = any(label in dims for label in outs for dims in rule.outputs)
    lacking = REPLICATED if inside and rule.outputs and not shows else PARTIAL_VALUE
    return Option(
        inputs=tuple(
            _sharded_pair(dims, {**ins, **outs}, size) or (PARTIAL_GRADIENT if value.requires_grad else REPLICATED)
            for dims, value in zip(rule.inputs, inputs, strict=True)
        ),
        outputs=tuple(
            _sharded_pair(dims, {**ins, **outs}, size) or lacking
            for dims, value in zip(rule.outputs, outputs, strict=True)
        ),
        labels=tuple(sorted({*ins, *outs})),
        size=size,
        inside=inside,
    )


def _sharded_pair(dims: tuple[int, ...], split_factors: dict[int, int], size: int) -> PlacementPair | None:
    """Of a tensor with labels ``dims``, sharded along the first that has a split factor; None where none has."""
    for dim, label in enumerate(dims):
        if label in split_factors:
            return PlacementPair.sharded(Atom(dim=dim, split_factor=split_factors[label], size=size))
    return None


def _passing(pair: PlacementPair, rule: OpRule, inputs: Sequence[Value], outputs: Sequence[Value]) -> Option:
    """The carrier and all outputs alike, other inputs replicated."""
    return Option(
        inputs=tuple(pair if at == rule.carrier else REPLICATED for at in range(len(inputs))),
        outputs=tuple(pair for _ in outputs),
    )
