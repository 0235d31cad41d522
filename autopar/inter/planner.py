"""`plan`: from a workload to the best plan found, over micro-batch sizes, stages, meshes and everything inside them."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from autopar.cluster.cluster import Cluster
from autopar.cluster.load import load_cluster
from autopar.cost.execution import ExecutionModel
from autopar.graph.blocks import crossing, cut_blocks, order_for_blocks
from autopar.graph.trace import trace
from autopar.inter.blocks import Blocks
from autopar.inter.bounds import max_in_flight
from autopar.inter.emit import Found, build_plan, stage_memory
from autopar.inter.finish import Finished
from autopar.inter.partition import PipelineProblem, PipelineResult, StageTable, search
from autopar.inter.simulate import StageTimes, simulate
from autopar.inter.smallest import smallest_budget
from autopar.inter.stages import StageBook
from autopar.inter.transfer import send_seconds
from autopar.plan.errors import InfeasibleError, TimeLimitError, UsageError
from autopar.plan.plan import Plan, Schedule
from autopar.workload.workload import Workload

Progress = Callable[[str, str, float | None, float | None], None]
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
GIB = 2**30
MAX_STAGES = 32
"""Pipelines are at most this deep."""
EVEN_EVALUATIONS = 60
"""Pipelines simulated at most in the first of the two searches of a micro-batch size."""


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
    books: list[StageBook] = []
    bound = np.inf
    cut_bytes = cut_bytes_of(graph, blocks)
    candidates = [micro_batch] if micro_batch else micro_batches(batch)
    for accumulate in (True, False):
        execution = ExecutionModel(
            dtype=long,
            optimizer=optimizer,  # type: ignore[arg-type]
            fp32_grads=accumulate,
            accumulate=accumulate,
        )
        shared = Blocks(graph, blocks, machine, execution)
        for size in candidates:
            if batch % size or (batch // size > 1) != accumulate:
                continue
            if deadline is not None and time.perf_counter() > deadline:
                break
            book = StageBook(shared, size, batch // size, budget, modes, gpus)
            if not any(book.meshes(submesh) for submesh in sizes):
                continue
            books.append(book)
            known = min((best.step_time_s for best in found), default=np.inf)
            best, least = _search_one(book, sizes, gpus, order, cut_bytes * size / graph.batch.traced, known, deadline)
            bound = min(bound, least)
            if best is not None:
                found.append(best)
            time_s = min((candidate.step_time_s for candidate in found), default=None)
            say("search", f"micro-batch {size}", time_s, None if time_s is None else max(0.0, 1 - bound / time_s))
    if not found:
        if deadline is not None and time.perf_counter() > deadline:
            raise TimeLimitError(f"no plan within {time_limit_s} s; raise --time-limit")
        raise InfeasibleError(_infeasible(books, sizes, budget, gpus, order))
    found.sort(key=lambda candidate: candidate.step_time_s)
    runs = finished(found[0].book, found[0].stages, order)
    assert runs is not None, "the best pipeline was evaluated"
    return build_plan(
        Found(
            workload=workload,
            cluster=machine,
            book=found[0].book,
            stages=found[0].stages,
            runs=runs,
            held=held_microbatches(found[0].book, found[0].stages, order),
            schedule=order,
            gpus=gpus,
            global_batch=batch,
            budget_bytes=int(budget),
            lower_bound_s=min(bound, found[0].step_time_s),
            seconds=time.perf_counter() - started,
            runner_up=_runner_up(found),
            times=pipeline_times(
                found[0].book, found[0].stages, runs, cut_bytes * found[0].book.micro_batch / graph.batch.traced
            ),
        )
    )


def _infeasible(
    books: list[StageBook], sizes: tuple[int, ...], budget_bytes: float, gpus: int, schedule: Schedule
) -> str:
    """What the leanest plan needs, what fills it, and the way out."""
    leanest = None
    for book in books:
        count = min(len(book.blocks.blocks), gpus, MAX_STAGES)
        held = tuple(max_in_flight(schedule, book.num_microbatches, place) for place in range(1, count + 1))
        one = smallest_budget(book, tuple(size for size in sizes if book.meshes(size)), held)
        if one is not None and (leanest is None or one.num_bytes < leanest.num_bytes):
            leanest = one
    if leanest is None:
        return f"no pipeline of this model can be laid out on {gpus} GPUs; try another --gpus or --global-batch"
    first, end, size = leanest.stage
    blocks = leanest.book.blocks.blocks
    parts = stage_memory(leanest.book, leanest.choice, first, end, leanest.in_flight)
    named = {
        "parameters": parts.parameters_bytes,
        "gradients": parts.gradients_bytes,
        "optimizer": parts.optimizer_bytes,
        "saved activations": parts.saved_activations_bytes,
        "workspace": parts.workspace_bytes,
        "context and buffers": parts.fixed_bytes,
    }
    fills = ", ".join(f"{name} {num_bytes / GIB:.2f}" for name, num_bytes in named.items())
    return (
        f"no plan fits {budget_bytes / GIB:.2f} GiB per device on {gpus} GPUs: the leanest found needs "
        f"{math.ceil(leanest.num_bytes / GIB * 100) / 100:.2f} GiB (micro-batch {leanest.book.micro_batch}, "
        f"{blocks[first].name} to {blocks[end - 1].name} on {size} GPUs; GiB: {fills}); raise --memory to that, or use "
        "more GPUs, a smaller global batch or --optimizer sgd"
    )


def submesh_sizes(gpus: int, per_node: int) -> tuple[int, ...]:
    """Divisors of a node, whole nodes, and all GPUs: the device counts of a stage.

    >>> submesh_sizes(24, 8)
    (1, 2, 4, 8, 16, 24)
    """
    sizes = {size for size in range(1, min(per_node, gpus) + 1) if per_node % size == 0 or gpus % size == 0}
    nodes = gpus // per_node
    sizes |= {per_node * count for count in range(1, nodes + 1) if nodes % count == 0 or count & (count - 1) == 0}
    return tuple(sorted(sizes | {gpus}))


def micro_batches(global_batch: int) -> list[int]:
    """Divisors of the global batch, all powers of two times one of its small odd divisors."""
    return [size for size in range(1, global_batch + 1) if global_batch % size == 0]


def cut_bytes_of(graph, blocks) -> np.ndarray:  # type: ignore[no-untyped-def, type-arg]
    """Bytes that cross the cut before each block, whole at the traced batch; (blocks + 1,)."""
    sizes = [0.0]
    for values in crossing(graph, blocks):
        sizes.append(
            float(
                sum(
                    np.prod(graph.values[value].shape) * graph.values[value].itemsize
                    for value in values
                    if graph.values[value].requires_grad
                )
            )
        )
    sizes += [0.0] * (len(blocks) + 1 - len(sizes))
    return np.array(sizes)


def finished(
    book: StageBook, stages: tuple[tuple[int, int, int], ...], schedule: Schedule
) -> tuple[Finished, ...] | None:
    """How each stage of a pipeline runs; None when one does not fit."""
    found = []
    for (first, end, devices), held in zip(stages, held_microbatches(book, stages, schedule), strict=True):
        one = book.finish(int(book.type_of[first, end]), devices, held)
        if one is None:
            return None
        found.append(one)
    return tuple(found)


def pipeline_times(
    book: StageBook,
    stages: tuple[tuple[int, int, int], ...],
    runs: tuple[Finished, ...],
    cut_bytes: np.ndarray,  # type: ignore[type-arg]
) -> list[StageTimes]:
    """Times of a pipeline, transfers included: a rank of the next stage receives its own part of what crosses."""
    cluster = book.blocks.cluster
    sends = []
    device = 0
    for at, (_first, end, devices) in enumerate(stages[:-1]):
        device += devices
        following = runs[at + 1].choice
        sends.append(
            send_seconds(
                cluster,
                float(cut_bytes[end]),
                following.mesh.sizes,
                book.roles(following.boundary, following.mesh),
                senders=min(devices, cluster.devices_per_node),
                same_node=device % cluster.devices_per_node != 0,
            )
        )
    return [
        StageTimes(
            forward_s=run.forward_s,
            backward_s=run.backward_s,
            step_s=run.step_s,
            send_forward_s=sends[at] if at < len(sends) else 0.0,
            send_backward_s=sends[at - 1] if at else 0.0,
        )
        for at, run in enumerate(runs)
    ]


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
    cut_bytes: np.ndarray,  # type: ignore[type-arg]
    known_s: float,
    deadline_s: float | None,
) -> tuple[Best | None, float]:
    usable = tuple(size for size in sizes if book.meshes(size))
    if book.work_bound_s(usable, gpus) >= known_s:
        return None, known_s
    book.cutoff_s = known_s

    def evaluate(stages: tuple[tuple[int, int, int], ...]) -> float:
        named = tuple((first, end, usable[k]) for first, end, k in stages)
        runs = finished(book, named, schedule)
        if runs is None:
            return np.inf
        times = pipeline_times(book, named, runs, cut_bytes)
        return simulate(schedule, times, book.num_microbatches).step_time_s  # type: ignore[arg-type]

    def run(table: Callable[[int], StageTable], below_s: float, evaluations: int | None) -> PipelineResult:
        remaining = None if deadline_s is None else max(deadline_s - time.perf_counter(), 0.1)
        problem = PipelineProblem(
            num_blocks=len(book.blocks.blocks),
            num_devices=gpus,
            num_microbatches=book.num_microbatches,
            submesh_sizes=usable,
            stage_times=table,
            schedule=schedule,  # type: ignore[arg-type]
            max_stages=min(len(book.blocks.blocks), gpus, MAX_STAGES),
            upper_bound_s=below_s,
        )
        return search(problem, evaluate=evaluate, deadline_s=remaining, max_evaluations=evaluations)

    # First by times that are reached, which finds good pipelines; then by bounds, which proves or finds better ones.
    even = run(lambda in_flight: book.even_table(usable, in_flight), known_s, EVEN_EVALUATIONS).best
    below_s = even.step_time_s if even is not None else known_s
    result = run(lambda in_flight: book.table(usable, in_flight), below_s, None)
    best = result.best or even
    if best is None:
        return None, min(result.lower_bound_s, known_s)
    stages = tuple((first, end, usable[k]) for first, end, k in best.stages)
    bound_s = min(result.lower_bound_s, best.step_time_s)
    return Best(book=book, stages=stages, step_time_s=best.step_time_s, lower_bound_s=bound_s), bound_s


def _runner_up(found: list[Best]) -> str | None:
    if len(found) < 2:
        return None
    second = found[1]
    return (
        f"micro-batch {second.book.micro_batch} on {len(second.stages)} stages: {second.step_time_s:.4g} s, "
        f"{second.step_time_s / found[0].step_time_s - 1:+.1%}"
    )
