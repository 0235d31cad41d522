"""Runs one stage's micro-batches, eagerly or lowered, and keeps what their backwards need."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from autopar.runtime.lower.joint_graph import LoweredStage, lower_stage
from autopar.runtime.lower.stage_function import StageFunction
from autopar.runtime.stored_parameters import StageParameters

ExecutionMode = Literal["lowered", "reference"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ForwardResult:
    """What the forward of a micro-batch made: ``sent`` by value, and the loss where this stage makes it."""

    sent: dict[int, Tensor]
    loss: Tensor | None


class StageRunner:
    """One stage on one rank. ``forward`` and ``backward`` are called in the schedule's order."""

    def __init__(
        self,
        function: StageFunction,
        parameters: StageParameters,
        dtypes: Mapping[int, torch.dtype],
        mode: ExecutionMode,
    ) -> None:
        self.function, self.program, self.parameters = function, function.program, parameters
        self.lowered: LoweredStage | None = None
        if mode == "lowered":
            shapes = [(function.argument_shape(value), dtypes[value]) for value in function.arguments]
            self.lowered = lower_stage(function, shapes, function.device)
        self._saved: dict[int, Any] = {}

    @property
    def num_in_flight(self) -> int:
        """Micro-batches between their forward and their backward."""
        return len(self._saved)

    def saved_tensors(self, microbatch: int) -> tuple[Tensor, ...]:
        """What the lowered forward of a micro-batch saved for its backward, besides its arguments."""
        assert self.lowered is not None
        return tuple(self._saved[microbatch][len(self.lowered.saved_arguments) :])

    def forward(self, microbatch: int, data: Mapping[int, Tensor], received: Mapping[int, Tensor]) -> ForwardResult:
        """Run the forward pass; ``data`` are the graph's inputs of the micro-batch, by value."""
        arguments = [self._argument(value, data, received) for value in self.function.arguments]
        if self.lowered is None:
            leaves = self.function.make_leaves(arguments)
            outputs = self.function.forward(leaves)
            self._saved[microbatch] = (leaves, outputs)
            sent, loss, buffers = outputs.sent, outputs.loss, outputs.buffers
        else:
            kept = [arguments[at] for at in self.lowered.saved_arguments]
            results = self.lowered.run_forward(arguments)
            self._saved[microbatch] = [*kept, *results[self.lowered.num_outputs :]]
            count = len(self.program.sent)
            sent = tuple(results[:count])
            loss = results[count] if self.program.loss_placements is not None else None
            buffers = tuple(results[count + (loss is not None) : self.lowered.num_outputs])
        for value, tensor in zip(self.program.written_buffers, buffers, strict=True):
            self.parameters.buffers[value] = tensor.detach()
        made = {value: tensor.detach() for value, tensor in zip(self.program.sent, sent, strict=True)}
        return ForwardResult(sent=made, loss=loss.detach() if loss is not None else None)

    def backward(self, microbatch: int, tangents: Sequence[Tensor], *, last: bool) -> dict[int, Tensor]:
        """Run the backward pass: parameters' gradients are added up as they are made, and after the ``last``
        micro-batch's their reduction begins; those of received activations are returned by value."""
        kept = self._saved.pop(microbatch)
        differentiated, count = self.function.differentiated, self.function.num_parameters

        def take(at: int, term: Tensor, owned: bool, complete: bool) -> None:
            self.parameters.add_gradient(differentiated[at], term, owns_memory=owned, complete=last and complete)

        if self.lowered is None:
            leaves, outputs = kept
            gradients = list(self.function.backward(leaves, outputs, tangents))
            for at, gradient in enumerate(gradients[:count]):
                take(at, gradient, False, True)
            back = gradients[count:]
        else:
            arguments = [*kept, *tangents]
            kept.clear()
            back = self.lowered.run_backward(arguments, take)
        return dict(zip(differentiated[count:], back, strict=True))

    def _argument(self, value: int, data: Mapping[int, Tensor], received: Mapping[int, Tensor]) -> Tensor:
        if value in self.parameters.parameters:
            return self.parameters.parameters[value].weight
        if value in self.parameters.buffers:
            return self.parameters.buffers[value]
        return received[value] if value in received else data[value]
