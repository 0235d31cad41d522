"""Pins on the parameters of a model: which parameters they match, and which options of ops and storages they allow.

Equal blocks share one plan, so a pin matches a parameter in all blocks of a kind or in none; a tied parameter is pinned
by any of its names.
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
"""How many parameter names an error suggests."""
LAYER_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""The number of a layer in a dotted name, such as 3 in ``layers.3.weight``."""


class BlockPins:
    """The pins of one model, from pairs of a glob of parameter names and placements. UsageError for a pin that matches
    nothing, matches only some of several equal blocks, or contradicts another."""

    def __init__(self, graph: Graph, blocks: Sequence[Block], pins: Sequence[tuple[str, str]]) -> None:
        self.pins = tuple(parse_pin(glob, placements) for glob, placements in pins)
        self._by_value: dict[int, Pin] = {}
        names = {
            value.id: value.qualified_names or (value.name,) for value in graph.values if value.kind == "parameter"
        }
        for pin in self.pins:
            matched = {value for value, of_value in names.items() if any(pin.matches(name) for name in of_value)}
            if not matched:
                globs = dict.fromkeys(LAYER_NUMBER.sub("*", name) for of_value in names.values() for name in of_value)
                closest = get_close_matches(pin.glob, list(globs), NUM_SUGGESTED, 0.0)
                raise UsageError(f"--pin {pin}: no parameter matches; the closest names are {', '.join(closest)}")
            _check_equal_blocks(pin, matched, blocks, names)
            for value in matched:
                other = self._by_value.setdefault(value, pin)
                if other.placements != pin.placements:
                    raise UsageError(f"--pin {other} and --pin {pin} both match {names[value][0]}; give one of them")

    def option_filter(self, has_data_axis: bool, base: OptionFilter | None = None) -> OptionFilter:
        """Which options of an op on an inner axis the pins and ``base`` allow. ``has_data_axis``: the mesh names its data
        axis, which is then the first of a pin's placements."""

        def allows(axis: int, node: OpNode, option: AxisOption) -> bool:
            for position in node.parameter_inputs:
                pin = self._by_value.get(node.op.inputs[position])
                pinned_axis = axis + int(has_data_axis)
                if pin is not None and pinned_axis < len(pin.placements):
                    factor = option.inputs[position].factor
                    if not satisfies(REPLICATE if factor is None else factor.shard, pin.placements[pinned_axis]):
                        return False
            return base is None or base(axis, node, option)

        return allows

    @property
    def num_axes(self) -> int | None:
        """How many axes a mesh must name for the pins; None without pins. UsageError if pins disagree."""
        counts = {len(pin.placements): pin for pin in self.pins}
        if len(counts) > 1:
            one, other = list(counts.values())[:2]
            raise UsageError(f"--pin {one} and --pin {other} are for meshes of {' and '.join(map(str, counts))} axes")
        return next(iter(counts), None)

    def storage_filter(self, has_data_axis: bool) -> StorageFilter:
        """Which storages of a parameter the pins allow. No op shards a parameter over the data axis (axis 0), so ZeRO-3
        must shard it there exactly where the pin does; over an inner axis pinned replicated it must not."""

        def allows(value: int, storage: ParameterStorage) -> bool:
            pin = self._by_value.get(value)
            for index, placement in enumerate(pin.placements if pin else ()):
                axis = index + int(not has_data_axis)
                is_sharded = storage.stage == 3 and axis in storage.axes
                if axis == 0 and is_sharded != isinstance(placement, Shard):
                    return False
                if axis != 0 and is_sharded and placement == REPLICATE:
                    return False
            return True

        return allows


def _check_equal_blocks(
    pin: Pin, matched_values: set[int], blocks: Sequence[Block], names: dict[int, tuple[str, ...]]
) -> None:
    """UsageError unless the pin matches, at each position of the parameters of a kind, those of all blocks or of
    none."""
    positions: dict[tuple[int, int], list[int]] = defaultdict(list)
    for block in blocks:
        for position, value in enumerate(block.parameters):
            positions[block.kind, position].append(value)
    for values in positions.values():
        is_matched = [value in matched_values for value in values]
        if any(is_matched) and not all(is_matched):
            left_out = names[values[is_matched.index(False)]][0]
            raise UsageError(
                f"--pin {pin} matches one block but not {left_out} in an equal block; equal blocks share one plan: "
                "match all of them, with * for the layer number"
            )
