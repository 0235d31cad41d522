"""The nouns of a plan and of its file, typed and frozen. No tensors, no code; unknown fields are refused.

A plan says, for every stage, which consecutive blocks it runs on which submesh (consecutive devices) under which logical
mesh, and for every block which *program* it follows: the placements of each op's tensors and of each parameter. Equal
blocks share one program, so a plan of 96 equal layers is as small as one of 12.

Placements are texts of ``placement.parse_placements``, one per axis of the stage that runs the program. Times are
seconds, sizes bytes (integers); ``micro_batch_size`` counts samples over all ranks of a stage.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import msgspec

import autopar
from autopar.core.dtypes import ShortDtype
from autopar.core.mesh_axis import Axis, axes_text
from autopar.core.notebook_text import html_table, short_repr
from autopar.core.units import gib_text, percent_text, ranges_text, seconds_text

if TYPE_CHECKING:
    import torch
    from torch import nn

FORMAT_VERSION = "1.0"

Recompute = Literal["none", "selective", "full"]
Schedule = Literal["1f1b", "gpipe", "interleaved"]
Scalar = bool | int | float | str | None


class PlanStruct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of what a plan file consists of: frozen and strict about unknown fields."""


class OpPlan(PlanStruct, frozen=True, kw_only=True):
    """One op of a block: placements of each tensor input and output, in the order of ``graph.ir.Op``.

    ``input_gradients`` are the placements in which the op's backward leaves the gradient of each input,
    ``output_gradients`` those in which it takes the gradient of each output; "" where there is none. A replicated input
    of an op that is sharded on an axis has a partial gradient. ``regathered`` are positions of inputs that are saved as
    shards, from before their all-gather, and gathered once more in the backward."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    input_gradients: tuple[str, ...] = ()
    output_gradients: tuple[str, ...] = ()
    regathered: tuple[int, ...] = msgspec.field(default=(), name="gathers_again")


class ValuePlan(PlanStruct, frozen=True, kw_only=True):
    """Placements of an activation between ops and of its gradient ("" where it has none); ``name`` is that of the value
    in the first block of the program's kind."""

    name: str
    placement: str
    gradient: str


class ParameterPlan(PlanStruct, frozen=True, kw_only=True):
    """One parameter or buffer of a block: its placements as ops use it (``compute``), and of what is stored between steps.

    ZeRO is where these differ: stage 1 shards ``optimizer`` over the data axis, 2 also ``gradient``, 3 also
    ``parameter``.
    ``name`` is the first of the parameter's fully qualified names in the first block that follows the program."""

    name: str
    compute: str
    parameter: str
    gradient: str
    optimizer: str


class BlockProgram(PlanStruct, frozen=True, kw_only=True):
    """How blocks of one ``kind`` run: ``ops`` and ``parameters`` align by position with those of each such block.

    ``inputs`` and ``outputs`` are the block's boundary values, placed as they are between blocks. ``shared`` are the
    activations with several users (ops, or the block's end): each is redistributed to this placement once, and from
    there to the placement of each user that needs another."""

    id: str
    kind: int
    recompute: Recompute
    ops: tuple[OpPlan, ...]
    parameters: tuple[ParameterPlan, ...]
    inputs: tuple[ValuePlan, ...] = ()
    outputs: tuple[ValuePlan, ...] = ()
    shared: tuple[ValuePlan, ...] = ()


class BlockRef(PlanStruct, frozen=True, kw_only=True):
    """A block of the graph in a stage, and the id of the program it follows."""

    index: int
    name: str
    program: str


