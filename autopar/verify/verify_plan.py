"""Runs a plan, shrunk to the ranks there are, on CPU processes and compares it with one process: loss, gradients, and
parameters after optimizer steps.

All in fp64, where an error shows that is not rounding. Tolerances are relative to a tensor's norm. One more step, in
the plan's own dtype, counts the collectives that run, which must be those that the plan lists.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from autopar.core.dtypes import LONG_NAMES
from autopar.core.errors import AutoparError, CheckError
from autopar.core.plan import Collective, Plan
from autopar.graph.ir import Graph
from autopar.graph.split_into_blocks import hoist_light_ops
from autopar.graph.trace import trace
from autopar.runtime.apply import build_trainer
from autopar.runtime.count_collectives import CollectiveKey, collective_differences, counts_of_stages
from autopar.runtime.stored_parameters import select_indices, stored_indices
from autopar.runtime.trainer import Trainer
from autopar.verify import single_process
from autopar.verify.shrink import shrink_plan
from autopar.workload.model_file import load_workload
from autopar.workload.user_code import guard_user_code
from autopar.workload.workload import Workload

GRADIENT_TOLERANCE = 1e-9
STEP_TOLERANCE = 1e-9
SMALL_NORM = 1e-3  # errors of tensors below this norm are relative to it
NUM_STEPS = 3
RANK_TIMEOUT_S = 1800
"""How long a rank waits for another, such as for the first, which also runs the model in one process."""
GRADIENTS_FILE, PARAMETERS_FILE = "gradients.pt", "parameters.pt"


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What was compared. ``changes`` says how the plan was shrunk, one line each. ``gradients`` and ``parameters`` map
    names to relative errors, the latter after ``NUM_STEPS`` steps. ``collectives`` are those that ran in a step, per
    stage on its first rank; ``collective_differences`` where they are not the plan's; ``not_compared_because`` why they
    were not compared with a list, None where they were."""

    num_ranks: int
    changes: tuple[str, ...]
    loss: float
    expected_loss: float
    gradients: Mapping[str, float]
    parameters: Mapping[str, float]
    collectives: Mapping[CollectiveKey, Mapping[int, int]]
    collective_differences: tuple[str, ...] = ()
    not_compared_because: str | None = None

    @property
    def loss_error(self) -> float:
        """The relative error of the first step's loss."""
        return abs(self.loss - self.expected_loss) / max(abs(self.expected_loss), SMALL_NORM)

    @property
    def passed(self) -> bool:
        """Whether all errors are within tolerance and the collectives, where compared, those of the plan."""
        return (
            self.loss_error <= GRADIENT_TOLERANCE
            and all(error <= GRADIENT_TOLERANCE for error in self.gradients.values())
            and all(error <= STEP_TOLERANCE for error in self.parameters.values())
            and not self.collective_differences
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _RankTask:
    """What every rank's process is given: the plan to run, as JSON, and the model (file and settings) to run it on.
    ``has_other_sizes``: the settings are not those of the plan. Results go to ``folder``."""

    plan_json: bytes
    model: str
    settings: dict[str, Any]
    has_other_sizes: bool
    folder: Path
    seed: int


def verify_plan(
    plan: Plan,
    *,
    model: str,
    settings: Mapping[str, Any],
    max_ranks: int,
    seed: int = 0,
    list_collectives: Callable[[Plan], tuple[Collective, ...]] | None = None,
) -> VerifyReport:
    """Compare a plan with one process. ``settings`` may give the model other sizes of the same structure.
    ``list_collectives`` lists the collectives of a shrunk plan, whose sizes are not the plan's.

    Raises UsageError and PlanFileError as ``apply`` does, CheckError where a process failed."""
    shrunk, changes = shrink_plan(plan, max_ranks, lambda: _trace_model(plan, model, settings))
    changed = {name: value for name, value in settings.items() if plan.model.settings.get(name) != value}
    changes += tuple(
        f"setting {name}: {plan.model.settings.get(name, 'default')} -> {value}" for name, value in changed.items()
    )
    with tempfile.TemporaryDirectory() as folder:
        task = _RankTask(
            plan_json=msgspec.json.encode(shrunk),
            model=model,
            settings=dict(settings),
            has_other_sizes=bool(changed),
            folder=Path(folder),
            seed=seed,
        )
        try:
            spawn(_run_rank, args=(task,), nprocs=shrunk.gpus, join=True)
        except (ProcessRaisedException, ProcessExitedException) as error:
            raise _worker_error(task.folder, error) from None
        results = [torch.load(task.folder / f"rank{rank}.pt") for rank in range(shrunk.gpus)]
    ran = counts_of_stages([result["collectives"] for result in results], shrunk)
    collectives, not_compared = _expected_collectives(plan, shrunk, bool(changes), list_collectives)
    return VerifyReport(
        num_ranks=shrunk.gpus,
        changes=changes,
        loss=results[0]["loss"],
        expected_loss=results[0]["expected"],
        gradients=_relative_errors([result["gradients"] for result in results]),
        parameters=_relative_errors([result["parameters"] for result in results]),
        collectives=ran,
        collective_differences=() if not_compared is not None else collective_differences(ran, shrunk, collectives),
        not_compared_because=not_compared,
    )


def _trace_model(plan: Plan, model: str, settings: Mapping[str, Any]) -> Graph:
    """The graph of the plan's model, whose ops are those of the plan."""
    workload = load_workload(model, **settings)
    return hoist_light_ops(trace(workload, dtype=LONG_NAMES[plan.execution.dtype]).graph)


def _expected_collectives(
    plan: Plan, shrunk: Plan, changed: bool, list_collectives: Callable[[Plan], tuple[Collective, ...]] | None
) -> tuple[tuple[Collective, ...], str | None]:
    """The list to compare what ran with, and None; or nothing, and why there is no list."""
    not_judged = next((note for note in plan.notes if note.startswith("not judged")), None)
    if not changed:
        return plan.estimate.collectives, not_judged
    if list_collectives is None:
        return (), "the shrunk plan communicates other sizes than the plan"
    try:
        return list_collectives(shrunk), None
    except AutoparError as error:
        return (), str(error)


def _worker_error(folder: Path, error: Exception) -> AutoparError:
    """The first error of a rank that is meant for a user, else the last line of what the processes said."""
    for path in sorted(folder.glob("error*.txt")):
        return CheckError(path.read_text())
    return CheckError(f"a rank of verify ended with an error: {str(error).strip().splitlines()[-1]}")


def _relative_errors(squares_by_rank: Sequence[Mapping[str, tuple[float, float]]]) -> dict[str, float]:
    """Relative errors by name, from each rank's (squared error, squared norm) of its parts."""
    sums: dict[str, tuple[float, float]] = {}
    for squares in squares_by_rank:
        for name, (error, norm) in squares.items():
            error_sum, norm_sum = sums.get(name, (0.0, 0.0))
            sums[name] = (error_sum + error, norm_sum + norm)
    return {name: error**0.5 / max(norm**0.5, SMALL_NORM) for name, (error, norm) in sums.items()}


def _run_rank(rank: int, task: _RankTask) -> None:
    """One rank's process: runs its part of the plan; the first also runs the model in one process."""
    torch.set_num_threads(1)
    plan = msgspec.json.decode(task.plan_json, type=Plan)
    dist.init_process_group(
        "gloo",
        f"file://{task.folder / 'store'}",
        rank=rank,
        world_size=plan.gpus,
        timeout=timedelta(seconds=RANK_TIMEOUT_S),
    )
    try:
        with guard_user_code("the model raised", reraised=(Exception,)):
            torch.save(_compare_rank(plan, task), task.folder / f"rank{rank}.pt")
    except AutoparError as error:
        (task.folder / f"error{rank}.txt").write_text(str(error))
        raise
    finally:
        dist.destroy_process_group()


def _compare_rank(plan: Plan, task: _RankTask) -> dict[str, Any]:
    """What one rank found: ``loss`` and ``expected`` loss, squared errors and norms of its ``gradients`` and
    ``parameters`` by name, and the ``collectives`` that ran."""
    workload = load_workload(task.model, **task.settings)
    make_optimizer = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[plan.execution.optimizer]

    def trainer_of(model: nn.Module, dtype: str | None) -> Trainer:
        return build_trainer(
            plan,
            model,
            optimizer=lambda masters: make_optimizer(masters, lr=1e-3),
            workload=workload,
            dtype=dtype,
            allow_other_sizes=task.has_other_sizes,
        )

    model = single_process.build_real_model(workload, task.seed)
    trainer = trainer_of(model, "float64")
    batches = [
        single_process.random_batch(workload, trainer.graph, plan.global_batch, task.seed + step)
        for step in range(NUM_STEPS)
    ]
    if dist.get_rank() == 0:
        optimizer = make_optimizer(model.parameters(), lr=1e-3)
        _run_single_process(model, optimizer, workload=workload, trainer=trainer, batches=batches, folder=task.folder)
    del model
    dist.barrier()
    result: dict[str, Any] = {"gradients": {}, "parameters": {}}
    for step, batch in enumerate(batches):
        loss = trainer.forward_backward(batch)
        if step == 0:
            expected = torch.load(task.folder / GRADIENTS_FILE, mmap=True)
            result["loss"], result["expected"] = float(loss), expected["loss"]
            for name, actual, wanted in _tensor_pairs(trainer, expected["gradients"], gradient=True):
                result["gradients"][name] = _squared_error_and_norm(actual, wanted)
        trainer.update()
    parameters = torch.load(task.folder / PARAMETERS_FILE, mmap=True)
    for name, actual, wanted in _tensor_pairs(trainer, parameters, gradient=False):
        result["parameters"][name] = _squared_error_and_norm(actual, wanted)
    in_planned_dtype = trainer_of(single_process.build_real_model(workload, task.seed), None)
    result["collectives"] = in_planned_dtype.count_collectives(batches[0])
    return result


def _run_single_process(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    workload: Workload,
    trainer: Trainer,
    batches: Sequence[dict[str, Tensor]],
    folder: Path,
) -> None:
    """All steps of the model in one process. The first loss and gradients and the last parameters go to files in
    ``folder``, so that they are computed once and, mapped by all ranks, are in memory once."""
    for step, batch in enumerate(batches):
        loss = single_process.accumulate_gradients(
            model,
            batch,
            workload=workload,
            graph=trainer.graph,
            num_microbatches=trainer.plan.microbatches,
            seed=trainer.seed,
            step=step,
        )
        parameters = dict(model.named_parameters(remove_duplicate=False))
        if step == 0:
            gradients = {name: parameter.grad for name, parameter in parameters.items()}
            torch.save({"loss": float(loss), "gradients": gradients}, folder / GRADIENTS_FILE)
        optimizer.step()
        optimizer.zero_grad()
    torch.save({name: parameter.detach() for name, parameter in parameters.items()}, folder / PARAMETERS_FILE)


def _tensor_pairs(
    trainer: Trainer, full_tensors: Mapping[str, Tensor | None], *, gradient: bool
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, this rank's part, the same part in one process) of each parameter, or its ``gradient``, of which this
    rank is the first replica. ``full_tensors`` are one process's; None is a gradient of zeros."""
    for index, stage in trainer.stages.items():
        mesh = stage.parameters.mesh
        for parameter in stage.parameters.trained():
            if not parameter.counts_in_norm:
                continue
            name = parameter.names[0]
            full = full_tensors[name]
            actual = parameter.master.grad if gradient else parameter.master
            assert actual is not None
            if full is None:
                full = torch.zeros(parameter.sharding.shape, dtype=actual.dtype)
            indices = stored_indices(parameter.sharding, mesh, mesh.coordinate, zero_sharded=True)
            yield f"{name} (stage {index})", actual.detach(), select_indices(full.detach(), indices)


def _squared_error_and_norm(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    return float((actual - expected).square().sum()), float(expected.square().sum())
