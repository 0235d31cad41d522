"""What a rank's training consists of between two steps: what a step changes, and what a checkpoint saves and loads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from autopar.core.dtypes import ShortDtype
from autopar.graph.ir import Graph
from autopar.runtime.loss_scale import LossScale
from autopar.runtime.lower.stage_program import StageProgram
from autopar.runtime.stored_parameters import OptimizerFactory, StageParameters, StoredParameter


@dataclass(slots=True, kw_only=True, eq=False)
class TrainingState:
    """The state of a training on one rank, between two steps.

    ``stages`` are the rank's, by index. ``first_stage_storing`` maps every parameter and buffer of the model to the
    first stage that stores it, on whatever rank; ``buffer_names`` those buffers to their names that the model's own
    ``state_dict`` has. ``optimizer`` is None where the user steps the masters, or this rank trains none;
    ``loss_scale`` is None but in fp16 training. ``num_steps`` counts the steps begun."""

    stages: Mapping[int, StageParameters]
    first_stage_storing: Mapping[int, int]
    buffer_names: Mapping[int, str]
    optimizer: torch.optim.Optimizer | None
    loss_scale: LossScale | None
    num_steps: int = 0

    def trained_parameters(self) -> list[StoredParameter]:
        """The parameters that this rank's optimizer steps, stage by stage."""
        return [parameter for stage in self.stages.values() for parameter in stage.trained()]


def initial_state(
    stages: Mapping[int, StageParameters],
    *,
    programs: Sequence[StageProgram],
    graph: Graph,
    saved_names: frozenset[str],
    make_optimizer: OptimizerFactory | None,
    dtype: ShortDtype,
) -> TrainingState:
    """The state before the first step. ``programs`` are those of all stages; ``saved_names`` the names in the model's
    own ``state_dict``; ``dtype`` the plan's."""
    first_stage_storing: dict[int, int] = {}
    buffer_names: dict[int, str] = {}
    for program in programs:
        for stored in (*program.parameters, *program.buffers):
            first_stage_storing.setdefault(stored.value, program.index)
        for buffer in program.buffers:
            name = graph.values[buffer.value].qualified_names[0]
            if name in saved_names:
                buffer_names[buffer.value] = name
    state = TrainingState(
        stages=stages,
        first_stage_storing=first_stage_storing,
        buffer_names=buffer_names,
        optimizer=None,
        loss_scale=LossScale() if dtype == "fp16" else None,
    )
    masters = [parameter.master for parameter in state.trained_parameters()]
    if make_optimizer is not None and masters:
        state.optimizer = make_optimizer(masters)
    return state
