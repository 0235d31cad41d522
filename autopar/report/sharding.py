"""How parameters are sharded, in a line per pattern of parameter names: equal layers share one.

layers.*.attn.qkv.weight   S(0) on tp, ZeRO-1 over dp
"""

import re
from collections import Counter
from dataclasses import dataclass

from autopar.core.mesh_axis import Axis
from autopar.core.placement import PARTIAL, Shard, parse_placements
from autopar.core.plan import BlockProgram, ParameterPlan, Plan
from autopar.core.units import ranges_text

_MODULE_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardingLine:
    """``pattern``: a parameter name with ``*`` for its indices; ``text``: its sharding; ``stages``: those where that is so,
    "" for all that have the parameter."""

    pattern: str
    text: str
    stages: str


def parameter_pattern(name: str) -> str:
    """A parameter's name with ``*`` for the indices of its modules.

    >>> parameter_pattern("layers.11.attn.qkv.weight"), parameter_pattern("0.weight"), parameter_pattern("w2.bias")
    ('layers.*.attn.qkv.weight', '*.weight', 'w2.bias')
    """
    return _MODULE_INDEX.sub("*", name)


def sharding_text(parameter: ParameterPlan, axes: tuple[Axis, ...]) -> str:
    """How one parameter is sharded on a mesh, in words; axes of one rank are left out.

    >>> mesh = (Axis(name="dp", size=4), Axis(name="tp", size=2))
    >>> sharding_text(ParameterPlan(name="w", compute="RS(0)", parameter="RS(0)", gradient="RS(0)",
    ...                             optimizer="S(1)S(0)"), mesh)
    'S(0) on tp, ZeRO-1 over dp'
    """
    roles = (parameter.compute, parameter.parameter, parameter.gradient, parameter.optimizer)
    columns = zip(axes, *(parse_placements(role) for role in roles), strict=True)
    words: list[str] = []
    zero: dict[str, list[str]] = {}
    for axis, compute, stored, gradient, optimizer in columns:
        if axis.size == 1:
            continue
        if isinstance(compute, Shard):
            words.append(f"{compute} on {axis.name}")
        elif isinstance(stored, Shard):
            zero.setdefault("ZeRO-3", []).append(axis.name)
        elif isinstance(gradient, Shard):
            zero.setdefault("ZeRO-2", []).append(axis.name)
        elif isinstance(optimizer, Shard):
            zero.setdefault("ZeRO-1", []).append(axis.name)
        if gradient == PARTIAL:
            zero.setdefault("gradients partial", []).append(axis.name)
    words.extend(f"{word} over {'*'.join(names)}" for word, names in zero.items())
    return ", ".join(words) or "replicated"


def sharding_lines(plan: Plan) -> tuple[ShardingLine, ...]:
    """One line per (pattern, text), in the order of the model."""
    stages_of_line: dict[tuple[str, str], set[int]] = {}
    programs: dict[str, BlockProgram] = {program.id: program for program in plan.programs}
    for position, stage in enumerate(plan.stages):
        for id in dict.fromkeys(block.program for block in stage.blocks):
            for parameter in programs[id].parameters:
                pattern = parameter_pattern(parameter.name)
                stages_of_line.setdefault((pattern, sharding_text(parameter, stage.axes)), set()).add(position)
    num_texts = Counter(pattern for pattern, _ in stages_of_line)
    return tuple(
        ShardingLine(
            pattern=pattern, text=text, stages="" if num_texts[pattern] == 1 else ranges_text(sorted(positions))
        )
        for (pattern, text), positions in stages_of_line.items()
    )
