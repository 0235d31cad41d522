"""`autopar profile`: a machine of known speed is met exactly by its table, and this machine's own table can be planned with."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from autopar.cli.main import run
from autopar.cluster.cluster import Cluster
from autopar.cluster.cost_tables import load_cluster, save_cluster
from autopar.measure import profile_machine as profiling
from autopar.measure.kernel_times import Stopwatch
from autopar.measure.profile_machine import MeasurementSizes, profile_machine
from autopar.planner.planner import plan
from tests.conftest import example_workload

torch.set_num_threads(1)
TINY = MeasurementSizes(
    m=(16, 64), nk=(32, 128), seq=(32, 64), heads=(1, 2), stream_bytes=2**20, message_bytes=(2**10, 2**14),
    repeats=2, min_total_s=0.0, warm_s=0.0,
)  # fmt: skip


def silent(*news: object) -> None:
    pass


def measured(sizes: MeasurementSizes = TINY) -> Cluster:
    found = profile_machine(device="cpu", quick=True, base=None, progress=silent, sizes=sizes)
    assert found is not None
    return found


def test_this_machine_can_be_planned_for(tmp_path: Path) -> None:
    save_cluster(measured(), tmp_path / "table.json")
    cluster = load_cluster(tmp_path / "table.json")
    document = json.loads((tmp_path / "table.json").read_text())
    for table in (document, document["device"]):
        assert set(table) - {"name", "device", "provenance"} == set(table["provenance"])
    sources = cluster.device.provenance
    ours = {key for key, source in sources.items() if source.status == "measured"}
    assert ours >= {"matmul", "flash_attention", "memory_bytes_per_s", "launch_s", "peak_flops_per_s"}
    assert f"torch {torch.__version__}" in sources["matmul"].source
    assert cluster.provenance["collectives"].status == "modelled"
    assert cluster.provenance["collectives"].source.startswith("copied from cpu-gloo: ")
    assert socket.gethostname() not in (tmp_path / "table.json").read_text()
    workload = example_workload("gpt", layers=2, hidden=64, heads=2, vocab=512, seq=64)
    found = plan(workload, cluster=str(tmp_path / "table.json"), gpus=2, global_batch=4)
    assert found.execution.dtype == "fp32"
    assert found.estimate.step_time_s > 0
    assert found.estimate.fits


PEAK, BANDWIDTH, SUSTAINED = 4e12, 1e11, 0.8


def test_a_machine_of_known_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every measurement replaced by a formula: the device's prices must give these seconds back (over the sustained rate)."""

    def matmul_s(watch: Stopwatch, m: int, n: int, k: int, dtype: torch.dtype) -> float:
        odd = 2.0 if n % 2 else 1.0
        return odd * 2 * m * n * k / (PEAK * (0.9 if m == 64 else 0.5))

    def attention_s(watch: Stopwatch, seq: int, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[float, float]:
        flops = 2 * heads * seq**2 * head_dim
        forward = flops / (PEAK * 0.001 * seq * (0.7 if head_dim == 64 else 1.0))
        return forward, 2.5 * forward / 0.6

    def product_s(seq: int, heads: int, d: int) -> float:
        """The best rate that was seen, sustained, or the bytes of two operands and the scores."""
        moved = 4 * heads * (seq**2 + 2 * seq * d) / (0.75 * BANDWIDTH)
        return max(2 * heads * seq**2 * d / (PEAK * 0.9 * SUSTAINED), moved)

    formulas: dict[str, Any] = {
        "matmul_s": matmul_s,
        "attention_s": attention_s,
        "materialised_attention_s": lambda watch, seq, heads, d, dtype: (
            2 * product_s(seq, heads, d) + 20 * heads * seq**2 / (0.75 * BANDWIDTH),
            4 * product_s(seq, heads, d) + 28 * heads * seq**2 / (0.75 * BANDWIDTH),
        ),
        "stream_bytes_per_s": lambda watch, size: (BANDWIDTH, 0.75 * BANDWIDTH),
        "launch_s": lambda watch, count: 7e-6,
        "latency_s": lambda watch: 1e-12,
        "sustained_fraction": lambda watch, size, dtype, seconds: SUSTAINED,
    }
    for name, formula in formulas.items():
        monkeypatch.setattr(profiling, name, formula)
    device = measured().device
    watch = Stopwatch(device="cpu", repeats=1, min_total_s=0.0)
    fp32: Any = torch.float32
    assert device.peak("float32") == PEAK * 0.9  # the fastest that was seen
    for m, n, k in ((16, 32, 128), (64, 128, 128), (64, 32, 32)):
        seconds = max(matmul_s(watch, m, n, k, fp32) / SUSTAINED, 4 * (m * k + k * n + m * n) / BANDWIDTH)
        assert float(device.matmul_s(m, n, k, dtype="float32")) == pytest.approx(seconds)
    assert device.unaligned_matmul_speed == pytest.approx(0.5, rel=0.01)

    def attends(heads: int, seq: int, head_dim: int, *, backward: bool, flash: bool) -> float:
        return float(
            device.attention_s(
                1, heads, heads, seq, seq, head_dim, causal=True, dtype="float32", backward=backward, flash=flash
            )
        )

    for seq, heads in ((32, 1), (64, 2)):
        forward, backward = attention_s(watch, seq, heads, 128, fp32)
        assert attends(heads, seq, 128, backward=False, flash=True) == pytest.approx(forward / SUSTAINED)
        assert attends(heads, seq, 128, backward=True, flash=True) == pytest.approx(backward / SUSTAINED)
    assert attends(2, 64, 64, backward=False, flash=True) == pytest.approx(
        attention_s(watch, 64, 2, 64, fp32)[0] / SUSTAINED
    )
    forward, backward = formulas["materialised_attention_s"](watch, 64, 2, 128, fp32)
    assert attends(2, 64, 128, backward=False, flash=False) == pytest.approx(forward)
    assert attends(2, 64, 128, backward=True, flash=False) == pytest.approx(backward)
    assert float(device.memory_bound_s(3e9)) == pytest.approx(3e9 / (0.75 * BANDWIDTH))
    assert device.launch_s == 7e-6


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(profiling.MEASUREMENT_SIZES, ("cpu", True), TINY)
    path = str(tmp_path / "t.json")
    assert run(["profile", "-o", path, "--quick", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert "peak        float32" in out
    assert "device: " in err
    assert run(["cluster", "show", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["device"]["matmul"]["m"] == [16, 64]
    assert run(["profile", "-o", path, "--quick", "--device", "cpu", "--base", "nowhere", "-q"]) == 2
    assert "no cluster 'nowhere'" in capsys.readouterr().err
    assert run(["profile", "-o", str(tmp_path / "no" / "t.json")]) == 2
    if not torch.cuda.is_available():
        assert run(["profile", "-o", path, "--device", "cuda", "-q"]) == 2
        assert "torch finds no GPU" in capsys.readouterr().err
