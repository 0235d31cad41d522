"""Where the values of a stage are while its program is built: in which slots, with which placements.

A slot is one copy of a value (see ``stage_program``). A value that comes from outside the stage has its own id as its
slot; copies that ops and redistributions make are numbered on from the number of the graph's values.
"""

from collections.abc import Iterable

from autopar.runtime.lower.value_placements import ValuePlacements


class ValueSlots:
    """The slot in which the next reader finds each value: inside a block the copy made there last, between blocks the one
    that the block left.

    ``partial_gradient_passes[value][axis]``: everything behind the value is replicated on that axis, up to parameters
    whose gradients may be partial, so that its own gradient may be partial too."""

    def __init__(self, num_values: int, num_axes: int) -> None:
        self.partial_gradient_passes: dict[int, tuple[bool, ...]] = {}
        self._num_slots, self._num_axes = num_values, num_axes
        self._placements: dict[int, ValuePlacements] = {}
        self._block_slots: dict[int, int] = {}
        self._boundary_slots: dict[int, int] = {}

    def current(self, value: int) -> int:
        """The slot in which the next reader of a value finds it."""
        return self._block_slots.get(value, self._boundary_slots.get(value, value))

    def is_available(self, value: int) -> bool:
        """Whether the stage has the value: stored, received, or computed."""
        return self.current(value) in self._placements

    def placements(self, value: int) -> ValuePlacements:
        """The placements of a value in its current slot; KeyError where it is not available."""
        return self._placements[self.current(value)]

    def passes_partial_gradient(self, value: int) -> tuple[bool, ...]:
        """Per axis, whether the gradient of a value may be partial; that of an activation of another stage may not."""
        return self.partial_gradient_passes.get(value, (False,) * self._num_axes)

    def enter(self, value: int, placements: ValuePlacements) -> None:
        """Make a value available that comes from outside the stage; its slot is its own id."""
        self._placements[value] = placements

    def add(self, value: int, placements: ValuePlacements, *, between_blocks: bool = False) -> int:
        """A new slot, in which the block's next readers find the value; with ``between_blocks`` those of all blocks."""
        slot = self._num_slots
        self._num_slots += 1
        self._placements[slot] = placements
        (self._boundary_slots if between_blocks else self._block_slots)[value] = slot
        return slot

    def end_block(self, outputs: Iterable[int]) -> None:
        """Leave a block whose ops made ``outputs``: later blocks find these as the block leaves them; copies that it made
        of other values are its own."""
        self._boundary_slots.update(
            (value, self._block_slots[value]) for value in outputs if value in self._block_slots
        )
        self._block_slots = {}
