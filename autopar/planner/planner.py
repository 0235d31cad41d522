"""`plan`: from a workload to the best plan found, over micro-batch sizes, stages, meshes and everything inside them."""

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

from autopar.cluster.cluster import Cluster
from autopar.cluster.cost_tables import load_cluster
from autopar.core.dtypes import Dtype, ShortDtype, long_dtype
from autopar.core.errors import InfeasibleError, TimeLimitError, UsageError
from autopar.core.pin import parse_pins, unsatisfied_pins
from autopar.core.plan import Plan
from autopar.core.request import (
    Optimizer,
    RecomputeChoice,
    ScheduleChoice,
    check_micro_batch,
    check_request,
    choose_global_batch,
)
from autopar.core.units import GIB
from autopar.cost.execution_model import ExecutionModel
from autopar.graph.split_into_blocks import hoist_light_ops, split_into_blocks
from autopar.graph.trace import trace
from autopar.inter.block_pins import BlockPins
from autopar.inter.block_pricer import BlockPricer
from autopar.inter.micro_batch_search import SimulatedPipeline
from autopar.inter.parallel_search import NUM_WORKERS, OpenMicroBatch, ParallelSearch
from autopar.inter.pipeline_candidate import PipelineCandidate
from autopar.inter.stage_costs import MAX_STAGES, StageCosts
from autopar.pipeline.schedule import Schedule
from autopar.planner.build_plan import ChosenPipeline, build_plan
from autopar.planner.infeasible_message import infeasible_message
from autopar.workload.workload import Workload

