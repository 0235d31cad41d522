"""The verb `plan`: from a workload to the best plan found, over micro-batch sizes, stages, meshes and placements."""

import gc
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import msgspec

from autopar.cluster.cluster import Cluster
from autopar.cluster.cluster_reference import named_as_given
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
from autopar.graph.traced_model import trace_model
from autopar.inter.block_pins import BlockPins
from autopar.inter.block_pricer import BlockPricer
from autopar.inter.micro_batch_search import SimulatedPipeline
from autopar.inter.micro_batch_setting import MicroBatchSetting
from autopar.inter.parallel_search import ParallelSearch
from autopar.inter.pipeline_candidate import PipelineCandidate
from autopar.inter.stage_costs import MAX_STAGES, StageCosts
from autopar.pipeline.schedule import Schedule
from autopar.planner.build_plan import ChosenPipeline, build_plan
from autopar.planner.infeasible_message import infeasible_message, interleaved_infeasible_message
from autopar.planner.search_progress import Progress, SearchProgress
from autopar.workload.workload import Workload

SCHEDULES_TRIED: dict[str, tuple[Schedule, ...]] = {
    "auto": ("1f1b", "interleaved"),  # gpipe is 1F1B with more micro-batches in flight
    "1f1b": ("1f1b",),
    "gpipe": ("gpipe",),
    "interleaved": ("interleaved",),
}
"""The schedules that the search tries for each ``schedule`` of a request."""
MIN_STAGE_SHARE = 4
"""A stage has at least gpus / (MIN_STAGE_SHARE * MAX_STAGES) devices."""


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Switch Python's cyclic garbage collector off: a search leaves few cycles, but looking for them among all of
    torch's objects takes a tenth of its time."""
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
    report = progress or (lambda stage, detail, best_s, gap: None)
    machine = load_cluster(cluster)
    weights_dtype = long_dtype(dtype or machine.device.default_dtype)
    machine.device.peak(weights_dtype)  # raises where the device has no such dtype
    model = trace_model(workload, dtype=weights_dtype)
    graph, blocks = model.graph, model.blocks
    block_pins = BlockPins(graph, blocks, pins)
    report("model", f"{len(graph.ops)} ops, {len(blocks)} blocks", None, None)
    budget_bytes = memory_gib * GIB if memory_gib is not None else float(machine.device.memory_bytes)
    sizes = submesh_sizes(gpus, machine.devices_per_node)
    stage_costs_by_size: list[StageCosts] = []
    for accumulates in (True, False):
        execution = ExecutionModel(
            dtype=weights_dtype,
            optimizer=optimizer,
            fp32_grads=accumulates,
            accumulates_gradients=accumulates,
        )
        stage_costs_by_size += _stage_costs_by_size(
            BlockPricer(graph, blocks, machine, execution, profile=model.profile, pins=block_pins),
            [micro_batch] if micro_batch else micro_batch_sizes(batch),
            sizes,
            global_batch=batch,
            budget_bytes=budget_bytes,
            gpus=gpus,
            recompute=recompute,
            schedule=schedule,
        )
    deadline_s = started + time_limit_s if time_limit_s is not None else math.inf
    found = _search(
        stage_costs_by_size, sizes, SCHEDULES_TRIED[schedule], deadline_s, num_processes=processes, report=report
    )
    if not found.simulated:
        if time.perf_counter() > deadline_s:
            raise TimeLimitError(f"no plan was found within {time_limit_s} s; raise --time-limit")
        if schedule == "interleaved":
            raise InfeasibleError(interleaved_infeasible_message(budget_bytes, gpus, len(blocks)))
        raise InfeasibleError(infeasible_message(stage_costs_by_size, sizes, budget_bytes, gpus, has_pins=bool(pins)))
    best = _plan_of_best(found, workload, machine, batch, int(budget_bytes), started)
    if faults := unsatisfied_pins(best, block_pins.pins):
        raise UsageError("no plan satisfies these pins: " + "; ".join(faults))
    return msgspec.structs.replace(best, cluster=named_as_given(best.cluster, cluster))


