"""`examples/train_gpt.py` under torchrun: one process's losses under any plan, and on from its checkpoint after a kill."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from autopar.core.plan_file import save_plan
from autopar.workload.model_file import load_workload
from tests.distributed.plans import layout_plan

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SIZES = {"layers": 2, "hidden": 64, "heads": 4, "vocab": 256, "seq": 64}


def plan_file(folder: Path, layout: str) -> Path:
    """A plan of a small byte-level GPT in a file."""
    path = folder / f"{layout}.plan.json"
    save_plan(layout_plan(load_workload(str(EXAMPLES / "gpt.py"), **SIZES), layout), path)
    return path


def started(plan: Path, *options: str, restarts: int = 0) -> subprocess.Popen[str]:
    """torchrun on the example, as `autopar run` starts it."""
    words = [sys.executable, "-m", "autopar", "run", str(plan), "--exec", "--max-restarts", str(restarts)]
    words += ["--", str(EXAMPLES / "train_gpt.py"), *options]
    here = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": here, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)


def losses(process: subprocess.Popen[str]) -> Iterator[tuple[int, float]]:
    """(step, nats per byte) as they are printed, until the process ends."""
    with process:
        for line in process.stdout or ():
            if line.startswith("step "):
                step, _, rest = line.removeprefix("step ").partition(": ")
                yield int(step), float(rest.split()[0])


def workers(launcher: int) -> list[int]:
    """The processes that a launcher started, by /proc."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):  # it ended meanwhile
            continue
        if parent == launcher:
            found.append(int(status.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp=2,tp=2,mbs=2,zero=1,sp=1", "dp=2,pp=2,mbs=1,zero=3,recompute=full"])
def test_first_losses_are_those_of_one_process(layout: str, tmp_path: Path) -> None:
    alone, shared = (
        dict(losses(started(plan_file(tmp_path, which), "--steps", "20"))) for which in ("dp=1,mbs=8", layout)
    )
    assert len(alone) == 20
    assert shared == pytest.approx(alone, abs=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the ranks by /proc")
def test_a_killed_rank_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    options = ("--steps", "20", "--save-every", "5", "--checkpoint", str(tmp_path / "checkpoint"))
    process = started(plan_file(tmp_path, "dp=2,mbs=2"), *options, restarts=2)
    seen: list[tuple[int, float]] = []
    for step, loss in losses(process):
        seen.append((step, loss))
        if len(seen) == 12:
            os.kill(workers(process.pid)[0], signal.SIGKILL)
    assert process.returncode == 0
    steps = [step for step, _ in seen]
    assert steps[-1] == 20
    restart = next(at for at in range(1, len(seen)) if steps[at] <= steps[at - 1])
    assert steps[restart] in (6, 11, 16), "it goes on from a checkpoint"
    before = dict(seen[:restart])
    for step, loss in seen[restart:]:
        assert step not in before or loss == pytest.approx(before[step], abs=1e-4)
