"""A model file may raise anything, and end the program: it is exit 3 with the user's own line, wherever its code runs."""

import json
import sys
from pathlib import Path

import pytest
import torch

import autopar
from autopar.cli.main import run
from autopar.core.errors import ModelError
from autopar.graph.trace import trace
from autopar.runtime.deferred_initialisation import DeferredInitialisation
from autopar.workload import Workload, load_workload

torch.set_num_threads(1)
MODEL = """
import argparse, os, sys
import torch

GLOBAL_BATCH = 16

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x):
        pass  # forward
        return self.linear(x)

    def named_parameters(self, *args, **settings):
        pass  # named_parameters
        return super().named_parameters(*args, **settings)

def build_model():
    pass  # build_model
    return Model()

def example_inputs(batch_size):
    pass  # example_inputs
    return {"x": torch.empty(batch_size, 8)}

def loss_fn(output, inputs):
    pass  # loss_fn
    return output.sum()

def init_weights(model):
    pass  # init_weights

def __getattr__(name):
    pass  # __getattr__
    raise AttributeError(name)

pass  # import
"""
PLACES = ("import", "__getattr__", "build_model", "example_inputs", "forward", "named_parameters", "loss_fn")
ENDINGS = {
    "sys.exit(0)": "SystemExit(0), which would end the program",
    "sys.exit()": "SystemExit(), which would end the program",
    "sys.exit('no data')": "SystemExit('no data'), which would end the program",
    "exit(3)": "SystemExit(3), which would end the program",
    "raise SystemExit": "SystemExit(), which would end the program",
    "argparse.ArgumentParser().parse_args(['--gpus'])": "SystemExit(2), which would end the program",
    "open('/no/such/file')": "FileNotFoundError: [Errno 2] No such file or directory: '/no/such/file'",
    "os.listdir('/no/such')": "FileNotFoundError: [Errno 2] No such file or directory: '/no/such'",
    "raise BrokenPipeError(32, 'Broken pipe')": "BrokenPipeError: [Errno 32] Broken pipe",
    "raise BaseException('odd')": "BaseException: odd",
    "raise type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})": "Mute: (its message raised ZeroDivisionError)",
}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "model.py"


def write(path: Path, place: str, statement: str) -> int:
    """Puts a statement at a place of the model file; returns its line."""
    text = MODEL.replace(f"pass  # {place}\n", f"{statement}  # {place}\n")
    path.write_text(text)
    return 1 + next(at for at, line in enumerate(text.splitlines()) if line.endswith(f"{statement}  # {place}"))


def use(path: Path) -> None:
    """What happens to a model file before it is traced."""
    workload = autopar.load_workload(path)
    workload.build()
    workload.inputs(2)


@pytest.mark.parametrize("place", PLACES)
def test_no_exit_of_the_model_is_an_exit_of_autopar(
    model: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    line = write(model, place, "sys.exit(0)")
    words = ["plan", "model.py", "--gpus", "4", "--cluster", "cpu-gloo", "--layout", "dp=4", "-q"]
    assert run(words) == 3
    out, err = capsys.readouterr()
    assert out == ""
    told = err[err.index("autopar: ") :].splitlines()
    assert told[0].endswith("SystemExit(0), which would end the program")
    assert told[1:] == [f"  at model.py:{line}: sys.exit(0)  # {place}"]
    assert run([*words, "--json"]) == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["code"], error["kind"]) == (3, "ModelError")
    assert not Path("model.plan.json").exists()


@pytest.mark.parametrize("place", ["import", "build_model", "example_inputs"])
@pytest.mark.parametrize("statement", ENDINGS)
def test_each_exception_becomes_a_model_error(model: Path, place: str, statement: str) -> None:
    line = write(model, place, statement)
    modules, path = set(sys.modules), list(sys.path)
    with pytest.raises(autopar.ModelError) as raised:
        use(model)
    what, where = str(raised.value).splitlines()
    assert place in what
    assert what.endswith(ENDINGS[statement])
    assert where == f"  at model.py:{line}: {statement}  # {place}"
    assert sys.path == path
    if place == "import":
        assert set(sys.modules) == modules


@pytest.mark.parametrize("place", ["import", "build_model", "example_inputs", "forward", "loss_fn"])
def test_an_interrupt_stays_one(model: Path, capsys: pytest.CaptureFixture[str], place: str) -> None:
    write(model, place, "raise KeyboardInterrupt")
    assert run(["estimate", "model.py", "--gpus", "4", "--layout", "dp=4", "-q"]) == 130
    assert capsys.readouterr().err.endswith("autopar: interrupted\n")
    with pytest.raises(KeyboardInterrupt):
        trace(load_workload(model), dtype="float32")


def test_initial_weights_that_end_the_program(model: Path) -> None:
    line = write(model, "init_weights", "sys.exit(1)")
    workload = load_workload(model)
    for initialise in (
        lambda: workload.initialise(workload.build()),
        lambda: DeferredInitialisation(workload.build(), workload, 0),
    ):
        with pytest.raises(ModelError, match=rf"SystemExit\(1\), which would end the program\n  at model.py:{line}: "):
            initialise()


def test_a_workload_made_in_python_is_guarded_too() -> None:
    workload = Workload(build_model=sys.exit, example_inputs=lambda batch_size: {})
    with pytest.raises(ModelError, match=r"build_model raised SystemExit\(\), which would end the program"):
        workload.build()


def test_a_file_that_rearranges_what_it_is_loaded_with(model: Path) -> None:
    model.write_text(MODEL + "\nsys.path[:] = []\nsys.modules.pop(__name__)\nsys.exit(0)\n")
    path = list(sys.path)
    try:
        with pytest.raises(ModelError, match=r"raised on import: SystemExit\(0\)"):
            load_workload(model)
    finally:
        sys.path[:] = path


def test_a_model_file_that_cannot_be_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model.write_text(MODEL)

    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(ModelError, match=r"cannot read model file .*model\.py: Permission denied"):
        load_workload(model)