def _stage_costs_by_size(
    pricer: BlockPricer,
    micro_batches: Sequence[int],
    submesh_sizes: tuple[int, ...],
    *,
    global_batch: int,
    budget_bytes: float,
    gpus: int,
    recompute: str,
    schedule: str,
) -> list[StageCosts]:
    """The costs of every micro-batch size that divides the global batch, accumulates gradients (or not) as ``pricer``
    does, and has a mesh."""
    recompute_modes = ("none", "selective", "full") if recompute == "auto" else (recompute,)
    flat_schedule: Schedule = "gpipe" if schedule == "gpipe" else "1f1b"
    found = []
    for size in micro_batches:
        if global_batch % size == 0 and (global_batch // size > 1) == pricer.execution.accumulates_gradients:
            setting = MicroBatchSetting(
                micro_batch=size,
                num_microbatches=global_batch // size,
                num_devices=gpus,
                budget_bytes=budget_bytes,
                recompute_modes=recompute_modes,
                schedule=flat_schedule,
            )
            costs = StageCosts(pricer, setting)
            if any(costs.frontiers.meshes(num_devices) for num_devices in submesh_sizes):
                found.append(costs)
    return found


def _search(
    stage_costs_by_size: Sequence[StageCosts],
    submesh_sizes: tuple[int, ...],
    schedules: tuple[Schedule, ...],
    deadline_s: float,
    *,
    num_processes: int,
    report: Progress,
) -> SearchProgress:
    """What the search of all micro-batch sizes found; tables are made for sizes near the geometric mean first."""
    found = SearchProgress(report=report, num_sizes=len(stage_costs_by_size))
    middle = _geometric_mean_size(stage_costs_by_size)
    with closing(
        ParallelSearch(
            sorted(stage_costs_by_size, key=lambda costs: _log_distance(costs, middle)),
            submesh_sizes,
            schedules,
            deadline_s,
            num_processes=num_processes,
            on_opened=found.on_opened,
            on_lost=found.on_worker_lost,
        )
    ) as searches:
        found.search(searches, deadline_s)
    return found


def _plan_of_best(
    found: SearchProgress,
    workload: Workload,
    cluster: Cluster,
    global_batch: int,
    budget_bytes: int,
    started: float,
) -> Plan:
    """The plan of the fastest pipeline, with the stage ILP's mix of frontier points where that is no slower;
    ``started`` on the clock of ``time.perf_counter``."""
    ranked = found.by_step_time
    best = ranked[0].candidate
    prices = best.fastest_prices()
    assert prices is not None, "the best pipeline was simulated"
    prices = best.improved_by_ilp(prices)
    return build_plan(
        ChosenPipeline(
            workload=workload,
            cluster=cluster,
            stage_costs=best.stage_costs,
            stages=best.stages,
            prices=prices,
            in_flight=best.in_flight(),
            schedule=best.schedule,
            num_chunks=best.num_chunks,
            first_devices=best.first_devices(),
            gpus=best.stage_costs.num_devices,
            global_batch=global_batch,
            budget_bytes=budget_bytes,
            lower_bound_s=min(found.lower_bound_s, ranked[0].step_time_s),
            search_s=time.perf_counter() - started,
            runner_up=_runner_up_text(ranked),
            stage_times=best.stage_times(prices),
        )
    )


def submesh_sizes(gpus: int, per_node: int) -> tuple[int, ...]:
    """The device counts that a stage may have: divisors of a node's devices, numbers of complete nodes, and all GPUs.

    On one node, divisors of ``gpus`` as well; on several nodes such a stage could span two of them but would be priced
    as if it did not.

    >>> submesh_sizes(24, 8), submesh_sizes(6, 8)
    ((1, 2, 4, 8, 16, 24), (1, 2, 3, 4, 6))
    """
    inside = gpus if gpus <= per_node else per_node
    sizes = {size for size in range(1, min(per_node, gpus) + 1) if per_node % size == 0 or inside % size == 0}
    nodes = gpus // per_node
    sizes |= {per_node * count for count in range(1, nodes + 1) if nodes % count == 0 or count & (count - 1) == 0}
    return tuple(sorted(size for size in sizes | {gpus} if MIN_STAGE_SHARE * MAX_STAGES * size >= gpus))


def micro_batch_sizes(global_batch: int) -> list[int]:
    """All divisors of the global batch, ascending."""
    return [size for size in range(1, global_batch + 1) if global_batch % size == 0]


def _geometric_mean_size(stage_costs_by_size: Sequence[StageCosts]) -> float:
    """The geometric mean of the micro-batch sizes; 1 where there are none."""
    logs = [math.log(costs.micro_batch) for costs in stage_costs_by_size]
    return math.exp(sum(logs) / max(len(logs), 1))


def _log_distance(stage_costs: StageCosts, micro_batch: float) -> float:
    """How far a micro-batch size is from ``micro_batch``: the absolute logarithm of their ratio."""
    return abs(math.log(stage_costs.micro_batch / micro_batch))


def _runner_up_text(ranked: list[SimulatedPipeline]) -> str | None:
    """The fastest pipeline found whose micro-batch size, number of stages or number of chunks is not the best one's,
    with its step time in seconds and relative to the best; None where there is none."""
    best = ranked[0]
    others = (other for other in ranked if _pipeline_class(other.candidate) != _pipeline_class(best.candidate))
    second = next(others, None)
    if second is None:
        return None
    micro_batch, stages, chunks = _pipeline_class(second.candidate)
    return (
        f"micro-batch {micro_batch} on {stages} stage{'s' if stages > 1 else ''}"
        f"{f', {chunks} chunks each' if chunks > 1 else ''}: "
        f"{second.step_time_s:.4g} s, {second.step_time_s / best.step_time_s - 1:+.1%}"
    )


def _pipeline_class(candidate: PipelineCandidate) -> tuple[int, int, int]:
    """(micro-batch size, submeshes, chunks per submesh)"""
    return candidate.stage_costs.micro_batch, candidate.num_submeshes, candidate.num_chunks
