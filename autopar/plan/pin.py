"""Pins: what a user fixes of a plan, ``--pin GLOB=PLACEMENTS``, and whether a plan keeps to them.

    layers.*.wq.weight=RS(0)     on a mesh of two axes: whole over the first, dim 0 cut over the second

A glob (``*`` also spans dots) names parameters; there is a token per axis of the mesh, outermost first, as plans print
them. Over an axis that cuts nothing of how a parameter is used, its token says whether it is cut at rest: ``S(0)`` over
the data axis is ZeRO-3. ``S(d)`` stands for any cut of dim d, also a strided one (a fused projection cut by heads).
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from autopar.plan.errors import UsageError
from autopar.plan.mesh import parse_placements, shard_dim
from autopar.plan.plan import ParameterPlan, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """``glob`` over names of parameters, and a placement token per mesh axis.

    >>> pin = parse_pin("layers.*.wq.weight", "RS(0)")
    >>> str(pin), pin.names("layers.11.wq.weight"), pin.names("head.weight")
    ('layers.*.wq.weight=RS(0)', True, False)
    """

    glob: str
    tokens: tuple[str, ...]

    def names(self, name: str) -> bool:
        return fnmatchcase(name, self.glob)

    def __str__(self) -> str:
        return f"{self.glob}={''.join(self.tokens)}"


def parse_pin(glob: str, placements: str) -> Pin:
    """UsageError for a placement that is none, or of a partial sum, which no parameter is."""
    try:
        tokens = parse_placements(placements)
    except ValueError as error:
        raise UsageError(f"--pin {glob}: {error}") from None
    if not tokens or "P" in tokens:
        raise UsageError(
            f"--pin {glob}={placements}: write S(dim) or R for each mesh axis; a parameter is no partial sum"
        )
    return Pin(glob=glob, tokens=tokens)


def meets(token: str, pinned: str) -> bool:
    """Whether a placement token is what a pin says.

    >>> meets("_S(0,3)", "S(0)"), meets("S(0)", "_S(0,3)"), meets("R", "R")
    (True, False, True)
    """
    return token == pinned or (pinned.startswith("S(") and shard_dim(token) == shard_dim(pinned))


def unmet(plan: Plan, pins: tuple[Pin, ...]) -> list[str]:
    """What of the pins a plan does not keep to, a line each; empty for a plan that keeps to all. Of a tied parameter
    one use in a stage stores it, and that counts."""
    found: dict[str, None] = {}
    for stage in plan.stages:
        axes = [axis.name for axis in stage.axes]
        stored: dict[str, list[ParameterPlan]] = {}
        for ref in stage.blocks:
            for parameter in plan.program(ref.program).parameters:
                stored.setdefault(parameter.name, []).append(parameter)
        for name, uses in stored.items():
            for pin in pins:
                if not pin.names(name):
                    continue
                if len(pin.tokens) != len(axes):
                    line = f"{pin}: {len(pin.tokens)} tokens, the mesh has {len(axes)} axes ({', '.join(axes)})"
                    found[line] = None
                elif not any(_kept(parameter, pin) for parameter in uses):
                    found[f"{pin}: {name} lies as {uses[0].parameter} on ({', '.join(axes)})"] = None
    return list(found)


def _kept(parameter: ParameterPlan, pin: Pin) -> bool:
    return all(
        meets(token, pinned) for token, pinned in zip(parse_placements(parameter.parameter), pin.tokens, strict=True)
    )
