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
from autopar.runtime.count_collectives import Key, differences, of_all_ranks
from autopar.runtime.stored_parameters import pick, rest_held
from autopar.runtime.trainer import Trainer
from autopar.verify import single_process as oracle
from autopar.verify.shrink import shrunk
from autopar.workload.model_file import load_workload
from autopar.workload.user_code import user_code
from autopar.workload.workload import Workload

GRADIENT_TOLERANCE = 1e-9
STEP_TOLERANCE = 1e-9
SMALL_NORM = 1e-3  # tensors below this norm are held to the tolerance of one with it
NUM_STEPS = 3
PATIENCE_S = 1800
"""How long a rank waits for another, such as the first while it runs the model by itself."""
GRADIENTS, PARAMETERS = "gradients.pt", "parameters.pt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was compared. ``gradients`` and ``parameters`` map names to relative errors, those after ``NUM_STEPS``
    steps; ``collectives`` are those that ran in a step, per stage on its first rank, and ``unlisted`` says where they
    are not the plan's; ``uncompared`` says why they were not held against a list, None where they were."""

    ranks: int
    changes: tuple[str, ...]
    loss: float
    expected_loss: float
    gradients: Mapping[str, float]
    parameters: Mapping[str, float]
    collectives: Mapping[Key, Mapping[int, int]]
    unlisted: tuple[str, ...] = ()
    uncompared: str | None = None

    @property
    def loss_error(self) -> float:
        return abs(self.loss - self.expected_loss) / max(abs(self.expected_loss), SMALL_NORM)

    @property
    def passed(self) -> bool:
        return (
            self.loss_error <= GRADIENT_TOLERANCE
            and all(error <= GRADIENT_TOLERANCE for error in self.gradients.values())
            and all(error <= STEP_TOLERANCE for error in self.parameters.values())
            and not self.unlisted
        )


def verify(
    plan: Plan,
    *,
    model: str,
    settings: Mapping[str, Any],
    ranks: int,
    seed: int = 0,
    relist: Callable[[Plan], tuple[Collective, ...]] | None = None,
) -> Report:
    """Compare; ``settings`` may give the model other sizes of the same structure. ``relist`` lists the collectives of a
    twin, whose bytes are not the plan's. Raises UsageError and PlanFileError as ``apply`` does, CheckError where a
    process failed."""
    twin, changes = shrunk(plan, ranks)
    other = {name: value for name, value in settings.items() if plan.model.settings.get(name) != value}
    changes += tuple(f"setting {name}: {plan.model.settings.get(name, 'default')} -> {other[name]}" for name in other)
    with tempfile.TemporaryDirectory() as folder:
        work = (msgspec.json.encode(twin), model, dict(settings), bool(other), folder, seed)
        try:
            spawn(_work, args=work, nprocs=twin.gpus, join=True)
        except (ProcessRaisedException, ProcessExitedException) as error:
            raise _failure(Path(folder), error) from None
        found = [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(twin.gpus)]
    ran = of_all_ranks([part["collectives"] for part in found], twin)
    collectives, uncompared = _listed(plan, twin, bool(changes), relist)
    return Report(
        ranks=twin.gpus,
        changes=changes,
        loss=found[0]["loss"],
        expected_loss=found[0]["expected"],
        gradients=_errors([part["gradients"] for part in found]),
        parameters=_errors([part["parameters"] for part in found]),
        collectives=ran,
        unlisted=() if uncompared is not None else differences(ran, twin, collectives),
        uncompared=uncompared,
    )


def _listed(
    plan: Plan, twin: Plan, changed: bool, relist: Callable[[Plan], tuple[Collective, ...]] | None
) -> tuple[tuple[Collective, ...], str | None]:
    """The list to hold what ran against, or why there is none."""
    unjudged = next((note for note in plan.notes if note.startswith("not judged")), None)
    if not changed:
        return plan.estimate.collectives, unjudged
    if relist is None:
        return (), "a twin moves other bytes than the plan"
    try:
        return relist(twin), None
    except AutoparError as error:
        return (), str(error)


def _failure(folder: Path, error: Exception) -> AutoparError:
    """The first error of a worker that is a user's, else what the processes said."""
    for path in sorted(folder.glob("error*.txt")):
        return CheckError(path.read_text())
    return CheckError(f"a rank of the check failed: {str(error).strip().splitlines()[-1]}")


