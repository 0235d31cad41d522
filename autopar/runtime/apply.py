"""From a plan and a model to a trainer: the way in."""

import hashlib
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
from autopar.graph.split_into_blocks import hoist_light_ops, split_into_blocks
from autopar.graph.trace import trace
from autopar.runtime.agreement import RENDEZVOUS_TIMEOUT_S, check_same_collectives, check_world
from autopar.runtime.deferred_initialisation import DeferredInitialisation
from autopar.runtime.lower.build_programs import build_programs
from autopar.runtime.lower.rank_mesh import make_meshes
from autopar.runtime.lower.stage_function import RANDOM_KEY, StageFunction
from autopar.runtime.stage_runner import ExecutionMode, StageRunner
from autopar.runtime.stored_parameters import OptimizerFactory, StageParameters, connect_tied_parameters
from autopar.runtime.trainer import Trainer
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
    ``seed`` is that of dropout and of deferred initial weights; ``device`` is this rank's own, by default its current
    GPU, or the CPU where there is none.

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
    twin: bool = False,
    patience_s: float = RENDEZVOUS_TIMEOUT_S,
) -> Trainer:
    """``apply``, with what checks of plans need besides: ``dtype`` ("float64") computes in another dtype than the plan's;
    ``twin`` takes a model of the plan's structure in other sizes; ``mode`` "reference" runs ops one by one;
    ``patience_s`` is how far apart ranks may arrive."""
    check_world(plan, patience_s)
    workload = workload or load_planned_workload(plan)
    where = torch.device(device) if device is not None else _default_device()
    traced = trace(workload, dtype=LONG_NAMES[plan.execution.dtype])
    graph = hoist_light_ops(traced.graph)
    if not twin and graph.fingerprint != plan.model.graph_fingerprint:
        raise PlanFileError(
            f"the plan is for another model: fingerprint {plan.model.graph_fingerprint[:12]}, this one has "
            f"{graph.fingerprint[:12]}; plan again"
        )
    graph = with_dtype(graph, dtype) if dtype is not None else graph
    programs, crossings = build_programs(plan, graph, split_into_blocks(graph))
    rank = dist.get_rank()
    meshes = make_meshes(plan.stages, rank)
    tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    names = {value.id: value.qualified_names for value in graph.values if value.kind in ("parameter", "buffer")}
    dtypes = {value.id: getattr(torch, value.dtype) for value in graph.values} | {RANDOM_KEY: torch.int64}

    deferred = None
    if any(tensor.is_meta for tensor in tensors.values()):
        deferred = DeferredInitialisation(model, workload, seed)

    def source(value: int) -> Tensor:
        return _initial_tensor(tensors, names[value], deferred)

    stages, stored = {}, {}
    for program, mesh in zip(programs, meshes, strict=True):
        if not mesh.contains(rank):
            continue
        constants = {
            value: traced.constants[graph.values[value].name].to(where, dtypes[value]) for value in program.constants
        }
        same = plan.execution.grads == "same"
        function = StageFunction(program, graph, mesh, constants, where, reduces_in_fp32=not same)
        stored[program.index] = StageParameters(program, mesh, names, source, dtypes, where, sums_in_weight_dtype=same)
        stages[program.index] = StageRunner(function, stored[program.index], dtypes, mode)
    check_same_collectives(stages)
    return Trainer(
        plan=plan,
        graph=graph,
        programs=programs,
        transfers=crossings,
        meshes=meshes,
        stages=stages,
        tied_parameters=connect_tied_parameters(stored, programs, meshes, rank),
        make_optimizer=optimizer,
        input_names=tuple(workload.inputs(1)),
        persistent_names=frozenset(model.state_dict()),
        clip_norm=clip_norm,
        seed=seed,
        device=where,
    )


def load_planned_workload(plan: Plan) -> Workload:
    """The workload of a plan, from the model file that it names; PlanFileError where that is gone or changed."""
    if plan.model.path is None:
        raise UsageError("the plan is for a model built in Python; give apply(..., workload=...)")
    path = Path(plan.model.path)
    if not path.is_file():
        raise PlanFileError(f"the plan is for {path}, which is not there; give apply(..., workload=...)")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if plan.model.source_hash not in (None, digest):
        raise PlanFileError(f"{path} changed since the plan was made; plan again")
    settings: dict[str, Any] = dict(plan.model.settings)
    return load_workload(path, **settings)


def _default_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _initial_tensor(
    tensors: dict[str, Tensor], names: tuple[str, ...], deferred: DeferredInitialisation | None
) -> Tensor:
    """The initial value of the tensor of these names."""
    found = next((name for name in names if name in tensors), None)
    if found is None:
        raise UsageError(f"the model has no parameter {names[0]}, which the plan places")
    if tensors[found].is_meta:
        assert deferred is not None
        return deferred.materialise(found)
    return tensors[found].detach()
