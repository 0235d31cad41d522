"""Runs a plan, or its shrunk twin, on CPU processes and compares it with one process: loss, gradients, optimizer steps.

All in fp64: an error that is not rounding shows, and rounding does not. Tolerances are relative to a tensor's norm. One
more step in the plan's own dtype counts the collectives that run, which must be those that the plan lists.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from autopar.core.errors import AutoparError, CheckError
from autopar.core.plan import Collective, Plan
from autopar.runtime.apply import build_trainer
from autopar.runtime.count_collectives import CollectiveKey, collective_differences, counts_of_stages
from autopar.runtime.stored_parameters import select_indices, stored_indices
from autopar.runtime.trainer import Trainer
from autopar.verify import single_process as oracle
from autopar.verify.shrink import shrink_plan
from autopar.workload.model_file import load_workload
from autopar.workload.user_code import guard_user_code
from autopar.workload.workload import Workload

GRADIENT_TOLERANCE = 1e-9
STEP_TOLERANCE = 1e-9
SMALL_NORM = 1e-3  # tensors below this norm are held to the tolerance of one with it
NUM_STEPS = 3
RANK_TIMEOUT_S = 1800
"""How long a rank waits for another, such as the first while it runs the model by itself."""
GRADIENTS_FILE, PARAMETERS_FILE = "gradients.pt", "parameters.pt"


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What was compared. ``gradients`` and ``parameters`` map names to relative errors, those after ``NUM_STEPS``
    steps; ``collectives`` are those that ran in a step, per stage on its first rank, and ``unlisted`` says where they
    are not the plan's; ``uncompared`` says why they were not held against a list, None where they were."""

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
        return abs(self.loss - self.expected_loss) / max(abs(self.expected_loss), SMALL_NORM)

    @property
    def passed(self) -> bool:
        return (
            self.loss_error <= GRADIENT_TOLERANCE
            and all(error <= GRADIENT_TOLERANCE for error in self.gradients.values())
            and all(error <= STEP_TOLERANCE for error in self.parameters.values())
            and not self.collective_differences
        )


def verify_plan(
    plan: Plan,
    *,
    model: str,
    settings: Mapping[str, Any],
    max_ranks: int,
    seed: int = 0,
    list_collectives: Callable[[Plan], tuple[Collective, ...]] | None = None,
) -> VerifyReport:
    """Compare; ``settings`` may give the model other sizes of the same structure. ``relist`` lists the collectives of a
    twin, whose bytes are not the plan's. Raises UsageError and PlanFileError as ``apply`` does, CheckError where a
    process failed."""
    twin, changes = shrink_plan(plan, max_ranks)
    other = {name: value for name, value in settings.items() if plan.model.settings.get(name) != value}
    changes += tuple(f"setting {name}: {plan.model.settings.get(name, 'default')} -> {other[name]}" for name in other)
    with tempfile.TemporaryDirectory() as folder:
        work = (msgspec.json.encode(twin), model, dict(settings), bool(other), folder, seed)
        try:
            spawn(_run_rank, args=work, nprocs=twin.gpus, join=True)
        except (ProcessRaisedException, ProcessExitedException) as error:
            raise _worker_error(Path(folder), error) from None
        found = [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(twin.gpus)]
    ran = counts_of_stages([part["collectives"] for part in found], twin)
    collectives, uncompared = _expected_collectives(plan, twin, bool(changes), list_collectives)
    return VerifyReport(
        num_ranks=twin.gpus,
        changes=changes,
        loss=found[0]["loss"],
        expected_loss=found[0]["expected"],
        gradients=_relative_errors([part["gradients"] for part in found]),
        parameters=_relative_errors([part["parameters"] for part in found]),
        collectives=ran,
        collective_differences=() if uncompared is not None else collective_differences(ran, twin, collectives),
        not_compared_because=uncompared,
    )


def _expected_collectives(
    plan: Plan, shrunk: Plan, changed: bool, list_collectives: Callable[[Plan], tuple[Collective, ...]] | None
) -> tuple[tuple[Collective, ...], str | None]:
    """The list to hold what ran against, or why there is none."""
    unjudged = next((note for note in plan.notes if note.startswith("not judged")), None)
    if not changed:
        return plan.estimate.collectives, unjudged
    if list_collectives is None:
        return (), "a twin moves other bytes than the plan"
    try:
        return list_collectives(shrunk), None
    except AutoparError as error:
        return (), str(error)


def _worker_error(folder: Path, error: Exception) -> AutoparError:
    """The first error of a worker that is a user's, else what the processes said."""
    for path in sorted(folder.glob("error*.txt")):
        return CheckError(path.read_text())
    return CheckError(f"a rank of the check failed: {str(error).strip().splitlines()[-1]}")


