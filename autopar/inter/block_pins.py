"""Pins on a model's blocks: which parameters they name, and what they leave of the options of an op on a mesh axis.

Equal blocks are planned alike, so a pin names a parameter of all blocks of a kind or of none; a tied parameter is
pinned by any of its names.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from difflib import get_close_matches

from autopar.core.errors import UsageError
from autopar.core.pin import Pin, parse_pin, satisfies
from autopar.core.placement import REPLICATE, Shard
from autopar.cost.parameter_storage import ParameterStorage
from autopar.graph.ir import Block, Graph
from autopar.intra.block_space import OpNode
from autopar.intra.storage_choice import StorageFilter
from autopar.intra.strategies import OptionFilter
from autopar.rules.axis_options import AxisOption

NUM_SUGGESTED = 3
LAYER_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # of a layer: a whole part of a dotted name


class BlockPins:
    """The pins of one graph, by parameter. UsageError for a pin that names nothing, names some of several equal blocks,
    or contradicts another."""

    def __init__(self, graph: Graph, blocks: Sequence[Block], pins: Sequence[tuple[str, str]]) -> None:
        self.pins = tuple(parse_pin(glob, placements) for glob, placements in pins)
        self._by_value: dict[int, Pin] = {}
        names = {
            value.id: value.qualified_names or (value.name,) for value in graph.values if value.kind == "parameter"
        }
        for pin in self.pins:
            named = {value for value, own in names.items() if any(pin.matches(name) for name in own)}
            if not named:
                known = dict.fromkeys(LAYER_NUMBER.sub("*", name) for own in names.values() for name in own)
                near = get_close_matches(pin.glob, list(known), NUM_SUGGESTED, 0.0)
                raise UsageError(f"--pin {pin}: no parameter has such a name; near it are {', '.join(near)}")
            _check_equal_blocks(pin, named, blocks, names)
            for value in named:
                other = self._by_value.setdefault(value, pin)
                if other.placements != pin.placements:
                    raise UsageError(f"--pin {other} and --pin {pin} both name {names[value][0]}; give one of them")

    def option_filter(self, has_data_axis: bool, base: OptionFilter | None = None) -> OptionFilter:
        """Which options of an op on an inner axis the pins leave, of those that ``base`` leaves. The placements of a
        mesh that names its data axis begin with that axis."""

        def allows(axis: int, node: OpNode, option: AxisOption) -> bool:
            for position in node.parameter_inputs:
                pin = self._by_value.get(node.op.inputs[position])
                at = axis + int(has_data_axis)
                if pin is not None and at < len(pin.placements):
                    atom = option.inputs[position].atom
                    if not satisfies(REPLICATE if atom is None else atom.shard, pin.placements[at]):
                        return False
            return base is None or base(axis, node, option)

        return allows

    @property
    def num_axes(self) -> int | None:
        """How many axes a mesh must name for the pins; None without pins. UsageError if pins disagree."""
        counts = {len(pin.placements): pin for pin in self.pins}
        if len(counts) > 1:
            one, other = list(counts.values())[:2]
            raise UsageError(f"--pin {one} and --pin {other} speak of meshes of {' and '.join(map(str, counts))} axes")
        return next(iter(counts), None)

    def storage_filter(self, has_data_axis: bool) -> StorageFilter:
        """Which storages of a parameter the pins leave: over the data axis, which shards no use, sharded at rest or
        replicated as its placement says; over an inner axis pinned replicated, replicated."""

        def leaves(value: int, storage: ParameterStorage) -> bool:
            pin = self._by_value.get(value)
            for at, pinned in enumerate(pin.placements if pin else ()):
                axis = at + int(not has_data_axis)
                sharded = storage.stage == 3 and axis in storage.axes
                if (sharded != isinstance(pinned, Shard)) if axis == 0 else (sharded and pinned == REPLICATE):
                    return False
            return True

        return leaves


def _check_equal_blocks(
    pin: Pin, named_values: set[int], blocks: Sequence[Block], names: dict[int, tuple[str, ...]]
) -> None:
    """All blocks of a kind, or none, at each position of their parameters."""
    positions: dict[tuple[int, int], list[int]] = defaultdict(list)
    for block in blocks:
        for at, value in enumerate(block.parameters):
            positions[block.kind, at].append(value)
    for values in positions.values():
        inside = [value in named_values for value in values]
        if any(inside) and not all(inside):
            left_out = names[values[inside.index(False)]][0]
            raise UsageError(
                f"--pin {pin} leaves out {left_out}, which lies in a block equal to one it names; equal blocks are planned "
                "alike: name all of them, with * for their number"
            )
