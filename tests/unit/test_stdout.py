"""Only the result reaches stdout: complete processes, with a model that writes wherever it can."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from autopar.core.plan_file import save_plan
from tests.unit.sample_plan import sample_plan

MODEL = """
import atexit, ctypes, os, sys, threading
import torch
from torch import nn

GLOBAL_BATCH = 8
C = ctypes.CDLL(None)

def noise(where):
    print("python", where)
    os.write(1, f"descriptor {where}\\n".encode())
    C.printf(f"C {where}\\n".encode())  # stays in C's buffer, which is written at exit

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)) for _ in range(4))

    def forward(self, x):
        noise("forward")
        for layer in self.layers:
            x = x + layer(x)
        return x.pow(2).mean()

def build_model():
    noise("build_model")
    os.system("echo child")
    return Net()

def example_inputs(batch_size):
    noise("example_inputs")
    return {"x": torch.empty(batch_size, 16)}

noise("import")
atexit.register(noise, "exit")
threading.Thread(target=noise, args=("thread",)).start()
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "noisy.py"
    path.write_text(MODEL)
    return path


def shell(*words: str, cwd: Path, redirection: str = "") -> subprocess.CompletedProcess[str]:
    line = f'"{sys.executable}" -m autopar ' + " ".join(words) + redirection
    return subprocess.run(["bash", "-c", line], cwd=cwd, capture_output=True, text=True, check=False)


SMALL = ("--gpus 4 --cluster cpu-gloo --dtype fp32",)


def test_a_plan_as_json_is_one_document_whatever_solver_and_model_print(model: Path) -> None:
    done = shell("plan", model.name, *SMALL, "--memory 0.001 --json -q", cwd=model.parent)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["plan"] == "noisy.plan.json"
    for writer in ("python", "descriptor", "C"):
        for where in ("import", "build_model", "example_inputs", "forward", "exit", "thread"):
            assert f"{writer} {where}\n" in done.stderr
    assert "HiGHS" not in done.stderr


def test_an_error_as_json_is_one_document(model: Path) -> None:
    done = shell("plan", model.name, *SMALL, "--set depth=3 --json", cwd=model.parent)
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["code"] == 2
    assert "python import" in done.stderr


def test_text_has_nothing_of_the_models(model: Path) -> None:
    done = shell("estimate", model.name, *SMALL, "--layout dp=4 -q", cwd=model.parent)
    assert done.stdout.startswith("model ")
    for writer in ("python ", "descriptor ", "C ", "child"):
        assert not any(line.startswith(writer) for line in done.stdout.splitlines())


@pytest.mark.parametrize("redirection", [" >&-", " 2>&-", " >&- 2>&-"])
def test_a_closed_descriptor_is_no_error(tmp_path: Path, redirection: str) -> None:
    save_plan(sample_plan(), tmp_path / "p.json")
    done = shell("show p.json", cwd=tmp_path, redirection=redirection)
    assert done.returncode == 0
    assert bool(done.stdout) == (">&-" not in redirection.replace("2>&-", ""))
    assert not done.stderr


def test_a_full_disk_is_a_short_error(tmp_path: Path) -> None:
    save_plan(sample_plan(), tmp_path / "p.json")
    for words in ("show p.json", "show p.json --json", "cluster list --json", "--help"):
        done = shell(words, cwd=tmp_path, redirection=" >/dev/full")
        assert done.returncode == 6
        assert done.stderr == "autopar: cannot write to stdout: No space left on device\n"


def test_help_and_version_go_to_stdout(tmp_path: Path) -> None:
    for words in (["--help"], ["plan", "--help"], ["--version"]):
        done = shell(*words, cwd=tmp_path)
        assert done.returncode == 0
        assert done.stdout
        assert not done.stderr


def test_a_training_script_keeps_its_stdout(tmp_path: Path) -> None:
    """``run --exec`` becomes torchrun, whose stdout is the user's."""
    save_plan(sample_plan(), tmp_path / "p.json")
    (tmp_path / "torchrun").write_text("#!/bin/sh\necho launched\n")
    (tmp_path / "torchrun").chmod(0o755)
    path_first = (
        f'PATH="{tmp_path}:$PATH" "{sys.executable}" -m autopar run p.json --ranks-per-node 8 --exec -- train.py'
    )
    done = subprocess.run(["bash", "-c", path_first], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "launched\n", done.stderr


def test_a_search_in_a_library_call_prints_nothing(tmp_path: Path) -> None:
    """Solvers print to descriptor 1, also where autopar is not the program."""
    quiet = MODEL.replace('    print("python", where)', "    return")
    (tmp_path / "net.py").write_text(quiet.replace('os.system("echo child")', ""))
    code = (
        "import autopar\n"
        "workload = autopar.load_workload('net.py')\n"
        "autopar.plan(workload, cluster='cpu-gloo', gpus=4, dtype='fp32', global_batch=8, memory_gib=0.001)\n"
        "print('mine')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "mine\n"
