"""A stage as a function of local tensors, differentiable by torch's own autograd.

Called eagerly it is the reference mode; ``joint_graph`` traces it. ZeRO-3 parameters come in sharded and are gathered
first, outside of autograd: gradients are taken with respect to the gathered ones and reduce-scattered afterwards.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import traceback

from autopar.core.local_shape import chunk_bounds, local_shape
from autopar.core.placement import REPLICATE, Placements
from autopar.core.plan import Recompute
from autopar.graph.from_fx import output_tensors
from autopar.graph.ir import Graph
from autopar.runtime.lower.fx_nodes import SEND_PREPARATION, ZERO3_GATHER
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
from autopar.runtime.lower.stage_program import ParameterSharding, ProgramOp, ProgramRedistribution, StageProgram

RANDOM_KEY = -1
"""Stands among the values' ids for the random key of the micro-batch, an int64 scalar (see ``randomness``)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageLeaves:
    """The inputs of a micro-batch's forward: all ``values`` by id, and among them the leaves that gradients are taken with
    respect to, in the order of ``StageFunction.differentiated``."""

    values: dict[int, Tensor]
    differentiated: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageOutputs:
    """The results of a micro-batch's forward: ``sent`` activations, the loss where this stage computes it, and the new
    values of the program's ``written_buffers``."""

    sent: tuple[Tensor, ...]
    loss: Tensor | None
    buffers: tuple[Tensor, ...]


class _SlotTensors:
    """The local tensors of one micro-batch's forward by slot, and the copies of them in the placements that ops read."""

    def __init__(self, leaves: StageLeaves, zero3_parameters: frozenset[int], mesh: RankMesh) -> None:
        self.by_slot = dict(leaves.values)
        self._zero3_parameters, self._mesh = zero3_parameters, mesh
        self._copies: dict[tuple[int, int, EdgeRedistribution], Tensor] = {}

    def read(self, slot: int, redistribution: EdgeRedistribution, block: int) -> Tensor:
        """A slot's tensor, redistributed; ops of one block that read it alike share one copy."""
        if not redistribution.is_needed:
            return self.by_slot[slot]
        key = (block, slot, redistribution)
        if key not in self._copies:
            # A copy of a gathered ZeRO-3 parameter is recomputed along with the gather.
            of_parameter = annotate_block(ZERO3_GATHER, "full") if slot in self._zero3_parameters else nullcontext()
            with of_parameter:
                self._copies[key] = redistribute_with_gradient(self.by_slot[slot], redistribution, self._mesh)
        return self._copies[key]

    def read_full(self, slot: int, redistribution: EdgeRedistribution, block: int) -> Tensor:
        """The full tensor of a slot that ``redistribution`` starts from, without a gradient."""
        everywhere: Placements = (REPLICATE,) * len(self._mesh.sizes)
        replicated = EdgeRedistribution(
            shape=redistribution.shape,
            source=redistribution.source,
            target=everywhere,
            gradient_source=(),
            gradient_target=(),
        )
        return self.read(slot, replicated, block)


