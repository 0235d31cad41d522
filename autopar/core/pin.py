"""Pins: placements of parameters that the user fixes, ``--pin GLOB=PLACEMENTS``, and whether a plan satisfies them.

    layers.*.wq.weight=RS(0)     on a mesh of two axes: replicated over the first, sharded on dim 0 over the second

A glob (``*`` also spans dots) names parameters; there is a placement per axis of the mesh, outermost first, as plans
print them. Over an axis that does not shard a parameter where ops use it, the placement says whether it is stored sharded:
``S(0)`` over the data axis is ZeRO-3. ``S(d)`` stands for any shard of dim d, also a strided one (a fused projection
sharded by heads).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from autopar.core.errors import UsageError
from autopar.core.placement import PARTIAL, Placement, Placements, Shard, format_placements, parse_placements
from autopar.core.plan import ParameterPlan, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """``glob`` over names of parameters, and a placement per mesh axis.

    >>> pin = parse_pin("layers.*.wq.weight", "RS(0)")
    >>> str(pin), pin.matches("layers.11.wq.weight"), pin.matches("head.weight")
    ('layers.*.wq.weight=RS(0)', True, False)
    """

    glob: str
    placements: Placements

    def matches(self, name: str) -> bool:
        """Whether the glob matches the name of a parameter."""
        return fnmatchcase(name, self.glob)

    def __str__(self) -> str:
        return f"{self.glob}={format_placements(self.placements)}"


def parse_pin(glob: str, placements: str) -> Pin:
    """The pin of a glob and the text of its placements; UsageError where the text is not one S(dim) or R per mesh axis."""
    try:
        parsed = parse_placements(placements)
    except ValueError as error:
        raise UsageError(f"--pin {glob}: {error}") from None
    if not parsed or PARTIAL in parsed:
        raise UsageError(
            f"--pin {glob}={placements}: write S(dim) or R for each mesh axis; no parameter is a partial sum"
        )
    return Pin(glob=glob, placements=parsed)


def parse_pins(pins: Sequence[tuple[str, str]]) -> tuple[Pin, ...]:
    """The pins of (glob, placements) pairs; UsageError for the first whose placements ``parse_pin`` refuses."""
    return tuple(parse_pin(glob, placements) for glob, placements in pins)


def satisfies(placement: Placement, pinned: Placement) -> bool:
    """Whether a placement is the ``pinned`` one; ``Shard(d)`` pins any shard of dim d.

    >>> satisfies(Shard(0, split_factor=3), Shard(0)), satisfies(Shard(0), Shard(0, split_factor=3))
    (True, False)
    """
    any_shard = isinstance(pinned, Shard) and pinned.split_factor == 1
    return placement == pinned or (any_shard and placement.shard_dim == pinned.shard_dim)


def unsatisfied_pins(plan: Plan, pins: tuple[Pin, ...]) -> list[str]:
    """A line for each parameter whose placement a pin contradicts; empty for a plan that satisfies all pins. A tied
    parameter is stored for one of its users in a stage, and only the placement there counts."""
    faults: dict[str, None] = {}
    for stage in plan.stages:
        axes = [axis.name for axis in stage.axes]
        stored: dict[str, list[ParameterPlan]] = {}
        for ref in stage.blocks:
            for parameter in plan.program(ref.program).parameters:
                stored.setdefault(parameter.name, []).append(parameter)
        for name, users in stored.items():
            for pin in pins:
                if not pin.matches(name):
                    continue
                if len(pin.placements) != len(axes):
                    line = f"{pin}: {len(pin.placements)} placements, the mesh has {len(axes)} axes ({', '.join(axes)})"
                    faults[line] = None
                elif not any(_is_satisfied(parameter, pin) for parameter in users):
                    faults[f"{pin}: {name} is placed as {users[0].parameter} on ({', '.join(axes)})"] = None
    return list(faults)


def _is_satisfied(parameter: ParameterPlan, pin: Pin) -> bool:
    """Whether the parameter is stored as the pin says, on every axis."""
    return all(
        satisfies(placement, pinned)
        for placement, pinned in zip(parse_placements(parameter.parameter), pin.placements, strict=True)
    )
