"""The training step as a user sees it: gradients of a global batch, clipping, the optimizer, checkpoints."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.core.errors import AutoparError, UsageError
from autopar.core.plan import Plan
from autopar.graph.ir import Graph
from autopar.runtime.checkpoint_state import full_state_dict
from autopar.runtime.count_collectives import CollectiveCounter, CollectiveCounts
from autopar.runtime.load_checkpoint import load
from autopar.runtime.load_state_dict import check_state_dict, load_state_dict
from autopar.runtime.loss_scale import LossScale
from autopar.runtime.lower.randomness import micro_batch_key
from autopar.runtime.lower.stage_function import RANDOM_KEY
from autopar.runtime.micro_batches import slice_batch
from autopar.runtime.on_all_ranks import run_on_all_ranks
from autopar.runtime.pipeline_step import PipelineStep
from autopar.runtime.save_checkpoint import save
from autopar.runtime.stage_runner import StageRunner
from autopar.runtime.stored_parameters import StoredParameter
from autopar.runtime.tied_parameters import TiedParameters, global_gradient_norm
from autopar.runtime.training_state import TrainingState

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
    """One rank's part of a plan. Every rank calls ``step``, ``save`` and ``load`` alike: they are collective.

    ``input_names`` are the keys of a batch, in the order of the graph's inputs; ``clip_norm`` is the largest norm of
    the gradient (None: no clipping); ``seed`` is that of dropout."""

    def __init__(
        self,
        *,
        plan: Plan,
        graph: Graph,
        state: TrainingState,
        pipeline: PipelineStep,
        tied_parameters: TiedParameters,
        input_names: tuple[str, ...],
        clip_norm: float | None,
        seed: int,
        device: torch.device,
    ) -> None:
        self.plan, self.graph, self.state, self.pipeline = plan, graph, state, pipeline
        self.tied_parameters, self.input_names = tied_parameters, input_names
        self.clip_norm, self.seed, self.device = clip_norm, seed, device

    @property
    def stages(self) -> Mapping[int, StageRunner]:
        """This rank's stages by index, several in an interleaved schedule."""
        return self.pipeline.stages

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer of this rank's masters; None where ``apply`` was given none, or this rank trains none."""
        return self.state.optimizer

    @property
    def loss_scale(self) -> LossScale | None:
        """The dynamic loss scale of an fp16 plan, else None."""
        return self.state.loss_scale

    @property
    def num_steps(self) -> int:
        """Steps begun since the start of the training, those before a loaded checkpoint included."""
        return self.state.num_steps

    def trained_parameters(self) -> list[StoredParameter]:
        """The parameters that this rank's optimizer steps, as local shards, stage by stage."""
        return self.state.trained_parameters()

    def step(self, batch: Mapping[str, Any]) -> Tensor:
        """Train on one global batch, the same on every rank; returns the mean loss, on every rank."""
        loss = self.forward_backward(batch)
        if self.loss_scale is not None and self.loss_scale.overflowed:
            for parameter in self.trained_parameters():
                parameter.master.grad = None
            return loss
        if self.clip_norm is not None:
            factor = (self.clip_norm / (self.gradient_norm() + 1e-6)).clamp(max=1.0)
            for parameter in self.trained_parameters():
                assert parameter.master.grad is not None
                parameter.master.grad.mul_(factor)
        self.update()
        return loss

    def forward_backward(self, batch: Mapping[str, Any]) -> Tensor:
        """Forward and backward of all micro-batches and the gradients' reduction: every master has its gradient in
        ``.grad``. Returns the mean loss, on every rank. Collective; AutoparError where another rank is gone."""
        try:
            return self._forward_backward(batch)
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and not any(sign in str(error) for sign in _CONNECTION_LOST):
                raise
            raise AutoparError(
                f"rank {dist.get_rank()} lost the connection to another rank in step {self.num_steps} "
                f"({str(error).splitlines()[0][:200]}); restart from the last checkpoint"
            ) from error

    def _forward_backward(self, batch: Mapping[str, Any]) -> Tensor:
        micro_batches = self.micro_batches(batch)
        self.state.num_steps += 1
        factor = 1.0 if self.loss_scale is None else self.loss_scale.factor
        loss = self.pipeline.run(micro_batches, loss_scale=factor)
        self.tied_parameters.sum_gradients(self.device, self.pipeline.count_received)
        if self.loss_scale is not None:
            self.loss_scale.unscale([parameter.master for parameter in self.trained_parameters()], self.device)
        return loss

    def micro_batches(self, batch: Mapping[str, Any]) -> list[dict[int, Tensor]]:
        """The graph's inputs of each micro-batch of the next step, by value, with its key of random numbers."""
        micro_batches = slice_batch(
            batch, graph=self.graph, plan=self.plan, input_names=self.input_names, device=self.device
        )
        for number, inputs in enumerate(micro_batches):
            inputs[RANDOM_KEY] = torch.tensor(micro_batch_key(self.seed, self.num_steps, number), device=self.device)
        return micro_batches

    def gradient_norm(self) -> Tensor:
        """The 2-norm of the whole model's gradient, on every rank; collective."""
        return global_gradient_norm(self.state.stages, self.tied_parameters, self.device)

    def update(self) -> None:
        """The optimizer's step on ``.grad``, and the weights from the masters; collective where weights are gathered.
        UsageError where there is no optimizer."""
        if self.optimizer is None and self.trained_parameters():
            raise UsageError(
                "no optimizer: pass optimizer=lambda params: torch.optim.AdamW(params) to apply(), or step your own on "
                "trainer.trained_parameters() and do not call update()"
            )
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        for index, parameters in self.state.stages.items():
            self.pipeline.count_for_stage(index)
            parameters.update_weights()

    @contextmanager
    def counting_collectives(self, *, fp64_as_fp32: bool = False) -> Iterator[CollectiveCounter]:
        """Count the collectives of each of this rank's stages that run inside; ``fp64_as_fp32``: fp64 tensors have the
        bytes of the plan's fp32."""
        with self.pipeline.counting_collectives(fp64_as_fp32=fp64_as_fp32) as counter:
            yield counter

    def count_collectives(self, batch: Mapping[str, Any]) -> CollectiveCounts:
        """Run a step without clipping; returns the collectives that ran in it, of each of this rank's stages.
        Collective."""
        with self.counting_collectives() as counter:
            self.forward_backward(batch)
            self.update()
        return counter.counts

    def state_dict(self) -> dict[str, Any]:
        """Parameters, buffers, the optimizer's state and settings, the step count and the loss scale, as
        ``torch.distributed.checkpoint`` saves them and loads them in place: see ``checkpoint_state``. Then call
        ``load_state_dict``. torch's own ``load`` runs what a checkpoint tells it to and does not look for damage;
        ``load`` of this class runs nothing. UsageError where the optimizer has yet to make its state, and cannot."""
        return full_state_dict(self.state, num_steps=self.num_steps)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore all that ``state_dict()`` has, after ``torch.distributed.checkpoint.load`` wrote into it or from
        another trainer under the same plan. Collective. CheckpointError, the same on every rank and with the trainer
        unchanged, that names what is missing and what would not be restored."""
        remedy = "nothing was loaded"
        run_on_all_ranks(
            lambda: check_state_dict(self.state, state), failure="cannot load the state_dict", remedy=remedy
        )
        load_state_dict(self.state, state)
        for parameters in self.state.stages.values():
            parameters.update_weights()

    def save(self, folder: str | os.PathLike[str], step: int, *, keep: int = 2) -> None:
        """Write a checkpoint that any plan of the model can load, and remove all but the last ``keep``; if it is
        interrupted, the one before remains. Collective."""
        save(self.state, folder, step, keep=keep)

    def load(self, folder: str | os.PathLike[str]) -> int:
        """Continue from the newest checkpoint of a folder; returns its step. Collective. PlanFileError where there is
        none; CheckpointError, with the trainer unchanged, where it is damaged, of another model, or might run code."""
        return load(self.state, folder)