def _errors(found: list[dict[str, tuple[float, float]]]) -> dict[str, float]:
    sums: dict[str, tuple[float, float]] = {}
    for part in found:
        for name, (error, norm) in part.items():
            known = sums.get(name, (0.0, 0.0))
            sums[name] = (known[0] + error, known[1] + norm)
    return {name: error**0.5 / max(norm**0.5, SMALL_NORM) for name, (error, norm) in sums.items()}


def _work(
    rank: int, plan_json: bytes, model: str, settings: dict[str, Any], twin: bool, folder: str, seed: int
) -> None:
    """One rank: runs its part; the first also runs all of the model by itself."""
    torch.set_num_threads(1)
    plan = msgspec.json.decode(plan_json, type=Plan)
    where = f"file://{Path(folder) / 'store'}"
    dist.init_process_group("gloo", where, rank=rank, world_size=plan.gpus, timeout=timedelta(seconds=PATIENCE_S))
    try:
        with user_code("the model raised", passes=(Exception,)):
            torch.save(_compare(plan, model, settings, twin, seed, Path(folder)), Path(folder) / f"rank{rank}.pt")
    except AutoparError as error:
        (Path(folder) / f"error{rank}.txt").write_text(str(error))
        raise
    finally:
        dist.destroy_process_group()


def _compare(plan: Plan, path: str, settings: dict[str, Any], twin: bool, seed: int, folder: Path) -> dict[str, Any]:
    workload = load_workload(path, **settings)
    make = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[plan.execution.optimizer]
    model = oracle.real_model(workload, seed)
    trainer = build_trainer(
        plan, model, optimizer=lambda given: make(given, lr=1e-3), workload=workload, dtype="float64", twin=twin
    )
    batches = [
        oracle.random_batch(workload, trainer.graph, plan.global_batch, seed + step) for step in range(NUM_STEPS)
    ]
    if dist.get_rank() == 0:
        _run_alone(model, make(model.parameters(), lr=1e-3), workload, trainer, plan.microbatches, batches, folder)
    del model
    dist.barrier()
    found: dict[str, Any] = {"gradients": {}, "parameters": {}}
    for step, batch in enumerate(batches):
        loss = trainer.gradients(batch)
        if step == 0:
            wanted = torch.load(folder / GRADIENTS, mmap=True)
            found["loss"], found["expected"] = float(loss), wanted["loss"]
            for name, got, other in _pairs(trainer, wanted["gradients"], gradient=True):
                found["gradients"][name] = _squares(got, other)
        trainer.update()
    for name, got, other in _pairs(trainer, torch.load(folder / PARAMETERS, mmap=True), gradient=False):
        found["parameters"][name] = _squares(got, other)
    model = oracle.real_model(workload, seed)
    planned = build_trainer(plan, model, optimizer=lambda given: make(given, lr=1e-3), workload=workload, twin=twin)
    found["collectives"] = planned.count(oracle.random_batch(workload, trainer.graph, plan.global_batch, seed))
    return found


def _run_alone(
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
        loss = oracle.gradients(model, workload, batch, num_microbatches, trainer.graph, trainer.seed, step)
        named = dict(model.named_parameters(remove_duplicate=False))
        if step == 0:
            gradients = {name: parameter.grad for name, parameter in named.items()}
            torch.save({"loss": float(loss), "gradients": gradients}, folder / GRADIENTS)
        optimizer.step()
        optimizer.zero_grad()
    torch.save({name: parameter.detach() for name, parameter in named.items()}, folder / PARAMETERS)


def _pairs(trainer: Trainer, whole: Mapping[str, Tensor | None], *, gradient: bool) -> Any:
    """(name, this rank's part, the same part of the one process's) of what this rank answers for."""
    for index, stage in trainer.stages.items():
        mesh = trainer.meshes[index]
        for parameter in stage.parameters.trained():
            if parameter.counted:
                wanted = whole[parameter.names[0]]
                held = rest_held(parameter.stored, mesh, mesh.coordinate, cut=True)
                got = parameter.master.grad if gradient else parameter.master
                assert got is not None
                other = torch.zeros(parameter.stored.shape, dtype=got.dtype) if wanted is None else wanted.detach()
                yield f"{parameter.names[0]} (stage {index})", got.detach(), pick(other, held)


def _squares(got: Tensor, wanted: Tensor) -> tuple[float, float]:
    return float((got - wanted).square().sum()), float(wanted.square().sum())