Progress = Callable[[str, str, float | None, float | None], None]
NUM_SIMULATED_GUESSES = 4
"""Pipelines, of all micro-batch sizes together, that are simulated before anything is searched."""
SCHEDULES_TRIED: dict[str, tuple[Schedule, ...]] = {
    "auto": ("1f1b", "interleaved"),  # gpipe is 1f1b with more held
    "1f1b": ("1f1b",),
    "gpipe": ("gpipe",),
    "interleaved": ("interleaved",),
}


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """A search leaves no cycles worth collecting, but looking for them among all of torch's objects takes a tenth of
    its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_without_garbage_collection()
def plan(
    workload: Workload,
    *,
    cluster: Cluster | str = "dgx-h100",
    gpus: int,
    global_batch: int | None = None,
    micro_batch: int | None = None,
    dtype: Dtype | ShortDtype | None = None,
    memory_gib: float | None = None,
    optimizer: Optimizer = "adamw",
    pins: Sequence[tuple[str, str]] = (),
    recompute: RecomputeChoice = "auto",
    schedule: ScheduleChoice = "auto",
    time_limit_s: float | None = None,
    progress: Progress | None = None,
    processes: int = 2,
) -> Plan:
    """The fastest plan that fits in memory, with its price, judged by code that shares nothing with the search.

    ``cluster`` is a name, a table's file or a ``Cluster``; ``global_batch`` counts samples per step, None is the
    workload's own; ``micro_batch`` counts samples over all ranks of a stage, None searches its size; ``dtype`` None is
    bf16, or fp16 where the device has no bf16; ``memory_gib`` replaces the device's usable memory as the budget of a
    GPU. ``pins`` are (glob of parameter names, placements) that the plan satisfies. ``recompute`` and ``schedule`` other
    than "auto" restrict the search; after ``time_limit_s`` seconds it ends with the best plan found by then, whose
    ``search`` has its gap. ``progress`` is called with (stage, detail, seconds of the best step, gap). A long search
    uses two ``processes`` where it may run on two cores; the plan is the same with one.

    Raises UsageError for wrong arguments, before anything is traced; ModelError where the model cannot be traced;
    InfeasibleError, which names the smallest budget that would do, where no plan fits; TimeLimitError where the limit
    came before any plan.

    >>> from torch import empty, nn
    >>> class Model(nn.Linear):
    ...     def forward(self, x):
    ...         return super().forward(x).square().mean()
    >>> workload = Workload(
    ...     build_model=lambda: Model(512, 512), example_inputs=lambda batch_size: {"x": empty(batch_size, 512)}
    ... )
    >>> plan(workload, cluster="dgx-a100", gpus=2, global_batch=64).estimate.fits
    True
    """
    check_request(
        workload=workload,
        cluster=cluster,
        gpus=gpus,
        global_batch=global_batch,
        micro_batch=micro_batch,
        dtype=dtype,
        memory_gib=memory_gib,
        optimizer=optimizer,
        pins=pins,
        recompute=recompute,
        schedule=schedule,
        time_limit_s=time_limit_s,
        progress=progress,
        processes=processes,
    )
    parse_pins(pins)
    batch = choose_global_batch(global_batch, workload.global_batch, model_file=workload.path)
    check_micro_batch(micro_batch, batch)
    started = time.perf_counter()
    say = progress or (lambda stage, detail, best_s, gap: None)
    machine = load_cluster(cluster)
    long = long_dtype(dtype or machine.device.default_dtype)
    machine.device.peak(long)
    graph = hoist_light_ops(trace(workload, dtype=long).graph)
    blocks = split_into_blocks(graph)
    pinned = BlockPins(graph, blocks, pins)
    say("model", f"{len(graph.ops)} ops, {len(blocks)} blocks", None, None)
    budget = memory_gib * GIB if memory_gib is not None else float(machine.device.memory_bytes)
    sizes = submesh_sizes(gpus, machine.devices_per_node)
    books: list[StageCosts] = []
    for accumulate in (True, False):
        execution = ExecutionModel(
            dtype=long,
            optimizer=optimizer,
            fp32_grads=accumulate,
            accumulates_gradients=accumulate,
        )
        shared = BlockPricer(graph, blocks, machine, execution, pins=pinned)
        for size in [micro_batch] if micro_batch else micro_batch_sizes(batch):
            if batch % size == 0 and (batch // size > 1) == accumulate:
                modes = ("none", "selective", "full") if recompute == "auto" else (recompute,)
                straight: Schedule = "gpipe" if schedule == "gpipe" else "1f1b"
                book = StageCosts(shared, size, batch // size, budget, modes, gpus, schedule=straight)
                if any(book.meshes(submesh) for submesh in sizes):
                    books.append(book)
    deadline_s = started + time_limit_s if time_limit_s is not None else math.inf
    outcome = _SearchProgress(report=say, num_sizes=len(books))
    middle = _geometric_mean_size(books)
    with closing(
        ParallelSearch(
            sorted(books, key=lambda book: _log_distance(book, middle)),
            sizes,
            SCHEDULES_TRIED[schedule],
            deadline_s,
            num_processes=processes,
            on_opened=outcome.on_opened,
            on_lost=outcome.on_worker_lost,
        )
    ) as lanes:
        outcome.search(lanes, deadline_s)
    if not outcome.simulated:
        if time.perf_counter() > deadline_s:
            raise TimeLimitError(f"no plan within {time_limit_s} s; raise --time-limit")
        if schedule == "interleaved":
            raise InfeasibleError(
                f"no interleaved pipeline fits {budget / GIB:.2f} GiB per device on {gpus} GPUs: it needs stages of "
                f"equally many devices, two chunks of the {len(blocks)} blocks for each, and micro-batches that are a "
                "multiple of the stages; use --schedule auto, more --memory, or another --micro-batch"
            )
        raise InfeasibleError(infeasible_message(books, sizes, budget, gpus, has_pins=bool(pins)))
    made = _plan_of_best(outcome, workload, machine, batch, int(budget), started)
    if faults := unsatisfied_pins(made, pinned.pins):
        raise UsageError("no plan keeps to these pins: " + "; ".join(faults))
    return made


@dataclass(slots=True, kw_only=True)
class _SearchProgress:
    """What the searches of all micro-batch sizes found, and a bound on what they left open."""

    report: Progress
    num_sizes: int
    num_opened: int = 0
    simulated: list[SimulatedPipeline] = field(default_factory=list)
    lower_bound_s: float = math.inf

    @property
    def by_step_time(self) -> list[SimulatedPipeline]:
        """All that was found, the fastest first."""
        return sorted(self.simulated, key=lambda best: best.step_time_s)

    @property
    def incumbent_s(self) -> float:
        """The fastest step; inf while there is none."""
        return min((best.step_time_s for best in self.simulated), default=math.inf)

    def on_opened(self, stage_costs: StageCosts) -> None:
        """A size is open."""
        self.num_opened += 1
        self.report(
            "tables", f"micro-batch {stage_costs.micro_batch}, {self.num_opened} of {self.num_sizes}", None, None
        )

    def on_worker_lost(self, exit_code: int) -> None:
        """The second process ended early."""
        self.report("search", f"the second process ended (exit code {exit_code}), doing its part again", None, None)

    def search(self, searches: ParallelSearch, deadline_s: float) -> None:
        """Search all micro-batch sizes, the ones first whose even pipelines take least; past the deadline none is begun
        if there is a plan, and of sizes without a table nothing is known."""
        opened = searches.open()
        if len(opened) < self.num_sizes:
            self.lower_bound_s = 0.0
        pending = [size for size in opened if math.isfinite(size.unconstrained_bound_s)]
        pending.sort(key=lambda size: (min(size.guesses_s, default=math.inf), size.unconstrained_bound_s))
        count = len(pending)
        guesses = [(seconds, size, at) for size in pending for at, seconds in enumerate(size.guesses_s)]
        guesses.sort(key=lambda guess: guess[0])
        self.simulated += searches.simulate([(size, at) for _, size, at in guesses[:NUM_SIMULATED_GUESSES]])
        while pending:
            known_s = self.incumbent_s
            if math.isfinite(known_s) and time.perf_counter() > deadline_s:
                self.lower_bound_s = min(self.lower_bound_s, *(size.unconstrained_bound_s for size in pending))
                return
            beaten = [size for size in pending if size.unconstrained_bound_s >= known_s]
            pending = [size for size in pending if size.unconstrained_bound_s < known_s]
            chosen = [next((size for size in pending if size.worker == lane), None) for lane in range(NUM_WORKERS)]
            searched = [size for size in chosen if size is not None]
            if searched:
                bound_s, found = searches.search(searched, known_s)
                self.lower_bound_s = min(self.lower_bound_s, bound_s)
                self.simulated += found
            pending = [size for size in pending if size not in searched]
            self._report_progress([*searched, *beaten], pending, count)

    def _report_progress(self, searched: list[OpenMicroBatch], pending: list[OpenMicroBatch], count: int) -> None:
        best_s = self.incumbent_s if self.simulated else None
        open_s = min([self.lower_bound_s, *(size.unconstrained_bound_s for size in pending)])
        gap = None if best_s is None else max(0.0, 1 - open_s / best_s)
        names = " and ".join(str(size.micro_batch) for size in searched)
        self.report("search", f"micro-batch {names}, {count - len(pending)} of {count}", best_s, gap)


def _plan_of_best(
    progress: _SearchProgress,
    workload: Workload,
    cluster: Cluster,
    global_batch: int,
    budget_bytes: int,
    started: float,
) -> Plan:
    """The plan of the best pipeline, its stages mixed anew."""
    ranked = progress.by_step_time
    best = ranked[0].candidate
    runs = best.fastest_prices()
    assert runs is not None, "the best pipeline was simulated"
    runs = best.improved_by_ilp(runs)
    return build_plan(
        ChosenPipeline(
            workload=workload,
            cluster=cluster,
            stage_costs=best.stage_costs,
            stages=best.stages,
            prices=runs,
            in_flight=best.in_flight(),
            schedule=best.schedule,
            num_chunks=best.num_chunks,
            first_devices=best.first_devices(),
            gpus=best.stage_costs.num_devices,
            global_batch=global_batch,
            budget_bytes=budget_bytes,
            lower_bound_s=min(progress.lower_bound_s, ranked[0].step_time_s),
            search_s=time.perf_counter() - started,
            runner_up=_runner_up_text(ranked),
            stage_times=best.stage_times(runs),
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
    return tuple(sorted(size for size in sizes | {gpus} if 4 * MAX_STAGES * size >= gpus))


def micro_batch_sizes(global_batch: int) -> list[int]:
    """Divisors of the global batch, all powers of two times one of its small odd divisors."""
    return [size for size in range(1, global_batch + 1) if global_batch % size == 0]


def _geometric_mean_size(stage_costs_by_size: Sequence[StageCosts]) -> float:
    """The geometric mean of micro-batch sizes."""
    return math.exp(sum(math.log(book.micro_batch) for book in stage_costs_by_size) / max(len(stage_costs_by_size), 1))


def _log_distance(stage_costs: StageCosts, micro_batch: float) -> float:
    """How far two micro-batch sizes are apart, by their ratio."""
    return abs(math.log(stage_costs.micro_batch / micro_batch))


def _runner_up_text(ranked: list[SimulatedPipeline]) -> str | None:
    """The fastest pipeline found of another micro-batch size, or of other numbers of stages or chunks, than the
    first."""
    best = ranked[0]
    second = next((one for one in ranked if _pipeline_class(one.candidate) != _pipeline_class(best.candidate)), None)
    if second is None:
        return None
    micro_batch, stages, chunks = _pipeline_class(second.candidate)
    return (
        f"micro-batch {micro_batch} on {stages} stage{'s' if stages > 1 else ''}"
        f"{f', {chunks} chunks each' if chunks > 1 else ''}: "
        f"{second.step_time_s:.4g} s, {second.step_time_s / best.step_time_s - 1:+.1%}"
    )


def _pipeline_class(candidate: PipelineCandidate) -> tuple[int, int, int]:
    """Micro-batch size, runs of devices, chunks of each."""
    return candidate.stage_costs.micro_batch, candidate.num_submeshes, candidate.num_chunks
