"""A plan names its cluster so that commands that take only the plan find the same tables, or say what is missing."""

import json
from pathlib import Path

import msgspec
import pytest

import autopar
from autopar.cli.main import run
from autopar.cluster import Cluster, load_cluster, save_cluster
from autopar.manual.layout_pricer import plan_layout

MODEL = """
import torch
from torch import nn

GLOBAL_BATCH = 16

class Model(nn.Linear):
    def forward(self, x):
        return super().forward(x).square().mean()

def build_model():
    return Model(64, 64)

def example_inputs(batch_size):
    return {"x": torch.empty(batch_size, 64)}
"""
SLOW = {"inter_node_gbits_per_s": 800, "device": "V100-SXM-32GB", "memory_gib": 20, "launch_s": 1e-6}
COMPARE = ("--against", "megatron:dp=4", "-q")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a model file."""
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(MODEL)
    return tmp_path


def planned(cluster: Cluster | str | Path) -> autopar.Plan:
    """The plan of the model in the working folder, written to p.json."""
    made = autopar.plan(autopar.load_workload("model.py"), cluster=cluster, gpus=4)
    autopar.save_plan(made, "p.json")
    return made


def handmade() -> Cluster:
    """A cluster whose numbers no override makes."""
    return msgspec.structs.replace(load_cluster("dgx-a100"), name="mine", link_latency_s=2e-6)


@pytest.mark.parametrize("overrides", [{"inter_node_gbits_per_s": 800}, SLOW], ids=["one", "device and memory"])
def test_what_python_overrides_is_in_the_plan(folder: Path, overrides: dict, capsys) -> None:
    cluster = load_cluster("dgx-a100", **overrides)
    made = planned(cluster)
    assert load_cluster(made.cluster.name, **made.cluster.overrides).fingerprint == cluster.fingerprint
    assert run(["compare", "p.json", *COMPARE]) == 0
    assert run(["show", "p.json"]) == 0
    assert "inter_node_gbits_per_s=800" in capsys.readouterr().out


def test_a_file_that_python_names_is_in_the_plan(folder: Path) -> None:
    save_cluster(handmade(), "table.json")
    assert planned("table.json").cluster.name == "table.json"
    assert run(["compare", "p.json", *COMPARE]) == 0
    made = plan_layout(autopar.load_workload("model.py"), cluster="table.json", gpus=4, layout="dp=4")
    assert made.cluster.name == "table.json"
    (folder / "moved").mkdir()
    for name in ("table.json", "p.json", "model.py"):
        Path(name).rename(folder / "moved" / name)
    assert run(["compare", "moved/p.json", "--model", "moved/model.py", *COMPARE]) == 0


@pytest.mark.parametrize("name", ["mine", "dgx-a100"])
@pytest.mark.parametrize("command", [("compare", "p.json", *COMPARE), ("verify", "p.json", "-q")])
def test_a_cluster_made_in_python_is_asked_for(folder: Path, command: tuple[str, ...], name: str, capsys) -> None:
    """Named as a shipped one it is not taken for that."""
    planned(msgspec.structs.replace(handmade(), name=name))
    assert run(command) == 6
    told = capsys.readouterr().err
    for word in (name, "--cluster", "save_cluster"):
        assert word in told


def test_a_cluster_made_in_python_can_be_named(folder: Path, capsys) -> None:
    planned(handmade())
    save_cluster(handmade(), "mine.json")
    assert run(["compare", "p.json", *COMPARE, "--cluster", "mine.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["speedup"] >= 1.0
    assert run(["compare", "p.json", *COMPARE, "--cluster", "dgx-a100"]) == 6
    assert "cluster dgx-a100 are not those that p.json was made with" in capsys.readouterr().err


def test_run_starts_as_many_ranks_a_node_as_the_clusters_file_says(folder: Path, capsys) -> None:
    """The file of the plan, which another folder has too; not that of a shipped cluster of the same name."""
    halves = msgspec.structs.replace(load_cluster("dgx-a100"), devices_per_node=2)
    save_cluster(halves, "table.json")
    planned("table.json")
    (folder / "moved").mkdir()
    for name in ("table.json", "p.json"):
        Path(name).rename(folder / "moved" / name)
    assert run(["run", "moved/p.json", "--", "train.py"]) == 0
    assert "--nnodes=2" in capsys.readouterr().out
    planned(halves)
    assert run(["run", "p.json", "--", "train.py"]) == 6
    assert "--ranks-per-node" in capsys.readouterr().err
    assert run(["run", "p.json", "--ranks-per-node", "2", "--", "train.py"]) == 0
