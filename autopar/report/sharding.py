"""Where parameters lie, in a line per parameter pattern: equal layers are told once.

layers.*.attn.qkv.weight   S(0) on tp, ZeRO-1 over dp
"""

import re
from dataclasses import dataclass

from autopar.core.mesh_axis import Axis
from autopar.core.placement import PARTIAL, Shard, parse_placements
from autopar.core.plan import BlockProgram, ParameterPlan, Plan
from autopar.core.units import ranges_text

_MODULE_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardingLine:
    """``pattern``: a parameter name with its indices as ``*``; ``stages``: where it lies so, "" when everywhere."""

    pattern: str
    text: str
    stages: str


def parameter_pattern(name: str) -> str:
    """
    >>> parameter_pattern("layers.11.attn.qkv.weight"), parameter_pattern("0.weight"), parameter_pattern("w2.bias")
    ('layers.*.attn.qkv.weight', '*.weight', 'w2.bias')
    """
    return _MODULE_INDEX.sub("*", name)


def sharding_text(parameter: ParameterPlan, axes: tuple[Axis, ...]) -> str:
    """How one parameter is placed on a mesh; axes of one rank are not worth a word.

    >>> mesh = (Axis(name="dp", size=4), Axis(name="tp", size=2))
    >>> parameter_text(ParameterPlan(name="w", compute="RS(0)", parameter="RS(0)", gradient="RS(0)",
    ...                              optimizer="S(1)S(0)"), mesh)
    'S(0) on tp, ZeRO-1 over dp'
    """
    roles = (parameter.compute, parameter.parameter, parameter.gradient, parameter.optimizer)
    columns = zip(axes, *(parse_placements(role) for role in roles), strict=True)
    words: list[str] = []
    rest: dict[str, list[str]] = {}
    for axis, compute, at_rest, gradient, optimizer in columns:
        if axis.size == 1:
            continue
        if isinstance(compute, Shard):
            words.append(f"{compute} on {axis.name}")
        elif isinstance(at_rest, Shard):
            rest.setdefault("ZeRO-3", []).append(axis.name)
        elif isinstance(gradient, Shard):
            rest.setdefault("ZeRO-2", []).append(axis.name)
        elif isinstance(optimizer, Shard):
            rest.setdefault("ZeRO-1", []).append(axis.name)
        if gradient == PARTIAL:
            rest.setdefault("gradients kept partial", []).append(axis.name)
    words.extend(f"{word} over {'*'.join(names)}" for word, names in rest.items())
    return ", ".join(words) or "replicated"


def sharding_lines(plan: Plan) -> tuple[ShardingLine, ...]:
    """One line per (pattern, text), in the order of the model."""
    places: dict[tuple[str, str], set[int]] = {}
    homes: dict[str, set[int]] = {}
    programs: dict[str, BlockProgram] = {program.id: program for program in plan.programs}
    for position, stage in enumerate(plan.stages):
        for id in dict.fromkeys(block.program for block in stage.blocks):
            for parameter in programs[id].parameters:
                pattern = parameter_pattern(parameter.name)
                places.setdefault((pattern, sharding_text(parameter, stage.axes)), set()).add(position)
                homes.setdefault(pattern, set()).add(position)
    alike = {pattern for pattern in homes if sum(key[0] == pattern for key in places) == 1}
    return tuple(
        ShardingLine(pattern=pattern, text=text, stages="" if pattern in alike else ranges_text(sorted(positions)))
        for (pattern, text), positions in places.items()
    )
