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
from autopar.core.pin import unmet
from autopar.core.plan import MemoryParts, Plan, chunks_memory
from autopar.core.units import GIB
from autopar.cost.execution_model import ExecutionModel
from autopar.graph.attention import attention_calls
from autopar.graph.ir import Block, Graph, GraphProfile
from autopar.graph.op_profiles import profile_graph
from autopar.graph.split_into_blocks import cut_blocks, order_for_blocks
from autopar.graph.trace import trace
from autopar.inter.block_pins import BlockPins
from autopar.inter.block_pricer import Blocks, Restriction
from autopar.inter.stage_choice import Finished
from autopar.inter.stage_costs import FREE, StageBook
from autopar.inter.stage_memory import stage_memory
from autopar.inter.tied_gradients import tied_seconds
from autopar.intra import block_totals as tt
from autopar.judge.context import Ground
from autopar.manual.megatron_restriction import StageCut, cuts, restriction, stage_ends
from autopar.manual.scatter_gather import cut_bytes_of, send_seconds
from autopar.pipeline.schedule import held_by_chunk
from autopar.pipeline.simulate import StageTimes, simulate
from autopar.planner.build_plan import Found, build_plan, execution_of
from autopar.workload.workload import Workload

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Priced:
    """A resolved layout: its stages with their books, how each runs, what it holds, its times, and the simulated step.
    ``memory_bytes`` is that of the fullest device."""

    layout: Layout
    cuts: tuple[StageCut, ...]
    books: tuple[StageBook, ...]
    runs: tuple[Finished, ...]
    held: tuple[int, ...]
    times: tuple[StageTimes, ...]
    step_time_s: float
    memory_bytes: float
    fits: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelGraph:
    """A traced model: what pricing needs of it on any cluster. ``dtype`` is that of its weights."""

    workload: Workload
    dtype: Dtype
    graph: Graph
    blocks: tuple[Block, ...]
    profile: GraphProfile


def model_graph(workload: Workload, *, dtype: str) -> ModelGraph:
    """Trace a workload; ``dtype`` as on the command line ("bf16") or long ("bfloat16")."""
    dtype = long_dtype(dtype)
    graph = order_for_blocks(trace(workload, dtype=dtype).graph)
    return ModelGraph(
        workload=workload, dtype=dtype, graph=graph, blocks=cut_blocks(graph), profile=profile_graph(graph)
    )


