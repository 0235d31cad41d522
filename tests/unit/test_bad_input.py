"""Bad input through the real command line: a few lines with a remedy, the documented exit code, no partial file."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from autopar.cli.main import run
from tests.conftest import EXAMPLES

torch.set_num_threads(1)
GOOD = """
import torch
from torch import nn

GLOBAL_BATCH = 16

class Model(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU()) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.mean()

def build_model(hidden=64):
    return Model(hidden)

def example_inputs(batch_size, hidden=64):
    return {"x": torch.empty(batch_size, hidden)}
"""
BRANCH = GOOD.replace("            x = layer(x)\n", "            if x.sum() > 0:\n                x = layer(x)\n")
GPT = EXAMPLES / "gpt.py"
TINY_GPT = ("--set", "layers=2", "--set", "hidden=64", "--set", "heads=4", "--set", "vocab=128", "--set", "seq=32")

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line twice, as text and with --json; returns exit code and message. There must be nothing new
    in the folder afterwards."""
    monkeypatch.chdir(tmp_path)

    def bad(*arguments: str) -> tuple[int, str]:
        before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        code = run(arguments)
        text = capsys.readouterr()
        assert text.out == ""
        message = "\n".join(line for line in text.err.splitlines() if line.strip())
        assert "Traceback" not in message
        told = message[message.index("autopar: ") :]
        assert len(told.splitlines()) <= 12, told
        json_code = run((*arguments, "--json"))
        printed = capsys.readouterr()
        error = json.loads(printed.out)["error"]
        assert json_code == code == error["code"]
        assert "Traceback" not in printed.err
        assert error["message"].splitlines()[0] in told
        assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
        return code, told

    return bad


def write(text: str, name: str = "model.py") -> str:
    Path(name).write_text(text)
    return name


@pytest.fixture
def plan_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    monkeypatch.chdir(tmp_path)
    assert run(["plan", write(GOOD), "--gpus", "4", "--layout", "dp=4", "-o", "good.plan.json", "-q"]) == 0
    capsys.readouterr()
    return tmp_path / "good.plan.json"


def test_a_file_without_build_model_is_told_what_to_add(cli: Run) -> None:
    code, told = cli("plan", write("def example_inputs(batch_size):\n    return {}\n"), "--gpus", "8")
    assert code == 3
    assert "model.py has no build_model: add" in told
    assert "def build_model(**settings) -> torch.nn.Module" in told


def test_a_missing_model_file_is_named(cli: Run) -> None:
    code, told = cli("plan", "nowhere.py", "--gpus", "8")
    assert code == 3
    assert "nowhere.py" in told


def test_a_syntax_error_is_shown_with_its_line(cli: Run) -> None:
    code, told = cli("plan", write("def build_model(:\n"), "--gpus", "8")
    assert code == 3
    assert "model.py:1" in told


@pytest.mark.parametrize("place", ["build_model", "example_inputs", "forward", "loss_fn", "import"])
def test_an_exception_of_the_model_is_shown_with_its_line(cli: Run, place: str) -> None:
    wrong = 'raise KeyError("no such thing")'
    text = {
        "build_model": GOOD.replace("return Model(hidden)", wrong),
        "example_inputs": GOOD.replace('return {"x": torch.empty(batch_size, hidden)}', wrong),
        "forward": GOOD.replace("return x.mean()", wrong),
        "loss_fn": GOOD + f"\ndef loss_fn(output, inputs):\n    {wrong}\n",
        "import": GOOD + f"\n{wrong}\n",
    }[place]
    code, told = cli("plan", write(text), "--gpus", "8")
    line = 1 + text.splitlines().index(next(row for row in text.splitlines() if wrong in row))
    assert code == 3
    assert "KeyError: 'no such thing'" in told
    assert f"model.py:{line}" in told


def test_shapes_that_do_not_match_are_shown_with_their_line(cli: Run) -> None:
    code, told = cli(
        "plan", write(GOOD.replace("nn.Linear(hidden, hidden)", "nn.Linear(hidden, hidden + 1)")), "--gpus", "8"
    )
    assert code == 3
    assert "model.py:14" in told


