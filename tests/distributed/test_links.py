"""Collectives measured among real gloo ranks: two nodes of two, told apart by their environment alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, sys, torch, torch.distributed as dist
from autopar.measure.kernel_times import Stopwatch
from autopar.measure.link_times import measure_links
torch.set_num_threads(1)
dist.init_process_group("gloo")
watch = Stopwatch(device="cpu", repeats=3, min_total_s=0.0)
links = measure_links(watch, (2**12, 2**20), 2, lambda what: None)
if dist.get_rank() == 0:
    curves = [(curve.kind, curve.num_ranks, curve.num_bytes, curve.time_s) for curve in links.curves]
    open(sys.argv[1], "w").write(json.dumps([curves, links.link_bytes_per_s, links.link_latency_s, links.inter_node]))
dist.destroy_process_group()
"""


def test_links_of_two_nodes_of_two_ranks(tmp_path: Path) -> None:
    script, answer = tmp_path / "program.py", tmp_path / "answer.json"
    script.write_text(PROGRAM)
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=4",
        "--standalone",
        str(script),
        str(answer),
    ]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**_environment(), "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    curves, rate, latency_s, between = json.loads(answer.read_text())
    kinds = ["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
    assert [(kind, ranks) for kind, ranks, _, _ in curves] == [(kind, 2) for kind in kinds]
    for _, _, sizes, times in curves:
        assert sizes == [2**12, 2**20]
        assert min(times) > 0
    assert rate > 0
    assert latency_s > 0
    assert between is not None
    assert between[0] > 0
    assert between[1] > 0


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