class MemoryParts(PlanStruct, frozen=True, kw_only=True):
    """Bytes on the fullest device of a stage at its peak. ``saved_activations_bytes`` covers all micro-batches in
    flight; ``workspace_bytes`` are the temporary tensors of the op at the peak; ``fixed_bytes`` is what torch's allocator
    does not count (context, communication buffers, fragmentation). A backward frees saved tensors block by block while
    it allocates a single micro-batch's gradients, so that never all of both exist: ``overlaid_bytes`` are counted in the
    other parts and are not allocated at the peak."""

    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    saved_activations_bytes: int
    workspace_bytes: int
    fixed_bytes: int
    overlaid_bytes: int = 0

    @property
    def state_bytes(self) -> int:
        """Parameters, gradients and optimizer state."""
        return self.parameters_bytes + self.gradients_bytes + self.optimizer_bytes

    @property
    def tensor_bytes(self) -> int:
        """All but ``fixed_bytes``: what torch's allocator counts."""
        return self.state_bytes + self.saved_activations_bytes + self.workspace_bytes - self.overlaid_bytes

    @property
    def total(self) -> int:
        """All bytes of the device, those that torch's allocator does not count included."""
        return self.tensor_bytes + self.fixed_bytes


class StagePlan(PlanStruct, frozen=True, kw_only=True):
    """Consecutive blocks on devices ``first_device <= d < first_device + num_devices``, a mesh of ``axes`` (outermost
    first, the last axis over neighbouring devices). With an interleaved schedule a submesh owns one stage per ``chunk``.
    Seconds are per micro-batch, but ``step_s`` (exposed work that is done once per step) is per step;
    ``transfer_forward_s`` is of the boundary values to the next stage, ``transfer_backward_s`` of their gradients to the
    previous one. ``in_flight`` counts the micro-batches whose activations are saved at the peak."""

    blocks: tuple[BlockRef, ...]
    first_device: int
    num_devices: int
    axes: tuple[Axis, ...]
    chunk: int = 0
    forward_s: float
    backward_s: float
    step_s: float
    transfer_forward_s: float = msgspec.field(name="send_forward_s")
    transfer_backward_s: float = msgspec.field(name="send_backward_s")
    in_flight: int
    memory: MemoryParts


class TimeParts(PlanStruct, frozen=True, kw_only=True):
    """Where the step goes on the devices of the slowest stage, seconds per step. ``communication_s`` maps a kind of
    collective to its total, overlapped or not; ``exposed_communication_s`` is what does not overlap with compute."""

    matmul_s: float
    attention_s: float
    memory_bound_s: float
    launch_s: float
    communication_s: dict[str, float]
    exposed_communication_s: float
    optimizer_s: float
    transfers_s: float


CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "ring", "send"]
ItemKind = (
    Literal["matmul", "attention", "memory_bound", "launches", "optimizer", "transfers", "bubble"] | CollectiveKind
)


class TimeItem(PlanStruct, frozen=True, kw_only=True):
    """One part of a step on the devices of the busiest stage, seconds per step: the total of its ``kind``, and what does
    not overlap with anything else; the ``exposed_s`` of all items add up to the step time. Collectives say over which
    mesh ``axes`` and ``of`` what they are."""

    kind: ItemKind
    total_s: float
    exposed_s: float
    axes: tuple[str, ...] = ()
    of: Literal["activations", "parameters", "gradients", ""] = ""


class Collective(PlanStruct, frozen=True, kw_only=True):
    """``count`` equal collectives of ``stage`` (a position in ``Plan.stages``) per micro-batch or per step, each over
    the group of its mesh ``axes``; ``num_bytes`` is the full tensor as one group sees it (a gather's output, a
    reduce-scatter's input)."""

    kind: CollectiveKind
    axes: tuple[str, ...]
    num_bytes: int
    count: int
    per: Literal["microbatch", "step"]
    stage: int


