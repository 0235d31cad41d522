"""The invariants of a plan, by name, and the check of all of them at once.

Each function below yields what violates the invariant that it is named after; ``INVARIANTS`` lists them. Nothing here
depends on how a plan was found: the question is whether the parts of one plan agree with each other.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal

import msgspec

from autopar.core.errors import PlanFileError
from autopar.core.mesh_axis import num_ranks
from autopar.core.placement import PARTIAL, parse_placements
from autopar.core.plan import (
    FORMAT_VERSION,
    BlockProgram,
    Plan,
    StagePlan,
    device_memory,
    stages_by_submesh,
)

RELATIVE_TOLERANCE = 1e-6
MAX_LISTED = 20


def check_plan(plan: Plan) -> None:
    """PlanFileError with a line ``name: what`` for each violated invariant, at most ``MAX_LISTED``."""
    violations = list(_numbers_finite(msgspec.to_builtins(plan), ""))
    if not violations:  # the other invariants compute with the numbers
        for invariant in INVARIANTS:
            name = invariant.__name__.strip("_").replace("_", "-")
            violations.extend(f"{name}: {what}" for what in invariant(plan))
    if violations:
        more = len(violations) - MAX_LISTED
        listed = violations[:MAX_LISTED] + ([f"... and {more} more"] if more > 0 else [])
        raise PlanFileError("the plan contradicts itself:\n" + "\n".join(f"  - {line}" for line in listed))


def _numbers_finite(node: Any, path: str) -> Iterator[str]:
    """Every number is finite and not negative (settings and overrides, which are the user's, excepted)."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key not in ("settings", "overrides"):
                yield from _numbers_finite(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list | tuple):
        for position, value in enumerate(node):
            yield from _numbers_finite(value, f"{path}[{position}]")
    elif isinstance(node, int | float) and not (math.isfinite(node) and node >= 0):
        yield f"numbers-finite: {path} is {node}"


def _format_version(plan: Plan) -> Iterator[str]:
    """The plan has the format that this version reads."""
    if plan.format_version != FORMAT_VERSION:
        yield f"{plan.format_version!r} is not {FORMAT_VERSION!r}"


def _blocks_covering(plan: Plan) -> Iterator[str]:
    """Stage by stage, the blocks are 0, 1, 2, ... without a gap, and no stage is empty."""
    if not plan.stages:
        yield "there is no stage"
    for position, stage in enumerate(plan.stages):
        if not stage.blocks:
            yield f"stage {position} has no block"
    indices = [block.index for stage in plan.stages for block in stage.blocks]
    for expected, index in enumerate(indices):
        if index != expected:
            yield f"block {index} stands where block {expected} belongs"
            return


def _devices_covering(plan: Plan) -> Iterator[str]:
    """The submeshes are disjoint and cover devices 0 .. gpus - 1."""
    if plan.gpus < 1:
        yield f"{plan.gpus} GPUs; the least is 1"
    next_device = 0
    for first, size in sorted({(stage.first_device, stage.num_devices) for stage in plan.stages}):
        if first != next_device:
            what = "overlap another stage" if first < next_device else f"leave GPU {next_device} to nobody"
            yield f"GPUs {first}..{first + size - 1} {what}"
        next_device = max(next_device, first + size)
    if next_device != plan.gpus:
        yield f"the stages end at GPU {next_device - 1}, the plan has {plan.gpus} GPUs"


def _axes_product(plan: Plan) -> Iterator[str]:
    """A stage's axis sizes multiply to its devices, and its axes have different names."""
    for position, stage in enumerate(plan.stages):
        if num_ranks(stage.axes) != stage.num_devices:
            text = " x ".join(f"{axis.name} {axis.size}" for axis in stage.axes) or "no axis"
            yield f"stage {position} has {stage.num_devices} GPUs but {text}"
        names = [axis.name for axis in stage.axes]
        if len(set(names)) != len(names):
            yield f"stage {position} names two axes alike: {', '.join(names)}"


def _batch_product(plan: Plan) -> Iterator[str]:
    """Micro-batches times their size are the global batch."""
    if plan.microbatches < 1 or plan.microbatches * plan.micro_batch_size != plan.global_batch:
        yield (
            f"{plan.microbatches} micro-batches of {plan.micro_batch_size} samples are not "
            f"the global batch of {plan.global_batch}"
        )


def _programs_exist(plan: Plan) -> Iterator[str]:
    """Program ids differ, every block's program is there, and every program is some block's."""
    counts = Counter(program.id for program in plan.programs)
    for id, count in counts.items():
        if count > 1:
            yield f"{count} programs are named {id!r}"
    used = {block.program for stage in plan.stages for block in stage.blocks}
    for id in sorted(used - set(counts)):
        yield f"a block follows program {id!r}, which is not there"
    for id in sorted(set(counts) - used):
        yield f"no block follows program {id!r}"


def _placements_per_axis(plan: Plan) -> Iterator[str]:
    """Every text of placements is valid and has one placement for each axis of the stages that run its program."""
    texts = {program.id: _placement_texts(program) for program in plan.programs}
    lengths: dict[str, dict[str, int]] = {}
    for id, placements in texts.items():
        lengths[id] = {}
        for text in sorted(placements):
            try:
                lengths[id][text] = len(parse_placements(text))
            except ValueError as error:
                yield f"program {id!r}: {error}"
    seen: set[tuple[str, int]] = set()
    for position, stage in enumerate(plan.stages):
        for id in {block.program for block in stage.blocks} & set(texts):
            if (id, len(stage.axes)) in seen:
                continue
            seen.add((id, len(stage.axes)))
            for text, length in lengths[id].items():
                if length != len(stage.axes):
                    yield f"program {id!r} has placement {text!r} on the {len(stage.axes)} axes of stage {position}"


def _placement_texts(program: BlockProgram) -> set[str]:
    """All texts of placements in a program; "" (no gradient) excepted."""
    texts = {text for op in program.ops for text in (*op.inputs, *op.outputs)}
    texts |= {text for p in program.parameters for text in (p.compute, p.parameter, p.gradient, p.optimizer)}
    values = (*program.inputs, *program.outputs, *program.shared)
    gradients = {text for op in program.ops for text in (*op.input_gradients, *op.output_gradients)}
    gradients |= {value.gradient for value in values}
    return texts | {value.placement for value in values} | (gradients - {""})


def _parameters_not_partial(plan: Plan) -> Iterator[str]:
    """No parameter, as ops use it or as it is stored, and no optimizer state is partial."""
    for program in plan.programs:
        for parameter in program.parameters:
            for role in ("compute", "parameter", "optimizer"):
                if _has_partial(getattr(parameter, role)):
                    yield f"program {program.id!r}: {role} of {parameter.name} is {getattr(parameter, role)!r}"


def _has_partial(text: str) -> bool:
    """Whether a text of placements has a partial one; False for an invalid text."""
    try:
        return PARTIAL in parse_placements(text)
    except ValueError:  # which _placements_per_axis lists
        return False


def recompute_summary(programs: tuple[BlockProgram, ...]) -> Literal["none", "selective", "full", "mixed"]:
    """The one word for how blocks recompute. Blocks without attention (embedding, head) gain nothing by it, so "none"
    next to one other mode is not "mixed".

    >>> recompute_summary(())
    'none'
    """
    chosen = {program.recompute for program in programs} - {"none"}
    if not chosen:
        return "none"
    return chosen.pop() if len(chosen) == 1 else "mixed"


def _recompute_summary(plan: Plan) -> Iterator[str]:
    """The plan's word for its recomputation is that of its programs."""
    summary = recompute_summary(plan.programs)
    if plan.recompute != summary:
        yield f"the plan says {plan.recompute!r}, its programs {summary!r}"


def _schedule_chunks(plan: Plan) -> Iterator[str]:
    """One chunk unless interleaved; interleaved submeshes have equal sizes and own stages in turn, chunk by chunk, and the
    number of micro-batches is a multiple of theirs."""
    submeshes = stages_by_submesh(plan)
    if plan.schedule != "interleaved":
        if plan.num_chunks != 1 or any(stage.chunk for stage in plan.stages):
            yield f"schedule {plan.schedule} has one chunk a device, the plan {plan.num_chunks}"
        if len(submeshes) != len(plan.stages):
            yield f"{len(plan.stages)} stages share {len(submeshes)} submeshes without an interleaved schedule"
        return
    if plan.num_chunks < 2 or len(plan.stages) != len(submeshes) * plan.num_chunks:
        yield f"{len(plan.stages)} stages are not {plan.num_chunks} chunks (at least 2) on each of {len(submeshes)} submeshes"
        return
    if plan.microbatches % len(submeshes):
        yield f"{plan.microbatches} micro-batches are no multiple of {len(submeshes)} interleaved submeshes"
    if len({stage.num_devices for stage in plan.stages}) > 1:
        yield "interleaved stages have unequal numbers of GPUs"
    for position, stage in enumerate(plan.stages):
        submesh, chunk = submeshes[position % len(submeshes)], position // len(submeshes)
        if stage.chunk != chunk or stage.first_device != submesh[0].first_device:
            yield f"stage {position} belongs to chunk {chunk} on GPU {submesh[0].first_device}"


def _in_flight(plan: Plan) -> Iterator[str]:
    """A stage has at least one micro-batch in flight and never more than there are."""
    for position, stage in enumerate(plan.stages):
        if not 1 <= stage.in_flight <= plan.microbatches:
            yield f"stage {position} has {stage.in_flight} of {plan.microbatches} micro-batches in flight"


def _memory_sums(plan: Plan) -> Iterator[str]:
    """The estimate's peaks are those of the fullest device."""
    devices = [device_memory(stages) for stages in stages_by_submesh(plan)]
    peaks = (
        ("peak_memory_bytes", plan.estimate.peak_memory_bytes, max((d.total for d in devices), default=0)),
        ("peak_tensor_bytes", plan.estimate.peak_tensor_bytes, max((d.tensor_bytes for d in devices), default=0)),
    )
    for name, said, summed in peaks:
        if not _close(said, summed):
            yield f"{name} is {said}, the parts of the fullest device sum to {summed}"


def _fits_budget(plan: Plan) -> Iterator[str]:
    """``fits`` says whether the peak is within the budget."""
    estimate = plan.estimate
    if estimate.fits != (estimate.peak_memory_bytes <= estimate.budget_bytes):
        yield f"fits is {estimate.fits} with {estimate.peak_memory_bytes} of {estimate.budget_bytes} bytes"


def _step_time(plan: Plan) -> Iterator[str]:
    """The step lasts at least as long as the busiest device, and the rates follow from it."""
    estimate = plan.estimate
    if estimate.step_time_s <= 0:
        yield f"step_time_s is {estimate.step_time_s}"
        return
    busy = max((_busy_s(stages, plan.microbatches) for stages in stages_by_submesh(plan)), default=0.0)
    if busy > estimate.step_time_s * (1 + RELATIVE_TOLERANCE):
        yield f"a device is busy for {busy} s of a step of {estimate.step_time_s} s"
    samples_per_s = plan.global_batch / estimate.step_time_s
    if not _close(estimate.samples_per_s, samples_per_s):
        yield f"samples_per_s is {estimate.samples_per_s}, global batch / step time is {samples_per_s}"
    for name, fraction in (("mfu", estimate.mfu), ("bubble_fraction", estimate.bubble_fraction)):
        if fraction > 1:
            yield f"{name} is {fraction}"
    if not _close(estimate.exposed_communication_s, estimate.time.exposed_communication_s):
        yield (
            f"exposed_communication_s is {estimate.exposed_communication_s}, "
            f"its part of the time is {estimate.time.exposed_communication_s}"
        )


def _busy_s(stages: tuple[StagePlan, ...], microbatches: int) -> float:
    """Seconds that a device computes in a step: its chunks run one after the other."""
    return microbatches * math.fsum(stage.forward_s + stage.backward_s for stage in stages)


def _search_bound(plan: Plan) -> Iterator[str]:
    """The lower bound is not above the step time, the gap is their relative distance, and no optimal plan has a gap."""
    search, step_time_s = plan.search, plan.estimate.step_time_s
    if search.lower_bound_s > step_time_s * (1 + RELATIVE_TOLERANCE):
        yield f"lower bound {search.lower_bound_s} s is above the step time {step_time_s} s"
    gap = max(0.0, 1 - search.lower_bound_s / step_time_s) if step_time_s > 0 else 0.0
    if abs(search.gap - gap) > max(RELATIVE_TOLERANCE, RELATIVE_TOLERANCE * gap):
        yield f"gap is {search.gap}, (step time - bound) / step time is {gap}"
    if search.status != "feasible" and search.gap > OPTIMAL_GAP:
        yield f"status {search.status} with a gap of {search.gap}"


def _collectives_known(plan: Plan) -> Iterator[str]:
    """Every collective runs on axes of an existing stage."""
    for collective in plan.estimate.collectives:
        if collective.stage >= len(plan.stages):
            yield f"{collective.kind} of stage {collective.stage}, but there are {len(plan.stages)} stages"
            continue
        known = {axis.name for axis in plan.stages[collective.stage].axes}
        missing = [name for name in collective.axes if name not in known]
        if missing:
            yield f"{collective.kind} of stage {collective.stage} over axis {', '.join(missing)}, which it lacks"


def _close(first: float, second: float) -> bool:
    return math.isclose(first, second, rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-12)


OPTIMAL_GAP = 1e-4  # a solver's own relative tolerance

INVARIANTS: tuple[Callable[[Plan], Iterator[str]], ...] = (
    _format_version,
    _blocks_covering,
    _devices_covering,
    _axes_product,
    _batch_product,
    _programs_exist,
    _placements_per_axis,
    _parameters_not_partial,
    _recompute_summary,
    _schedule_chunks,
    _in_flight,
    _memory_sums,
    _fits_budget,
    _step_time,
    _search_bound,
    _collectives_known,
)
