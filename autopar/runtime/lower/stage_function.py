"""A stage as a function of local tensors, differentiable by torch's own autograd.

Called eagerly it is the reference mode; ``joint`` traces it. ZeRO-3 parameters come cut and are gathered first, outside
of autograd, so that the gradient is taken where the ops use them and cut again afterwards.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import traceback

from autopar.core.local_shape import chunk_bounds, local_shape
from autopar.core.placement import REPLICATE
from autopar.graph.from_fx import tensors_of
from autopar.graph.ir import Graph
from autopar.runtime.lower.local_kernels import run_op
from autopar.runtime.lower.local_op import Around, LocalOp, Written
from autopar.runtime.lower.rank_mesh import Mesh
from autopar.runtime.lower.redistribute_tensor import Conversion, convert, gather_pieces, move, moving, scatter_pieces
from autopar.runtime.lower.schedule_nodes import GATHER, SENDS
from autopar.runtime.lower.stage_program import ProgramMove, ProgramOp, StageParameter, StageProgram

KEY = -1  # stands among values for the number that random ops start from


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Leaves:
    """The tensors that a micro-batch's gradients are taken of, in the order of ``StageFunction.differentiated``, and
    all values by id."""

    values: dict[int, Tensor]
    differentiated: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outputs:
    """What a stage makes of a micro-batch: ``sent`` activations, the loss (last), and new values of ``written``
    buffers."""

    sent: tuple[Tensor, ...]
    loss: Tensor | None
    buffers: tuple[Tensor, ...]


class StageFunction:
    """Runs one stage's program on one rank. ``values`` of the graph are addressed by id. ``fp32_sums``: gradients in
    bf16 are summed over ranks in fp32, as they then are over micro-batches."""

    def __init__(
        self,
        program: StageProgram,
        graph: Graph,
        mesh: Mesh,
        constants: Mapping[int, Tensor],
        device: torch.device,
        *,
        fp32_sums: bool,
    ) -> None:
        self.program, self.graph, self.mesh, self.constants, self.device = program, graph, mesh, constants, device
        self.fp32_sums = fp32_sums
        self.parameters = {parameter.value: parameter for parameter in program.parameters}
        self.arguments: tuple[int, ...] = (
            *(parameter.value for parameter in (*program.parameters, *program.buffers)),
            *program.inputs,
            *program.received,
            *((KEY,) if program.random else ()),
        )
        self.differentiated: tuple[int, ...] = (
            *(parameter.value for parameter in program.parameters if parameter.trained),
            *(value for value in program.received if graph.values[value].requires_grad),
        )
        self.num_parameters = sum(parameter.trained for parameter in program.parameters)  # first of ``differentiated``
        # Outputs that a gradient comes back for, in the order of ``tangents``.
        self.sent_with_gradient = tuple(
            at for at, value in enumerate(program.sent) if graph.values[value].requires_grad
        )
        self._local_ops = [self._local(step) if isinstance(step, ProgramOp) else None for step in program.steps]

    def _local(self, op: ProgramOp) -> LocalOp:
        return LocalOp(
            op=op.op,
            usage=op.usage,
            mesh=self.mesh,
            input_shapes=tuple(conversion.shape for conversion in op.conversions),
            output_shapes=op.output_shapes,
            device=self.device,
        )

    def argument_shape(self, value: int) -> tuple[int, ...]:
        """The local shape of an argument."""
        if value == KEY:
            return ()
        found = self.graph.values[value]
        if value in self.parameters or found.kind == "buffer":
            stored = self.stored(value)
            return self.rest_shape(stored)
        at = self.program.received.index(value) if value in self.program.received else None
        placement = self.program.received_placements[at] if at is not None else (REPLICATE,) * len(self.mesh.sizes)
        return local_shape(self.program.shapes[value], placement, self.mesh.sizes, self.mesh.coordinate)

    def stored(self, value: int) -> StageParameter:
        """How a parameter or buffer is stored."""
        found = self.parameters.get(value)
        return found or next(buffer for buffer in self.program.buffers if buffer.value == value)

    def compute_shape(self, stored: StageParameter) -> tuple[int, ...]:
        """The local shape of a parameter as ops use it."""
        return local_shape(stored.shape, stored.compute, self.mesh.sizes, self.mesh.coordinate)

    def rest_shape(self, stored: StageParameter) -> tuple[int, ...]:
        """The local shape of a parameter between uses: cut by ZeRO-3."""
        return (
            zero_shape(self.compute_shape(stored), stored.zero_axes, self.mesh)
            if stored.zero == 3
            else self.compute_shape(stored)
        )

    def leaves(self, arguments: Sequence[Tensor]) -> Leaves:
        """Gathers what ZeRO-3 cut, and makes leaves of what is differentiated."""
        values = dict(zip(self.arguments, arguments, strict=True))
        values.update(self.constants)
        with torch.no_grad(), mark(GATHER, "full"):
            for parameter in self.program.parameters:
                if parameter.zero == 3:
                    values[parameter.value] = gather_zero(
                        values[parameter.value], parameter, self.compute_shape(parameter), self.mesh
                    )
        for value in self.differentiated:
            values[value] = values[value].detach().requires_grad_()
        return Leaves(values=values, differentiated=tuple(values[value] for value in self.differentiated))

    def forward(self, leaves: Leaves) -> Outputs:
        """The outputs, attached to the leaves."""
        slots = dict(leaves.values)
        taken: dict[tuple[int, int, Conversion], Tensor] = {}

        def take(slot: int, conversion: Conversion, block: int) -> Tensor:
            """What a block reads of a slot, the same copy whenever it reads it like that."""
            if not conversion.changes:
                return slots[slot]
            key = (block, slot, conversion)
            if key not in taken:
                gathered = slot in self.parameters and self.parameters[slot].zero == 3
                with mark(GATHER, "full") if gathered else nullcontext():  # made again with what it is a part of
                    taken[key] = convert(slots[slot], conversion, self.mesh)
            return taken[key]

        with torch.enable_grad():
            for step, local in zip(self.program.steps, self._local_ops, strict=True):
                again = "full" if step.recompute == "full" else "none"
                if local is None or not isinstance(step, ProgramOp):
                    assert isinstance(step, ProgramMove)
                    with gathering_again(step.block) if step.again and again == "none" else mark(step.block, again):
                        slots[step.target] = convert(slots[step.source], step.conversion, self.mesh)
                    continue
                tensors = []
                for at, (slot, made) in enumerate(zip(step.reads, step.conversions, strict=True)):
                    # selective recomputation redoes core attention, not the moves before it
                    repeats = at in step.gathers_again and again == "none"
                    with gathering_again(step.block) if repeats else mark(step.block, again):
                        tensors.append(take(slot, made, step.block))
                with mark(step.block, "none" if step.stays else step.recompute if _is_core(step) else again):
                    self._run(step, local, slots, tensors, take)
            with mark(SENDS, "none"):
                sent = tuple(
                    take(slot, conversion, SENDS)
                    for slot, conversion in zip(self.program.send_slots, self.program.send_conversions, strict=True)
                )
        loss = slots[self.program.loss_slot] if self.program.loss is not None else None
        return Outputs(sent=sent, loss=loss, buffers=tuple(slots[value].detach() for value in self.program.written))

    def _run(
        self, step: ProgramOp, local: LocalOp, slots: dict[int, Tensor], tensors: Sequence[Tensor], take: Any
    ) -> None:
        def whole(at: int) -> Tensor:
            made = step.conversions[at]
            everywhere = (REPLICATE,) * len(self.mesh.sizes)
            return take(
                step.reads[at],
                Conversion(
                    shape=made.shape, source=made.source, target=everywhere, gradient_source=(), gradient_target=()
                ),
                step.block,
            )

        result = run_op(local, tensors, Around(whole=whole, key=slots.get(KEY)))
        if isinstance(result, Written):
            for at, tensor in result.buffers.items():
                made = step.conversions[at]  # back to where the buffer is stored
                slots[step.reads[at]] = move(tensor.detach(), made.shape, made.target, made.source, self.mesh)
            result = result.result
        for slot, value, (_, tensor) in zip(step.makes, step.op.outputs, tensors_of(result), strict=True):
            slots[slot] = tensor if self.graph.values[value].requires_grad else tensor.detach()

    def backward(self, leaves: Leaves, outputs: Outputs, tangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Gradients of what is differentiated, parameters' as ZeRO keeps them; ``tangents`` of sent activations, then
        of the loss."""
        roots = [outputs.sent[at] for at in self.sent_with_gradient]
        if outputs.loss is not None:
            roots.append(outputs.loss)
        gradients: Sequence[Tensor | None] = [None] * len(self.differentiated)
        if leaves.differentiated and roots:
            gradients = torch.autograd.grad(roots, leaves.differentiated, list(tangents), allow_unused=True)
        found = []
        with torch.no_grad():
            for value, leaf, gradient in zip(self.differentiated, leaves.differentiated, gradients, strict=True):
                gradient = torch.zeros_like(leaf) if gradient is None else gradient
                parameter = self.parameters.get(value)
                if parameter is not None and parameter.zero >= 2:
                    gradient = scatter_zero(gradient, parameter, self.mesh, fp32_sums=self.fp32_sums)
                found.append(gradient)
        return tuple(found)


