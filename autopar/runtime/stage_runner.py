"""Runs one stage's micro-batches, op by op or lowered, and stores what their backwards need."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from autopar.runtime.lower.joint_graph import LoweredStage, lower_stage
from autopar.runtime.lower.stage_function import StageFunction
from autopar.runtime.stored_parameters import StageParameters

ExecutionMode = Literal["lowered", "reference"]
"""Local forward and backward graphs, or the stage's ops one by one under autograd."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ForwardResult:
    """The result of a micro-batch's forward: the activations to send, by value, and the loss where this stage computes
    it."""

    sent: dict[int, Tensor]
    loss: Tensor | None


class StageRunner:
    """One stage on one rank. ``forward`` and ``backward`` are called in the schedule's order; ``dtypes`` are by
    value."""

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

    def forward(self, microbatch: int, inputs: Mapping[int, Tensor], received: Mapping[int, Tensor]) -> ForwardResult:
        """Run the forward pass of a micro-batch; ``inputs`` are the graph's inputs, ``received`` the activations of
        other stages, both by value."""
        arguments = [self._argument(value, inputs, received) for value in self.function.arguments]
        if self.lowered is None:
            leaves = self.function.make_leaves(arguments)
            outputs = self.function.forward(leaves)
            self._saved[microbatch] = (leaves, outputs)
            sent, loss, buffers = outputs.sent, outputs.loss, outputs.buffers
        else:
            saved_arguments = [arguments[position] for position in self.lowered.saved_arguments]
            results = self.lowered.run_forward(arguments)
            self._saved[microbatch] = [*saved_arguments, *results[self.lowered.num_outputs :]]
            count = len(self.program.sent)
            sent = tuple(results[:count])
            loss = results[count] if self.program.loss_placements is not None else None
            buffers = tuple(results[count + (loss is not None) : self.lowered.num_outputs])
        for value, tensor in zip(self.program.written_buffers, buffers, strict=True):
            self.parameters.buffers[value] = tensor.detach()
        sent_by_value = {value: tensor.detach() for value, tensor in zip(self.program.sent, sent, strict=True)}
        return ForwardResult(sent=sent_by_value, loss=loss.detach() if loss is not None else None)

    def backward(self, microbatch: int, tangents: Sequence[Tensor], *, last: bool) -> dict[int, Tensor]:
        """Run the backward pass of a micro-batch; ``tangents`` are the gradients of what was sent, where it has one,
        and of the loss. Parameters' gradients are added to their sums, whose reduction starts in the step's ``last``
        backward. Returns the gradients of received activations, by value."""
        saved = self._saved.pop(microbatch)
        differentiated, count = self.function.differentiated, self.function.num_parameters

        def add(position: int, addend: Tensor, owns_memory: bool, complete: bool) -> None:
            self.parameters.add_gradient(
                differentiated[position], addend, owns_memory=owns_memory, complete=last and complete
            )

        if self.lowered is None:
            leaves, outputs = saved
            gradients = list(self.function.backward(leaves, outputs, tangents))
            for position, gradient in enumerate(gradients[:count]):
                add(position, gradient, False, True)
            of_received = gradients[count:]
        else:
            arguments = [*saved, *tangents]
            saved.clear()  # the backward frees each tensor after its last use
            of_received = self.lowered.run_backward(arguments, add)
        return dict(zip(differentiated[count:], of_received, strict=True))

    def _argument(self, value: int, inputs: Mapping[int, Tensor], received: Mapping[int, Tensor]) -> Tensor:
        """The tensor of an argument of the stage's function."""
        if value in self.parameters.parameters:
            return self.parameters.parameters[value].weight
        if value in self.parameters.buffers:
            return self.parameters.buffers[value]
        return received[value] if value in received else inputs[value]
