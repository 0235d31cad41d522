"""`plan`: from a workload to the best plan found, over micro-batch sizes, stages, meshes and everything inside them."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from autopar.cluster.cluster import Cluster
from autopar.cluster.load import load_cluster
from autopar.cost.execution import ExecutionModel
from autopar.graph.blocks import cut_blocks, order_for_blocks
from autopar.graph.trace import trace
from autopar.inter.blocks import Blocks
from autopar.inter.bounds import max_in_flight
from autopar.inter.emit import Found, build_plan
from autopar.inter.finish import Finished
from autopar.inter.partition import PipelineProblem, PipelineResult, StageTable, least_s, search
from autopar.inter.pins import BlockPins
from autopar.inter.simulate import StageTimes, simulate
from autopar.inter.smallest import smallest_budget
from autopar.inter.stage_tables import StageTables
from autopar.inter.stages import StageBook
from autopar.inter.uses import stage_memory
from autopar.plan.errors import InfeasibleError, TimeLimitError, UsageError
from autopar.plan.pin import unmet
from autopar.plan.plan import Plan, Schedule
from autopar.workload.workload import Workload

Progress = Callable[[str, str, float | None, float | None], None]
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
GIB = 2**30
MAX_STAGES = 32
"""Pipelines are at most this deep."""
REACHES = (1.25, 1.6, 2.5, 6.0, math.inf)
"""Steps are sought below these multiples of the bound without memory, one after the other."""
EVEN_EVALUATIONS = 200
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
    ``pins`` (glob over parameters, placements over a mesh's axes) are kept to and the rest is searched.
    """
    started = time.perf_counter()
    say = progress or (lambda stage, detail, best_s, gap: None)
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
    pinned = BlockPins(graph, blocks, pins)
    say("model", f"{len(graph.ops)} ops, {len(blocks)} blocks", None, None)
    budget = memory_gib * GIB if memory_gib is not None else float(machine.device.memory_bytes)
    modes = ("none", "selective", "full") if recompute == "auto" else (recompute,)
    order: Schedule = "gpipe" if schedule == "gpipe" else "1f1b"
    sizes = submesh_sizes(gpus, machine.devices_per_node)
    deadline = started + time_limit_s if time_limit_s is not None else None
    found: list[Best] = []
    books: list[StageBook] = []
    bound = np.inf
    candidates = [micro_batch] if micro_batch else micro_batches(batch)
    for accumulate in (True, False):
        execution = ExecutionModel(
            dtype=long,
            optimizer=optimizer,  # type: ignore[arg-type]
            fp32_grads=accumulate,
            accumulate=accumulate,
        )
        shared = Blocks(graph, blocks, machine, execution, pins=pinned)
        for size in candidates:
            if batch % size == 0 and (batch // size > 1) == accumulate:
                book = StageBook(shared, size, batch // size, budget, modes, gpus, schedule=order)
                if any(book.meshes(submesh) for submesh in sizes):
                    books.append(book)
    searches = []
    for at, book in enumerate(books):
        searches.append(_Search(book, sizes, order, deadline))
        say("tables", f"micro-batch {book.micro_batch}, {at + 1} of {len(books)}", None, None)
    pending, done = [one for one in searches if math.isfinite(one.free_bound_s)], 0
    for one in searches:
        if one not in pending:
            one.tables.release()
    while pending:
        winner = min(found, key=lambda candidate: candidate.step_time_s, default=None)
        known = winner.step_time_s if winner is not None else np.inf
        if deadline is not None and time.perf_counter() > deadline and found:
            bound = min(bound, *(one.free_bound_s for one in pending))
            break
        one = _next(pending, winner.book.micro_batch if winner is not None else None)
        pending.remove(one)
        best, least = one.run(known)
        bound = min(bound, least)
        done += 1
        if best is not None:
            found.append(best)
        loser = (
            one if best is None else next((other for other in searches if winner and other.book is winner.book), None)
        )
        if loser is not None:
            loser.tables.release()
        time_s = min((candidate.step_time_s for candidate in found), default=None)
        open_s = min([bound, *(other.free_bound_s for other in pending)])
        gap = None if time_s is None else max(0.0, 1 - open_s / time_s)
        say("search", f"micro-batch {one.book.micro_batch}, {done} of {done + len(pending)}", time_s, gap)
    if not found:
        if deadline is not None and time.perf_counter() > deadline:
            raise TimeLimitError(f"no plan within {time_limit_s} s; raise --time-limit")
        raise InfeasibleError(_infeasible(books, sizes, budget, gpus, order, bool(pins)))
    found.sort(key=lambda candidate: candidate.step_time_s)
    runs = finished(found[0].book, found[0].stages, order)
    assert runs is not None, "the best pipeline was evaluated"
    runs = mixed(found[0].book, found[0].stages, runs, order)
    made = build_plan(
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
            times=pipeline_times(found[0].book, found[0].stages, runs),
        )
    )
    if faults := unmet(made, pinned.pins):
        raise UsageError("no plan keeps to these pins: " + "; ".join(faults))
    return made


def _infeasible(
    books: list[StageBook], sizes: tuple[int, ...], budget_bytes: float, gpus: int, schedule: Schedule, pins: bool
) -> str:
    """What the leanest plan needs, what fills it, and the way out."""
    leanest = None
    for book in books:
        one = smallest_budget(book, tuple(size for size in sizes if book.meshes(size)), held_at_most(book, schedule))
        if one is not None and (leanest is None or one.num_bytes < leanest.num_bytes):
            leanest = one
    if leanest is None:
        pinned = " with these pins; a mesh has one or two axes" if pins else ""
        return f"no pipeline of this model can be laid out on {gpus} GPUs{pinned}; try another --gpus or --global-batch"
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
    """Divisors of a node, whole nodes, and all GPUs: the device counts of a stage. Within one node divisors of the GPUs
    do, too; of several, they would lie across two nodes and be priced as if they did not.

    >>> submesh_sizes(24, 8), submesh_sizes(6, 8)
    ((1, 2, 4, 8, 16, 24), (1, 2, 3, 4, 6))
    """
    inside = gpus if gpus <= per_node else per_node
    sizes = {size for size in range(1, min(per_node, gpus) + 1) if per_node % size == 0 or inside % size == 0}
    nodes = gpus // per_node
    sizes |= {per_node * count for count in range(1, nodes + 1) if nodes % count == 0 or count & (count - 1) == 0}
    return tuple(sorted(size for size in sizes | {gpus} if 4 * MAX_STAGES * size >= gpus))


def micro_batches(global_batch: int) -> list[int]:
    """Divisors of the global batch, all powers of two times one of its small odd divisors."""
    return [size for size in range(1, global_batch + 1) if global_batch % size == 0]


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


def mixed(
    book: StageBook,
    stages: tuple[tuple[int, int, int], ...],
    runs: tuple[Finished, ...],
    schedule: Schedule,
) -> tuple[Finished, ...]:
    """The runs of a pipeline, each replaced by the proven best mix of frontier points where the simulated step is then
    no longer."""

    def step_s(candidate: tuple[Finished, ...]) -> float:
        times = pipeline_times(book, stages, candidate)
        return simulate(schedule, times, book.num_microbatches).step_time_s  # type: ignore[arg-type]

    best_s = step_s(runs)
    slowest_first = sorted(range(len(stages)), key=lambda at: -runs[at].time_s)
    held = held_microbatches(book, stages, schedule)
    for at in slowest_first:
        first, end, _ = stages[at]
        one = book.mix(int(book.type_of[first, end]), held[at], runs[at])
        candidate = (*runs[:at], one, *runs[at + 1 :])
        if one is not runs[at] and (found_s := step_s(candidate)) <= best_s:
            runs, best_s = candidate, found_s
    return runs


def pipeline_times(
    book: StageBook,
    stages: tuple[tuple[int, int, int], ...],
    runs: tuple[Finished, ...],
) -> list[StageTimes]:
    """Times of a pipeline, transfers included: a rank of the next stage receives its own part of what crosses."""
    forward, backward = book.transfers.seconds(stages, [run.choice for run in runs])
    return [
        StageTimes(
            forward_s=run.forward_s,
            backward_s=run.backward_s,
            step_s=run.step_s,
            send_forward_s=forward[at],
            send_backward_s=backward[at],
        )
        for at, run in enumerate(runs)
    ]


def _held(book: StageBook, stages: tuple[tuple[int, int, int], ...], at: int, schedule: str) -> int:
    return book.num_microbatches if schedule == "gpipe" else min(len(stages) - at, book.num_microbatches)


def held_microbatches(book: StageBook, stages: tuple[tuple[int, int, int], ...], schedule: Schedule) -> tuple[int, ...]:
    """Micro-batches each stage holds at most."""
    return tuple(_held(book, stages, at, schedule) for at in range(len(stages)))


def held_at_most(book: StageBook, schedule: Schedule) -> tuple[int, ...]:
    """Micro-batches that stage number 1, 2, ... from the last holds, for as many stages as there can be."""
    count = min(len(book.blocks.blocks), book.gpus, MAX_STAGES)
    return tuple(max_in_flight(schedule, book.num_microbatches, place) for place in range(1, count + 1))


def _next(pending: list["_Search"], best: int | None) -> "_Search":
    """The search of the micro-batch size next to the best so far (step times fall and rise again along the sizes), else
    of the middle one."""
    middle = best or math.exp(sum(math.log(one.book.micro_batch) for one in pending) / len(pending))
    return min(pending, key=lambda one: (abs(math.log(one.book.micro_batch / middle)), one.free_bound_s))


class _Search:
    """The search of one micro-batch size."""

    def __init__(
        self,
        book: StageBook,
        sizes: tuple[int, ...],
        schedule: Schedule,
        deadline_s: float | None,
    ) -> None:
        self.book, self.schedule, self.deadline_s = book, schedule, deadline_s
        self.sizes = tuple(size for size in sizes if book.meshes(size))
        self.tables = StageTables(book, self.sizes)
        self.cuts_s = book.transfers.cut_bounds_s(self.sizes)
        free = self.tables.free()
        self.free_bound_s = np.inf
        if self.tables.can_fit(held_at_most(book, schedule)):
            bound_s = least_s(self._problem(lambda in_flight: free, np.inf))
            self.free_bound_s = max(self.tables.work_bound_s(), bound_s)

    def _problem(self, table: Callable[[int], StageTable], below_s: float) -> PipelineProblem:
        book = self.book
        return PipelineProblem(
            num_blocks=len(book.blocks.blocks),
            num_devices=book.gpus,
            num_microbatches=book.num_microbatches,
            submesh_sizes=self.sizes,
            stage_times=table,
            schedule=self.schedule,  # type: ignore[arg-type]
            max_stages=min(len(book.blocks.blocks), book.gpus, MAX_STAGES),
            upper_bound_s=below_s,
            cut_transfer_s=self.cuts_s,
        )

    def _named(self, stages: tuple[tuple[int, int, int], ...]) -> tuple[tuple[int, int, int], ...]:
        return tuple((first, end, self.sizes[k]) for first, end, k in stages)

    def _evaluate(self, stages: tuple[tuple[int, int, int], ...]) -> float:
        named = self._named(stages)
        runs = finished(self.book, named, self.schedule)
        if runs is None:
            return np.inf
        times = pipeline_times(self.book, named, runs)
        return simulate(self.schedule, times, self.book.num_microbatches).step_time_s  # type: ignore[arg-type]

    def _run(self, table: Callable[[int], StageTable], below_s: float, evaluations: int | None) -> PipelineResult:
        remaining = None if self.deadline_s is None else max(self.deadline_s - time.perf_counter(), 0.1)
        problem = self._problem(table, below_s)
        return search(problem, evaluate=self._evaluate, deadline_s=remaining, max_evaluations=evaluations)

    def run(self, known_s: float) -> tuple[Best | None, float]:
        """The best pipeline below ``known_s`` seconds, and a bound on all of this size (at most ``known_s``)."""
        book = self.book
        for reach in REACHES if math.isinf(known_s) else (math.inf,):
            below_s = min(known_s, reach * self.free_bound_s)
            if self.free_bound_s >= below_s:
                return None, known_s
            self.tables.ignore_from(below_s)
            least = least_s(self._problem(self.tables.bounding, below_s))
            if least >= below_s:
                if below_s == known_s:
                    return None, known_s
                continue
            # First by times that are reached, which finds good pipelines; then by bounds, to prove or find better ones.
            even = self._run(self.tables.even, below_s, EVEN_EVALUATIONS).best
            target_s = even.step_time_s if even is not None else below_s
            result = self._run(self.tables.bounding, target_s, None)
            best = result.best or even
            if best is not None or below_s == known_s:
                break
        if best is None:
            return None, min(result.lower_bound_s, known_s)
        bound_s = min(result.lower_bound_s, best.step_time_s)
        return Best(
            book=book, stages=self._named(best.stages), step_time_s=best.step_time_s, lower_bound_s=bound_s
        ), bound_s


def _runner_up(found: list[Best]) -> str | None:
    if len(found) < 2:
        return None
    second = found[1]
    return (
        f"micro-batch {second.book.micro_batch} on {len(second.stages)} stages: {second.step_time_s:.4g} s, "
        f"{second.step_time_s / found[0].step_time_s - 1:+.1%}"
    )
