"""The nouns of a stage's computation: its ops with their usages, the moves between them, and what crosses stages.

A value in one of its places is a *slot*: as its op leaves it, as several readers share it, as one (placement, gradient)
of a reader, and as it lies where blocks meet; where nothing changes, two places are one slot. ``build`` makes the
programs of all stages, ``build_stage`` that of one.
"""

from dataclasses import dataclass

from autopar.core.placement import Placements
from autopar.core.plan import Recompute, StagePlan
from autopar.graph.ir import Op
from autopar.runtime.lower.op_sharding import OpSharding
from autopar.runtime.lower.redistribute_tensor import EdgeRedistribution


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramOp:
    """An op of a stage: the slots it reads and makes; ``conversions`` say how it takes each of its inputs, shapes are
    global. ``block`` is the block that runs it, -1 for the preparation of data that another block holds. Inputs
    (positions) in ``gathers_again`` stay as they were before they were gathered, and the backward gathers them again.
    ``stays``: what it makes is kept although its block is computed again."""

    op: Op
    sharding: OpSharding
    input_slots: tuple[int, ...]
    output_slots: tuple[int, ...]
    redistributions: tuple[EdgeRedistribution, ...]
    output_shapes: tuple[tuple[int, ...], ...]
    block: int
    recompute: Recompute
    regathered_inputs: tuple[int, ...]
    saves_result: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramRedistribution:
    """Brings what slot ``source`` holds to slot ``target``; ``again``: once more in the backward, where ops need it."""

    source: int
    target: int
    redistribution: EdgeRedistribution
    block: int
    recompute: Recompute
    regathered: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterSharding:
    """A parameter or buffer of a stage. ``compute`` is where its ops use it, ``gradient`` where one micro-batch leaves
    its gradient before ZeRO cuts it; ``zero`` (0 to 3) is the stage of ZeRO over ``zero_axes``, which cut dim 0 of what
    ``compute`` leaves to a rank."""

    value: int
    shape: tuple[int, ...]
    compute_placements: Placements
    gradient_placements: Placements
    zero_stage: int
    zero_axes: tuple[int, ...]
    trained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundaryTransfer:
    """An activation on its way from stage ``maker``, which makes it or passes it on, to the next, ``reader``, with its
    placement on either's mesh; ``returned`` is how the reader gives the gradient, ``taken_back`` how the maker takes
    it."""

    value: int
    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool
    sender: int
    receiver: int
    sender_placements: Placements
    receiver_placements: Placements
    receiver_gradient_placements: Placements
    sender_gradient_placements: Placements


@dataclass(frozen=True, slots=True, kw_only=True)
class StageProgram:
    """A stage's computation on one micro-batch. ``received`` and ``sent`` are activations, by value;
    ``send_conversions`` bring a value from where blocks meet (its ``send_slots``) to its ``sent`` placement. A value's
    own id is the slot of what comes from outside. ``loss`` is how the loss lies in its ``loss_slot``, None where
    another stage makes it; ``random``: some op drops out; ``shapes`` are the global shapes of inputs and of what
    crosses stages."""

    index: int
    plan: StagePlan
    steps: tuple[ProgramOp | ProgramRedistribution, ...]
    parameters: tuple[ParameterSharding, ...]
    buffers: tuple[ParameterSharding, ...]
    written_buffers: tuple[int, ...]
    constants: tuple[int, ...]
    inputs: tuple[int, ...]
    received: tuple[int, ...]
    received_placements: tuple[Placements, ...]
    received_gradient_placements: tuple[Placements, ...]
    sent: tuple[int, ...]
    send_slots: tuple[int, ...]
    send_redistributions: tuple[EdgeRedistribution, ...]
    loss_placements: Placements | None
    loss_slot: int
    draws_random: bool
    global_shapes: dict[int, tuple[int, ...]]

    @property
    def ops(self) -> tuple[ProgramOp, ...]:
        return tuple(step for step in self.steps if isinstance(step, ProgramOp))
