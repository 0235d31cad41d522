"""`estimate`: the price of a manual layout, as a plan with everything fixed, from the same tables as the search.

What a layout leaves open is filled in by `layouts`. A stage (with an interleaved schedule a chunk) is priced like any
of the search's; the schedule is simulated; memory is that of the fullest run of devices, whose chunks each hold what
`stage_memory` says (``run_memory``).
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from autopar.cluster.cluster import Cluster
from autopar.cluster.cost_tables import load_cluster
from autopar.core.dtypes import Dtype, long_dtype
from autopar.core.errors import LayoutError
from autopar.core.layout import Layout, parse_layout
from autopar.core.pin import unsatisfied_pins
from autopar.core.plan import MemoryParts, Plan, memory_of_chunks
from autopar.core.units import GIB
from autopar.cost.execution_model import ExecutionModel
from autopar.graph.attention import attention_calls
from autopar.graph.ir import Block, Graph, GraphProfile
from autopar.graph.op_profiles import profile_graph
from autopar.graph.split_into_blocks import hoist_light_ops, split_into_blocks
from autopar.graph.trace import trace
from autopar.inter.block_pins import BlockPins
from autopar.inter.block_pricer import BlockPricer, LayoutRestriction
from autopar.inter.frontier_cache import UNPRICED
from autopar.inter.micro_batch_setting import MicroBatchSetting
from autopar.inter.stage_choice import StagePrice
from autopar.inter.stage_costs import StageCosts
from autopar.inter.tied_gradients import tied_gradient_s
from autopar.intra import block_totals as tt
from autopar.judge.context import ModelContext
from autopar.manual.megatron_restriction import LayoutStage, layout_stages, megatron_restriction, stage_ends
from autopar.manual.scatter_gather import scatter_gather_s, stage_boundary_bytes
from autopar.pipeline.schedule import in_flight_by_chunk
from autopar.pipeline.simulate import StageTimes, simulate
from autopar.planner.build_plan import ChosenPipeline, build_plan, plan_execution
from autopar.workload.workload import Workload

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PricedLayout:
    """A resolved layout: its stages with their books, how each runs, what it holds, its times, and the simulated step.
    ``memory_bytes`` is that of the fullest device."""

    layout: Layout
    stages: tuple[LayoutStage, ...]
    stage_costs: tuple[StageCosts, ...]
    prices: tuple[StagePrice, ...]
    in_flight: tuple[int, ...]
    stage_times: tuple[StageTimes, ...]
    step_time_s: float
    memory_bytes: float
    fits: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TracedModel:
    """A traced model: what pricing needs of it on any cluster. ``dtype`` is that of its weights."""

    workload: Workload
    dtype: Dtype
    graph: Graph
    blocks: tuple[Block, ...]
    profile: GraphProfile


def trace_model(workload: Workload, *, dtype: str) -> TracedModel:
    """Trace a workload; ``dtype`` as on the command line ("bf16") or long ("bfloat16")."""
    dtype = long_dtype(dtype)
    graph = hoist_light_ops(trace(workload, dtype=dtype).graph)
    return TracedModel(
        workload=workload, dtype=dtype, graph=graph, blocks=split_into_blocks(graph), profile=profile_graph(graph)
    )


class LayoutPricer:
    """Prices layouts of one traced model on one cluster; equal blocks and meshes share their tables."""

    def __init__(
        self,
        model: TracedModel,
        *,
        cluster: Cluster,
        gpus: int,
        global_batch: int | None,
        memory_gib: float | None,
        optimizer: str,
        pins: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.workload, self.gpus, self.optimizer = model.workload, gpus, optimizer
        self.cluster, self.global_batch, self.dtype = cluster, global_batch, model.dtype
        self.cluster.device.peak(self.dtype)
        self.graph, self.blocks, self.profile = model.graph, model.blocks, model.profile
        self.head_counts, self.kv_head_counts = head_counts(self.graph)
        self.budget_bytes = memory_gib * GIB if memory_gib is not None else float(self.cluster.device.memory_bytes)
        self._stage_boundary_bytes = stage_boundary_bytes(self.graph, self.blocks) / self.graph.batch.traced_size
        self._block_pricers: dict[ExecutionModel, BlockPricer] = {}
        self._judge_contexts: dict[ExecutionModel, ModelContext] = {}
        self.pins = BlockPins(self.graph, self.blocks, pins)

    def price(self, layout: Layout, measured_layer_s: tuple[float, float] | None = None) -> PricedLayout:
        """Resolve and price; LayoutError lists all faults. ``layer_s``: measured forward and backward seconds of a
        micro-batch in one layer (the most frequent block) under this layout, recompute and collectives included, which
        then stand for the model's own."""
        resolved, stages = self._resolve(layout)
        books = self._stage_costs(resolved, stages)
        held = in_flight_by_chunk(resolved.schedule, resolved.num_stages, resolved.num_microbatches, resolved.vpp)
        runs = []
        for cut, book, count in zip(stages, books, held, strict=True):
            run = book.fastest_feasible(
                (int(book.stage_kind_of[cut.first_block, cut.end_block]),), cut.spec.num_gpus, count
            )
            if run is None:
                raise LayoutError(
                    [f"mbs={resolved.mbs} samples per rank cannot be run by the model with these degrees"]
                )
            runs.append(run)
        if measured_layer_s is not None:
            runs = self._with_measured_layers(stages, books, runs, measured_layer_s)
        times = self._stage_times(resolved, stages, books, runs)
        devices = [cut.spec.num_gpus for cut in stages[: resolved.num_stages]]
        memory = max(submesh_memory_bytes(stages, books, runs, held).values())
        return PricedLayout(
            layout=resolved,
            stages=stages,
            stage_costs=books,
            prices=tuple(runs),
            in_flight=held,
            stage_times=tuple(times),
            step_time_s=simulate(
                resolved.schedule, times, resolved.num_microbatches, resolved.vpp, num_devices=devices
            ).step_time_s,
            memory_bytes=memory,
            fits=memory <= self.budget_bytes,
        )

    def _resolve(self, layout: Layout) -> tuple[Layout, tuple[LayoutStage, ...]]:
        """The layout with nothing left open, and its stages; LayoutError lists the faults of both."""
        faults: list[str] = []
        found = layout
        try:
            found = layout.resolve(self.gpus, self.global_batch, heads=self.head_counts, kv_heads=self.kv_head_counts)
        except LayoutError as error:
            faults += error.faults
        try:
            stage_ends(self.blocks, layout)
        except LayoutError as error:
            raise LayoutError([*faults, *error.faults]) from None
        if faults:
            raise LayoutError(faults)
        return found, layout_stages(self.blocks, found, self.gpus)

    def _with_measured_layers(
        self,
        stages: tuple[LayoutStage, ...],
        stage_costs: tuple[StageCosts, ...],
        prices: list[StagePrice],
        measured_layer_s: tuple[float, float],
    ) -> list[StagePrice]:
        """Runs with the measured seconds in place of the priced ones in every layer."""
        layer = self._layer_kind
        found = []
        for cut, book, run in zip(stages, stage_costs, prices, strict=True):
            more = [0.0, 0.0]
            for block, column in zip(
                self.blocks[cut.first_block : cut.end_block],
                book.frontiers.variants_of(cut.first_block, cut.end_block),
                strict=True,
            ):
                if block.kind == layer:
                    totals = book.frontiers.frontier(column, run.choice.mesh, UNPRICED).totals[0, run.choice.boundary]
                    more[0] += measured_layer_s[0] - float(totals[tt.FORWARD])
                    more[1] += measured_layer_s[1] - float(totals[tt.BACKWARD])
            found.append(replace(run, forward_s=run.forward_s + more[0], backward_s=run.backward_s + more[1]))
        return found

    def _stage_costs(self, layout: Layout, stages: tuple[LayoutStage, ...]) -> tuple[StageCosts, ...]:
        """The book of every stage; stages of one mesh share theirs."""
        fsdp = layout.zero == 3 and layout.overlap
        execution = ExecutionModel(
            dtype=self.dtype,
            optimizer=self.optimizer,  # type: ignore[arg-type]
            attn=layout.attn,
            overlap=layout.overlap,
            fusion=layout.fusion,
            fp32_grads=layout.grads == "fp32",
            accumulates_gradients=layout.num_microbatches > 1,
            balances_causal_context=True,
            blocking_launches=layout.launch == "blocking",
            # parameters gathered ahead of their use: PyTorch's FSDP, whose checkpoint stops early and selects by op; what
            # selects is torchtitan, whose loss is PyTorch's (llm-foundry's is fused)
            recomputes_whole_block=not fsdp,
            selective_policy="products" if fsdp else "attention",
            loss_kernels=_loss_program(layout, fsdp=fsdp),
        )
        if execution not in self._block_pricers:
            self._block_pricers[execution] = BlockPricer(self.graph, self.blocks, self.cluster, execution, self.profile)
        found: dict[tuple[int, int, int], StageCosts] = {}
        for cut in stages:
            key = (cut.spec.dp, cut.spec.cp, cut.spec.tp)
            if key not in found:
                book = StageCosts(
                    self._block_pricers[execution],
                    MicroBatchSetting(
                        micro_batch=layout.micro_batch_size,
                        num_microbatches=layout.num_microbatches,
                        num_devices=self.gpus,
                        budget_bytes=inf,
                        recompute_modes=(layout.recompute,),
                        restriction=self._restriction(layout, cut),
                    ),
                )
                if not book.frontiers.has_integer_sizes(layout.micro_batch_size // cut.spec.dp):
                    raise LayoutError(
                        [f"mbs={layout.mbs} samples per rank cannot be run by the model with dp={key[0]}"]
                    )
                found[key] = book
        return tuple(found[cut.spec.dp, cut.spec.cp, cut.spec.tp] for cut in stages)

    def _restriction(self, layout: Layout, stage: LayoutStage) -> LayoutRestriction:
        """What the layout leaves open, less what pins fix."""
        found = megatron_restriction(self.graph, self.blocks, layout, stage.spec)
        if not self.pins.pins:
            return found
        return replace(found, option_filter=self.pins.option_filter(found.mesh.has_data_axis, found.option_filter))

    def _stage_times(
        self,
        layout: Layout,
        stages: tuple[LayoutStage, ...],
        stage_costs: tuple[StageCosts, ...],
        prices: list[StagePrice],
    ) -> list[StageTimes]:
        """Times of all stages, transfers and exchanges of tied parameters included."""
        placed = [(cut.first_block, cut.end_block, cut.spec.num_gpus) for cut in stages]
        tied = tied_gradient_s(
            [book.tied_gradients for book in stage_costs],
            placed,
            [cut.first_device for cut in stages],
            [run.choice for run in prices],
        )
        per_node = self.cluster.devices_per_node
        sends = []
        for at, (cut, following) in enumerate(itertools.pairwise(stages)):
            choice = prices[at + 1].choice
            backwards = following.first_device <= cut.first_device  # from the last run of devices to the first
            sends.append(
                scatter_gather_s(
                    self.cluster,
                    float(self._stage_boundary_bytes[cut.end_block]) * layout.micro_batch_size,
                    choice.mesh.sizes,
                    stage_costs[at + 1].frontiers.boundary_roles(choice.boundary, choice.mesh),
                    senders=min(cut.spec.num_gpus, per_node),
                    same_node=self.gpus <= per_node if backwards else following.first_device % per_node != 0,
                )
            )
        return [
            StageTimes(
                forward_s=run.forward_s,
                backward_s=run.backward_s,
                step_s=run.step_s + tied[at],
                transfer_forward_s=sends[at] if at < len(sends) else 0.0,
                transfer_backward_s=sends[at - 1] if at else 0.0,
            )
            for at, run in enumerate(prices)
        ]

    def block_times(self, priced: PricedLayout, name: str) -> tuple[float, float]:
        """Forward and backward seconds of one micro-batch in the block of that name; KeyError for another."""
        for cut, book, run in zip(priced.stages, priced.stage_costs, priced.prices, strict=True):
            for block, column in zip(
                self.blocks[cut.first_block : cut.end_block],
                book.frontiers.variants_of(cut.first_block, cut.end_block),
                strict=True,
            ):
                if block.name == name:
                    totals = book.frontiers.frontier(column, run.choice.mesh, UNPRICED).totals[0, run.choice.boundary]
                    return float(totals[tt.FORWARD]), float(totals[tt.BACKWARD])
        raise KeyError(name)

    @property
    def _layer_kind(self) -> int:
        """The kind of most blocks."""
        kinds = [block.kind for block in self.blocks]
        return max(kinds, key=kinds.count)

    def layer_times(self, priced: PricedLayout) -> tuple[float, float]:
        """Forward and backward seconds of one micro-batch in one layer: what ``price`` takes as ``layer_s``."""
        return self.block_times(priced, next(block.name for block in self.blocks if block.kind == self._layer_kind))

    def plan(self, priced: PricedLayout, search_s: float) -> Plan:
        """The whole plan of a priced layout; LayoutError where a pin contradicts it."""
        execution = priced.stage_costs[0].pricer.execution
        if execution not in self._judge_contexts:
            self._judge_contexts[execution] = ModelContext.of(
                plan_execution(execution), self.graph, self.blocks, self.profile
            )
        plan = build_plan(
            ChosenPipeline(
                workload=self.workload,
                cluster=self.cluster,
                stage_costs=priced.stage_costs[0],
                stage_costs_of=priced.stage_costs,
                stages=tuple((cut.first_block, cut.end_block, cut.spec.num_gpus) for cut in priced.stages),
                first_devices=tuple(cut.first_device for cut in priced.stages),
                num_chunks=priced.layout.vpp,
                prices=priced.prices,
                in_flight=priced.in_flight,
                schedule=priced.layout.schedule,
                gpus=self.gpus,
                global_batch=priced.layout.gbs or 0,
                budget_bytes=int(self.budget_bytes),
                lower_bound_s=priced.step_time_s,
                search_s=search_s,
                runner_up=None,
                stage_times=priced.stage_times,
                is_manual=True,
                judge_context=self._judge_contexts[execution],
            )
        )
        if faults := unsatisfied_pins(plan, self.pins.pins):
            raise LayoutError([f"--pin {fault}" for fault in faults])
        return plan


def _loss_program(layout: Layout, *, fsdp: bool) -> Literal["program", "chain", "torch"]:
    """Which cross entropy a layout's program runs (`ExecutionModel`)."""
    if fsdp:
        return "torch" if layout.recompute == "selective" else "program"
    return "chain" if layout.fusion == "megatron" else "program"


def submesh_memory_bytes(
    stages: tuple[LayoutStage, ...],
    stage_costs: tuple[StageCosts, ...],
    prices: list[StagePrice],
    in_flight: tuple[int, ...],
) -> dict[int, int]:
    """First device of each run of devices -> bytes on each of its devices."""
    found: dict[int, list[MemoryParts]] = {}
    for cut, book, run, count in zip(stages, stage_costs, prices, in_flight, strict=True):
        found.setdefault(cut.first_device, []).append(
            book.memory.peak(run.choice, cut.first_block, cut.end_block, count)
        )
    return {device: memory_of_chunks(parts).total for device, parts in found.items()}


def plan_layout(
    workload: Workload,
    *,
    cluster: Cluster | str = "dgx-h100",
    gpus: int,
    layout: str,
    global_batch: int | None = None,
    dtype: str | None = None,
    memory_gib: float | None = None,
    optimizer: str = "adamw",
    pins: Sequence[tuple[str, str]] = (),
) -> Plan:
    """The plan of one layout, priced; memory never makes it fail (``estimate.fits`` says). LayoutError lists all
    faults. ``pins`` (glob, placements) fix parameters that the layout leaves open: columns or rows of a pair."""
    started = time.perf_counter()
    parsed = parse_layout(layout)
    machine = load_cluster(cluster)
    pricer = LayoutPricer(
        trace_model(workload, dtype=dtype or machine.device.default_dtype),
        cluster=machine,
        gpus=gpus,
        global_batch=global_batch or parsed.gbs or workload.global_batch,
        memory_gib=memory_gib,
        optimizer=optimizer,
        pins=pins,
    )
    return pricer.plan(pricer.price(parsed), time.perf_counter() - started)


def head_counts(graph: Graph) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Query and key/value head counts of the model's attentions; keys repeated for all query heads count once."""
    calls = attention_calls(graph)
    return tuple(sorted({call.heads for call in calls})), tuple(sorted({call.kv_heads for call in calls}))