def test_a_model_without_a_scalar_loss_is_told_of_loss_fn(cli: Run) -> None:
    code, told = cli("plan", write(GOOD.replace("return x.mean()", "return x")), "--gpus", "8")
    assert code == 3
    assert "def loss_fn(output, inputs)" in told


def test_data_dependent_control_flow_is_shown_with_a_way_out(cli: Run) -> None:
    code, told = cli("plan", write(BRANCH), "--gpus", "8")
    assert code == 3
    assert "depends on the values of a tensor" in told
    assert "model.py:14: if x.sum() > 0:" in told
    assert "torch.where" in told


def test_an_unknown_cluster_lists_the_known_ones(cli: Run) -> None:
    code, told = cli("plan", write(GOOD), "--gpus", "8", "--cluster", "dgx-h1000")
    assert code == 2
    assert "dgx-h100" in told.replace("dgx-h1000", "")


def test_an_unknown_key_of_a_cluster_names_a_similar_one(cli: Run) -> None:
    code, told = cli("plan", write(GOOD), "--gpus", "8", "--cluster-set", "inter_node_gbit=800")
    assert code == 2
    assert "inter_node_gbits_per_s" in told


def test_a_cluster_file_that_is_no_json_is_named(cli: Run) -> None:
    code, told = cli("plan", write(GOOD), "--gpus", "8", "--cluster", write("{", "mine.json"))
    assert code == 6
    assert "mine.json" in told


@pytest.mark.parametrize("gpus", ["0", "-3", "many"])
def test_a_number_of_gpus_below_one_is_refused(cli: Run, gpus: str) -> None:
    code, told = cli("plan", write(GOOD), "--gpus", gpus)
    assert code == 2
    assert "--gpus" in told


def test_an_unknown_setting_lists_the_known_ones(cli: Run) -> None:
    code, told = cli("plan", write(GOOD), "--gpus", "8", "--set", "hiden=128")
    assert code == 2
    assert "hiden" in told
    assert "hidden" in told


@pytest.mark.parametrize("command", ["plan", "estimate"])
def test_a_missing_global_batch_names_the_flag_and_the_file_s_constant(cli: Run, command: str) -> None:
    layout = ("--layout", "dp=8") if command == "estimate" else ()
    code, told = cli(command, write(GOOD.replace("GLOBAL_BATCH = 16", "")), "--gpus", "8", *layout)
    assert code == 2
    assert "--global-batch" in told
    assert "GLOBAL_BATCH" in told


@pytest.mark.parametrize("command", ["plan", "estimate"])
def test_all_faults_of_a_layout_are_listed(cli: Run, command: str) -> None:
    layout = "tp=3,pp=2,dp=2,mbs=3,gbs=64"
    code, told = cli(command, str(GPT), "--gpus", "8", *TINY_GPT, "--layout", layout)
    assert code == 2
    assert "12" in told
    assert "8" in told
    assert sum(line.startswith("  - ") for line in told.splitlines()) >= 3, told


def test_all_unknown_keys_of_a_layout_are_listed(cli: Run) -> None:
    code, told = cli("estimate", str(GPT), "--gpus", "8", *TINY_GPT, "--layout", "tq=2,pp=x,zero=7")
    assert code == 2
    for word in ("tq", "pp", "zero"):
        assert word in told


