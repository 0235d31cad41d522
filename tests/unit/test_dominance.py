"""The plan is never worse, by the same estimate, than what can be written down by hand, and is found without it."""

import json
import subprocess
import sys

import msgspec
import pytest
import torch

from autopar.cluster.cost_tables import load_cluster
from autopar.core.errors import LayoutError
from autopar.manual.layout_pricer import plan_layout
from autopar.manual.megatron_grid import compare_megatron
from autopar.planner.planner import plan
from autopar.workload import load_workload
from tests.conftest import ROOT

torch.set_num_threads(1)
TOLERANCE = 2e-3  # the outer search stops within 1e-3 of its bound
MODELS = {
    "gpt": {"layers": 4, "hidden": 1024, "heads": 8, "vocab": 4096, "seq": 512},
    "llama": {"layers": 4, "hidden": 1024, "heads": 8, "kv_heads": 4, "ffn": 2048, "vocab": 4096, "seq": 512},
    "moe": {"layers": 4, "hidden": 512, "heads": 8, "vocab": 2048, "seq": 256, "experts": 8, "group_size": 256},
    "wide_resnet": {"layers": 50, "base_channels": 64, "width_factor": 2, "image_size": 64},
}
BLOCKED = ("autopar.manual.megatron_grid", "autopar.cli.compare_command", "autopar.report.comparison_text")


def model(name):
    return load_workload(str(ROOT / "examples" / f"{name}.py"), **MODELS[name])


def restrictions(gpus: int, batch: int):
    """Data parallel and ZeRO at every micro-batch size, one stage with tensor parallelism, one device a stage."""
    for size in (1, 2, 4, 8):
        if (batch // gpus) % size == 0:
            yield from (f"zero={zero},mbs={size}" for zero in (0, 1, 2, 3))
    yield from (f"tp={gpus},sp={sp},mbs={size}" for sp in (0, 1) for size in (1, 4))
    yield from (f"pp={stages},tp={gpus // stages},mbs=2" for stages in (2, 4) if gpus % stages == 0)
    yield from (f"pp=4,mbs={size},recompute={mode}" for size in (1, 2) for mode in ("none", "full"))


def assert_dominates(name: str, cluster: str, gpus: int, batch: int, memory_gib: float | None, *, grid: bool) -> None:
    found = plan(model(name), cluster=cluster, gpus=gpus, global_batch=batch, memory_gib=memory_gib)
    assert found.search.lower_bound_s <= found.estimate.step_time_s
    slower, compared = [], 0
    for text in restrictions(gpus, batch):
        try:
            one = plan_layout(
                model(name), cluster=cluster, gpus=gpus, global_batch=batch, memory_gib=memory_gib, layout=text
            )
        except LayoutError:
            continue  # no runtime can run it
        compared += 1
        if one.estimate.fits and one.estimate.step_time_s * (1 + TOLERANCE) < found.estimate.step_time_s:
            slower.append((text, one.estimate.step_time_s))
    assert compared >= 4
    assert not slower, f"the plan takes {found.estimate.step_time_s} s, but {slower}"
    if grid:
        best = compare_megatron(found, model(name), load_cluster(cluster)).best
        assert best is None or best.estimate.step_time_s * (1 + TOLERANCE) >= found.estimate.step_time_s


def test_no_restriction_of_a_small_gpt_is_faster():
    assert_dominates("gpt", "p3.16xlarge", 4, 16, None, grid=True)


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [4, 8, 16])
@pytest.mark.parametrize("cluster", ["p3.16xlarge", "dgx-h100"])
@pytest.mark.parametrize("name", list(MODELS))
def test_no_restriction_is_faster(name, cluster, gpus):
    assert_dominates(name, cluster, gpus, 64, None, grid=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MODELS))
def test_no_restriction_is_faster_where_memory_binds(name):
    assert_dominates(name, "p3.16xlarge", 8, 64, 2.0, grid=True)


ALONE = """
import json, sys

class Removed:
    def find_spec(self, name, path=None, target=None):
        if name in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is removed")

sys.meta_path.insert(0, Removed())
import torch
torch.set_num_threads(1)
import msgspec
from autopar.planner.planner import plan
from autopar.workload import load_workload
found = plan(load_workload({path!r}, **{settings!r}), cluster="p3.16xlarge", gpus=4, global_batch=16)
assert not set({blocked!r}) & set(sys.modules)
print(json.dumps(msgspec.to_builtins(found)))
"""


def test_the_same_plan_comes_out_without_the_grid_and_the_comparison():
    path = str(ROOT / "examples" / "gpt.py")
    here = plan(model("gpt"), cluster="p3.16xlarge", gpus=4, global_batch=16)
    code = ALONE.format(blocked=BLOCKED, path=path, settings=MODELS["gpt"])
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    alone = json.loads(ran.stdout.splitlines()[-1])
    expected = json.loads(json.dumps(msgspec.to_builtins(here)))
    for document in (alone, expected):
        document["search"].pop("seconds")
    assert alone == expected
