"""The pipeline part of a step: a rank's forward and backward passes and transfers, in the order of its schedule.

The loss of a step is the mean of its micro-batches' losses, as of one process that runs them one after the other.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.core.placement import PARTIAL, REPLICATE, Placements
from autopar.core.plan import Plan, stages_by_submesh
from autopar.pipeline.schedule import Action, rank_actions
from autopar.runtime.count_collectives import CollectiveCounter
from autopar.runtime.lower.rank_mesh import RankMesh
from autopar.runtime.lower.stage_program import BoundaryTransfer
from autopar.runtime.stage_runner import StageRunner
from autopar.runtime.transfer import Mailbox, TransferChannel, indices_by_rank, make_direction_groups

_Placed = tuple[Placements, RankMesh]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _BoundaryChannels:
    """The channels of one boundary tensor: of the activation, and of its gradient (None where it has none)."""

    transfer: BoundaryTransfer
    activation: TransferChannel
    gradient: TransferChannel | None


class PipelineStep:
    """Runs the micro-batches of a step through this rank's stages. ``run`` is collective over the world.

    ``transfers`` and ``meshes`` are those of all stages, ``stages`` the runners of this rank's, by index
    (several in an interleaved schedule). ``loss_dtype`` is that of the model's loss. Creating one is collective."""

    def __init__(
        self,
        *,
        plan: Plan,
        transfers: Sequence[BoundaryTransfer],
        meshes: Sequence[RankMesh],
        stages: Mapping[int, StageRunner],
        loss_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.stages, self.loss_dtype, self.device = dict(stages), loss_dtype, device
        self.num_microbatches = plan.microbatches
        self.rank = dist.get_rank()
        self.actions = self._own_actions(plan)
        self._counter: CollectiveCounter | None = None
        self._direction_groups = make_direction_groups(device), make_direction_groups(device)  # activations, gradients
        self._channels = [self._connect(transfer, meshes, number) for number, transfer in enumerate(transfers)]

    def run(self, micro_batches: Sequence[Mapping[int, Tensor]], *, loss_scale: float) -> Tensor:
        """Forward and backward of all micro-batches, gradients times ``loss_scale`` reduced into the masters'
        ``.grad``; returns the mean loss, on every rank. A micro-batch is the graph's inputs, by value."""
        mailbox = Mailbox()
        losses: list[Tensor] = []
        remaining = dict.fromkeys(self.stages, self.num_microbatches)
        for action in self.actions:
            if action.kind == "F":
                loss = self._forward(action, micro_batches[action.microbatch], mailbox)
                losses += [loss] if loss is not None else []
            else:
                remaining[action.stage] -= 1
                self._backward(action, mailbox, loss_scale=loss_scale, last=not remaining[action.stage])
        mailbox.flush()
        for index, stage in self.stages.items():
            self.count_for_stage(index)
            stage.parameters.finish_reduction()
        return self._mean_loss(losses)

    @contextmanager
    def counting_collectives(self, *, fp64_as_fp32: bool) -> Iterator[CollectiveCounter]:
        """Count the collectives of each of this rank's stages that run inside; see ``CollectiveCounter``."""
        meshes = {index: stage.parameters.mesh for index, stage in self.stages.items()}
        self._counter = CollectiveCounter(meshes, fp64_as_fp32=fp64_as_fp32)
        try:
            with self._counter:
                yield self._counter
        finally:
            self._counter = None

    def count_for_stage(self, stage: int) -> None:
        """Collectives that follow are counted, where they are, as those of this stage."""
        if self._counter is not None:
            self._counter.current_stage = stage

    def count_received(self, sender: int, tensor: Tensor) -> None:
        """Count a tensor that this rank received from stage ``sender``, where collectives are counted."""
        if self._counter is not None:
            self._counter.count_received(sender, tensor)

    def _own_actions(self, plan: Plan) -> tuple[Action, ...]:
        """This rank's actions, in the order of torch's schedules."""
        submeshes = stages_by_submesh(plan)
        own = next(
            number
            for number, (stage, *_) in enumerate(submeshes)
            if stage.first_device <= self.rank < stage.first_device + stage.num_devices
        )
        return rank_actions(plan.schedule, len(submeshes), plan.microbatches, plan.num_chunks)[own]

    def _connect(self, transfer: BoundaryTransfer, meshes: Sequence[RankMesh], number: int) -> _BoundaryChannels:
        """The channels of boundary tensor ``number``, which tells its messages from others'."""
        sender, receiver = meshes[transfer.sender], meshes[transfer.receiver]
        activation = self._channel(
            transfer,
            source=(transfer.sender_placements, sender),
            target=(transfer.receiver_placements, receiver),
            tag=2 * number + 2,
        )
        gradient = None
        if transfer.requires_grad:
            gradient = self._channel(
                transfer,
                source=(transfer.receiver_gradient_placements, receiver),
                target=(transfer.sender_gradient_placements, sender),
                tag=2 * number + 3,
            )
        return _BoundaryChannels(transfer=transfer, activation=activation, gradient=gradient)

    def _channel(self, transfer: BoundaryTransfer, *, source: _Placed, target: _Placed, tag: int) -> TransferChannel:
        """A channel for the boundary tensor, or its gradient, from one mesh to another; even tags are activations'."""
        sources, targets = (indices_by_rank(transfer.shape, placements, mesh) for placements, mesh in (source, target))
        is_partial = PARTIAL in source[0]
        return TransferChannel(sources, targets, self.rank, tag, self._direction_groups[tag % 2], is_partial=is_partial)

    def _forward(self, action: Action, inputs: Mapping[int, Tensor], mailbox: Mailbox) -> Tensor | None:
        """Receive, run one forward pass, send; returns the loss where this stage computes it."""
        stage = self.stages[action.stage]
        received = {
            channels.transfer.value: self._receive(channels.transfer, channels.activation, mailbox)
            for channels in self._channels
            if channels.transfer.receiver == action.stage
        }
        self.count_for_stage(action.stage)
        result = stage.forward(action.microbatch, inputs, {value: received[value] for value in stage.program.received})
        available = {**received, **result.sent}  # a stage also passes on what only later stages use
        for channels in self._channels:
            if channels.transfer.sender == action.stage:
                channels.activation.send(available[channels.transfer.value], mailbox)
        return result.loss

    def _backward(self, action: Action, mailbox: Mailbox, *, loss_scale: float, last: bool) -> None:
        """Receive gradients, run one backward pass, send gradients. ``last``: of the step's micro-batches."""
        stage = self.stages[action.stage]
        returned = {
            channels.transfer.value: self._receive(channels.transfer, channels.gradient, mailbox, is_gradient=True)
            for channels in self._channels
            if channels.transfer.sender == action.stage and channels.gradient is not None
        }
        tangents = [returned[stage.program.sent[position]] for position in stage.function.sent_requiring_grad]
        if stage.program.loss_placements is not None:
            share = loss_scale / self.num_microbatches
            tangents.append(torch.full((), share, dtype=self.loss_dtype, device=self.device))
        self.count_for_stage(action.stage)
        gradients = stage.backward(action.microbatch, tangents, last=last)
        for channels in self._channels:
            value = channels.transfer.value
            if channels.transfer.receiver == action.stage and channels.gradient is not None:
                # the gradient from this stage's own use, and from later stages to which it passed the value on
                addends = [each for each in (gradients.get(value), returned.get(value)) if each is not None]
                channels.gradient.send(addends[0] if len(addends) == 1 else addends[0] + addends[1], mailbox)

    def _receive(
        self, transfer: BoundaryTransfer, channel: TransferChannel, mailbox: Mailbox, *, is_gradient: bool = False
    ) -> Tensor:
        """Receive, and count, a boundary tensor or its gradient."""
        tensor = channel.receive(getattr(torch, transfer.dtype), self.device, mailbox)
        self.count_received(transfer.receiver if is_gradient else transfer.sender, tensor)
        return tensor

    def _mean_loss(self, losses: Sequence[Tensor]) -> Tensor:
        """The mean loss on every rank: the sum over the ranks of the stage that computes it, replicas counted once."""
        mean = torch.zeros((), dtype=torch.float64, device=self.device)
        if losses:
            stage = next(stage for stage in self.stages.values() if stage.program.loss_placements is not None)
            assert stage.program.loss_placements is not None
            positions = zip(stage.parameters.mesh.coordinate, stage.program.loss_placements, strict=True)
            if all(position == 0 for position, placement in positions if placement == REPLICATE):
                mean = torch.stack([loss.double() for loss in losses]).mean()
        dist.all_reduce(mean)
        return mean.to(self.loss_dtype)
