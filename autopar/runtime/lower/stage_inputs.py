"""What the ops of a stage take from outside it: parameters and buffers, inputs and constants of the model, and the
activations of earlier stages."""

from collections.abc import Iterable
from dataclasses import replace

from autopar.core.placement import PARTIAL, REPLICATE, Placements
from autopar.core.plan import BlockProgram
from autopar.graph.ir import Block, Op
from autopar.runtime.lower.planned_blocks import PlannedBlocks
from autopar.runtime.lower.stage_program import ParameterSharding
from autopar.runtime.lower.value_placements import ValuePlacements
from autopar.runtime.lower.value_slots import ValueSlots


class StageInputs:
    """Collects a stage's inputs in the order in which its ops first read them, and makes each available in ``slots``.

    ``received`` are activations of earlier stages; ``inputs`` and ``constants`` are ordered sets of values."""

    def __init__(self, planned: PlannedBlocks, slots: ValueSlots, num_axes: int) -> None:
        self.planned, self.graph, self.slots = planned, planned.graph, slots
        self.parameter_shardings: dict[int, ParameterSharding] = {}
        self.received: dict[int, ValuePlacements] = {}
        self.inputs: dict[int, None] = {}
        self.constants: dict[int, None] = {}
        self._replicated: Placements = (REPLICATE,) * num_axes

    def add_parameters(self, blocks: Iterable[tuple[Block, BlockProgram]]) -> None:
        """How the plan stores the parameters and buffers of these blocks, the stage's own."""
        for block, program in blocks:
            for value, sharding in self.planned.parameter_shardings(block, program):
                known = self.parameter_shardings.get(value)
                self.parameter_shardings[value] = sharding if known is None else _merge_tied(known, sharding)

    def parameters(self, kind: str) -> tuple[ParameterSharding, ...]:
        """The stage's parameters (``kind`` "parameter") or buffers ("buffer"), by value."""
        return tuple(
            self.parameter_shardings[value]
            for value in sorted(self.parameter_shardings)
            if self.graph.values[value].kind == kind
        )

    def receive(self, value: int, placements: ValuePlacements) -> None:
        """Receive an activation of an earlier stage with these placements, as far as it can be transferred with them."""
        self.received[value] = self.planned.transfer_placements(value, placements)
        self.slots.enter(value, self.received[value])

    def enter(self, value: int) -> Op | None:
        """Make a value available, or return the op that must compute it here first: preparation of data.

        An activation of an earlier stage stays unavailable where the plan names no placements between blocks: its first
        reader says how it is received."""
        if self.slots.is_available(value):
            return None
        match self.graph.values[value].kind:
            case "parameter" | "buffer":
                self._enter_parameter(value)
            case "activation":
                return None if value in self.planned.parameter_dependent else self.planned.producers[value]
            case kind:
                (self.inputs if kind == "input" else self.constants)[value] = None
                self._enter_replicated(value)
        return None

    def _enter_parameter(self, value: int) -> None:
        """Of a parameter or buffer that the plan does not place every rank stores the full tensor."""
        found = self.graph.values[value]
        sharding = self.parameter_shardings.setdefault(
            value,
            ParameterSharding(
                value=value,
                shape=found.shape,
                compute_placements=self._replicated,
                gradient_placements=self._replicated,
                zero_stage=0,
                zero_axes=(),
                trained=found.kind == "parameter" and found.requires_grad,
            ),
        )
        self.slots.enter(
            value, ValuePlacements(value=sharding.compute_placements, gradient=sharding.gradient_placements)
        )
        self.slots.partial_gradient_passes[value] = tuple(
            not sharding.trained or placement == PARTIAL for placement in sharding.gradient_placements
        )

    def _enter_replicated(self, value: int) -> None:
        self.slots.enter(value, ValuePlacements(value=self._replicated, gradient=self._replicated))
        self.slots.partial_gradient_passes[value] = (True,) * len(self._replicated)


def _merge_tied(first: ParameterSharding, other: ParameterSharding) -> ParameterSharding:
    """A tied parameter is stored as its first block uses it. On an axis where another block shards it, or one of the two
    leaves its gradient partial, the gradient is partial until the end of the step."""
    gradient = tuple(
        PARTIAL
        if stored == REPLICATE and (used != stored or {first_gradient, other_gradient} == {REPLICATE, PARTIAL})
        else first_gradient
        for stored, used, first_gradient, other_gradient in zip(
            first.compute_placements,
            other.compute_placements,
            first.gradient_placements,
            other.gradient_placements,
            strict=True,
        )
    )
    return replace(first, gradient_placements=gradient)