@pytest.mark.parametrize("command", ["show", "compare"])
@pytest.mark.parametrize(
    "fault", ["missing", "empty", "truncated", "corrupt", "binary", "future", "other", "folder", "inconsistent"]
)
def test_a_bad_plan_file_is_named(cli: Run, plan_file: Path, command: str, fault: str) -> None:
    content = plan_file.read_bytes()
    document = json.loads(content)
    bad = Path("bad.plan.json")
    if fault == "folder":
        bad.mkdir()
    elif fault != "missing":
        bad.write_bytes(
            {
                "empty": b"",
                "truncated": content[: len(content) // 2],
                "corrupt": content.replace(b'"microbatches"', b'"microbitches"'),
                "binary": bytes(range(256)) * 8,
                "future": json.dumps({**document, "format_version": "99.0"}).encode(),
                "other": b'{"name": "something else"}',
                "inconsistent": json.dumps({**document, "microbatches": 7}).encode(),
            }[fault]
        )
    code, told = cli(command, str(bad), *(("--against", "megatron") if command == "compare" else ()))
    assert code == 6
    assert "bad.plan.json" in told
    if fault == "future":
        assert "99.0" in told


def test_a_model_that_changed_since_the_plan_is_refused(cli: Run, plan_file: Path) -> None:
    write(GOOD + "\n# changed\n")
    code, told = cli("compare", str(plan_file), "--against", "megatron:dp=4")
    assert code == 6
    assert "changed since" in told
    assert "--model" in told


def test_a_model_that_is_gone_since_the_plan_can_be_named(cli: Run, plan_file: Path) -> None:
    Path("model.py").unlink()
    code, told = cli("compare", str(plan_file), "--against", "megatron:dp=4")
    assert code == 6
    assert "--model" in told


def test_where_no_plan_fits_the_need_is_named_in_gib(cli: Run) -> None:
    code, told = cli("plan", write(GOOD), "--gpus", "2", "--memory", "0.001", "--time-limit", "30")
    assert code == 4
    assert "GiB" in told


def test_an_output_without_a_folder_is_refused(cli: Run) -> None:
    code, told = cli("plan", write(GOOD), "--gpus", "2", "-o", "nowhere/x.plan.json")
    assert code == 2
    assert "cannot write nowhere/x.plan.json: there is no folder nowhere" in told


def test_an_output_that_is_a_folder_is_refused(cli: Run) -> None:
    Path("folder").mkdir()
    code, told = cli("plan", write(GOOD), "--gpus", "2", "-o", "folder")
    assert code == 2
    assert "'folder' is a directory" in told


def test_a_full_disk_leaves_no_file(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    code, told = cli("plan", write(GOOD), "--gpus", "2", "--layout", "dp=2", "-o", "x.plan.json")
    assert code == 6
    assert "cannot write x.plan.json: No space left on device" in told


def test_an_output_folder_that_may_not_be_written_is_refused(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, to whom every folder is writable: the answer of ``os.access`` is replaced."""
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != Path())
    code, told = cli("plan", write(GOOD), "--gpus", "2", "-o", "x.plan.json")
    assert code == 2
    assert "cannot write x.plan.json" in told


@pytest.mark.parametrize("pin", ["layers.0.0.weight=Q(0)", "layers.0.0.weight"])
def test_a_pin_that_cannot_be_parsed_is_refused(cli: Run, pin: str) -> None:
    code, told = cli("plan", write(GOOD), "--gpus", "2", "--pin", pin)
    assert code == 2
    assert "--pin" in told


@pytest.mark.parametrize("memory", ["0", "-1", "nan", "inf"])
def test_a_budget_that_is_no_positive_number_is_refused(cli: Run, memory: str) -> None:
    code, told = cli("plan", write(GOOD), "--gpus", "2", "--memory", memory)
    assert code == 2
    assert "memory" in told


def test_a_model_that_prints_leaves_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model prints, on import or while it is traced, goes to stderr."""
    monkeypatch.chdir(tmp_path)
    write(
        "print('importing')\n"
        + GOOD.replace("        return x.mean()", "        print('forward')\n        return x.mean()")
    )
    for command in ("plan", "estimate"):
        arguments = [command, "model.py", "--gpus", "2", "--layout", "dp=2", "--json"]
        done = subprocess.run(
            [sys.executable, "-c", "from autopar.cli.main import entry; entry()", *arguments],
            capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(GPT.parents[1])},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["format_version"] == "1.0"
        assert "importing" in done.stderr
