"""Plan files come back as they were or are refused, and every contradiction between a plan's parts is named."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from autopar.core.errors import PlanFileError
from autopar.core.invariants import INVARIANTS, check_plan
from autopar.core.mesh_axis import Axis
from autopar.core.plan import Plan
from autopar.core.plan_file import load_plan, save_plan
from tests.unit.sample_plan import GIB, embedding, estimate, head, layer, sample_plan

changed = msgspec.structs.replace


def test_a_plan_comes_back_from_its_file_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "gpt.plan.json"
    save_plan(sample_plan(), path)
    assert load_plan(path) == sample_plan()
    assert json.loads(path.read_text())["format_version"] == "1.0"
    assert os.listdir(tmp_path) == ["gpt.plan.json"]


def edited(path: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    save_plan(sample_plan(), path)
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))
    return path


def test_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    save_plan(sample_plan(), path)
    content = path.read_bytes().rstrip()
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(PlanFileError, match="torn or no JSON"):
            load_plan(path)


def test_bad_files_are_refused_in_a_few_lines(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    cases: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
        (lambda d: d.update(format_version="2.0"), "has plan format '2.0', this autopar reads '1.0'"),
        (lambda d: d.update(format_version="2.0", stages="?"), "has plan format '2.0'"),
        (lambda d: d.pop("format_version"), "no format_version"),
        (lambda d: d.update(colour="red"), "unknown field `colour`"),
        (lambda d: d["stages"][1]["memory"].update(disk_bytes=1), "unknown field `disk_bytes`"),
        (lambda d: d.pop("search"), "missing required field `search`"),
        (lambda d: d.update(gpus="8"), "Expected `int`, got `str`"),
        (lambda d: d.update(schedule="zero-bubble"), "Invalid enum value 'zero-bubble'"),
        (lambda d: d["stages"][0]["axes"][0].update(size=0), "mesh axis dp has size 0"),
        (lambda d: d.update(global_batch=33), "batch-product: 8 micro-batches of 4 samples"),
    ]
    for edit, message in cases:
        with pytest.raises(PlanFileError, match=re.escape(message)) as raised:
            load_plan(edited(path, edit))
        assert len(str(raised.value).splitlines()) <= 3
        assert str(path) in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"\x80\x04\x95pickle", b"[1, 2]", b"null", b"[" * 100_000, b"\xff\xfe{"])
def test_other_content_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(content)
    with pytest.raises(PlanFileError):
        load_plan(path)


def test_a_missing_file_or_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanFileError, match="No such file"):
        load_plan(tmp_path / "none.json")
    with pytest.raises(PlanFileError, match="Is a directory"):
        load_plan(tmp_path)
    with pytest.raises(PlanFileError, match="cannot write"):
        save_plan(sample_plan(), tmp_path / "no" / "p.json")


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.json"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(PlanFileError, match="No space left"):
        save_plan(sample_plan(), path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["p.json"]


def test_an_unsound_plan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(PlanFileError, match="batch-product"):
        save_plan(sample_plan(global_batch=31), tmp_path / "p.json")
    assert os.listdir(tmp_path) == []


def test_kill_leaves_a_complete_file(tmp_path: Path) -> None:
    """A writer that is killed at any moment leaves a complete plan."""
    path = tmp_path / "p.json"
    save_plan(sample_plan(), path)
    program = (
        "import sys; from autopar.core.plan_file import load_plan, save_plan\n"
        "plan = load_plan(sys.argv[1]); print('go', flush=True)\n"
        "while True: save_plan(plan, sys.argv[1])"
    )
    for delay_s in (0.01, 0.017, 0.031):
        writer = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE)
        with writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"go\n"
            time.sleep(delay_s)
            writer.send_signal(signal.SIGKILL)
        assert load_plan(path) == sample_plan()


def with_stage(position: int, **changes: Any) -> Plan:
    plan = sample_plan()
    stages = list(plan.stages)
    stages[position] = changed(stages[position], **changes)
    return changed(plan, stages=tuple(stages))


def interleaved(**changes: Any) -> Plan:
    """The sample's blocks as 4 chunks on 2 runs: chunks 0 and 2 on GPU 0-3, chunks 1 and 3 on GPU 4-7."""
    plan = sample_plan()
    blocks = [block for stage in plan.stages for block in stage.blocks]
    parts = (blocks[:2], blocks[2:3], blocks[3:4], blocks[4:])
    small = changed(plan.stages[0].memory, workspace_bytes=0, fixed_bytes=0)
    stages = tuple(
        changed(plan.stages[i % 2], blocks=tuple(part), chunk=i // 2, forward_s=0.03, backward_s=0.06, memory=small)
        for i, part in enumerate(parts)
    )
    peak = 2 * (2 + 2 + 3 + 2) * GIB  # two chunks of the same memory on each device
    figures = estimate(peak_memory_bytes=peak, peak_tensor_bytes=peak, budget_bytes=20 * GIB)
    return changed(plan, schedule="interleaved", num_chunks=2, stages=stages, estimate=figures, **changes)


def test_sound_plans_pass() -> None:
    check_plan(sample_plan())
    check_plan(interleaved())


def with_estimate(**changes: Any) -> Plan:
    return sample_plan(estimate=estimate(**changes))


def with_search(**changes: Any) -> Plan:
    return changed(sample_plan(), search=changed(sample_plan().search, **changes))


def wrong_plans() -> dict[str, tuple[str, Plan]]:
    """For each way of being wrong: the invariant that must be named, and a plan that is wrong so."""
    plan = sample_plan()
    first = plan.stages[0]
    blocks = first.blocks
    parameter = layer().parameters[0]
    other_collective = changed(plan.estimate.collectives[0], stage=2)
    lost_axis = changed(plan.estimate.collectives[0], axes=("ep",))
    swapped = tuple(interleaved().stages[i] for i in (0, 1, 3, 2))
    renumbered = [block for stage in swapped for block in stage.blocks]
    return {
        "nan": ("numbers-finite", with_estimate(mfu=float("nan"))),
        "infinite": ("numbers-finite", with_stage(0, step_s=float("inf"))),
        "negative": ("numbers-finite", with_stage(0, forward_s=-0.01)),
        "version": ("format-version", changed(plan, format_version="0.9")),
        "block missing": ("blocks-covering", with_stage(0, blocks=blocks[:-1])),
        "block twice": ("blocks-covering", with_stage(0, blocks=(*blocks, blocks[-1]))),
        "blocks swapped": ("blocks-covering", with_stage(0, blocks=(blocks[1], blocks[0], blocks[2]))),
        "empty stage": ("blocks-covering", with_stage(1, blocks=())),
        "no stage": ("blocks-covering", changed(plan, stages=())),
        "no GPU": ("devices-covering", changed(plan, gpus=0)),
        "GPU idle": ("devices-covering", changed(plan, gpus=9)),
        "GPU hole": ("devices-covering", with_stage(1, first_device=5)),
        "GPU shared": ("devices-covering", with_stage(1, first_device=3)),
        "axes": ("axes-product", with_stage(0, axes=(Axis(name="dp", size=4), Axis(name="tp", size=2)))),
        "axis twice": ("axes-product", with_stage(0, axes=(Axis(name="dp", size=2), Axis(name="dp", size=2)))),
        "batch": ("batch-product", changed(plan, microbatches=7)),
        "no program": ("programs-exist", changed(plan, programs=(embedding(), layer()))),
        "idle program": ("programs-exist", changed(plan, programs=(*plan.programs, changed(head(), id="x")))),
        "program twice": ("programs-exist", changed(plan, programs=(*plan.programs, head()))),
        "third axis": (
            "placements-per-axis",
            with_stage(0, axes=(*first.axes, Axis(name="cp", size=1))),
        ),
        "no placement": (
            "placements-per-axis",
            changed(
                plan, programs=(embedding(), changed(layer(), parameters=(changed(parameter, compute="RX"),)), head())
            ),
        ),
        "partial parameter": (
            "parameters-not-partial",
            changed(
                plan,
                programs=(embedding(), changed(layer(), parameters=(changed(parameter, parameter="PR"),)), head()),
            ),
        ),
        "recompute": ("recompute-summary", changed(plan, recompute="full")),
        "chunks without interleaving": ("schedule-chunks", changed(plan, num_chunks=2)),
        "stages share GPUs": ("schedule-chunks", with_stage(1, first_device=0)),
        "one chunk interleaved": ("schedule-chunks", changed(plan, schedule="interleaved")),
        "chunks out of turn": (
            "schedule-chunks",
            changed(
                interleaved(),
                stages=tuple(
                    changed(stage, blocks=tuple(changed(b, index=renumbered.index(b)) for b in stage.blocks))
                    for stage in swapped
                ),
            ),
        ),
        "odd micro-batches": ("schedule-chunks", interleaved(microbatches=1, micro_batch_size=32)),
        "nothing in flight": ("in-flight", with_stage(1, in_flight=0)),
        "more in flight than there is": ("in-flight", with_stage(0, in_flight=9)),
        "peak memory": ("memory-sums", with_estimate(peak_memory_bytes=10 * GIB)),
        "peak tensors": ("memory-sums", with_estimate(peak_tensor_bytes=11 * GIB)),
        "fits": ("fits-budget", with_estimate(fits=False)),
        "does not fit": ("fits-budget", with_estimate(budget_bytes=11 * GIB - 1)),
        "busier than the step": ("step-time", with_stage(1, backward_s=0.2)),
        "no time": ("step-time", with_estimate(step_time_s=0.0)),
        "rate": ("step-time", with_estimate(samples_per_s=17.0)),
        "mfu": ("step-time", with_estimate(mfu=1.2)),
        "exposed": ("step-time", with_estimate(exposed_communication_s=0.5)),
        "bound above": ("search-bound", with_search(lower_bound_s=2.1, gap=0.0)),
        "gap": ("search-bound", with_search(gap=0.01)),
        "optimal with a gap": ("search-bound", with_search(status="optimal")),
        "collective of no stage": ("collectives-known", with_estimate(collectives=(other_collective,))),
        "collective on no axis": ("collectives-known", with_estimate(collectives=(lost_axis,))),
    }


@pytest.mark.parametrize("case", wrong_plans())
def test_each_way_of_being_wrong_is_named(case: str) -> None:
    name, plan = wrong_plans()[case]
    with pytest.raises(PlanFileError, match=rf"(?m)^  - {name}: "):
        check_plan(plan)


def test_every_invariant_has_a_wrong_plan() -> None:
    named = {name for name, _ in wrong_plans().values()}
    assert named == {i.__name__.strip("_").replace("_", "-") for i in INVARIANTS} | {"numbers-finite"}


def test_all_violations_are_listed() -> None:
    with pytest.raises(PlanFileError) as raised:
        check_plan(changed(sample_plan(), gpus=9, global_batch=31))
    assert "devices-covering" in str(raised.value)
    assert "batch-product" in str(raised.value)
