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
from autopar.core.plan import Plan, device_runs
from autopar.graph.ir import Graph
from autopar.pipeline.schedule import Action, actions
from autopar.runtime.count_collectives import Counts, Tally
from autopar.runtime.loss_scale import LossScale
from autopar.runtime.lower.randomness import step_key
from autopar.runtime.lower.rank_mesh import Mesh
from autopar.runtime.lower.stage_function import KEY
from autopar.runtime.lower.stage_program import Crossing, StageProgram
from autopar.runtime.stage_runner import StageRunner
from autopar.runtime.stored_parameters import StoredParameter, Ties, global_norm
from autopar.runtime.transfer import Channel, Mailbox, make_lanes, mesh_layout

_LOST = ("Connection closed", "Connection reset", "Timed out", "Broken pipe", "Read error", "Write error", "NCCL error")


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
        crossings: Sequence[Crossing],
        meshes: Sequence[Mesh],
        stages: Mapping[int, StageRunner],
        ties: Ties,
        make_optimizer: Any,
        input_names: Sequence[str],
        persistent: frozenset[str],
        clip_norm: float | None,
        seed: int,
        device: torch.device,
    ) -> None:
        self.plan, self.graph, self.programs, self.meshes = plan, graph, tuple(programs), tuple(meshes)
        self.stages, self.ties, self.clip_norm, self.device = dict(stages), ties, clip_norm, device
        self.input_names, self.persistent = tuple(input_names), persistent
        self.rank = dist.get_rank()
        self.seed, self.num_steps = seed, 0
        self.scale = LossScale() if plan.execution.dtype == "fp16" else None
        masters = [parameter.master for parameter in self.trained()]
        self.optimizer: torch.optim.Optimizer | None = None
        if make_optimizer is not None and masters:
            self.optimizer = make_optimizer(masters)
        self._lanes = (make_lanes(), make_lanes())
        self._channels = [self._channel(crossing, at) for at, crossing in enumerate(crossings)]
        self.schedule = self._actions()
        self._tally: Tally | None = None

    def trained(self) -> list[StoredParameter]:
        """The parameters that this rank's optimizer steps: local parts, stage by stage."""
        return [parameter for stage in self.stages.values() for parameter in stage.parameters.trained()]

    def first_stage_with(self, value: int) -> int:
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
            stage.parameters.gather()

    def step(self, batch: Mapping[str, Any]) -> Tensor:
        """Train on one global batch, the same on every rank; returns the mean loss, on every rank."""
        loss = self.gradients(batch)
        if self.scale is not None and self.scale.overflowed:
            self._forget_gradients()
            return loss
        if self.clip_norm is not None:
            scale = self.clip_norm / (self.gradient_norm() + 1e-6)
            for parameter in self.trained():
                assert parameter.master.grad is not None
                parameter.master.grad.mul_(scale.clamp(max=1.0))
        self.update()
        return loss

    def gradients(self, batch: Mapping[str, Any]) -> Tensor:
        """Forward and backward of all micro-batches and the reduction: every master has its gradient in ``.grad``.

        AutoparError where another rank is gone."""
        try:
            return self._gradients(batch)
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and not any(sign in str(error) for sign in _LOST):
                raise
            raise AutoparError(
                f"rank {self.rank} lost another rank in step {self.num_steps} ({str(error).splitlines()[0][:200]}); "
                "start again from the last checkpoint"
            ) from error

    def _gradients(self, batch: Mapping[str, Any]) -> Tensor:
        data = self._slices(batch)
        self.num_steps += 1
        mailbox = Mailbox()
        losses: list[Tensor] = []
        left = dict.fromkeys(self.stages, self.plan.microbatches)
        for action in self.schedule:
            if action.kind == "F":
                made = self._forward(action, data, mailbox)
                losses += [made] if made is not None else []
            else:
                left[action.stage] -= 1
                self._backward(action, mailbox, last=not left[action.stage])
        mailbox.flush()
        for index, stage in self.stages.items():
            self._runs(index)
            stage.parameters.reduce()
        self.ties.exchange(self.device, self._received)
        if self.scale is not None:
            self.scale.undo([parameter.master for parameter in self.trained()], self.device)
        return self._mean(losses)

    @contextmanager
    def counted(self, *, widened: bool = False) -> Iterator[Tally]:
        """Counts the collectives of each of the rank's stages that run inside; ``widened``: fp64 for the plan's fp32."""
        self._tally = Tally({index: self.meshes[index] for index in self.stages}, widened=widened)
        try:
            with self._tally:
                yield self._tally
        finally:
            self._tally = None

    def count(self, batch: Mapping[str, Any]) -> Counts:
        """A step without clipping: the collectives of each of the rank's stages that ran in it. Collective."""
        with self.counted() as tally:
            self.gradients(batch)
            self.update()
        return tally.found

    def _runs(self, stage: int) -> None:
        if self._tally is not None:
            self._tally.stage = stage

    def gradient_norm(self) -> Tensor:
        """The 2-norm of the whole gradient."""
        return global_norm({index: stage.parameters for index, stage in self.stages.items()}, self.ties, self.device)

    def update(self) -> None:
        """The optimizer's step on ``.grad``, and the weights from the masters."""
        if self.optimizer is None and self.trained():
            raise UsageError(
                "no optimizer: give apply(optimizer=lambda params: torch.optim.AdamW(params)) or step your own"
            )
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        for index, stage in self.stages.items():
            self._runs(index)
            stage.parameters.gather()

    def _forget_gradients(self) -> None:
        for parameter in self.trained():
            parameter.master.grad = None

    def _actions(self) -> tuple[Action, ...]:
        """This rank's actions, in the order of torch's schedules."""
        runs = device_runs(self.plan)
        mine = next(at for at, run in enumerate(runs) if self._runs_on(run[0].first_device, run[0].num_devices))
        return actions(self.plan.schedule, len(runs), self.plan.microbatches, self.plan.num_chunks)[mine]

    def _runs_on(self, first: int, count: int) -> bool:
        return first <= self.rank < first + count

    def _channel(self, crossing: Crossing, at: int) -> tuple[Crossing, Channel, Channel]:
        maker, reader = self.meshes[crossing.maker], self.meshes[crossing.reader]

        def channel(ends: Sequence[tuple[Placements, Mesh]], tag: int) -> Channel:
            sources, targets = (mesh_layout(crossing.shape, placement, mesh) for placement, mesh in ends)
            terms = PARTIAL in ends[0][0]
            return Channel(sources, targets, self.rank, tag, self._lanes[tag % 2], of_terms=terms)

        on = channel([(crossing.sent, maker), (crossing.received, reader)], 2 * at + 2)
        back = [(crossing.returned, reader), (crossing.taken_back, maker)] if crossing.requires_grad else []
        return crossing, on, channel(back, 2 * at + 3) if back else on

    def _slices(self, batch: Mapping[str, Any]) -> list[dict[int, Tensor]]:
        """The graph's inputs of each micro-batch, by value."""
        given = dict(zip(self.graph.inputs, _tensors(batch, self.input_names), strict=True))
        size, slices = self.plan.micro_batch_size, [dict[int, Tensor]() for _ in range(self.plan.microbatches)]
        for value, tensor in given.items():
            traced = self.graph.values[value]
            grows = next((dim for dim, n in enumerate(traced.shape) if self.graph.batch.grows(n)), None)
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
            part[KEY] = torch.tensor(step_key(self.seed, self.num_steps, at), device=self.device)
        return slices

    def _forward(self, action: Action, data: Sequence[dict[int, Tensor]], mailbox: Mailbox) -> Tensor | None:
        received = {}
        for crossing, way, _ in self._channels:
            if crossing.reader == action.stage:
                received[crossing.value] = self._receive(crossing, way, crossing.maker, mailbox)
        stage = self.stages[action.stage]
        mine = {value: received[value] for value in stage.program.received}
        self._runs(action.stage)
        made = stage.forward(action.microbatch, data[action.microbatch], mine)
        leaving = {**received, **made.sent}
        for crossing, way, _ in self._channels:
            if crossing.maker == action.stage:
                way.send(leaving[crossing.value], mailbox)
        return made.loss

    def _backward(self, action: Action, mailbox: Mailbox, *, last: bool) -> None:
        stage = self.stages[action.stage]
        returned: dict[int, Tensor] = {}
        for crossing, _, back in self._channels:
            if crossing.maker == action.stage and crossing.requires_grad:
                returned[crossing.value] = self._receive(crossing, back, crossing.reader, mailbox)
        wanted = [returned[stage.program.sent[at]] for at in stage.function.sent_with_gradient]
        if stage.program.loss is not None:
            dtype = getattr(torch, self.graph.values[self.graph.outputs[0]].dtype)
            share = (1.0 if self.scale is None else self.scale.factor) / self.plan.microbatches
            wanted.append(torch.full((), share, dtype=dtype, device=self.device))
        self._runs(action.stage)
        gradients = stage.backward(action.microbatch, wanted, last=last)
        for crossing, _, back in self._channels:
            if crossing.reader == action.stage and crossing.requires_grad:
                own, beyond = gradients.get(crossing.value), returned.get(crossing.value)
                terms = [
                    term for term in (own, beyond) if term is not None
                ]  # what later stages read passed through here
                back.send(terms[0] if len(terms) == 1 else terms[0] + terms[1], mailbox)

    def _receive(self, crossing: Crossing, way: Channel, sender: int, mailbox: Mailbox) -> Tensor:
        part = way.receive(getattr(torch, crossing.dtype), self.device, mailbox)
        self._received(sender, part)
        return part

    def _received(self, sender: int, part: Tensor) -> None:
        if self._tally is not None:
            self._tally.received(sender, part)

    def _mean(self, losses: Sequence[Tensor]) -> Tensor:
        """The mean loss on every rank, from the stage that makes it: each of its terms once."""
        last = next(program for program in self.programs if program.loss is not None)
        mean = torch.zeros((), dtype=torch.float64, device=self.device)
        if losses:
            assert last.loss is not None
            coordinate = self.meshes[last.index].coordinate
            if not any(place for place, placement in zip(coordinate, last.loss, strict=True) if placement == REPLICATE):
                mean = torch.stack([loss.double() for loss in losses]).mean()
        dist.all_reduce(mean)
        return mean.to(getattr(torch, self.graph.values[self.graph.outputs[0]].dtype))


def _tensors(batch: Mapping[str, Any], names: Sequence[str]) -> list[Tensor]:
    """The tensors of a batch in the order of the graph's inputs."""
    missing = sorted(set(names) - set(batch))
    if missing or len(batch) != len(names):
        raise UsageError(f"the batch has {', '.join(sorted(batch))}; the model takes {', '.join(names)}")
    return [leaf for name in names for leaf in _leaves(batch[name])]


def _leaves(part: Any) -> Iterable[Tensor]:
    return (leaf for leaf in torch.utils._pytree.tree_leaves(part) if isinstance(leaf, Tensor))
