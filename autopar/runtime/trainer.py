"""The training step: micro-batches through the schedule's actions, one reduction, one update.

loss of a step = mean of the losses of its micro-batches, as one process makes it that runs them one after the other
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.core.errors import AutoparError, UsageError
from autopar.core.placement import PARTIAL, REPLICATE, Placements
from autopar.core.plan import Plan, stages_by_submesh
from autopar.graph.ir import Graph
from autopar.pipeline.schedule import Action, rank_actions
from autopar.runtime.count_collectives import CollectiveCounter, CollectiveCounts
from autopar.runtime.loss_scale import LossScale
from autopar.runtime.lower.randomness import micro_batch_key
from autopar.runtime.lower.rank_mesh import RankMesh
from autopar.runtime.lower.stage_function import RANDOM_KEY
from autopar.runtime.lower.stage_program import BoundaryTransfer, StageProgram
from autopar.runtime.stage_runner import StageRunner
from autopar.runtime.stored_parameters import StoredParameter, TiedParameters, global_gradient_norm
from autopar.runtime.transfer import Mailbox, TransferChannel, indices_by_rank, make_direction_groups

_CONNECTION_LOST = (
    "Connection closed",
    "Connection reset",
    "Timed out",
    "Broken pipe",
    "Read error",
    "Write error",
    "NCCL error",
)


class Trainer:
    """One rank's part of a plan. ``step`` and ``gradients`` are collective: every rank calls them alike.

    ``persistent`` names what the model itself would save.
    ``stages`` are the rank's stages by index (several when interleaved), ``meshes`` those of all stages."""

    def __init__(
        self,
        *,
        plan: Plan,
        graph: Graph,
        programs: Sequence[StageProgram],
        transfers: Sequence[BoundaryTransfer],
        meshes: Sequence[RankMesh],
        stages: Mapping[int, StageRunner],
        tied_parameters: TiedParameters,
        make_optimizer: Any,
        input_names: Sequence[str],
        persistent_names: frozenset[str],
        clip_norm: float | None,
        seed: int,
        device: torch.device,
    ) -> None:
        self.plan, self.graph, self.programs, self.meshes = plan, graph, tuple(programs), tuple(meshes)
        self.stages, self.tied_parameters, self.clip_norm, self.device = (
            dict(stages),
            tied_parameters,
            clip_norm,
            device,
        )
        self.input_names, self.persistent_names = tuple(input_names), persistent_names
        self.rank = dist.get_rank()
        self.seed, self.num_steps = seed, 0
        self.loss_scale = LossScale() if plan.execution.dtype == "fp16" else None
        masters = [parameter.master for parameter in self.trained_parameters()]
        self.optimizer: torch.optim.Optimizer | None = None
        if make_optimizer is not None and masters:
            self.optimizer = make_optimizer(masters)
        self._direction_groups = (make_direction_groups(), make_direction_groups())
        self._channels = [self._connect(crossing, at) for at, crossing in enumerate(transfers)]
        self.actions = self._own_actions()
        self._counter: CollectiveCounter | None = None

    def trained_parameters(self) -> list[StoredParameter]:
        """The parameters that this rank's optimizer steps: local parts, stage by stage."""
        return [parameter for stage in self.stages.values() for parameter in stage.parameters.trained()]

    def first_stage_storing(self, value: int) -> int:
        """The first stage that holds a parameter or buffer."""
        return next(
            program.index
            for program in self.programs
            if any(stored.value == value for stored in (*program.parameters, *program.buffers))
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds, for ``torch.distributed.checkpoint.save``: see ``checkpoint.state_dict``. Its
        ``load`` runs what a checkpoint says, and does not look for damage; ``load`` of the trainer runs nothing."""
        return import_module("autopar.runtime.checkpoint").state_dict(self)

    def save(self, folder: str, step: int, *, keep: int = 2) -> None:
        """Write a checkpoint that any plan can load; an interrupted one leaves the one before. Collective."""
        import_module("autopar.runtime.checkpoint").save(self, folder, step, keep=keep)

    def load(self, folder: str) -> int:
        """Go on from the newest checkpoint; returns its step. Collective. PlanFileError where there is none;
        CheckpointError, with the trainer as it was, where it is damaged, of another model, or might run something."""
        step: int = import_module("autopar.runtime.checkpoint").load(self, folder)
        return step

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``torch.distributed.checkpoint.load`` wrote into ``state_dict()``: weights from masters."""
        assert {"model", "optimizer"} <= set(state)
        for stage in self.stages.values():
            stage.parameters.update_weights()

    def step(self, batch: Mapping[str, Any]) -> Tensor:
        """Train on one global batch, the same on every rank; returns the mean loss, on every rank."""
        loss = self.forward_backward(batch)
        if self.loss_scale is not None and self.loss_scale.overflowed:
            self._clear_gradients()
            return loss
        if self.clip_norm is not None:
            scale = self.clip_norm / (self.gradient_norm() + 1e-6)
            for parameter in self.trained_parameters():
                assert parameter.master.grad is not None
                parameter.master.grad.mul_(scale.clamp(max=1.0))
        self.update()
        return loss

    def forward_backward(self, batch: Mapping[str, Any]) -> Tensor:
        """Forward and backward of all micro-batches and the reduction: every master has its gradient in ``.grad``.

        AutoparError where another rank is gone."""
        try:
            return self._forward_backward(batch)
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and not any(sign in str(error) for sign in _CONNECTION_LOST):
                raise
            raise AutoparError(
                f"rank {self.rank} lost another rank in step {self.num_steps} ({str(error).splitlines()[0][:200]}); "
                "start again from the last checkpoint"
            ) from error

    def _forward_backward(self, batch: Mapping[str, Any]) -> Tensor:
        data = self._micro_batches(batch)
        self.num_steps += 1
        mailbox = Mailbox()
        losses: list[Tensor] = []
        left = dict.fromkeys(self.stages, self.plan.microbatches)
        for action in self.actions:
            if action.kind == "F":
                made = self._forward(action, data, mailbox)
                losses += [made] if made is not None else []
            else:
                left[action.stage] -= 1
                self._backward(action, mailbox, last=not left[action.stage])
        mailbox.flush()
        for index, stage in self.stages.items():
            self._count_for_stage(index)
            stage.parameters.finish_reduction()
        self.tied_parameters.sum_gradients(self.device, self._count_received)
        if self.loss_scale is not None:
            self.loss_scale.unscale([parameter.master for parameter in self.trained_parameters()], self.device)
        return self._mean_loss(losses)

    @contextmanager
    def counting_collectives(self, *, fp64_as_fp32: bool = False) -> Iterator[CollectiveCounter]:
        """Counts the collectives of each of the rank's stages that run inside; ``widened``: fp64 for the plan's fp32."""
        self._counter = CollectiveCounter(
            {index: self.meshes[index] for index in self.stages}, fp64_as_fp32=fp64_as_fp32
        )
        try:
            with self._counter:
                yield self._counter
        finally:
            self._counter = None

    def count_collectives(self, batch: Mapping[str, Any]) -> CollectiveCounts:
        """A step without clipping: the collectives of each of the rank's stages that ran in it. Collective."""
        with self.counting_collectives() as tally:
            self.forward_backward(batch)
            self.update()
        return tally.counts

    def _count_for_stage(self, stage: int) -> None:
        if self._counter is not None:
            self._counter.current_stage = stage

    def gradient_norm(self) -> Tensor:
        """The 2-norm of the whole gradient."""
        return global_gradient_norm(
            {index: stage.parameters for index, stage in self.stages.items()}, self.tied_parameters, self.device
        )

    def update(self) -> None:
        """The optimizer's step on ``.grad``, and the weights from the masters."""
        if self.optimizer is None and self.trained_parameters():
            raise UsageError(
                "no optimizer: give apply(optimizer=lambda params: torch.optim.AdamW(params)) or step your own"
            )
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        for index, stage in self.stages.items():
            self._count_for_stage(index)
            stage.parameters.update_weights()

    def _clear_gradients(self) -> None:
        for parameter in self.trained_parameters():
            parameter.master.grad = None

    def _own_actions(self) -> tuple[Action, ...]:
        """This rank's actions, in the order of torch's schedules."""
        runs = stages_by_submesh(self.plan)
        mine = next(at for at, run in enumerate(runs) if self._is_on(run[0].first_device, run[0].num_devices))
        return rank_actions(self.plan.schedule, len(runs), self.plan.microbatches, self.plan.num_chunks)[mine]

    def _is_on(self, first: int, count: int) -> bool:
        return first <= self.rank < first + count

    def _connect(
        self, transfer: BoundaryTransfer, number: int
    ) -> tuple[BoundaryTransfer, TransferChannel, TransferChannel]:
        maker, reader = self.meshes[transfer.sender], self.meshes[transfer.receiver]

        def channel(ends: Sequence[tuple[Placements, RankMesh]], tag: int) -> TransferChannel:
            sources, targets = (indices_by_rank(transfer.shape, placement, mesh) for placement, mesh in ends)
            terms = PARTIAL in ends[0][0]
            return TransferChannel(sources, targets, self.rank, tag, self._direction_groups[tag % 2], is_partial=terms)

        on = channel([(transfer.sender_placements, maker), (transfer.receiver_placements, reader)], 2 * number + 2)
        back = (
            [(transfer.receiver_gradient_placements, reader), (transfer.sender_gradient_placements, maker)]
            if transfer.requires_grad
            else []
        )
        return transfer, on, channel(back, 2 * number + 3) if back else on

    def _micro_batches(self, batch: Mapping[str, Any]) -> list[dict[int, Tensor]]:
        """The graph's inputs of each micro-batch, by value."""
        given = dict(zip(self.graph.inputs, _batch_tensors(batch, self.input_names), strict=True))
        size, slices = self.plan.micro_batch_size, [dict[int, Tensor]() for _ in range(self.plan.microbatches)]
        for value, tensor in given.items():
            traced = self.graph.values[value]
            grows = next((dim for dim, n in enumerate(traced.shape) if self.graph.batch.is_proportional(n)), None)
            tensor = tensor.to(self.device)
            if traced.dtype.startswith(("float", "bfloat")):
                tensor = tensor.to(getattr(torch, traced.dtype))
            expected = tuple(self.graph.batch.scale(n, self.plan.global_batch) for n in traced.shape)
            if tuple(tensor.shape) != expected:
                raise UsageError(
                    f"input {traced.name} has shape {tuple(tensor.shape)}; the plan's global batch of "
                    f"{self.plan.global_batch} samples has {expected}"
                )
            for at, part in enumerate(slices):
                rows = self.graph.batch.scale(traced.shape[grows], size) if grows is not None else 0
                part[value] = tensor.narrow(grows, at * rows, rows) if grows is not None else tensor
        for at, part in enumerate(slices):
            part[RANDOM_KEY] = torch.tensor(micro_batch_key(self.seed, self.num_steps, at), device=self.device)
        return slices

    def _forward(self, action: Action, data: Sequence[dict[int, Tensor]], mailbox: Mailbox) -> Tensor | None:
        received = {}
        for crossing, way, _ in self._channels:
            if crossing.receiver == action.stage:
                received[crossing.value] = self._receive(crossing, way, crossing.sender, mailbox)
        stage = self.stages[action.stage]
        mine = {value: received[value] for value in stage.program.received}
        self._count_for_stage(action.stage)
        made = stage.forward(action.microbatch, data[action.microbatch], mine)
        leaving = {**received, **made.sent}
        for crossing, way, _ in self._channels:
            if crossing.sender == action.stage:
                way.send(leaving[crossing.value], mailbox)
        return made.loss

    def _backward(self, action: Action, mailbox: Mailbox, *, last: bool) -> None:
        stage = self.stages[action.stage]
        returned: dict[int, Tensor] = {}
        for crossing, _, back in self._channels:
            if crossing.sender == action.stage and crossing.requires_grad:
                returned[crossing.value] = self._receive(crossing, back, crossing.receiver, mailbox)
        wanted = [returned[stage.program.sent[at]] for at in stage.function.sent_requiring_grad]
        if stage.program.loss_placements is not None:
            dtype = getattr(torch, self.graph.values[self.graph.outputs[0]].dtype)
            share = (1.0 if self.loss_scale is None else self.loss_scale.factor) / self.plan.microbatches
            wanted.append(torch.full((), share, dtype=dtype, device=self.device))
        self._count_for_stage(action.stage)
        gradients = stage.backward(action.microbatch, wanted, last=last)
        for crossing, _, back in self._channels:
            if crossing.receiver == action.stage and crossing.requires_grad:
                own, beyond = gradients.get(crossing.value), returned.get(crossing.value)
                terms = [
                    term for term in (own, beyond) if term is not None
                ]  # what later stages read passed through here
                back.send(terms[0] if len(terms) == 1 else terms[0] + terms[1], mailbox)

    def _receive(self, transfer: BoundaryTransfer, channel: TransferChannel, sender: int, mailbox: Mailbox) -> Tensor:
        part = channel.receive(getattr(torch, transfer.dtype), self.device, mailbox)
        self._count_received(sender, part)
        return part

    def _count_received(self, sender: int, tensor: Tensor) -> None:
        if self._counter is not None:
            self._counter.count_received(sender, tensor)

    def _mean_loss(self, losses: Sequence[Tensor]) -> Tensor:
        """The mean loss on every rank, from the stage that makes it: each of its terms once."""
        last = next(program for program in self.programs if program.loss_placements is not None)
        mean = torch.zeros((), dtype=torch.float64, device=self.device)
        if losses:
            assert last.loss_placements is not None
            coordinate = self.meshes[last.index].coordinate
            if not any(
                place
                for place, placement in zip(coordinate, last.loss_placements, strict=True)
                if placement == REPLICATE
            ):
                mean = torch.stack([loss.double() for loss in losses]).mean()
        dist.all_reduce(mean)
        return mean.to(getattr(torch, self.graph.values[self.graph.outputs[0]].dtype))


def _batch_tensors(batch: Mapping[str, Any], names: Sequence[str]) -> list[Tensor]:
    """The tensors of a batch in the order of the graph's inputs."""
    missing = sorted(set(names) - set(batch))
    if missing or len(batch) != len(names):
        raise UsageError(f"the batch has {', '.join(sorted(batch))}; the model takes {', '.join(names)}")
    return [leaf for name in names for leaf in _tensor_leaves(batch[name])]


def _tensor_leaves(part: Any) -> Iterable[Tensor]:
    return (leaf for leaf in torch.utils._pytree.tree_leaves(part) if isinstance(leaf, Tensor))
