"""How a value and its gradient are placed on a stage's mesh, and what redistributes both from one reader's needs to another's."""

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.core.local_shape import is_legal
from autopar.core.placement import REPLICATE, Placements, parse_placements
from autopar.core.plan import ValuePlan
from autopar.runtime.lower.op_sharding import replicate_partial_axes, replicate_unit_axes
from autopar.runtime.lower.redistribute_tensor import EdgeRedistribution


@dataclass(frozen=True, slots=True, kw_only=True)
class ValuePlacements:
    """How a value is placed on a stage's mesh, and how its gradient must be."""

    value: Placements
    gradient: Placements


def legal_placements(planned: ValuePlan, shape: Sequence[int], sizes: Sequence[int]) -> ValuePlacements:
    """The plan's placements of a value of global ``shape`` and of its gradient, both replicated on axes, the innermost
    first, until the shape allows the value's shards on a mesh of ``sizes``."""
    placements = parse_placements(planned.placement)
    gradient = parse_placements(planned.gradient) if planned.gradient else replicate_partial_axes(placements)
    for axis in reversed(range(len(sizes))):
        if is_legal(shape, placements, sizes):
            break
        placements, gradient = ((*each[:axis], REPLICATE, *each[axis + 1 :]) for each in (placements, gradient))
    return ValuePlacements(value=placements, gradient=gradient)


def edge_between(
    source: ValuePlacements,
    target: ValuePlacements,
    shape: tuple[int, ...],
    sizes: Sequence[int],
    *,
    requires_grad: bool,
) -> EdgeRedistribution:
    """A value of global ``shape`` redistributed from ``source`` to ``target``, and its gradient, if it has one, from
    ``target`` to ``source``."""
    return EdgeRedistribution(
        shape=shape,
        source=replicate_unit_axes(source.value, sizes),
        target=replicate_unit_axes(target.value, sizes),
        gradient_source=replicate_unit_axes(target.gradient, sizes) if requires_grad else (),
        gradient_target=replicate_unit_axes(source.gradient, sizes) if requires_grad else (),
    )
