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
from autopar.graph.from_fx import output_tensors
from autopar.graph.ir import Graph
from autopar.runtime.lower.local_kernels import run_op
from autopar.runtime.lower.local_op import KernelContext, LocalOp, ResultAndBuffers
from autopar.runtime.lower.rank_mesh import RankMesh
from autopar.runtime.lower.redistribute_tensor import (
    EdgeRedistribution,
    all_gather_shards,
    annotate_redistribution,
    redistribute,
    redistribute_with_gradient,
    reduce_scatter_shards,
)
from autopar.runtime.lower.schedule_nodes import SEND_PREPARATION, ZERO3_GATHER
from autopar.runtime.lower.stage_program import ParameterSharding, ProgramOp, ProgramRedistribution, StageProgram

RANDOM_KEY = -1  # stands among values for the number that random ops start from


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageLeaves:
    """The tensors that a micro-batch's gradients are taken of, in the order of ``StageFunction.differentiated``, and
    all values by id."""

    values: dict[int, Tensor]
    differentiated: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageOutputs:
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
        mesh: RankMesh,
        constants: Mapping[int, Tensor],
        device: torch.device,
        *,
        reduces_in_fp32: bool,
    ) -> None:
        self.program, self.graph, self.mesh, self.constants, self.device = program, graph, mesh, constants, device
        self.reduces_in_fp32 = reduces_in_fp32
        self.parameters = {parameter.value: parameter for parameter in program.parameters}
        self.arguments: tuple[int, ...] = (
            *(parameter.value for parameter in (*program.parameters, *program.buffers)),
            *program.inputs,
            *program.received,
            *((RANDOM_KEY,) if program.draws_random else ()),
        )
        self.differentiated: tuple[int, ...] = (
            *(parameter.value for parameter in program.parameters if parameter.trained),
            *(value for value in program.received if graph.values[value].requires_grad),
        )
        self.num_parameters = sum(parameter.trained for parameter in program.parameters)  # first of ``differentiated``
        # Outputs that a gradient comes back for, in the order of ``tangents``.
        self.sent_requiring_grad = tuple(
            at for at, value in enumerate(program.sent) if graph.values[value].requires_grad
        )
        self._local_ops = [self._local_op(step) if isinstance(step, ProgramOp) else None for step in program.steps]

    def _local_op(self, op: ProgramOp) -> LocalOp:
        return LocalOp(
            op=op.op,
            sharding=op.sharding,
            mesh=self.mesh,
            input_shapes=tuple(conversion.shape for conversion in op.redistributions),
            output_shapes=op.output_shapes,
            device=self.device,
        )

    def argument_shape(self, value: int) -> tuple[int, ...]:
        """The local shape of an argument."""
        if value == RANDOM_KEY:
            return ()
        found = self.graph.values[value]
        if value in self.parameters or found.kind == "buffer":
            stored = self.sharding_of(value)
            return self.stored_shape(stored)
        at = self.program.received.index(value) if value in self.program.received else None
        placement = self.program.received_placements[at] if at is not None else (REPLICATE,) * len(self.mesh.sizes)
        return local_shape(self.program.global_shapes[value], placement, self.mesh.sizes, self.mesh.coordinate)

    def sharding_of(self, value: int) -> ParameterSharding:
        """How a parameter or buffer is stored."""
        found = self.parameters.get(value)
        return found or next(buffer for buffer in self.program.buffers if buffer.value == value)

    def compute_shape(self, sharding: ParameterSharding) -> tuple[int, ...]:
        """The local shape of a parameter as ops use it."""
        return local_shape(sharding.shape, sharding.compute_placements, self.mesh.sizes, self.mesh.coordinate)

    def stored_shape(self, sharding: ParameterSharding) -> tuple[int, ...]:
        """The local shape of a parameter between uses: cut by ZeRO-3."""
        return (
            zero_shard_shape(self.compute_shape(sharding), sharding.zero_axes, self.mesh)
            if sharding.zero_stage == 3
            else self.compute_shape(sharding)
        )

    def make_leaves(self, arguments: Sequence[Tensor]) -> StageLeaves:
        """Gathers what ZeRO-3 cut, and makes leaves of what is differentiated."""
        values = dict(zip(self.arguments, arguments, strict=True))
        values.update(self.constants)
        with torch.no_grad(), annotate_block(ZERO3_GATHER, "full"):
            for parameter in self.program.parameters:
                if parameter.zero_stage == 3:
                    values[parameter.value] = gather_zero3_parameter(
                        values[parameter.value], parameter, self.compute_shape(parameter), self.mesh
                    )
        for value in self.differentiated:
            values[value] = values[value].detach().requires_grad_()
        return StageLeaves(values=values, differentiated=tuple(values[value] for value in self.differentiated))

    def forward(self, leaves: StageLeaves) -> StageOutputs:
        """The outputs, attached to the leaves."""
        slots = dict(leaves.values)
        taken: dict[tuple[int, int, EdgeRedistribution], Tensor] = {}

        def take(slot: int, conversion: EdgeRedistribution, block: int) -> Tensor:
            """What a block reads of a slot, the same copy whenever it reads it like that."""
            if not conversion.is_needed:
                return slots[slot]
            key = (block, slot, conversion)
            if key not in taken:
                gathered = slot in self.parameters and self.parameters[slot].zero_stage == 3
                with (
                    annotate_block(ZERO3_GATHER, "full") if gathered else nullcontext()
                ):  # made again with what it is a part of
                    taken[key] = redistribute_with_gradient(slots[slot], conversion, self.mesh)
            return taken[key]

        with torch.enable_grad():
            for step, local in zip(self.program.steps, self._local_ops, strict=True):
                again = "full" if step.recompute == "full" else "none"
                if local is None or not isinstance(step, ProgramOp):
                    assert isinstance(step, ProgramRedistribution)
                    with (
                        annotate_regather(step.block)
                        if step.regathered and again == "none"
                        else annotate_block(step.block, again)
                    ):
                        slots[step.target] = redistribute_with_gradient(
                            slots[step.source], step.redistribution, self.mesh
                        )
                    continue
                tensors = []
                for at, (slot, made) in enumerate(zip(step.input_slots, step.redistributions, strict=True)):
                    # selective recomputation redoes core attention, not the moves before it
                    repeats = at in step.regathered_inputs and again == "none"
                    with annotate_regather(step.block) if repeats else annotate_block(step.block, again):
                        tensors.append(take(slot, made, step.block))
                with annotate_block(
                    step.block, "none" if step.saves_result else step.recompute if _is_core_attention(step) else again
                ):
                    self._run_step(step, local, slots, tensors, take)
            with annotate_block(SEND_PREPARATION, "none"):
                sent = tuple(
                    take(slot, conversion, SEND_PREPARATION)
                    for slot, conversion in zip(self.program.send_slots, self.program.send_redistributions, strict=True)
                )
        loss = slots[self.program.loss_slot] if self.program.loss_placements is not None else None
        return StageOutputs(
            sent=sent, loss=loss, buffers=tuple(slots[value].detach() for value in self.program.written_buffers)
        )

    def _run_step(
        self, step: ProgramOp, local: LocalOp, slots: dict[int, Tensor], tensors: Sequence[Tensor], take: Any
    ) -> None:
        def whole(at: int) -> Tensor:
            made = step.redistributions[at]
            everywhere = (REPLICATE,) * len(self.mesh.sizes)
            return take(
                step.input_slots[at],
                EdgeRedistribution(
                    shape=made.shape, source=made.source, target=everywhere, gradient_source=(), gradient_target=()
                ),
                step.block,
            )

        result = run_op(local, tensors, KernelContext(full_input=whole, random_key=slots.get(RANDOM_KEY)))
        if isinstance(result, ResultAndBuffers):
            for at, tensor in result.new_buffers.items():
                made = step.redistributions[at]  # back to where the buffer is stored
                slots[step.input_slots[at]] = redistribute(
                    tensor.detach(), made.shape, made.target, made.source, self.mesh
                )
            result = result.result
        for slot, value, (_, tensor) in zip(step.output_slots, step.op.outputs, output_tensors(result), strict=True):
            slots[slot] = tensor if self.graph.values[value].requires_grad else tensor.detach()

    def backward(self, leaves: StageLeaves, outputs: StageOutputs, tangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Gradients of what is differentiated, parameters' as ZeRO keeps them; ``tangents`` of sent activations, then
        of the loss."""
        roots = [outputs.sent[at] for at in self.sent_requiring_grad]
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
                if parameter is not None and parameter.zero_stage >= 2:
                    gradient = reduce_scatter_gradient(
                        gradient, parameter, self.mesh, reduces_in_fp32=self.reduces_in_fp32
                    )
                found.append(gradient)
        return tuple(found)


def annotate_block(block: int, recompute: str) -> AbstractContextManager[Any]:
    """Nodes traced inside carry the block they belong to and whether the backward is to compute them again."""
    if not traceback.has_preserved_node_meta():
        return nullcontext()
    return traceback.annotate({"block": block, "recompute": recompute != "none"})


def annotate_regather(block: int) -> AbstractContextManager[Any]:
    """Nodes traced inside gather what the backward gathers again, beside what else its readers do there."""
    if not traceback.has_preserved_node_meta():
        return nullcontext()
    return traceback.annotate({"block": block, "recompute": True, "beside": True})


def _is_core_attention(op: ProgramOp) -> bool:
    """Whether selective recomputation redoes the op: core attention."""
    return op.op.is_attention


def zero_shard_shape(shape: tuple[int, ...], axes: Sequence[int], mesh: RankMesh) -> tuple[int, ...]:
    """The shape of the rank's part of dim 0, cut over the flattened ``axes``."""
    return (chunk_bounds(shape[0], mesh.degree(axes), mesh.rank_in_group(axes))[1], *shape[1:])


def gather_zero3_parameter(
    shard: Tensor, sharding: ParameterSharding, shape: tuple[int, ...], mesh: RankMesh
) -> Tensor:
    """What the ops use, from this rank's part of its dim 0; ``shape`` is the local shape they use."""
    with annotate_redistribution():
        return all_gather_shards(shard, 0, 1, shape[0], mesh, sharding.zero_axes)


def reduce_scatter_gradient(
    gradient: Tensor, sharding: ParameterSharding, mesh: RankMesh, *, reduces_in_fp32: bool
) -> Tensor:
    """This rank's part of the sum of all ranks' terms."""
    with annotate_redistribution():
        gradient = gradient.float() if reduces_in_fp32 and gradient.dtype == torch.bfloat16 else gradient
        return reduce_scatter_shards(gradient, 0, 1, mesh, sharding.zero_axes)
