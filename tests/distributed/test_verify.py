"""`autopar verify` and `autopar run`: what they print, and their exit codes."""

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from autopar.cli.main import run
from autopar.core.plan import BlockProgram
from autopar.core.plan_file import load_plan
from autopar.graph.split_into_blocks import hoist_light_ops, split_into_blocks
from autopar.graph.trace import trace
from autopar.verify.shrink import shrink_plan
from autopar.verify.verify_plan import VerifyReport
from tests.conftest import example_workload

ROOT = Path(__file__).resolve().parents[2]
MODEL = {"size": "125M", "layers": 2, "hidden": 32, "heads": 4, "vocab": 64, "seq": 8}
SIZES = tuple(f"{name}={value}" for name, value in MODEL.items())


@pytest.fixture
def plan_file(tmp_path: Path) -> str:
    path = str(tmp_path / "gpt.plan.json")
    words = [word for size in SIZES for word in ("--set", size)]
    layout = ["--layout", "tp=2,dp=4,pp=2,mbs=2,zero=1", "--global-batch", "64"]
    code = run(
        ["plan", str(ROOT / "examples/gpt.py"), "--gpus", "16", *words, *layout, "--dtype", "bf16", "-o", path, "-q"]
    )
    assert code == 0
    return path


def test_twin_passes(plan_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(["verify", plan_file, "--ranks", "2", "--set", "hidden=16", "-q"]) == 0
    printed = capsys.readouterr().out
    assert "stage 1: dp 4 x tp 2 -> dp 1 x tp 1" in printed
    assert "setting hidden: 32 -> 16" in printed
    assert "a step in the plan's dtype, those that the plan lists" in printed
    assert printed.endswith("PASS\n")


def test_wrong_numbers_exit_7(
    plan_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def verify(*args: Any, **options: Any) -> VerifyReport:
        return VerifyReport(
            num_ranks=2,
            changes=(),
            loss=1.0,
            expected_loss=1.0,
            gradients={"head.weight": 1e-4},
            parameters={"head.weight": 0.0},
            collectives={},
        )

    monkeypatch.setattr("autopar.verify.verify_plan.verify_plan", verify)
    assert run(["verify", plan_file, "-q"]) == 7
    assert "FAIL" in capsys.readouterr().out
    assert run(["verify", plan_file, "-q", "--json"]) == 7
    assert json.loads(capsys.readouterr().out)["passed"] is False  # one document, which is the report


def test_twin_keeps_stages_and_axes(plan_file: str) -> None:
    plan = load_plan(plan_file)
    graph = hoist_light_ops(trace(example_workload("gpt", **MODEL), dtype="bfloat16").graph)
    shrunk, changes = shrink_plan(plan, 8, lambda: graph)
    assert shrunk.gpus == 8
    assert [len(stage.blocks) for stage in shrunk.stages] == [len(stage.blocks) for stage in plan.stages]
    assert [[axis.name for axis in stage.axes] for stage in shrunk.stages] == [["dp", "tp"]] * 2
    assert shrunk.global_batch == shrunk.microbatches * shrunk.micro_batch_size
    assert changes
    assert shrink_plan(plan, 16, lambda: graph)[0].gpus == 16


def test_shrinking_scales_the_split_factors_that_count_samples(plan_file: str) -> None:
    """Of 12 samples 6 remain: so do 12 pieces of the batch, but not those of a hidden dim or of a parameter."""
    graph = hoist_light_ops(trace(example_workload("gpt", **MODEL), dtype="bfloat16").graph)
    plan = replace(load_plan(plan_file), micro_batch_size=12)
    block = next(block for block in split_into_blocks(graph) if block.name == "layers.0")
    name = next(ref.program for stage in plan.stages for ref in stage.blocks if ref.index == block.index)

    def with_factors(program: BlockProgram, batch: str, hidden: str) -> BlockProgram:
        op = replace(program.ops[0], inputs=(batch, *program.ops[0].inputs[1:]), outputs=(hidden,), regathered=(0,))
        parameter = replace(program.parameters[0], compute="_S(0,12)R")
        shared = tuple(replace(value, placement=hidden, gradient=batch) for value in program.shared)
        return replace(program, ops=(op, *program.ops[1:]), parameters=(parameter,), shared=shared)

    before = next(program for program in plan.programs if program.id == name)
    given = with_factors(before, "_S(0,12)R", "_S(2,12)R")
    assert before.shared
    plan = replace(plan, programs=tuple(given if each is before else each for each in plan.programs))
    shrunk, _ = shrink_plan(plan, 8, lambda: graph)
    assert shrunk.micro_batch_size == 6
    after = next(program for program in shrunk.programs if program.id == name)
    assert after == with_factors(before, "_S(0,6)R", "_S(2,12)R")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "torchrun --nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 --nproc-per-node=8 train.py --lr 3"),
        (["--ranks-per-node", "16"], "torchrun --standalone --nproc-per-node=16 train.py --lr 3"),
        (
            ["--launcher", "slurm", "--rendezvous", "a:1"],
            "srun --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 torchrun",
        ),
        (
            ["--ranks-per-node", "16", "--max-restarts", "3"],
            "env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone --nproc-per-node=16 --max-restarts=3 train.py",
        ),
        (["--launcher", "torchx"], "torchx run --scheduler=slurm dist.ddp -j 2x8 --script train.py -- --lr 3"),
    ],
)
def test_run_prints(plan_file: str, options: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(["run", plan_file, *options, "--", "train.py", "--lr", "3"]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed.startswith(expected)
    assert printed.endswith(f"--plan {plan_file}")


def test_run_needs_a_script(plan_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["run", plan_file]) == 2
    assert "no training script" in capsys.readouterr().err


DRAWS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.drop = nn.Dropout2d(0.3)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, images, labels):
        x = self.layer(self.drop(self.conv(images)).flatten(2).transpose(1, 2))
        path = torch.rand(x.shape[0], 1, 1).add(0.8).floor()
        noise = torch.randn_like(x) * torch.bernoulli(x.detach().sigmoid())
        x = (x * path + 0.1 * noise).transpose(1, 2)
        return self.head(nn.functional.adaptive_avg_pool1d(x, 1).flatten(1))  # its backward writes in place

def build_model():
    return Net()

def example_inputs(batch_size):
    return {"images": torch.empty(batch_size, 3, 6, 6), "labels": torch.empty(batch_size, dtype=torch.long)}

def random_inputs(batch_size, seed):
    generator = torch.Generator().manual_seed(seed)
    return {"images": torch.randn(batch_size, 3, 6, 6, generator=generator),
            "labels": torch.randint(4, (batch_size,), generator=generator)}

def loss_fn(output, inputs):
    return torch.nn.functional.cross_entropy(output, inputs["labels"])
"""


def test_random_numbers_are_those_of_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Dropout of elements, channels and attention, and random tensors, of torch's own layers called in one process."""
    model, plan = tmp_path / "draws.py", str(tmp_path / "draws.plan.json")
    model.write_text(DRAWS)
    options = [
        "--gpus",
        "2",
        "--cluster",
        "cpu-gloo",
        "--layout",
        "tp=2,mbs=2",
        "--global-batch",
        "4",
        "-o",
        plan,
        "-q",
    ]
    assert run(["plan", str(model), *options]) == 0
    capsys.readouterr()
    assert run(["verify", plan, "--ranks", "2", "-q"]) == 0
    assert capsys.readouterr().out.endswith("PASS\n")


def test_a_model_that_ends_a_rank_fails_the_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is built in peace to be planned, and ends the program, as if all were well, where it is really run."""
    model, plan = tmp_path / "ends.py", str(tmp_path / "ends.plan.json")
    ends = "    if torch.distributed.is_initialized():\n        raise SystemExit(0)\n    return Net()\n"
    model.write_text(DRAWS.replace("    return Net()\n", ends))
    words = ["--gpus", "1", "--cluster", "cpu-gloo", "--layout", "dp=1", "--global-batch", "4", "-o", plan, "-q"]
    assert run(["estimate", str(model), *words]) == 0
    capsys.readouterr()
    assert run(["verify", plan, "--ranks", "1", "-q"]) == 7
    out, err = capsys.readouterr()
    assert out == ""
    assert "autopar: build_model raised SystemExit(0), which would end the program\n  at ends.py:" in err
