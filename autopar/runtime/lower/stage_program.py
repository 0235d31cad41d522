"""The nouns of a stage's computation: its ops with their shardings, the redistributions between them, and the transfers
between stages.

A *slot* is one copy of a value: as its op produces it, as several readers share it, in the placements (of value and
gradient) that one reader needs, or at a block boundary; where nothing changes, two of these are one slot. What comes from
outside the stage is in the slot of the value's own id. ``build_programs`` makes the programs of all stages,
``build_stage_program`` that of one.
"""

from dataclasses import dataclass

from autopar.core.placement import Placements
from autopar.core.plan import Recompute, StagePlan
from autopar.graph.ir import Op
from autopar.runtime.lower.op_sharding import OpSharding
from autopar.runtime.lower.redistribute_tensor import EdgeRedistribution

NO_BLOCK = -1
"""The block of ops that prepare data for whichever block reads it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramOp:
    """An op of a stage, at the micro-batch's sizes; ``output_shapes`` are global.

    It reads ``input_slots``, each through its entry of ``redistributions``, and fills ``output_slots``. ``block`` is the
    block that runs it, ``NO_BLOCK`` for preparation of data. Inputs (positions) in ``regathered_inputs`` are saved as
    they were before they were gathered, and regathered in the backward. ``saves_result``: its result is saved although
    the block is recomputed."""

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
    """Fills slot ``target`` with the value of slot ``source``, redistributed. ``regathered``: ``source`` is what is saved
    for the backward, which redistributes it anew where ops need it."""

    source: int
    target: int
    redistribution: EdgeRedistribution
    block: int
    recompute: Recompute
    regathered: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterSharding:
    """How a stage stores a parameter or buffer of global ``shape``.

    ``compute_placements`` are those in which ops use it, ``gradient_placements`` those in which one micro-batch's backward
    leaves its gradient, before ZeRO. ``zero_stage`` is ZeRO's, 0 to 3; it shards dim 0 of a rank's compute shard over the
    flattened ``zero_axes``. ``trained``: it gets a gradient and is stepped by the optimizer."""

    value: int
    shape: tuple[int, ...]
    compute_placements: Placements
    gradient_placements: Placements
    zero_stage: int
    zero_axes: tuple[int, ...]
    trained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundaryTransfer:
    """An activation (of one micro-batch, global ``shape``) sent from stage ``sender``, which computes it or passes it on,
    to the next stage, ``receiver``, and its gradient sent back; with its placements, and the gradient's, on the mesh of
    either."""

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
    """A stage's computation on one micro-batch.

    ``received`` and ``sent`` are activations from and for other stages, by value; ``send_redistributions`` bring those in
    ``send_slots`` to the placements in which they are sent. ``written_buffers`` are the buffers that some op updates.
    ``loss_placements`` is None where another stage computes the loss. ``draws_random``: some op draws random numbers.
    ``global_shapes`` are those of ``inputs``, ``received`` and ``sent``."""

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
        """The steps that are ops, in order."""
        return tuple(step for step in self.steps if isinstance(step, ProgramOp))
