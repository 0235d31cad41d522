"""Pricing of manual layouts: a layout is a plan with everything fixed, priced from the same cost tables as the search.

What a layout leaves open is filled in by `megatron_restriction`. A stage (with an interleaved schedule, a chunk) is
priced like a stage of the search, and the schedule is simulated. Memory is that of the fullest submesh, over all the
chunks that it runs (`priced_layout.submesh_memory_bytes`).
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from math import inf

import msgspec

from autopar.cluster.cluster import Cluster
from autopar.cluster.cluster_reference import named_as_given
from autopar.cluster.cost_tables import load_cluster
from autopar.core.errors import LayoutError
from autopar.core.layout import Layout, parse_layout
from autopar.core.pin import unsatisfied_pins
from autopar.core.plan import Plan
from autopar.core.units import GIB
from autopar.cost.execution_model import ExecutionModel
from autopar.graph.traced_model import TracedModel, trace_model
from autopar.inter.block_pins import BlockPins
from autopar.inter.block_pricer import BlockPricer, LayoutRestriction
from autopar.inter.micro_batch_setting import MicroBatchSetting
from autopar.inter.stage_costs import StageCosts
from autopar.judge.context import ModelContext
from autopar.manual.layer_times import with_measured_layers
from autopar.manual.layout_execution import layout_execution
from autopar.manual.layout_stage_times import layout_stage_times
from autopar.manual.megatron_restriction import LayoutStage, layout_stages, megatron_restriction, stage_ends
from autopar.manual.priced_layout import PricedLayout, PricedStage, submesh_memory_bytes
from autopar.manual.scatter_gather import stage_boundary_bytes
from autopar.pipeline.schedule import in_flight_by_chunk
from autopar.pipeline.simulate import simulate
from autopar.planner.build_plan import ChosenPipeline, build_plan, plan_execution
from autopar.workload.workload import Workload


class LayoutPricer:
    """Prices layouts of one traced model on one cluster; equal blocks on equal meshes share their cost tables.

    ``global_batch`` None leaves it to each layout's ``gbs``; ``memory_gib`` None is the device's usable memory; ``pins``
    are (glob of parameter names, placements). UsageError where the device cannot compute in the model's dtype.
    """

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
        cluster.device.peak(model.dtype)  # raises where the device has no such dtype
        self.model, self.cluster, self.gpus = model, cluster, gpus
        self.budget_bytes = memory_gib * GIB if memory_gib is not None else float(cluster.device.memory_bytes)
        self._global_batch, self._optimizer = global_batch, optimizer
        self._head_counts, self._kv_head_counts = model.head_counts()
        self._boundary_bytes = stage_boundary_bytes(model.graph, model.blocks) / model.graph.batch.traced_size
        self._block_pricers: dict[ExecutionModel, BlockPricer] = {}
        self._judge_contexts: dict[ExecutionModel, ModelContext] = {}
        self._pins = BlockPins(model.graph, model.blocks, pins)

    def price(self, layout: Layout, measured_layer_s: tuple[float, float] | None = None) -> PricedLayout:
        """Resolve and price a layout; LayoutError lists all of its faults.

        ``measured_layer_s``: measured forward and backward seconds of a micro-batch in one layer (a block of the most
        frequent kind) under this layout, recomputation and collectives included, which replace the priced ones.
        """
        resolved, placed = self._resolve(layout)
        stages = self._price_stages(resolved, placed)
        if measured_layer_s is not None:
            stages = with_measured_layers(stages, measured_layer_s)
        times = layout_stage_times(
            stages,
            resolved,
            cluster=self.cluster,
            gpus=self.gpus,
            boundary_bytes_per_sample=self._boundary_bytes,
        )
        simulation = simulate(
            resolved.schedule,
            times,
            resolved.num_microbatches,
            resolved.vpp,
            num_devices=[stage.spec.num_gpus for stage in placed[: resolved.num_stages]],
        )
        memory = max(submesh_memory_bytes(stages).values())
        return PricedLayout(
            layout=resolved,
            stages=stages,
            stage_times=times,
            step_time_s=simulation.step_time_s,
            memory_bytes=memory,
            fits=memory <= self.budget_bytes,
        )

    def plan(self, priced: PricedLayout, search_s: float) -> Plan:
        """The plan of a priced layout, judged; ``search_s`` is the seconds that pricing took. LayoutError where a pin
        contradicts the layout."""
        first, layout = priced.stages[0].stage_costs, priced.layout
        plan = build_plan(
            ChosenPipeline(
                workload=self.model.workload,
                cluster=self.cluster,
                stage_costs=first,
                stage_costs_of=tuple(stage.stage_costs for stage in priced.stages),
                stages=tuple(stage.span for stage in priced.stages),
                first_devices=tuple(stage.layout_stage.first_device for stage in priced.stages),
                num_chunks=layout.vpp,
                prices=tuple(stage.price for stage in priced.stages),
                in_flight=tuple(stage.in_flight for stage in priced.stages),
                schedule=layout.schedule,
                gpus=self.gpus,
                global_batch=layout.gbs or 0,
                budget_bytes=int(self.budget_bytes),
                lower_bound_s=priced.step_time_s,
                search_s=search_s,
                runner_up=None,
                stage_times=priced.stage_times,
                is_manual=True,
                judge_context=self._judge_context(first.pricer.execution),
            )
        )
        if faults := unsatisfied_pins(plan, self._pins.pins):
            raise LayoutError([f"--pin {fault}" for fault in faults])
        return plan

    def _resolve(self, layout: Layout) -> tuple[Layout, tuple[LayoutStage, ...]]:
        """The layout with nothing left open, and its stages; LayoutError lists the faults of both."""
        faults: list[str] = []
        resolved = layout
        try:
            resolved = layout.resolve(
                self.gpus, self._global_batch, heads=self._head_counts, kv_heads=self._kv_head_counts
            )
        except LayoutError as error:
            faults += error.faults
        try:
            stage_ends(self.model.blocks, layout)
        except LayoutError as error:
            raise LayoutError([*faults, *error.faults]) from None
        if faults:
            raise LayoutError(faults)
        return resolved, layout_stages(self.model.blocks, resolved, self.gpus)

    def _price_stages(self, layout: Layout, placed: tuple[LayoutStage, ...]) -> tuple[PricedStage, ...]:
        """Every stage with its fastest choice, whether or not it fits; LayoutError where one cannot run."""
        in_flight = in_flight_by_chunk(layout.schedule, layout.num_stages, layout.num_microbatches, layout.vpp)
        stages = []
        for stage, costs, count in zip(placed, self._stage_costs(layout, placed), in_flight, strict=True):
            kind = int(costs.stage_kind_of[stage.first_block, stage.end_block])
            price = costs.fastest_feasible((kind,), stage.spec.num_gpus, count)
            if price is None:
                raise LayoutError([f"the model cannot run mbs={layout.mbs} samples per rank with these degrees"])
            stages.append(PricedStage(layout_stage=stage, stage_costs=costs, price=price, in_flight=count))
        return tuple(stages)

    def _stage_costs(self, layout: Layout, stages: tuple[LayoutStage, ...]) -> tuple[StageCosts, ...]:
        """The costs of every stage; stages of equal degrees share one object."""
        execution = layout_execution(layout, dtype=self.model.dtype, optimizer=self._optimizer)
        by_degrees: dict[tuple[int, int, int], StageCosts] = {}
        for stage in stages:
            degrees = (stage.spec.dp, stage.spec.cp, stage.spec.tp)
            if degrees in by_degrees:
                continue
            costs = StageCosts(
                self._block_pricer(execution),
                MicroBatchSetting(
                    micro_batch=layout.micro_batch_size,
                    num_microbatches=layout.num_microbatches,
                    num_devices=self.gpus,
                    budget_bytes=inf,
                    recompute_modes=(layout.recompute,),
                    restriction=self._restriction(layout, stage),
                ),
            )
            if not costs.frontiers.has_integer_sizes(layout.micro_batch_size // stage.spec.dp):
                raise LayoutError([f"the model cannot run mbs={layout.mbs} samples per rank with dp={stage.spec.dp}"])
            by_degrees[degrees] = costs
        return tuple(by_degrees[stage.spec.dp, stage.spec.cp, stage.spec.tp] for stage in stages)

    def _block_pricer(self, execution: ExecutionModel) -> BlockPricer:
        """The block prices under an execution model, made once."""
        if execution not in self._block_pricers:
            self._block_pricers[execution] = BlockPricer(
                self.model.graph, self.model.blocks, self.cluster, execution, self.model.profile
            )
        return self._block_pricers[execution]

    def _judge_context(self, execution: ExecutionModel) -> ModelContext:
        """What judging plans under an execution model shares, made once."""
        if execution not in self._judge_contexts:
            self._judge_contexts[execution] = ModelContext.of(
                plan_execution(execution), self.model.graph, self.model.blocks, self.model.profile
            )
        return self._judge_contexts[execution]

    def _restriction(self, layout: Layout, stage: LayoutStage) -> LayoutRestriction:
        """The mesh of a stage and the options that the layout and the pins allow on it."""
        restriction = megatron_restriction(self.model.graph, self.model.blocks, layout, stage.spec)
        if not self._pins.pins:
            return restriction
        allowed = self._pins.option_filter(restriction.mesh.has_data_axis, restriction.option_filter)
        return replace(restriction, option_filter=allowed)


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
    """The plan of one layout; the arguments are those of `estimate.estimate`.

    Memory never makes it fail (look at ``estimate.fits``). LayoutError lists all faults of the layout; ``pins`` decide
    what it leaves open, such as columns or rows of a weight.
    """
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
    made = pricer.plan(pricer.price(parsed), time.perf_counter() - started)
    return msgspec.structs.replace(made, cluster=named_as_given(made.cluster, cluster))
