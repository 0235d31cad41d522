"""From a plan and a model to a trainer: the entry point of the runtime."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopar.core.dtypes import LONG_NAMES
from autopar.core.errors import PlanFileError, UsageError
from autopar.core.plan import Plan
from autopar.core.request import ARGUMENT_RULES, check_request
from autopar.graph.change_dtype import with_dtype
from autopar.graph.ir import Graph
from autopar.graph.split_into_blocks import hoist_light_ops, split_into_blocks
from autopar.graph.trace import trace
from autopar.runtime.agreement import RENDEZVOUS_TIMEOUT_S, check_same_collectives, check_world
from autopar.runtime.deferred_initialisation import DeferredInitialisation
from autopar.runtime.lower.build_programs import build_programs
from autopar.runtime.lower.rank_mesh import RankMesh, make_meshes
from autopar.runtime.lower.stage_function import RANDOM_KEY, StageFunction
from autopar.runtime.lower.stage_program import StageProgram
from autopar.runtime.pipeline_step import PipelineStep
from autopar.runtime.rank_device import choose_device
from autopar.runtime.stage_runner import ExecutionMode, StageRunner
from autopar.runtime.stored_parameters import OptimizerFactory, StageParameters
from autopar.runtime.tied_parameters import connect_tied_parameters
from autopar.runtime.trainer import Trainer
from autopar.runtime.training_state import initial_state
from autopar.workload.model_file import load_workload
from autopar.workload.workload import Workload


def apply(
    plan: Plan,
    model: nn.Module,
    *,
    optimizer: OptimizerFactory | None = None,
    workload: Workload | None = None,
    clip_norm: float | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Trainer:
    """This rank's trainer of ``plan``. Collective: all ranks of the world call it, and there are as many as the plan has
    GPUs.

    ``model`` has the initial weights, the same on every rank; each rank stores only its shards of them. A model on the
    meta device is initialised tensor by tensor, by its file's ``init_weights``, as Hugging Face does or by its modules'
    ``reset_parameters``. ``optimizer`` makes a torch optimizer that works element by element (AdamW, SGD) from a list of
    fp32 parameters; without one ``Trainer.step`` is refused. ``workload`` is needed for a model built in Python,
    otherwise the plan names the model file. ``clip_norm`` is the largest norm of all gradients, None does not clip;
    ``seed`` is that of dropout and of deferred initial weights; ``device`` is this rank's own: by default the
    current GPU, or where that is not set the GPU with the rank's number on its node, or the CPU where there is none. A
    GPU becomes the current one.

    Raises UsageError (wrong arguments, another world size, or ranks with different plans), PlanFileError (the plan is
    for another model), AutoparError (a rank does not come).

    >>> trainer = apply(plan, model, optimizer=lambda parameters: torch.optim.AdamW(parameters))  # doctest: +SKIP
    >>> loss = trainer.step({"tokens": tokens, "labels": labels})  # doctest: +SKIP
    """
    ARGUMENT_RULES["make_optimizer"].check("optimizer", optimizer)
    check_request(plan=plan, model=model, clip_norm=clip_norm, seed=seed)
    if workload is not None:
        check_request(workload=workload)
    try:
        torch.device(device or "cpu")
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"device must be one of torch's, such as 'cuda:0': {str(error).splitlines()[0]}") from None
    return build_trainer(
        plan, model, optimizer=optimizer, workload=workload, clip_norm=clip_norm, seed=seed, device=device
    )


def build_trainer(
    plan: Plan,
    model: nn.Module,
    *,
    optimizer: OptimizerFactory | None = None,
    workload: Workload | None = None,
    mode: ExecutionMode = "lowered",
    clip_norm: float | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: str | None = None,
    allow_other_sizes: bool = False,
    rendezvous_timeout_s: float = RENDEZVOUS_TIMEOUT_S,
) -> Trainer:
    """``apply``, with what checks of plans need in addition. ``mode`` "reference" runs ops one by one; ``dtype``
    ("float64") replaces the plan's; ``allow_other_sizes`` takes a model of the plan's structure in other sizes;
    ``rendezvous_timeout_s`` is how far apart ranks may arrive."""
    rank_device = choose_device(device)  # before the first collective, which may run on it
    check_world(plan, rendezvous_timeout_s)
    workload = workload or load_planned_workload(plan)
    graph, constants = _trace_planned_model(plan, workload, dtype=dtype, allow_other_sizes=allow_other_sizes)
    programs, transfers = build_programs(plan, graph, split_into_blocks(graph))
    rank = dist.get_rank()
    meshes = make_meshes(plan.stages, rank)
    dtypes = {value.id: getattr(torch, value.dtype) for value in graph.values} | {RANDOM_KEY: torch.int64}
    builder = _StageBuilder(
        plan=plan,
        graph=graph,
        constants=constants,
        initial=_InitialTensors(model, graph, workload, seed),
        dtypes=dtypes,
        device=rank_device,
        mode=mode,
    )
    stages = {
        program.index: builder.build(program, mesh)
        for program, mesh in zip(programs, meshes, strict=True)
        if mesh.contains(rank)
    }
    check_same_collectives(stages)
    stored = {index: stage.parameters for index, stage in stages.items()}
    state = initial_state(
        stored,
        programs=programs,
        graph=graph,
        saved_names=frozenset(model.state_dict()),
        make_optimizer=optimizer,
        dtype=plan.execution.dtype,
    )
    pipeline = PipelineStep(
        plan=plan,
        transfers=transfers,
        meshes=meshes,
        stages=stages,
        loss_dtype=dtypes[graph.outputs[0]],
        device=rank_device,
    )
    return Trainer(
        plan=plan,
        graph=graph,
        state=state,
        pipeline=pipeline,
        tied_parameters=connect_tied_parameters(stored, programs, meshes, rank=rank, device=rank_device),
        input_names=tuple(workload.inputs(1)),
        clip_norm=clip_norm,
        seed=seed,
        device=rank_device,
    )


def _trace_planned_model(
    plan: Plan, workload: Workload, *, dtype: str | None, allow_other_sizes: bool
) -> tuple[Graph, Mapping[str, Tensor]]:
    """The graph of the plan's model, in ``dtype`` where that is given, and its constants by name; PlanFileError where
    it is not the model that was planned."""
    traced = trace(workload, dtype=LONG_NAMES[plan.execution.dtype])
    graph = hoist_light_ops(traced.graph)
    if not allow_other_sizes and graph.fingerprint != plan.model.graph_fingerprint:
        raise PlanFileError(
            f"the plan is for another model (graph fingerprint {plan.model.graph_fingerprint[:12]}, this model's is "
            f"{graph.fingerprint[:12]}); plan again"
        )
    return (with_dtype(graph, dtype) if dtype is not None else graph), traced.constants


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _StageBuilder:
    """Builds stages of a plan on this rank. ``constants`` are the graph's, by name; ``dtypes`` by value."""

    plan: Plan
    graph: Graph
    constants: Mapping[str, Tensor]
    initial: "_InitialTensors"
    dtypes: Mapping[int, torch.dtype]
    device: torch.device
    mode: ExecutionMode

    def build(self, program: StageProgram, mesh: RankMesh) -> StageRunner:
        """The runner of one stage, with this rank's part of its parameters."""
        constants = {
            value: self.constants[self.graph.values[value].name].to(self.device, self.dtypes[value])
            for value in program.constants
        }
        sums_in_weight_dtype = self.plan.execution.grads == "same"
        function = StageFunction(
            program, self.graph, mesh, constants, self.device, reduces_in_fp32=not sums_in_weight_dtype
        )
        parameters = StageParameters(
            program,
            mesh,
            names=self.initial.names,
            full_tensor_of=self.initial.full_tensor,
            dtypes=self.dtypes,
            device=self.device,
            sums_in_weight_dtype=sums_in_weight_dtype,
        )
        return StageRunner(function, parameters, self.dtypes, self.mode)