def _relative_errors(found: list[dict[str, tuple[float, float]]]) -> dict[str, float]:
    sums: dict[str, tuple[float, float]] = {}
    for part in found:
        for name, (error, norm) in part.items():
            known = sums.get(name, (0.0, 0.0))
            sums[name] = (known[0] + error, known[1] + norm)
    return {name: error**0.5 / max(norm**0.5, SMALL_NORM) for name, (error, norm) in sums.items()}


def _run_rank(
    rank: int, plan_json: bytes, model: str, settings: dict[str, Any], is_shrunk: bool, folder: str, seed: int
) -> None:
    """One rank: runs its part; the first also runs all of the model by itself."""
    torch.set_num_threads(1)
    plan = msgspec.json.decode(plan_json, type=Plan)
    where = f"file://{Path(folder) / 'store'}"
    dist.init_process_group("gloo", where, rank=rank, world_size=plan.gpus, timeout=timedelta(seconds=RANK_TIMEOUT_S))
    try:
        with guard_user_code("the model raised", reraised=(Exception,)):
            torch.save(
                _compare_rank(plan, model, settings, is_shrunk, seed, Path(folder)), Path(folder) / f"rank{rank}.pt"
            )
    except AutoparError as error:
        (Path(folder) / f"error{rank}.txt").write_text(str(error))
        raise
    finally:
        dist.destroy_process_group()


def _compare_rank(
    plan: Plan, path: str, settings: dict[str, Any], is_shrunk: bool, seed: int, folder: Path
) -> dict[str, Any]:
    workload = load_workload(path, **settings)
    make = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[plan.execution.optimizer]
    model = oracle.build_real_model(workload, seed)
    trainer = build_trainer(
        plan, model, optimizer=lambda given: make(given, lr=1e-3), workload=workload, dtype="float64", twin=is_shrunk
    )
    batches = [
        oracle.random_batch(workload, trainer.graph, plan.global_batch, seed + step) for step in range(NUM_STEPS)
    ]
    if dist.get_rank() == 0:
        _run_single_process(
            model, make(model.parameters(), lr=1e-3), workload, trainer, plan.microbatches, batches, folder
        )
    del model
    dist.barrier()
    found: dict[str, Any] = {"gradients": {}, "parameters": {}}
    for step, batch in enumerate(batches):
        loss = trainer.forward_backward(batch)
        if step == 0:
            wanted = torch.load(folder / GRADIENTS_FILE, mmap=True)
            found["loss"], found["expected"] = float(loss), wanted["loss"]
            for name, got, other in _tensor_pairs(trainer, wanted["gradients"], gradient=True):
                found["gradients"][name] = _squared_error_and_norm(got, other)
        trainer.update()
    for name, got, other in _tensor_pairs(trainer, torch.load(folder / PARAMETERS_FILE, mmap=True), gradient=False):
        found["parameters"][name] = _squared_error_and_norm(got, other)
    model = oracle.build_real_model(workload, seed)
    planned = build_trainer(
        plan, model, optimizer=lambda given: make(given, lr=1e-3), workload=workload, twin=is_shrunk
    )
    found["collectives"] = planned.count_collectives(
        oracle.random_batch(workload, trainer.graph, plan.global_batch, seed)
    )
    return found


def _run_single_process(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    workload: Workload,
    trainer: Trainer,
    num_microbatches: int,
    batches: Sequence[dict[str, Tensor]],
    folder: Path,
) -> None:
    """All steps of the model in one process; the first loss and gradients and the last parameters are left in
    ``folder``, so that they are made once and lie in memory once."""
    for step, batch in enumerate(batches):
        loss = oracle.accumulate_gradients(model, workload, batch, num_microbatches, trainer.graph, trainer.seed, step)
        named = dict(model.named_parameters(remove_duplicate=False))
        if step == 0:
            gradients = {name: parameter.grad for name, parameter in named.items()}
            torch.save({"loss": float(loss), "gradients": gradients}, folder / GRADIENTS_FILE)
        optimizer.step()
        optimizer.zero_grad()
    torch.save({name: parameter.detach() for name, parameter in named.items()}, folder / PARAMETERS_FILE)


def _tensor_pairs(trainer: Trainer, full: Mapping[str, Tensor | None], *, gradient: bool) -> Any:
    """(name, this rank's part, the same part of the one process's) of what this rank answers for."""
    for index, stage in trainer.stages.items():
        mesh = trainer.meshes[index]
        for parameter in stage.parameters.trained():
            if parameter.counts_in_norm:
                wanted = full[parameter.names[0]]
                held = stored_indices(parameter.sharding, mesh, mesh.coordinate, zero_sharded=True)
                got = parameter.master.grad if gradient else parameter.master
                assert got is not None
                other = torch.zeros(parameter.sharding.shape, dtype=got.dtype) if wanted is None else wanted.detach()
                yield f"{parameter.names[0]} (stage {index})", got.detach(), select_indices(other, held)


def _squared_error_and_norm(got: Tensor, wanted: Tensor) -> tuple[float, float]:
    return float((got - wanted).square().sum()), float(wanted.square().sum())
