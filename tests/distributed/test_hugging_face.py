"""Models that nobody wrote for autopar, dropout and experts included: a plan of each passes ``autopar verify``."""

from pathlib import Path

import pytest

from autopar.cli.main import run
from tests.distributed.models.hugging_face import MODELS

MODEL = str(Path(__file__).parent / "models" / "hugging_face.py")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LAYOUTS = ("dp=2,tp=2,mbs=1,zero=1,sp=1", "pp=2,dp=2,mbs=1,zero=3,recompute=full")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [*LAYOUTS, None])
@pytest.mark.parametrize("name", list(MODELS))
def test_plans_pass(name: str, layout: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = str(tmp_path / "model.plan.json")
    options = ["--gpus", "4", "--cluster", "cpu-gloo", "--global-batch", "8", "--dtype", "fp32", "-o", plan, "-q"]
    chosen = ["--layout", layout] if layout is not None else []
    assert run(["plan", MODEL, "--set", f"name={name}", *options, *chosen]) == 0
    capsys.readouterr()
    assert run(["verify", plan, "--ranks", "4", "-q"]) == 0
    assert capsys.readouterr().out.endswith("PASS\n")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp=2,sp=1,mbs=1", "cp=2,mbs=1"])
def test_a_long_causal_sequence_passes(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mask of 12,288 positions is not computed to be recognised, yet one process computes with it."""
    plan = str(tmp_path / "long.plan.json")
    sizes = {"layers": 1, "hidden": 16, "heads": 2, "kv_heads": 2, "ffn": 16, "vocab": 32, "seq": 12_288}
    settings = [option for key, size in sizes.items() for option in ("--set", f"{key}={size}")]
    options = ["--gpus", "2", "--cluster", "cpu-gloo", "--global-batch", "2", "--dtype", "fp32", "-o", plan, "-q"]
    assert run(["plan", str(EXAMPLES / "llama.py"), *settings, *options, "--layout", layout]) == 0
    capsys.readouterr()
    assert run(["verify", plan, "--ranks", "2", "-q"]) == 0
    assert capsys.readouterr().out.endswith("PASS\n")
