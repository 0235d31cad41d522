"""What one mesh axis can do to one op: the op's rule as a list of options, each a token per tensor.

A token says how a tensor lies on one axis, forward and backward together, since the backward is conjugate:

    Atom    sharded along it, and so is its gradient
    "R"     replicated, gradient replicated
    "G"     replicated, gradient partial: what an input of a sharded op is when it lacks the sharded label
    "P"     partial, gradient replicated: what an output of a sharded contraction is
"""

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.graph.ir import Op, Value
from autopar.rules.atoms import Atom, Cuts, matched_atoms
from autopar.rules.rule import OpRule

Token = Atom | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One choice of one op on one axis. ``labels`` are the labels it divides (none: the op is replicated), ``size`` the
    traced number of pieces it can be cut into at most, ``inside`` whether the kernel then exchanges
    ``OpRule.inside``."""

    inputs: tuple[Token, ...]
    outputs: tuple[Token, ...]
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
    options = [Option(inputs=("R",) * len(inputs), outputs=("R",) * len(outputs))]
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
        options.append(_passing("G", rule, inputs, outputs))
    if rule.passes_partial and inputs and inputs[rule.carrier].kind == "activation":
        options.append(_passing("P", rule, inputs, outputs))
    if op.target.startswith(("aten.add.Tensor", "aten.sub.Tensor")) and len(inputs) == 2 and not outputs[0].shape:
        # losses that are summed may stay partial sums
        options.append(Option(inputs=("P", "P"), outputs=("P",)))
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
    lacking = (
        "R" if inside and rule.outputs and not any(label in dims for label in outs for dims in rule.outputs) else "P"
    )
    return Option(
        inputs=tuple(
            _atom(dims, {**ins, **outs}, size) or ("G" if value.requires_grad else "R")
            for dims, value in zip(rule.inputs, inputs, strict=True)
        ),
        outputs=tuple(
            _atom(dims, {**ins, **outs}, size) or lacking for dims, value in zip(rule.outputs, outputs, strict=True)
        ),
        labels=tuple(sorted({*ins, *outs})),
        size=size,
        inside=inside,
    )


def _atom(dims: tuple[int, ...], repeats: dict[int, int], size: int) -> Atom | None:
    for dim, label in enumerate(dims):
        if label in repeats:
            return Atom(dim=dim, repeats=repeats[label], size=size)
    return None


def _passing(token: str, rule: OpRule, inputs: Sequence[Value], outputs: Sequence[Value]) -> Option:
    return Option(
        inputs=tuple(token if at == rule.carrier else "R" for at in range(len(inputs))),
        outputs=tuple(token for _ in outputs),
    )


def forward_placement(tokens: Sequence[Token]) -> tuple[Token, ...]:
    """Where the value lies: "G" is replicated in the forward pass."""
    return tuple("R" if token == "G" else token for token in tokens)


def gradient_placement(tokens: Sequence[Token]) -> tuple[Token, ...]:
    """Where the gradient lies: partial for "G", replicated for "P" and "R"."""
    return tuple("P" if token == "G" else "R" if token == "P" else token for token in tokens)
