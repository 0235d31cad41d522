"""`plan`: from a workload to the best plan found, over micro-batch sizes, stages, meshes and everything inside them."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from autopar.cluster.cluster import Cluster
from autopar.cluster.load import load_cluster
from autopar.cost.execution import ExecutionModel
from autopar.graph.blocks import cut_blocks, order_for_blocks
from autopar.graph.trace import trace
from autopar.inter.emit import Found, build_plan
from autopar.inter.partition import PipelineProblem, search
from autopar.inter.simulate import StageTimes, simulate
from autopar.inter.stages import Blocks, StageBook, StageChoice
from autopar.plan.errors import InfeasibleError, TimeLimitError, UsageError
from autopar.plan.plan import Plan, Schedule
from autopar.workload.workload import Workload

Progress = Callable[[str, str, float | None, float | None], None]
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The best pipeline of one micro-batch size: stages (first, end, devices), simulated step, bound."""

    book: StageBook
    stages: tuple[tuple[int, int, int], ...]
    step_time_s: float
    lower_bound_s: float


def plan(
    workload: Workload,
    *,
    cluster: Cluster | str = "dgx-h100",
    gpus: int,
    global_batch: int | None = None,
    micro_batch: int | None = None,
    dtype: str | None = None,
    memory_gib: float | None = None,
    optimizer: str = "adamw",
    pins: tuple[tuple[str, str], ...] = (),
    recompute: str = "auto",
    schedule: str = "auto",
    time_limit_s: float | None = None,
    progress: Progress | None = None,
) -> Plan:
    """The fastest plan that fits. Raises InfeasibleError (no plan fits), UsageError, ModelError, TimeLimitError.

    ``micro_batch`` counts samples over all ranks of a stage; times are seconds, ``memory_gib`` GiB per device.
    """
    started = time.perf_counter()
    say = progress or (lambda stage, detail, best_s, gap: None)
    if pins:
        raise UsageError("pins are not supported yet; leave out --pin")
    if schedule not in ("auto", "1f1b", "gpipe"):
        raise UsageError(f"schedule {schedule!r} is not supported yet; use auto, 1f1b or gpipe")
    machine = load_cluster(cluster)
    batch = global_batch or workload.global_batch
    if batch is None:
        raise UsageError("no global batch: give --global-batch or set GLOBAL_BATCH in the model file")
    long = DTYPES.get(dtype or "", dtype) or machine.device.default_dtype
    machine.device.peak(long)
    traced = trace(workload, dtype=long)  # type: ignore[arg-type]
    graph = order_for_blocks(traced.graph)
    blocks = cut_blocks(graph)
    say("model", f"{len(graph.ops)} ops, {len(blocks)} blocks", None, None)
    budget = memory_gib * GIB if memory_gib is not None else float(machine.device.memory_bytes)
    modes = ("none", "selective", "full") if recompute == "auto" else (recompute,)
    order: Schedule = "gpipe" if schedule == "gpipe" else "1f1b"
    sizes = submesh_sizes(gpus, machine.devices_per_node)
    deadline = started + time_limit_s if time_limit_s is not None else None
    found: list[Best] = []
    smallest = np.inf
    bound = np.inf
    candidates = [micro_batch] if micro_batch else micro_batches(batch)
    for accumulate in (True, False):
        execution = ExecutionModel(dtype=long, optimizer=optimizer, fp32_grads=accumulate)  # type: ignore[arg-type]
        shared = Blocks(graph, blocks, machine, execution)
        for size in candidates:
            if batch % size or (batch // size > 1) != accumulate:
                continue
            if deadline is not None and time.perf_counter() > deadline:
                break
            book = StageBook(shared, size, batch // size, budget, modes)
            if not any(book.meshes(submesh) for submesh in sizes):
                continue
            known = min((best.step_time_s for best in found), default=np.inf)
            best, least = _search_one(book, sizes, gpus, order, known, deadline)
            smallest = min(smallest, book.smallest_bytes)
            bound = min(bound, least)
            if best is not None:
                found.append(best)
            time_s = min((candidate.step_time_s for candidate in found), default=None)
            say("search", f"micro-batch {size}", time_s, None if time_s is None else max(0.0, 1 - bound / time_s))
    if not found:
        if deadline is not None and time.perf_counter() > deadline:
            raise TimeLimitError(f"no plan within {time_limit_s} s; raise --time-limit")
        raise InfeasibleError(
            f"no plan fits {budget / GIB:.2f} GiB per device on {gpus} GPUs: the leanest stage tried needs "
            f"{smallest / GIB:.2f} GiB; use more GPUs, more memory (--memory) or a smaller global batch"
        )
    found.sort(key=lambda candidate: candidate.step_time_s)
    return build_plan(
        Found(
            workload=workload,
            cluster=machine,
            book=found[0].book,
            stages=found[0].stages,
            schedule=order,
            gpus=gpus,
            global_batch=batch,
            budget_bytes=int(budget),
            lower_bound_s=min(bound, found[0].step_time_s),
            seconds=time.perf_counter() - started,
            runner_up=_runner_up(found),
            times=pipeline_times(found[0].book, found[0].stages, order),
        )
    )


def submesh_sizes(gpus: int, per_node: int) -> tuple[int, ...]:
    """Divisors of a node, whole nodes, and all GPUs: the device counts of a stage. Within one node divisors of the GPUs
    do, too; of several, they would lie across two nodes and be priced as if they did not.

    >>> submesh_sizes(24, 8), submesh_sizes(6, 8)
    ((1, 2, 4, 8, 16, 24), (1, 2, 3, 4, 6))
    """
    inside = gpus if gpus <= per_node else per_node
    sizes = {size for size in range(1, min(per_node, gpus) + 1) if per_node % size == 0 or inside % size == 0}
    nodes = gpus // per_node
    sizes |= {per_node * count for count in range(1, nodes + 1) if nodes % count == 0 or count & (count - 1) == 0}
    return tuple(sorted(sizes | {gpus}))


def micro_batches(global_batch: int) -> list[int]:
    """Divisors of the global batch, all powers of two times one of its small odd divisors."""
    return [size for size in range(1, global_batch + 1) if global_batch % size == 0]


def _choice(book: StageBook, stage: tuple[int, int, int], in_flight: int) -> tuple[StageChoice, int]:
    first, end, devices = stage
    at = int(book.type_of[first, end])
    choice = book.costs(devices, in_flight).choices[at]
    assert choice is not None
    return choice, at


def pipeline_times(
    book: StageBook,
    stages: tuple[tuple[int, int, int], ...],
    schedule: Schedule,
) -> list[StageTimes]:
    """Times of a pipeline, transfers included: a rank of the next stage receives its own part of what crosses."""
    found: list[StageTimes] = []
    choices = [_choice(book, stage, _held(book, stages, at, schedule))[0] for at, stage in enumerate(stages)]
    forward, backward = book.transfers.seconds(stages, choices)
    for at, stage in enumerate(stages):
        held = _held(book, stages, at, schedule)
        costs = book.costs(stage[2], held)
        _, row = _choice(book, stage, held)
        found.append(
            StageTimes(
                forward_s=float(costs.forward_s[row]),
                backward_s=float(costs.backward_s[row]),
                step_s=float(costs.step_s[row]),
                send_forward_s=forward[at],
                send_backward_s=backward[at],
            )
        )
    return found


def _held(book: StageBook, stages: tuple[tuple[int, int, int], ...], at: int, schedule: str) -> int:
    return book.num_microbatches if schedule == "gpipe" else min(len(stages) - at, book.num_microbatches)


def held_microbatches(book: StageBook, stages: tuple[tuple[int, int, int], ...], schedule: Schedule) -> tuple[int, ...]:
    """Micro-batches each stage holds at most."""
    return tuple(_held(book, stages, at, schedule) for at in range(len(stages)))


def _search_one(
    book: StageBook,
    sizes: tuple[int, ...],
    gpus: int,
    schedule: Schedule,
    known_s: float,
    deadline_s: float | None,
) -> tuple[Best | None, float]:
    usable = tuple(size for size in sizes if book.meshes(size))
    work_s = book.work_bound_s(usable, gpus)
    if work_s >= known_s:
        return None, known_s

    def evaluate(stages: tuple[tuple[int, int, int], ...]) -> float:
        named = tuple((first, end, usable[k]) for first, end, k in stages)
        times = pipeline_times(book, named, schedule)
        return simulate(schedule, times, book.num_microbatches).step_time_s  # type: ignore[arg-type]

    remaining = None if deadline_s is None else max(deadline_s - time.perf_counter(), 0.1)
    result = search(
        PipelineProblem(
            num_blocks=len(book.blocks.blocks),
            num_devices=gpus,
            num_microbatches=book.num_microbatches,
            submesh_sizes=usable,
            stage_times=lambda in_flight: book.table(usable, in_flight),
            schedule=schedule,  # type: ignore[arg-type]
            max_stages=min(len(book.blocks.blocks), gpus, 32),
            upper_bound_s=known_s,
        ),
        evaluate=evaluate,
        deadline_s=remaining,
    )
    if result.best is None:
        return None, result.lower_bound_s if np.isfinite(result.lower_bound_s) else known_s
    stages = tuple((first, end, usable[k]) for first, end, k in result.best.stages)
    # Where memory binds, stages were compared at the given prices only: the outer bound speaks of those, not of all.
    loose = all(
        book.memory_free(first, end, devices, _held(book, stages, at, schedule))
        for at, (first, end, devices) in enumerate(stages)
    )
    bound = result.lower_bound_s if loose else min(work_s, result.lower_bound_s)
    best = Best(book=book, stages=stages, step_time_s=result.best.step_time_s, lower_bound_s=bound)
    return best, bound


def _runner_up(found: list[Best]) -> str | None:
    if len(found) < 2:
        return None
    second = found[1]
    return (
        f"micro-batch {second.book.micro_batch} on {len(second.stages)} stages: {second.step_time_s:.4g} s, "
        f"{second.step_time_s / found[0].step_time_s - 1:+.1%}"
    )
