"""How fast a plan runs against torch without it: ``python -m tests.benchmarks.runtime_speed``.

    one rank      a lowered stage against the plain model under autograd
    four ranks    gloo processes against ``runtime_by_hand``, of the same layout

Both sides train the same model in fp32 with AdamW on the same batches, one thread a process, and must find the same
losses. Steps are taken in turn (one side, the other, one side, ...), a figure is the median of the pairs' ratios: of wall
time, and of the processor time of all ranks, which other work on the machine disturbs less.
"""

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import msgspec
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import autopar
from autopar.core.plan import Plan
from autopar.manual.layout_pricer import plan_layout
from autopar.runtime.apply import build_trainer
from autopar.workload.workload import Workload
from tests.benchmarks.runtime_by_hand import by_hand_step, plain_step
from tests.distributed.pool import Pool

GPT = Path(__file__).resolve().parents[2] / "examples" / "gpt.py"
LEARNING_RATE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model's settings, a batch, and a layout; ``zero`` is 0 or 3."""

    name: str
    batch: int
    dp: int = 1
    tp: int = 1
    zero: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        return self.dp * self.tp

    def workload(self) -> Workload:
        return autopar.load_workload(GPT, size="125M", tied_embeddings=False, **self.settings)

    def plan(self) -> Plan:
        layout = f"dp={self.dp},tp={self.tp},mbs={self.batch // self.dp},zero={self.zero}"
        return plan_layout(
            self.workload(), cluster="cpu-gloo", gpus=self.ranks, layout=layout, global_batch=self.batch, dtype="fp32"
        )


SMALL = {"layers": 4, "hidden": 512, "heads": 8, "vocab": 2048, "seq": 128}
LARGE = {"layers": 2, "hidden": 1024, "heads": 16, "vocab": 2048, "seq": 128}
CASES = (
    Case(name="one rank, hidden 512", batch=4, settings=SMALL),
    Case(name="one rank, hidden 1024", batch=4, settings=LARGE),
    Case(name="dp4, DistributedDataParallel", batch=16, dp=4, settings=SMALL),
    Case(name="dp4, fully_shard", batch=16, dp=4, zero=3, settings=SMALL),
    Case(name="dp4, fully_shard, hidden 1024", batch=8, dp=4, zero=3, settings=LARGE),
    Case(name="dp2 x tp2, parallelize_module + fully_shard", batch=16, dp=2, tp=2, zero=3, settings=SMALL),
    Case(name="tp4, parallelize_module", batch=8, tp=4, settings=SMALL),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """On one rank, step by step: seconds on the wall and of the processor, our side and theirs; ``apart`` is the
    largest difference of two losses."""

    wall_s: tuple[list[float], list[float]]
    processor_s: tuple[list[float], list[float]]
    apart: float


def measure(case: Case, plan_json: bytes, pairs: int) -> Measured:
    """Pairs of steps on one rank, after two to warm up."""
    plan, workload = msgspec.json.decode(plan_json, type=Plan), case.workload()
    torch.manual_seed(0)
    model = workload.build_model(size="125M", tied_embeddings=False, **case.settings)
    assert workload.init_weights is not None
    workload.init_weights(model)
    trainer = build_trainer(
        plan,
        copy.deepcopy(model),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=LEARNING_RATE),
        workload=workload,
    )
    if case.ranks == 1:
        theirs = plain_step(model, workload.loss_fn, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE))
    else:
        theirs = by_hand_step(model, case.dp, case.tp, case.zero, LEARNING_RATE)
    wall: tuple[list[float], list[float]] = ([], [])
    processor: tuple[list[float], list[float]] = ([], [])
    apart = 0.0
    for pair in range(pairs + 2):
        generator = torch.Generator().manual_seed(pair)
        shape = (case.batch, case.settings["seq"])
        batch = {
            name: torch.randint(case.settings["vocab"], shape, generator=generator) for name in ("tokens", "labels")
        }
        losses = [0.0, 0.0]
        for side in ((0, 1), (1, 0))[pair % 2]:
            dist.barrier()
            start, used = time.perf_counter(), time.process_time()
            loss = (trainer.step, theirs)[side](batch)
            dist.barrier()
            wall[side].append(time.perf_counter() - start)
            processor[side].append(time.process_time() - used)
            losses[side] = _whole(loss, case, of_ranks=side == 1)
        apart = max(apart, abs(losses[0] - losses[1]))
    measured = slice(2, None)
    return Measured(
        wall_s=(wall[0][measured], wall[1][measured]),
        processor_s=(processor[0][measured], processor[1][measured]),
        apart=apart,
    )


def _whole(loss: Tensor, case: Case, *, of_ranks: bool) -> float:
    """The mean loss; ``of_ranks``: ``loss`` is of this rank's samples."""
    full = loss.full_tensor() if isinstance(loss, DTensor) else loss.clone()
    if of_ranks and case.dp > 1:
        dist.all_reduce(full)
        full /= case.ranks
    return float(full)


def line(name: str, found: Sequence[Measured]) -> str:
    """A case's figures; ``found`` is by rank."""
    ours, theirs = found[0].wall_s
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    used = [[sum(step) for step in zip(*(rank.processor_s[side] for rank in found), strict=True)] for side in (0, 1)]
    processor = [mine / other for mine, other in zip(*used, strict=True)]
    return (
        f"{name:<46} wall {statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"
        f"  processor {statistics.median(processor):.2f} ({min(processor):.2f} .. {max(processor):.2f})"
        f"  {len(ratios)} pairs, {1e3 * statistics.median(ours):.0f} ms : {1e3 * statistics.median(theirs):.0f} ms"
        f"  losses within {found[0].apart:.0e}"
    )


@click.command()
@click.option("--pairs", default=9, show_default=True, help="Pairs of steps a case.")
@click.option("--only", default="", help="Run the cases whose name contains this.")
def main(pairs: int, only: str) -> None:
    """Print each case's ratio: our seconds per step over theirs."""
    pool = Pool(4)
    try:
        for case in CASES:
            if only in case.name:
                plan = msgspec.json.encode(case.plan())
                found = pool.run(case.ranks, measure, case, plan, pairs, timeout_s=900)
                print(line(case.name, found), flush=True)
    finally:
        pool.close()


if __name__ == "__main__":
    main()