class _InitialTensors:
    """The model's initial parameters and buffers, by the graph's values. ``names`` are a value's names in the model."""

    def __init__(self, model: nn.Module, graph: Graph, workload: Workload, seed: int) -> None:
        self.names = {
            value.id: value.qualified_names for value in graph.values if value.kind in ("parameter", "buffer")
        }
        self._tensors: dict[str, Tensor] = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        is_deferred = any(tensor.is_meta for tensor in self._tensors.values())
        self._deferred = DeferredInitialisation(model, workload, seed) if is_deferred else None

    def full_tensor(self, value: int) -> Tensor:
        """The full initial tensor of a parameter or buffer; UsageError where the model has none of its names."""
        name = next((name for name in self.names[value] if name in self._tensors), None)
        if name is None:
            raise UsageError(f"the plan places parameter {self.names[value][0]}, which the model does not have")
        if self._tensors[name].is_meta:
            assert self._deferred is not None
            return self._deferred.materialise(name)
        return self._tensors[name].detach()


def load_planned_workload(plan: Plan) -> Workload:
    """The workload of a plan, from the model file that it names. UsageError where it names none, PlanFileError where
    the file does not exist or has changed."""
    if plan.model.path is None:
        raise UsageError("the plan is for a model built in Python; pass workload=... to apply()")
    path = Path(plan.model.path)
    if not path.is_file():
        raise PlanFileError(f"the plan's model file {path} does not exist; pass workload=... to apply()")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if plan.model.source_hash not in (None, digest):
        raise PlanFileError(f"{path} changed since the plan was made; plan again")
    settings: dict[str, Any] = dict(plan.model.settings)
    return load_workload(path, **settings)