class Estimate(PlanStruct, frozen=True, kw_only=True):
    """What the cost model says of a plan. ``peak_memory_bytes`` is that of the fullest device, against
    ``budget_bytes``; ``peak_tensor_bytes`` is the part that torch's allocator counts. ``flops_per_step`` counts matmul
    and full attention, forward and backward, without recompute; ``mfu`` = that / (step time x GPUs x dense peak of the
    dtype). The low and high ends are of 90 % intervals from measured runs; 0 where there are none. ``flops_by_kind``
    splits the FLOPs by kind of op; ``items`` are the parts of the step, empty where the judge could not follow the plan.

    ``provenance`` counts the prices that the slowest stage consists of by their source, ``provenance_s`` adds up their
    seconds per step, overlapped or not: "measured" (inside a measured table), "modelled" (a formula, or the scaled table
    of a similar device), "extrapolated" (outside its table)."""

    step_time_s: float
    tokens_per_s: float
    samples_per_s: float
    mfu: float
    flops_per_step: int
    peak_memory_bytes: int
    peak_tensor_bytes: int
    budget_bytes: int
    fits: bool
    bubble_fraction: float
    exposed_communication_s: float
    time: TimeParts
    collectives: tuple[Collective, ...]
    step_time_low_s: float = 0.0
    step_time_high_s: float = 0.0
    memory_low_bytes: int = 0
    memory_high_bytes: int = 0
    items: tuple[TimeItem, ...] = ()
    flops_by_kind: dict[str, int] = {}
    provenance: dict[str, int] = {}
    provenance_s: dict[str, float] = {}

    def __repr__(self) -> str:
        memory, budget = self.peak_memory_bytes, self.budget_bytes
        return short_repr(
            "Estimate", step_time_s=self.step_time_s, mfu=self.mfu, peak_memory_bytes=memory, budget_bytes=budget
        )

    def _repr_html_(self) -> str:
        """The figures as a table, for notebooks."""
        figures = [
            ("step time", seconds_text(self.step_time_s)),
            ("tokens/s", f"{self.tokens_per_s:,.0f}"),
            ("MFU", percent_text(self.mfu)),
            ("exposed communication", seconds_text(self.exposed_communication_s)),
            ("memory", f"{gib_text(self.peak_memory_bytes)} of {gib_text(self.budget_bytes)}"),
        ]
        return html_table("Estimate", ("figure", "value"), figures)


class SearchOutcome(PlanStruct, frozen=True, kw_only=True):
    """How the plan was found. No plan of the searched space is faster than ``lower_bound_s``; ``gap`` is the relative
    distance of the step time from it. A manual layout leaves nothing to search: "fixed", gap 0."""

    seconds: float
    status: Literal["optimal", "feasible", "fixed"]
    lower_bound_s: float
    gap: float
    runner_up: str | None = None


class Execution(PlanStruct, frozen=True, kw_only=True):
    """What the price assumes about the software, in the words of a layout's keys. ``checkpoint``: full recomputation
    recomputes what the backward needs, or the whole block. ``selective``: selective recomputation recomputes attention,
    or everything but attention and every second product with a weight. ``loss``: the cross entropy is the one that the
    program fuses, always the chain of kernels that a sharded vocabulary needs, or PyTorch's own
    (``cost.execution_model`` has the sources)."""

    dtype: ShortDtype
    optimizer: Literal["adamw", "sgd"]
    attn: Literal["flash", "math"] = "flash"
    overlap: bool = True
    fusion: Literal["none", "megatron", "compiler"] = "megatron"
    grads: Literal["fp32", "same"] = "fp32"
    launch: Literal["async", "blocking"] = "async"
    checkpoint: Literal["needed", "whole"] = "needed"
    selective: Literal["attention", "products"] = "attention"
    loss: Literal["program", "chain", "torch"] = "program"


class ModelRef(PlanStruct, frozen=True, kw_only=True):
    """The model a plan is for: the file (None when built in Python), its settings and the hash of its source, the
    fingerprint of its graph, and how many parameters it has."""

    path: str | None
    settings: dict[str, Scalar]
    source_hash: str | None
    graph_fingerprint: str
    num_parameters: int = msgspec.field(name="parameters")


class ClusterRef(PlanStruct, frozen=True, kw_only=True):
    """The cluster a plan is for: its name, the fingerprint of its tables, and the keys the user overrode."""

    name: str
    fingerprint: str
    overrides: dict[str, Scalar]


