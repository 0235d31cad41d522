"""The nouns of a plan: what a file holds, typed and frozen. No tensors, no code; unknown fields are refused.

A plan says, for every stage, which consecutive blocks it runs on which run of devices under which logical mesh, and for
every block which *program* it follows: the placements of each op's tensors and of each parameter. Blocks alike share
one program, so a plan of 96 equal layers is as small as one of 12.

Placements are texts of ``placement.parse_placements``, one per axis of the stage that runs the program. Times are
seconds, sizes bytes (integers); ``micro_batch_size`` counts samples over all ranks of a stage.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import msgspec

import autopar
from autopar.core.dtypes import ShortDtype
from autopar.core.mesh_axis import Axis

if TYPE_CHECKING:
    import torch
    from torch import nn

FORMAT_VERSION = "1.0"

Recompute = Literal["none", "selective", "full"]
Schedule = Literal["1f1b", "gpipe", "interleaved"]
Scalar = bool | int | float | str | None


class PlanStruct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the nouns in the file: frozen and strict about unknown fields."""


class OpPlan(PlanStruct, frozen=True, kw_only=True):
    """One op of a block: placements of each tensor input and output, in the order of ``graph.ir.Op``.

    ``input_gradients`` say how the op's backward leaves the gradient of each input, ``output_gradients`` how it takes
    that of each output; "" where there is none. An ``R`` input of an op that is sharded on an axis has gradient
    ``P``. Inputs (positions) in ``gathers_again`` are kept for the backward as they were cut before they were gathered,
    and gathered again there."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    input_gradients: tuple[str, ...] = ()
    output_gradients: tuple[str, ...] = ()
    regathered: tuple[int, ...] = msgspec.field(default=(), name="gathers_again")


class ValuePlan(PlanStruct, frozen=True, kw_only=True):
    """How an activation lies between ops, and its gradient ("" where it has none); ``name`` is that of the value in the
    first block of the program's kind."""

    name: str
    placement: str
    gradient: str


class ParameterPlan(PlanStruct, frozen=True, kw_only=True):
    """One parameter or buffer of a block: placements as the ops use it (``compute``), and at rest.

    ZeRO is where these differ: stage 1 cuts ``optimizer`` over the data axis, 2 also ``gradient``, 3 all.
    ``name`` is the first of the parameter's fully qualified names in the first block that follows the program."""

    name: str
    compute: str
    parameter: str
    gradient: str
    optimizer: str


class BlockProgram(PlanStruct, frozen=True, kw_only=True):
    """How blocks of one ``kind`` run: ``ops`` and ``parameters`` align by position with those of each such block.

    ``inputs`` and ``outputs`` are the block's own, as they lie where blocks meet. ``shared`` are the activations that
    several readers (ops, or the block's end) take: each is brought to this placement once, and from there to every
    other placement that some reader wants."""

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
    flight; ``workspace_bytes`` is what passes at the peak; ``fixed_bytes`` is what torch's allocator does not count
    (context, communication buffers, fragmentation). While a backward frees saved tensors, block by block, and a single
    micro-batch's gradients come, neither all of the one nor all of the other are there: ``overlaid_bytes`` are counted
    above and are not there at the peak."""

    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    saved_activations_bytes: int
    workspace_bytes: int
    fixed_bytes: int
    overlaid_bytes: int = 0

    @property
    def state_bytes(self) -> int:
        return self.parameters_bytes + self.gradients_bytes + self.optimizer_bytes

    @property
    def tensor_bytes(self) -> int:
        """All but ``fixed_bytes``: what torch's allocator counts."""
        return self.state_bytes + self.saved_activations_bytes + self.workspace_bytes - self.overlaid_bytes

    @property
    def total(self) -> int:
        return self.tensor_bytes + self.fixed_bytes


