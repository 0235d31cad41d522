"""Tied parameters that several stages store: the gradient of every copy is the sum over these stages.

Stages send their gradients to each other, in the sharding of their masters, after their own reduction.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.runtime.lower.rank_mesh import RankMesh
from autopar.runtime.lower.stage_program import ParameterSharding, StageProgram
from autopar.runtime.stored_parameters import StageParameters, stored_indices
from autopar.runtime.transfer import DimIndices, Mailbox, TransferChannel, make_direction_groups


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TiedExchange:
    """Sends the gradient of parameter ``value`` from one of its stages to another."""

    value: int
    source_stage: int
    target_stage: int
    channel: TransferChannel


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TiedParameters:
    """The exchanges of all tied parameters, in one order on all ranks; ``stages`` are this rank's, by index."""

    exchanges: tuple[TiedExchange, ...]
    stages: Mapping[int, StageParameters]

    def sum_gradients(self, device: torch.device, on_received: Callable[[int, Tensor], None]) -> None:
        """Replace the gradient of every copy by the sum over the stages, added in the order of stages on all of them.
        ``on_received`` is called with (sending stage, tensor) for each tensor received."""
        mailbox = Mailbox()
        for exchange in self.exchanges:
            if exchange.source_stage in self.stages:
                gradient = self.stages[exchange.source_stage].parameters[exchange.value].master.grad
                assert gradient is not None
                exchange.channel.send(gradient, mailbox)
        received: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
        for exchange in self.exchanges:
            value, target = exchange.value, exchange.target_stage
            if target in self.stages:
                dtype = self.stages[target].parameters[value].master.dtype
                gradient = exchange.channel.receive(dtype, device, mailbox)
                on_received(exchange.source_stage, gradient)
                received.setdefault((value, target), []).append((exchange.source_stage, gradient))
        mailbox.flush()
        for (value, target), others in received.items():
            master = self.stages[target].parameters[value].master
            assert master.grad is not None
            addends = [gradient for _, gradient in sorted([(target, master.grad), *others], key=lambda pair: pair[0])]
            total = addends[0].clone()
            for addend in addends[1:]:
                total += addend
            master.grad = total

    def is_first_stage(self, value: int, stage: int) -> bool:
        """Whether a stage is the first of those that store a parameter: its copy enters the gradient norm."""
        return all(stage <= exchange.source_stage for exchange in self.exchanges if exchange.value == value)


def connect_tied_parameters(
    stages: Mapping[int, StageParameters],
    programs: Sequence[StageProgram],
    meshes: Sequence[RankMesh],
    *,
    rank: int,
    device: torch.device,
) -> TiedParameters:
    """The exchanges between every two stages that train the same parameter; collective over the world. ``programs`` and
    ``meshes`` are of all stages, ``stages`` those of ``rank``, whose tensors are on ``device``."""
    shardings: dict[int, dict[int, ParameterSharding]] = {}
    for program in programs:
        for sharding in program.parameters:
            if sharding.trained:
                shardings.setdefault(sharding.value, {})[program.index] = sharding
    groups = make_direction_groups(device)
    exchanges = []
    for value, by_stage in sorted(shardings.items()):
        if len(by_stage) == 1:
            continue
        indices = {stage: _indices_by_rank(sharding, meshes[stage]) for stage, sharding in by_stage.items()}
        for source in indices:
            for target in indices:
                if source != target:
                    channel = TransferChannel(indices[source], indices[target], rank, 0, groups)
                    exchanges.append(
                        TiedExchange(value=value, source_stage=source, target_stage=target, channel=channel)
                    )
    return TiedParameters(exchanges=tuple(exchanges), stages=dict(stages))


def _indices_by_rank(sharding: ParameterSharding, mesh: RankMesh) -> list[tuple[int, DimIndices]]:
    """(rank, the indices of its master) of all ranks of a stage."""
    return [
        (rank, stored_indices(sharding, mesh, mesh.coordinate_of(rank), zero_sharded=True))
        for rank in range(mesh.first_rank, mesh.first_rank + mesh.num_ranks)
    ]


def global_gradient_norm(
    stages: Mapping[int, StageParameters], tied_parameters: TiedParameters, device: torch.device
) -> Tensor:
    """The 2-norm of the gradient of the whole model, the same on every rank; collective over the world."""
    square = torch.zeros((), dtype=torch.float64, device=device)
    for index, stage in stages.items():
        for parameter in stage.trained():
            if parameter.counts_in_norm and tied_parameters.is_first_stage(parameter.sharding.value, index):
                assert parameter.master.grad is not None
                square += parameter.master.grad.double().square().sum()
    dist.all_reduce(square)
    return square.sqrt()