class Plan(PlanStruct, frozen=True, kw_only=True):
    """How to train one model on one cluster: stages, placements, schedule, and the price of it all.

    ``invariants.check_plan`` says what holds between its parts. ``num_chunks`` is 1 unless interleaved; ``recompute`` is
    "mixed" when programs differ; ``notes`` are for the user (ops that are replicated because they have no rule, a padded
    vocabulary); ``command`` is how it was made."""

    format_version: str
    model: ModelRef
    cluster: ClusterRef
    execution: Execution
    gpus: int
    global_batch: int
    microbatches: int
    micro_batch_size: int
    schedule: Schedule
    num_chunks: int
    recompute: Literal["none", "selective", "full", "mixed"]
    programs: tuple[BlockProgram, ...]
    stages: tuple[StagePlan, ...]
    estimate: Estimate
    search: SearchOutcome
    notes: tuple[str, ...]
    command: str
    versions: dict[str, str]

    def __repr__(self) -> str:
        model, cluster, step_time_s = self.model.path, self.cluster.name, self.estimate.step_time_s
        return short_repr(
            "Plan", model=model, cluster=cluster, gpus=self.gpus, stages=len(self.stages), step_time_s=step_time_s
        )

    def _repr_html_(self) -> str:
        """The stages as a table, for notebooks: devices, axes, blocks, memory."""
        rows = [
            (
                position,
                ranges_text(list(range(stage.first_device, stage.first_device + stage.num_devices))),
                axes_text(stage.axes),
                ", ".join(dict.fromkeys((stage.blocks[0].name, stage.blocks[-1].name))) + f" ({len(stage.blocks)})",
                gib_text(stage.memory.total),
            )
            for position, stage in enumerate(self.stages)
        ]
        caption = f"{self.model.path or 'A model'} on {self.gpus} GPUs of {self.cluster.name}, "
        caption += f"{seconds_text(self.estimate.step_time_s)} a step"
        return html_table(caption, ("stage", "GPUs", "axes", "blocks", "memory of a GPU"), rows)

    def apply(
        self,
        model: "nn.Module",
        *,
        optimizer: "Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None" = None,
        workload: "autopar.Workload | None" = None,
        clip_norm: float | None = None,
        seed: int = 0,
        device: "torch.device | str | None" = None,
    ) -> "autopar.Trainer":
        """This rank's trainer: ``autopar.apply(plan, model, ...)``, which documents the keywords and the errors."""
        return autopar.apply(
            self, model, optimizer=optimizer, workload=workload, clip_norm=clip_norm, seed=seed, device=device
        )

    def program(self, id: str) -> BlockProgram:
        """The program of that id; KeyError when there is none."""
        for program in self.programs:
            if program.id == id:
                return program
        raise KeyError(id)


def stages_by_submesh(plan: Plan) -> tuple[tuple[StagePlan, ...], ...]:
    """The stages of each submesh, in order of first appearance: one stage each unless interleaved."""
    by_first_device: dict[int, list[StagePlan]] = {}
    for stage in plan.stages:
        by_first_device.setdefault(stage.first_device, []).append(stage)
    return tuple(tuple(stages) for stages in by_first_device.values())


def device_memory(stages: tuple[StagePlan, ...]) -> MemoryParts:
    """Memory of the fullest device of one submesh, whose stages these are."""
    return memory_of_chunks([stage.memory for stage in stages])


def memory_of_chunks(parts: Sequence[MemoryParts]) -> MemoryParts:
    """The memory of one device from that of its chunks: state and saved tensors add up; one chunk at a time has its
    workspace and overlays saved tensors with gradients; what is fixed per device is counted once."""
    busy = max(parts, key=lambda part: part.workspace_bytes - part.overlaid_bytes)
    return MemoryParts(
        parameters_bytes=sum(part.parameters_bytes for part in parts),
        gradients_bytes=sum(part.gradients_bytes for part in parts),
        optimizer_bytes=sum(part.optimizer_bytes for part in parts),
        saved_activations_bytes=sum(part.saved_activations_bytes for part in parts),
        workspace_bytes=busy.workspace_bytes,
        fixed_bytes=max(part.fixed_bytes for part in parts),
        overlaid_bytes=busy.overlaid_bytes,
    )