def mark(block: int, recompute: str) -> AbstractContextManager[Any]:
    """Nodes traced inside carry the block they belong to and whether the backward is to compute them again."""
    if not traceback.has_preserved_node_meta():
        return nullcontext()
    return traceback.annotate({"block": block, "recompute": recompute != "none"})


def gathering_again(block: int) -> AbstractContextManager[Any]:
    """Nodes traced inside gather what the backward gathers again, beside what else its readers do there."""
    if not traceback.has_preserved_node_meta():
        return nullcontext()
    return traceback.annotate({"block": block, "recompute": True, "beside": True})


def _is_core(op: ProgramOp) -> bool:
    """Whether selective recomputation redoes the op: core attention."""
    return op.op.is_attention


def zero_shape(shape: tuple[int, ...], axes: Sequence[int], mesh: Mesh) -> tuple[int, ...]:
    """The shape of the rank's part of dim 0, cut over the flattened ``axes``."""
    return (chunk_bounds(shape[0], mesh.degree(axes), mesh.index(axes))[1], *shape[1:])


def gather_zero(part: Tensor, stored: StageParameter, shape: tuple[int, ...], mesh: Mesh) -> Tensor:
    """What the ops use, from this rank's part of its dim 0; ``shape`` is the local shape they use."""
    with moving():
        return gather_pieces(part, 0, 1, shape[0], mesh, stored.zero_axes)


def scatter_zero(term: Tensor, stored: StageParameter, mesh: Mesh, *, fp32_sums: bool) -> Tensor:
    """This rank's part of the sum of all ranks' terms."""
    with moving():
        term = term.float() if fp32_sums and term.dtype == torch.bfloat16 else term
        return scatter_pieces(term, 0, 1, mesh, stored.zero_axes)