class LayoutPricer:
    """Prices layouts of one traced model on one cluster; equal blocks and meshes share their tables."""

    def __init__(
        self,
        model: ModelGraph,
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
        self.heads, self.kv_heads = head_counts(self.graph)
        self.budget_bytes = memory_gib * GIB if memory_gib is not None else float(self.cluster.device.memory_bytes)
        self._cut_bytes = cut_bytes_of(self.graph, self.blocks) / self.graph.batch.traced
        self._shared: dict[ExecutionModel, Blocks] = {}
        self._grounds: dict[ExecutionModel, Ground] = {}
        self.pins = BlockPins(self.graph, self.blocks, pins)

    def price(self, layout: Layout, layer_s: tuple[float, float] | None = None) -> Priced:
        """Resolve and price; LayoutError lists all faults. ``layer_s``: measured forward and backward seconds of a
        micro-batch in one layer (the most frequent block) under this layout, recompute and collectives included, which
        then stand for the model's own."""
        resolved, stages = self._resolved(layout)
        books = self._books(resolved, stages)
        held = held_by_chunk(resolved.schedule, resolved.num_stages, resolved.num_microbatches, resolved.vpp)
        runs = []
        for cut, book, count in zip(stages, books, held, strict=True):
            run = book.finish((int(book.type_of[cut.first, cut.end]),), cut.spec.num_gpus, count)
            if run is None:
                raise LayoutError(
                    [f"mbs={resolved.mbs} samples per rank cannot be run by the model with these degrees"]
                )
            runs.append(run)
        if layer_s is not None:
            runs = self._with_layers(stages, books, runs, layer_s)
        times = self._times(resolved, stages, books, runs)
        devices = [cut.spec.num_gpus for cut in stages[: resolved.num_stages]]
        memory = max(run_memory(stages, books, runs, held).values())
        return Priced(
            layout=resolved,
            cuts=stages,
            books=books,
            runs=tuple(runs),
            held=held,
            times=tuple(times),
            step_time_s=simulate(
                resolved.schedule, times, resolved.num_microbatches, resolved.vpp, num_devices=devices
            ).step_time_s,
            memory_bytes=memory,
            fits=memory <= self.budget_bytes,
        )

    def _resolved(self, layout: Layout) -> tuple[Layout, tuple[StageCut, ...]]:
        """The layout with nothing left open, and its stages; LayoutError lists the faults of both."""
        faults: list[str] = []
        found = layout
        try:
            found = layout.resolve(self.gpus, self.global_batch, heads=self.heads, kv_heads=self.kv_heads)
        except LayoutError as error:
            faults += error.faults
        try:
            stage_ends(self.blocks, layout)
        except LayoutError as error:
            raise LayoutError([*faults, *error.faults]) from None
        if faults:
            raise LayoutError(faults)
        return found, cuts(self.blocks, found, self.gpus)

    def _with_layers(
        self,
        stages: tuple[StageCut, ...],
        books: tuple[StageBook, ...],
        runs: list[Finished],
        layer_s: tuple[float, float],
    ) -> list[Finished]:
        """Runs with the measured seconds in place of the priced ones in every layer."""
        layer = self._layer_kind
        found = []
        for cut, book, run in zip(stages, books, runs, strict=True):
            more = [0.0, 0.0]
            for block, column in zip(
                self.blocks[cut.first : cut.end], book.columns_of(cut.first, cut.end), strict=True
            ):
                if block.kind == layer:
                    totals = book.points(column, run.choice.mesh, FREE).totals[0, run.choice.boundary]
                    more[0] += layer_s[0] - float(totals[tt.FORWARD])
                    more[1] += layer_s[1] - float(totals[tt.BACKWARD])
            found.append(replace(run, forward_s=run.forward_s + more[0], backward_s=run.backward_s + more[1]))
        return found

    def _books(self, layout: Layout, stages: tuple[StageCut, ...]) -> tuple[StageBook, ...]:
        """The book of every stage; stages of one mesh share theirs."""
        fsdp = layout.zero == 3 and layout.overlap
        execution = ExecutionModel(
            dtype=self.dtype,
            optimizer=self.optimizer,  # type: ignore[arg-type]
            attn=layout.attn,
            overlap=layout.overlap,
            fusion=layout.fusion,
            fp32_grads=layout.grads == "fp32",
            accumulate=layout.num_microbatches > 1,
            balanced_context=True,
            blocking=layout.launch == "blocking",
            # parameters gathered ahead of their use: PyTorch's FSDP, whose checkpoint stops early and selects by op; what
            # selects is torchtitan, whose loss is PyTorch's (llm-foundry's is fused)
            whole_checkpoint=not fsdp,
            selective="products" if fsdp else "attention",
            loss=_loss(layout, fsdp=fsdp),
        )
        if execution not in self._shared:
            self._shared[execution] = Blocks(self.graph, self.blocks, self.cluster, execution, self.profile)
        found: dict[tuple[int, int, int], StageBook] = {}
        for cut in stages:
            key = (cut.spec.dp, cut.spec.cp, cut.spec.tp)
            if key not in found:
                book = StageBook(
                    self._shared[execution],
                    layout.micro_batch_size,
                    layout.num_microbatches,
                    inf,
                    (layout.recompute,),
                    self.gpus,
                    self._restriction(layout, cut),
                )
                if not book.whole(layout.micro_batch_size // cut.spec.dp):
                    raise LayoutError(
                        [f"mbs={layout.mbs} samples per rank cannot be run by the model with dp={key[0]}"]
                    )
                found[key] = book
        return tuple(found[cut.spec.dp, cut.spec.cp, cut.spec.tp] for cut in stages)

    def _restriction(self, layout: Layout, cut: StageCut) -> Restriction:
        """What the layout leaves open, less what pins fix."""
        found = restriction(self.graph, self.blocks, layout, cut.spec)
        if not self.pins.pins:
            return found
        return replace(found, allowed=self.pins.allowed(found.mesh.has_data_axis, found.allowed))

    def _times(
        self, layout: Layout, stages: tuple[StageCut, ...], books: tuple[StageBook, ...], runs: list[Finished]
    ) -> list[StageTimes]:
        """Times of all stages, transfers and exchanges of tied parameters included."""
        placed = [(cut.first, cut.end, cut.spec.num_gpus) for cut in stages]
        tied = tied_seconds(books, placed, [cut.first_device for cut in stages], [run.choice for run in runs])
        per_node = self.cluster.devices_per_node
        sends = []
        for at, (cut, following) in enumerate(itertools.pairwise(stages)):
            choice = runs[at + 1].choice
            backwards = following.first_device <= cut.first_device  # from the last run of devices to the first
            sends.append(
                send_seconds(
                    self.cluster,
                    float(self._cut_bytes[cut.end]) * layout.micro_batch_size,
                    choice.mesh.sizes,
                    books[at + 1].roles(choice.boundary, choice.mesh),
                    senders=min(cut.spec.num_gpus, per_node),
                    same_node=self.gpus <= per_node if backwards else following.first_device % per_node != 0,
                )
            )
        return [
            StageTimes(
                forward_s=run.forward_s,
                backward_s=run.backward_s,
                step_s=run.step_s + tied[at],
                send_forward_s=sends[at] if at < len(sends) else 0.0,
                send_backward_s=sends[at - 1] if at else 0.0,
            )
            for at, run in enumerate(runs)
        ]

    def block_times(self, priced: Priced, name: str) -> tuple[float, float]:
        """Forward and backward seconds of one micro-batch in the block of that name; KeyError for another."""
        for cut, book, run in zip(priced.cuts, priced.books, priced.runs, strict=True):
            for block, column in zip(
                self.blocks[cut.first : cut.end], book.columns_of(cut.first, cut.end), strict=True
            ):
                if block.name == name:
                    totals = book.points(column, run.choice.mesh, FREE).totals[0, run.choice.boundary]
                    return float(totals[tt.FORWARD]), float(totals[tt.BACKWARD])
        raise KeyError(name)

    @property
    def _layer_kind(self) -> int:
        """The kind of most blocks."""
        kinds = [block.kind for block in self.blocks]
        return max(kinds, key=kinds.count)

    def layer_times(self, priced: Priced) -> tuple[float, float]:
        """Forward and backward seconds of one micro-batch in one layer: what ``price`` takes as ``layer_s``."""
        return self.block_times(priced, next(block.name for block in self.blocks if block.kind == self._layer_kind))

    def plan(self, priced: Priced, seconds: float) -> Plan:
        """The whole plan of a priced layout; LayoutError where a pin contradicts it."""
        execution = priced.books[0].blocks.execution
        if execution not in self._grounds:
            self._grounds[execution] = Ground.of(execution_of(execution), self.graph, self.blocks, self.profile)
        plan = build_plan(
            Found(
                workload=self.workload,
                cluster=self.cluster,
                book=priced.books[0],
                books=priced.books,
                stages=tuple((cut.first, cut.end, cut.spec.num_gpus) for cut in priced.cuts),
                first_devices=tuple(cut.first_device for cut in priced.cuts),
                num_chunks=priced.layout.vpp,
                runs=priced.runs,
                held=priced.held,
                schedule=priced.layout.schedule,
                gpus=self.gpus,
                global_batch=priced.layout.gbs or 0,
                budget_bytes=int(self.budget_bytes),
                lower_bound_s=priced.step_time_s,
                seconds=seconds,
                runner_up=None,
                times=priced.times,
                fixed=True,
                ground=self._grounds[execution],
            )
        )
        if faults := unmet(plan, self.pins.pins):
            raise LayoutError([f"--pin {fault}" for fault in faults])
        return plan


def _loss(layout: Layout, *, fsdp: bool) -> Literal["program", "chain", "torch"]:
    """Which cross entropy a layout's program runs (`ExecutionModel`)."""
    if fsdp:
        return "torch" if layout.recompute == "selective" else "program"
    return "chain" if layout.fusion == "megatron" else "program"


def run_memory(
    stages: tuple[StageCut, ...], books: tuple[StageBook, ...], runs: list[Finished], held: tuple[int, ...]
) -> dict[int, int]:
    """First device of each run of devices -> bytes on each of its devices."""
    found: dict[int, list[MemoryParts]] = {}
    for cut, book, run, count in zip(stages, books, runs, held, strict=True):
        found.setdefault(cut.first_device, []).append(stage_memory(book, run.choice, cut.first, cut.end, count))
    return {device: chunks_memory(parts).total for device, parts in found.items()}


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
        model_graph(workload, dtype=dtype or machine.device.default_dtype),
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