class StageFunction:
    """Runs one stage's program on one rank; all values are addressed by their ids in ``graph``.

    ``constants`` are the full tensors of the model's literal constants. ``reduces_in_fp32``: bf16 gradients are summed over
    ranks in fp32, as they then are over micro-batches. ``arguments`` are the values whose local tensors a micro-batch needs:
    parameters, buffers, inputs, received activations and the random key; ``differentiated`` those that gradients are taken
    with respect to, the first ``num_parameters`` of them parameters. ``sent_requiring_grad`` are the positions in the
    program's ``sent`` of the activations that a gradient comes back for."""

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
        self.num_parameters = sum(parameter.trained for parameter in program.parameters)
        self.sent_requiring_grad = tuple(
            at for at, value in enumerate(program.sent) if graph.values[value].requires_grad
        )
        self._local_ops = [self._local_op(step) if isinstance(step, ProgramOp) else None for step in program.steps]

    def _local_op(self, op: ProgramOp) -> LocalOp:
        return LocalOp(
            op=op.op,
            sharding=op.sharding,
            mesh=self.mesh,
            input_shapes=tuple(redistribution.shape for redistribution in op.redistributions),
            output_shapes=op.output_shapes,
            device=self.device,
        )

    def argument_shape(self, value: int) -> tuple[int, ...]:
        """The local shape of one of the ``arguments``."""
        if value == RANDOM_KEY:
            return ()
        if value in self.parameters or self.graph.values[value].kind == "buffer":
            return self.stored_shape(self.sharding_of(value))
        received = dict(zip(self.program.received, self.program.received_placements, strict=True))
        placements = received.get(value, (REPLICATE,) * len(self.mesh.sizes))
        return local_shape(self.program.global_shapes[value], placements, self.mesh.sizes, self.mesh.coordinate)

    def sharding_of(self, value: int) -> ParameterSharding:
        """How a parameter or buffer of the stage is stored."""
        found = self.parameters.get(value)
        return found or next(buffer for buffer in self.program.buffers if buffer.value == value)

    def compute_shape(self, sharding: ParameterSharding) -> tuple[int, ...]:
        """The local shape of a parameter or buffer as ops use it."""
        return local_shape(sharding.shape, sharding.compute_placements, self.mesh.sizes, self.mesh.coordinate)

    def stored_shape(self, sharding: ParameterSharding) -> tuple[int, ...]:
        """The local shape of a parameter or buffer between uses: a shard of ``compute_shape`` under ZeRO-3."""
        return (
            zero_shard_shape(self.compute_shape(sharding), sharding.zero_axes, self.mesh)
            if sharding.zero_stage == 3
            else self.compute_shape(sharding)
        )

    def make_leaves(self, arguments: Sequence[Tensor]) -> StageLeaves:
        """The inputs of ``forward`` from the local tensors of ``arguments``: ZeRO-3 parameters gathered, those that gradients
        are taken with respect to detached."""
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
        """The outputs of a micro-batch, attached to the leaves in torch's autograd graph."""
        zero3_parameters = frozenset(value for value, each in self.parameters.items() if each.zero_stage == 3)
        tensors = _SlotTensors(leaves, zero3_parameters, self.mesh)
        program = self.program
        with torch.enable_grad():
            for step, local in zip(program.steps, self._local_ops, strict=True):
                if isinstance(step, ProgramRedistribution):
                    self._run_redistribution(step, tensors)
                else:
                    assert local is not None
                    self._run_op(step, local, tensors)
            with annotate_block(SEND_PREPARATION, "none"):
                sent = tuple(
                    tensors.read(slot, redistribution, SEND_PREPARATION)
                    for slot, redistribution in zip(program.send_slots, program.send_redistributions, strict=True)
                )
        loss = tensors.by_slot[program.loss_slot] if program.loss_placements is not None else None
        buffers = tuple(tensors.by_slot[value].detach() for value in program.written_buffers)
        return StageOutputs(sent=sent, loss=loss, buffers=buffers)

    def _run_redistribution(self, step: ProgramRedistribution, tensors: _SlotTensors) -> None:
        with _annotate_redistributed(step, regathered=step.regathered):
            tensors.by_slot[step.target] = redistribute_with_gradient(
                tensors.by_slot[step.source], step.redistribution, self.mesh
            )

    def _run_op(self, step: ProgramOp, local: LocalOp, tensors: _SlotTensors) -> None:
        inputs = []
        for position, (slot, redistribution) in enumerate(zip(step.input_slots, step.redistributions, strict=True)):
            with _annotate_redistributed(step, regathered=position in step.regathered_inputs):
                inputs.append(tensors.read(slot, redistribution, step.block))

        def full_input(position: int) -> Tensor:
            return tensors.read_full(step.input_slots[position], step.redistributions[position], step.block)

        slots = tensors.by_slot
        with annotate_block(step.block, _recompute_of_result(step)):
            result = run_op(local, inputs, KernelContext(full_input=full_input, random_key=slots.get(RANDOM_KEY)))
            if isinstance(result, ResultAndBuffers):
                for position, tensor in result.new_buffers.items():
                    edge = step.redistributions[position]  # back to the placements in which the buffer is stored
                    slots[step.input_slots[position]] = redistribute(
                        tensor.detach(), edge.shape, edge.target, edge.source, self.mesh
                    )
                result = result.result
            outputs = zip(step.output_slots, step.op.outputs, output_tensors(result), strict=True)
            for slot, value, (_, tensor) in outputs:
                slots[slot] = tensor if self.graph.values[value].requires_grad else tensor.detach()

    def backward(self, leaves: StageLeaves, outputs: StageOutputs, tangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The gradients with respect to ``differentiated``, those of parameters reduce-scattered under ZeRO-2 and 3.
        ``tangents`` are the gradients of the sent activations that require one, then that of the loss."""
        roots = [outputs.sent[at] for at in self.sent_requiring_grad]
        if outputs.loss is not None:
            roots.append(outputs.loss)
        gradients: Sequence[Tensor | None] = [None] * len(self.differentiated)
        if leaves.differentiated and roots:
            gradients = torch.autograd.grad(roots, leaves.differentiated, list(tangents), allow_unused=True)
        results = []
        with torch.no_grad():
            for value, leaf, gradient in zip(self.differentiated, leaves.differentiated, gradients, strict=True):
                gradient = torch.zeros_like(leaf) if gradient is None else gradient
                parameter = self.parameters.get(value)
                if parameter is not None and parameter.zero_stage >= 2:
                    gradient = reduce_scatter_gradient(
                        gradient, parameter, self.mesh, reduces_in_fp32=self.reduces_in_fp32
                    )
                results.append(gradient)
        return tuple(results)


def _annotate_redistributed(
    step: ProgramOp | ProgramRedistribution, *, regathered: bool
) -> AbstractContextManager[Any]:
    """Annotates the redistribution of a step's input: selective recomputation recomputes core attention, not the
    redistributions before it, unless they are regathered."""
    if step.recompute == "full":
        return annotate_block(step.block, "full")
    return annotate_regather(step.block) if regathered else annotate_block(step.block, "none")


def _recompute_of_result(step: ProgramOp) -> Recompute:
    """How the backward gets an op's result: selective recomputation recomputes core attention alone."""
    if step.saves_result:
        return "none"
    return step.recompute if step.recompute == "full" or step.op.is_attention else "none"


def annotate_block(block: int, recompute: Recompute) -> AbstractContextManager[Any]:
    """Nodes traced inside carry their block, and whether the backward recomputes them."""
    if not traceback.has_preserved_node_meta():
        return nullcontext()
    return traceback.annotate({"block": block, "recompute": recompute != "none"})


def annotate_regather(block: int) -> AbstractContextManager[Any]:
    """Nodes traced inside gather what the backward regathers, while it computes the other inputs of the gather's reader."""
    if not traceback.has_preserved_node_meta():
        return nullcontext()
    return traceback.annotate({"block": block, "recompute": True, "regather": True})


def zero_shard_shape(shape: tuple[int, ...], axes: Sequence[int], mesh: RankMesh) -> tuple[int, ...]:
    """The shape of this rank's shard of a tensor of local ``shape``: a chunk of dim 0 over the flattened ``axes``."""
    return (chunk_bounds(shape[0], mesh.degree(axes), mesh.rank_in_group(axes))[1], *shape[1:])


def gather_zero3_parameter(
    shard: Tensor, sharding: ParameterSharding, shape: tuple[int, ...], mesh: RankMesh
) -> Tensor:
    """A parameter as ops use it, of local ``shape``, gathered from the ZeRO-3 shards of its dim 0."""
    with annotate_redistribution():
        return all_gather_shards(shard, 0, 1, shape[0], mesh, sharding.zero_axes)


def reduce_scatter_gradient(
    gradient: Tensor, sharding: ParameterSharding, mesh: RankMesh, *, reduces_in_fp32: bool
) -> Tensor:
    """This rank's ZeRO shard of the sum of all ranks' gradients; fp32 if ``reduces_in_fp32`` and they are bf16."""
    with annotate_redistribution():
        gradient = gradient.float() if reduces_in_fp32 and gradient.dtype == torch.bfloat16 else gradient
        return reduce_scatter_shards(gradient, 0, 1, mesh, sharding.zero_axes)