class StagePlan(PlanStruct, frozen=True, kw_only=True):
    """Consecutive blocks on devices ``first_device <= d < first_device + num_devices`` laid out as ``axes`` (outermost
    first, the last axis over neighbouring devices). With an interleaved schedule a run of devices owns one stage per
    ``chunk``. Seconds are per micro-batch, but ``step_s`` (exposed work once per step) is per step; the two sends are
    the transfers to the next stage and of the gradient to the previous one. ``in_flight`` counts the micro-batches
    whose activations are held at the peak."""

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
    collective to its total, hidden or not; ``exposed_communication_s`` is what compute does not hide."""

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
    """A line of where a step goes on the devices of the busiest stage, seconds per step: all that ``kind`` takes, and
    what nothing else hides; the ``exposed_s`` of all items add up to the step time. Collectives say over which mesh
    ``axes`` and ``of`` what they are."""

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
    """What the cost model says of a plan. ``peak_memory_bytes`` is all that the fullest device holds, against
    ``budget_bytes``; ``peak_tensor_bytes`` is torch's part of it. ``flops_per_step`` counts matmul and full attention,
    forward and backward, without recompute; ``mfu`` = that / (step time x GPUs x dense peak of the dtype).
    The low and high ends are of 90 % intervals from measured runs; 0 where none was made. ``flops_by_kind`` says
    which arithmetic they are; ``items`` are what the step is made of, empty where the judge could not follow the plan.

    ``provenance`` counts the priced terms of the slowest stage by what stands behind them, ``provenance_s`` their
    seconds per step, hidden or not: "measured" (inside a measured table), "modelled" (a formula, or a sibling's table
    scaled),
    "extrapolated" (outside its table)."""

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


class SearchOutcome(PlanStruct, frozen=True, kw_only=True):
    """How the plan was found. ``lower_bound_s`` bounds every plan of the space that was searched, ``gap`` is the
    relative distance of the step time from it. A manual layout leaves nothing to search: "fixed", gap 0."""

    seconds: float
    status: Literal["optimal", "feasible", "fixed"]
    lower_bound_s: float
    gap: float
    runner_up: str | None = None


class Execution(PlanStruct, frozen=True, kw_only=True):
    """What the price assumes about the software, as a layout's keys say it. ``checkpoint``: full recomputation runs
    again what the backward needs, or the whole block. ``selective``: selective recomputation runs attention again, or all
    but it and every second product with a weight. ``loss``: the cross entropy is the program's, its
    chain of kernels over a cut vocabulary whether it is cut or not, or PyTorch's own."""

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
    """A whole plan; ``invariants.check`` says what holds between its parts. ``num_chunks`` is 1 unless interleaved;
    ``recompute`` is "mixed" when programs differ; ``notes`` is what the user should know (ops replicated for want of a
    rule, a padded vocabulary); ``command`` is how it was made."""

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
        """This rank's trainer: ``autopar.apply(plan, model, ...)``, whose documentation says what the keywords mean."""
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
    """The stages of each run of devices, in order of first appearance: one stage a run unless interleaved."""
    runs: dict[int, list[StagePlan]] = {}
    for stage in plan.stages:
        runs.setdefault(stage.first_device, []).append(stage)
    return tuple(tuple(stages) for stages in runs.values())


def device_memory(stages: tuple[StagePlan, ...]) -> MemoryParts:
    """Memory of the fullest device of one run."""
    return memory_of_chunks([stage.memory for stage in stages])


def memory_of_chunks(parts: Sequence[MemoryParts]) -> MemoryParts:
    """What the chunks of one device hold together: state and saved tensors add up; one chunk at a time has its
    workspace and less than all its saved tensors; what is fixed per device is there once."""
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


def recompute_summary(programs: tuple[BlockProgram, ...]) -> Literal["none", "selective", "full", "mixed"]:
    """The one word for how blocks recompute. Blocks without attention (embedding, head) have nothing to gain, so "none"
    beside one other choice does not make it mixed.

    >>> recompute_summary(())
    'none'
    """
    chosen = {program.recompute for program in programs} - {"none"}
    if not chosen:
        return "none"
    return chosen.pop() if len(chosen) == 1 else "mixed"
