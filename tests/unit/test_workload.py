"""Model files: loading, settings, and the parameter counts that were published for the examples."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from autopar.core.errors import ModelError, UsageError
from autopar.workload import Workload, load_workload
from tests.conftest import EXAMPLES

GOOD = """
import torch
def build_model(width=4, depth=1):
    return torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(depth)])
def example_inputs(batch_size, width=4):
    return {"input": torch.empty(batch_size, width)}
GLOBAL_BATCH = 64
"""


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def write(folder: Path, text: str) -> Path:
    path = folder / "model.py"
    path.write_text(text)
    return path


# Billions of parameters. A GPT or MoE size is known by its name alone; the Wide-ResNet numbers are the published ones.
GPT = {"125M": 0.125, "350M": 0.355, "760M": 0.76, "1.3B": 1.3, "2.6B": 2.6, "6.7B": 6.7, "15B": 15, "39B": 39,
       "76B": 76, "175B": 175, "530B": 530, "1T": 1008}  # fmt: skip
WIDE_RESNET = {"250M": 0.254, "500M": 0.495, "1B": 1.005, "2B": 1.965, "4B": 4.000, "6.8B": 6.727, "13B": 12.63}
MOE = {"380M": 0.38, "690M": 0.69, "1.3B": 1.3, "2.4B": 2.4, "10B": 10, "27B": 27, "70B": 70}


@pytest.mark.parametrize("size", GPT)
def test_gpt_has_the_published_sizes(size: str) -> None:
    workload = load_workload(EXAMPLES / "gpt.py", size=size)
    count = parameters(workload.build())
    # Narayanan et al. SC'21, equation 2: P = 12 l h^2 (1 + 13 / 12h + (V + s) / 12lh), and the last norm's 2 h.
    rows = {"125M": (768, 12, 1024), "39B": (8192, 48, 1024), "175B": (12288, 96, 2048), "1T": (25600, 128, 2048)}
    if size in rows:
        h, layers, s = rows[size]
        assert count == 12 * layers * h * h + 13 * layers * h + (51200 + s) * h + 2 * h
    assert count / 1e9 == pytest.approx(GPT[size], rel=0.06)


@pytest.mark.parametrize("size", WIDE_RESNET)
def test_wide_resnet_has_the_published_sizes(size: str) -> None:
    count = parameters(load_workload(EXAMPLES / "wide_resnet.py", size=size).build()) / 1e9
    assert float(f"{count:.4g}" if count > 10 else f"{count:.3f}") == WIDE_RESNET[size]


@pytest.mark.parametrize("size", MOE)
def test_moe_has_the_published_sizes(size: str) -> None:
    count = parameters(load_workload(EXAMPLES / "moe.py", size=size).build()) / 1e9
    assert count == pytest.approx(MOE[size], rel=0.04)


def test_llama_has_the_published_sizes() -> None:
    pytest.importorskip("transformers")
    published = {"7B": 6.738, "8B": 8.030, "70B": 70.55, "405B": 405.85}
    for size, billions in published.items():
        count = parameters(load_workload(EXAMPLES / "llama.py", size=size).build()) / 1e9
        assert count == pytest.approx(billions, rel=1e-4), size


@pytest.mark.parametrize(("name", "batch"), [("gpt", 1024), ("moe", 1024), ("wide_resnet", 1536), ("llama", 512)])
def test_examples_take_no_memory_and_name_their_batch(name: str, batch: int) -> None:
    if name == "llama":
        pytest.importorskip("transformers")
    workload = load_workload(EXAMPLES / f"{name}.py")
    assert workload.global_batch == batch
    assert all(parameter.is_meta for parameter in workload.build().parameters())
    inputs = workload.inputs(6)
    assert all(tensor.is_meta and tensor.shape[0] == 6 for tensor in inputs.values())


def test_settings_reach_what_accepts_them(tmp_path: Path) -> None:
    workload = load_workload(write(tmp_path, GOOD), width=8, depth=3)
    assert parameters(workload.build()) == 3 * (8 * 8 + 8)
    assert workload.inputs(5)["input"].shape == (5, 8)
    assert workload.global_batch == 64
    assert workload.path is not None
    assert workload.source_hash != load_workload(write(tmp_path, GOOD + "\n#")).source_hash


def test_unknown_setting_names_the_accepted_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no setting widht; it accepts: depth, width") as caught:
        load_workload(write(tmp_path, GOOD), widht=8)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no model file"),
        ("x = 1", "has no build_model"),
        (GOOD.replace("def example_inputs", "def other"), "has no example_inputs"),
        ("import no_such_module_here", "No module named"),
        ("def build_model(:", "SyntaxError.*\n.*model.py:1"),
        (GOOD + "\nloss_fn = 3", "loss_fn is a int"),
        (GOOD.replace("64", "'many'"), "GLOBAL_BATCH is 'many'"),
    ],
)
def test_files_that_do_not_load_say_why(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "absent.py" if text is None else write(tmp_path, text)
    with pytest.raises(ModelError, match=message) as caught:
        load_workload(path)
    assert caught.value.exit_code == 3
    assert "Traceback" not in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 4


def test_a_model_that_raises_is_quoted_with_its_line(tmp_path: Path) -> None:
    text = GOOD.replace(
        "    return torch.nn.Sequential", "    raise ValueError('no such depth')\n    return torch.nn.Sequential"
    )
    with pytest.raises(ModelError, match=r"(?s)build_model raised ValueError: no such depth.*model.py:4"):
        load_workload(write(tmp_path, text)).build()


def test_unknown_size_lists_the_sizes() -> None:
    with pytest.raises(ModelError, match="no size '40B'; choose one of 125M, 350M"):
        load_workload(EXAMPLES / "gpt.py", size="40B").build()


def test_a_workload_can_be_made_in_python() -> None:
    workload = Workload(
        build_model=lambda: nn.Linear(3, 2), example_inputs=lambda batch_size: {"input": torch.empty(batch_size, 3)}
    )
    assert workload.build().weight.is_meta
    assert workload.inputs(7)["input"].is_meta
    assert math.prod(workload.inputs(7)["input"].shape) == 21
    with pytest.raises(ModelError, match="returned a int"):
        Workload(build_model=lambda: 3, example_inputs=dict).build()  # type: ignore[arg-type, return-value]
