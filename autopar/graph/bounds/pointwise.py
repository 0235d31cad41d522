"""Interval arithmetic of element-wise ops: bounds of the result from bounds of the operands.

The op itself runs on the bounds, so that dtypes, rounding and infinities are torch's own. If it is monotone in each
operand, its extremes are among its results at the operands' bounds, as rounding is monotone, too. If it is monotone on
either side of zero, zero is another candidate where it is between the bounds. The elements of boolean operands are their
bounds, so every op on these is exact. The result of an op without a rule is known only where its operands are.

Source: Moore, Kearfott, Cloud, Introduction to Interval Analysis (2009), chapters 2 and 5.
"""

import operator
from collections.abc import Sequence
from functools import reduce
from itertools import product

import torch
from torch import Tensor, fx

from autopar.graph.bounds.boxes import Bounds, Undecided, exactly, widened
from autopar.graph.bounds.constants import Call

_MONOTONE = frozenset(
    (
        "add", "sub", "rsub", "subtract", "neg", "negative", "positive", "minimum", "maximum", "clamp", "clamp_min",
        "clamp_max", "relu", "ceil", "floor", "round", "trunc", "sign", "where", "masked_fill", "clone", "lt", "le",
        "gt", "ge", "less", "less_equal", "greater", "greater_equal",
    )
)  # fmt: skip
_MONOTONE_AROUND_ZERO = frozenset(
    ("mul", "multiply", "abs", "absolute", "square", "logical_and", "logical_or", "logical_xor", "logical_not")
)
_DIVISIONS = frozenset(("div", "divide", "true_divide", "floor_divide"))
_EQUALITIES = {"eq": True, "ne": False, "not_equal": False}
_LOGICAL = frozenset(("__and__", "__or__", "__xor__", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not"))
_CASTS = frozenset(("to", "_to_copy", "type_as"))
_WITH_RULE = _MONOTONE | _MONOTONE_AROUND_ZERO | _DIVISIONS | frozenset(_EQUALITIES) | _LOGICAL | _CASTS


def is_pointwise(call: Call) -> bool:
    """Whether an element of the result depends only on the elements of the operands at the same position."""
    return call.packet in _WITH_RULE or torch.Tag.pointwise in getattr(call.target, "tags", ())


def operands_of(call: Call) -> list[fx.Node]:
    """The tensors among the arguments, in order."""
    return [argument for argument in (*call.args, *call.kwargs.values()) if isinstance(argument, fx.Node)]


def pointwise(call: Call, operands: Sequence[Bounds]) -> Bounds:
    """Bounds of the result of an element-wise op from those of its operands, in the order of ``operands_of(call)``;
    raises Undecided where the op gives no tensor of the result's dtype."""
    if call.packet in _CASTS and call.dtype is not None:
        return cast(operands[0], call.dtype)
    if all(operand.exact for operand in operands):
        return exactly(_run(call, [operand.low for operand in operands]))
    if call.packet in _EQUALITIES and not _are_boolean(operands):
        return _equality(call, operands)
    if call.packet == "remainder" and type(call.args[-1]) is int and call.args[-1] > 0 and _is_integral(operands[0]):
        return _remainder(call, operands[0], call.args[-1])
    extremes = _extremes(call, _candidates(call, operands))
    known = reduce(operator.and_, (operand.low == operand.high for operand in operands))
    if not _has_rule(call, operands):
        return widened(extremes, ~known)
    unknown = [torch.isnan(end) for operand in operands for end in _ends(operand) if end.is_floating_point()]
    if call.packet in _DIVISIONS:
        unknown.append(_may_be_zero(call, operands[-1]))
    if _is_integral(extremes) and not _are_boolean(operands):
        unknown.append(_may_overflow(call, operands, extremes.low.dtype))
    return widened(extremes, reduce(operator.or_, unknown) & ~known) if unknown else extremes


def cast(bounds: Bounds, dtype: torch.dtype) -> Bounds:
    """Bounds of the same elements in another dtype; what an integer dtype cannot hold is unknown."""
    if bounds.exact:
        return exactly(bounds.low.to(dtype))
    if dtype == torch.bool:
        ends = _with_zero(bounds) if bounds.low.dtype != torch.bool else _ends(bounds)
        truths = [end != 0 for end in ends]
        converted = Bounds(low=reduce(operator.and_, truths), high=reduce(operator.or_, truths))
    else:
        converted = Bounds(low=bounds.low.to(dtype), high=bounds.high.to(dtype))
    unknown = torch.isnan(bounds.low) | torch.isnan(bounds.high)
    if _is_integral(converted):
        limits = torch.iinfo(dtype)
        least, greatest = bounds.low.double(), bounds.high.double()
        unknown = unknown | ~((least >= limits.min / 2) & (greatest <= limits.max / 2))
    return widened(converted, unknown & (bounds.low != bounds.high))


def _run(call: Call, elements: Sequence[Tensor]) -> Tensor:
    """The op's result with ``elements`` in place of its tensor arguments."""
    remaining = iter(elements)
    args = [next(remaining) if isinstance(argument, fx.Node) else argument for argument in call.args]
    kwargs = {name: next(remaining) if isinstance(arg, fx.Node) else arg for name, arg in call.kwargs.items()}
    result = call.target(*args, **kwargs)
    if not isinstance(result, Tensor) or call.dtype not in (None, result.dtype):
        raise Undecided(f"{call.target} of bounds is not a tensor of {call.dtype}")
    return result


def _has_rule(call: Call, operands: Sequence[Bounds]) -> bool:
    """Whether the op's extremes are among its results at ``_candidates``."""
    return _are_boolean(operands) or call.packet in _MONOTONE | _MONOTONE_AROUND_ZERO | _DIVISIONS


def _candidates(call: Call, operands: Sequence[Bounds]) -> list[tuple[Tensor, ...]]:
    """For each operand the elements at which the op may have its extremes."""
    if call.packet not in _MONOTONE_AROUND_ZERO:
        return [_ends(operand) for operand in operands]
    return [_ends(operand) if operand.low.dtype == torch.bool else _with_zero(operand) for operand in operands]


def _ends(bounds: Bounds) -> tuple[Tensor, ...]:
    return (bounds.low,) if bounds.exact else (bounds.low, bounds.high)


def _with_zero(bounds: Bounds) -> tuple[Tensor, ...]:
    """Both bounds and the number between them that is nearest to zero."""
    if bounds.exact:
        return (bounds.low,)
    return bounds.low, bounds.high, torch.minimum(bounds.low.clamp(min=0), bounds.high)


def _extremes(call: Call, candidates: Sequence[Sequence[Tensor]]) -> Bounds:
    """The least and the greatest result over all choices of one candidate per operand."""
    results = [_run(call, choice) for choice in product(*candidates)]
    return Bounds(low=reduce(torch.minimum, results), high=reduce(torch.maximum, results))


def _equality(call: Call, operands: Sequence[Bounds]) -> Bounds:
    """``a == b`` is ``a <= b and a >= b``: true in a box where both are, possible where both may be true."""
    overload = str(call.target).rpartition(".")[2]
    sides = []
    for name in ("le", "ge"):
        side = Call(
            target=getattr(getattr(torch.ops.aten, name), overload),
            args=call.args,
            kwargs=call.kwargs,
            shape=call.shape,
            dtype=call.dtype,
        )
        sides.append(pointwise(side, operands))
    low, high = sides[0].low & sides[1].low, sides[0].high & sides[1].high
    return Bounds(low=low, high=high) if _EQUALITIES[call.packet] else Bounds(low=~high, high=~low)


def _remainder(call: Call, operand: Bounds, divisor: int) -> Bounds:
    """The remainder is monotone between two multiples of the divisor; over more, it may be all of 0 .. divisor - 1."""
    low, high = _run(call, [operand.low]), _run(call, [operand.high])
    same_quotient = operand.low.floor_divide(divisor) == operand.high.floor_divide(divisor)
    return Bounds(low=torch.where(same_quotient, low, 0), high=torch.where(same_quotient, high, divisor - 1))


def _may_overflow(call: Call, operands: Sequence[Bounds], dtype: torch.dtype) -> Tensor:
    """Where an integer result may exceed its dtype: where the result in float64 exceeds half of its range."""
    as_float64 = [
        operand if operand.low.dtype == torch.bool else Bounds(low=operand.low.double(), high=operand.high.double())
        for operand in operands
    ]
    any_dtype = Call(target=call.target, args=call.args, kwargs=call.kwargs, shape=call.shape, dtype=None)
    extremes = _extremes(any_dtype, _candidates(call, as_float64))
    limits = torch.iinfo(dtype)
    return ~((extremes.low >= limits.min / 2) & (extremes.high <= limits.max / 2))


def _may_be_zero(call: Call, last: Bounds) -> Tensor:
    """Where the divisor, the second argument, may be zero; ``last`` are the bounds of the last tensor argument."""
    if isinstance(call.args[1], fx.Node):
        return (last.low <= 0) & (last.high >= 0)
    return torch.tensor(call.args[1] == 0)


def _is_integral(bounds: Bounds) -> bool:
    dtype = bounds.low.dtype
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _are_boolean(operands: Sequence[Bounds]) -> bool:
    return all(operand.low.dtype == torch.bool for operand in operands)
