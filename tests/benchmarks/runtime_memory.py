"""What a rank's tensors really take at most, against the plan's ``peak_tensor_bytes``:
``python -m tests.benchmarks.runtime_memory``.

Every case trains two steps with AdamW on gloo processes; in the second, when the optimizer has its state, torch's
``MemTracker`` counts the bytes of all storages alive, on the rank whose stage the plan says is the fullest.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import msgspec
import torch
from torch.distributed._tools.mem_tracker import MemTracker  # private; tried on torch 2.13.0

import autopar
from autopar.core.plan import Plan, device_memory, stages_by_submesh
from autopar.manual.layout_pricer import plan_layout
from autopar.runtime.apply import build_trainer
from autopar.workload.workload import Workload
from tests.distributed.parity import random_batch, real_model
from tests.distributed.pool import Pool

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model file with its settings, integers below ``classes``, and a layout of a global batch."""

    file: str
    layout: str
    batch: int
    classes: int
    settings: dict[str, Any] = field(default_factory=dict)

    def workload(self) -> Workload:
        return autopar.load_workload(EXAMPLES / self.file, **self.settings)

    def plan(self) -> Plan:
        keys = dict(part.split("=") for part in self.layout.split(","))
        gpus = int(keys.get("tp", 1)) * int(keys.get("pp", 1)) * int(keys.get("dp", 1))
        return plan_layout(
            self.workload(),
            cluster="cpu-gloo",
            gpus=gpus,
            layout=self.layout,
            global_batch=self.batch,
            dtype="fp32",
        )


GPT = {"size": "125M", "layers": 4, "hidden": 512, "heads": 8, "vocab": 4096, "seq": 512}
LLAMA = {"size": "7B", "layers": 4, "hidden": 512, "heads": 8, "kv_heads": 4, "ffn": 1408, "vocab": 4096, "seq": 512}
RESNET = {"size": "250M", "base_channels": 32, "width_factor": 2, "classes": 64, "image_size": 64}


def cases() -> list[Case]:
    """GPT and Llama over the layouts that change what is saved, Wide-ResNet over those it has."""
    found = []
    for layout in (
        "dp=1,mbs=2",
        "dp=1,mbs=1",
        "dp=1,mbs=2,recompute=full",
        "dp=2,mbs=2,zero=0",
        "dp=2,mbs=2,zero=1",
        "dp=2,mbs=1,zero=2",
        "dp=2,mbs=2,zero=3",
        "dp=2,mbs=1,zero=3,recompute=full",
        "tp=2,mbs=2",
        "tp=2,mbs=2,sp=1",
        "pp=2,mbs=1",
        "dp=2,tp=2,mbs=2,zero=1",
    ):
        dp = int(dict(part.split("=") for part in layout.split(",")).get("dp", 1))
        found.append(
            Case(file="gpt.py", layout=layout, batch=2 * dp if "pp" not in layout else 4, classes=4096, settings=GPT)
        )
        found.append(
            Case(
                file="llama.py", layout=layout, batch=2 * dp if "pp" not in layout else 4, classes=4096, settings=LLAMA
            )
        )
    for layout in ("dp=1,mbs=16", "dp=1,mbs=8", "dp=1,mbs=16,recompute=full", "dp=2,mbs=16", "dp=2,mbs=16,zero=3"):
        dp = int(dict(part.split("=") for part in layout.split(",")).get("dp", 1))
        found.append(Case(file="wide_resnet.py", layout=layout, batch=16 * dp, classes=64, settings=RESNET))
    return found


def peak(case: Case, plan_json: bytes) -> tuple[int, dict[str, int]]:
    """This rank's peak bytes in a step, and what they are."""
    plan, workload = msgspec.json.decode(plan_json, type=Plan), case.workload()
    batch = random_batch(workload, plan.global_batch, 0, case.classes)
    trainer = build_trainer(
        plan,
        real_model(workload, 0),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
        workload=workload,
    )
    trainer.step(batch)
    tracker = MemTracker()
    tensors = [tensor for stage in trainer.stages.values() for tensor in stage.parameters.buffers.values()]
    tensors += [
        parameter.weight for stage in trainer.stages.values() for parameter in stage.parameters.parameters.values()
    ]
    tensors += [parameter.master.data for parameter in trainer.trained_parameters()]
    tracker.track_external(*tensors, *([trainer.optimizer] if trainer.optimizer is not None else []))
    with tracker:
        trainer.step(batch)
    snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return snapshot["Total"], {str(getattr(kind, "value", kind)): size for kind, size in snapshot.items() if size}


def fullest(plan: Plan) -> tuple[int, int]:
    """The first rank of the submesh whose devices use most memory by the plan, and how many bytes."""
    runs = [(device_memory(run).tensor_bytes, run[0].first_device) for run in stages_by_submesh(plan)]
    size, rank = max(runs, key=lambda pair: (pair[0], -pair[1]))
    return rank, size


@click.command()
@click.option("--only", default="", help="Run the cases whose file and layout contain this.")
@click.option("-v", "verbose", is_flag=True, help="Print what the peak and the plan's are made of.")
def main(only: str, verbose: bool) -> None:
    """Print each case's peak and the plan's, in MiB, and their ratio."""
    pool = Pool(4)
    try:
        for case in cases():
            if only not in f"{case.file} {case.layout}":
                continue
            plan = case.plan()
            rank, planned = fullest(plan)
            found = pool.run(plan.gpus, peak, case, msgspec.json.encode(plan), timeout_s=600)[rank]
            print(
                f"{case.file:<16} {case.layout:<36} {found[0] / MIB:8.1f} MiB ran {planned / MIB:8.1f} planned"
                f" {found[0] / planned:6.3f}",
                flush=True,
            )
            if verbose:
                stage = next(stage for stage in plan.stages if stage.first_device == rank)
                print("   ran    ", {kind: round(size / MIB, 1) for kind, size in found[1].items()})
                parts = msgspec.structs.asdict(stage.memory)
                print("   planned", {kind.removesuffix("_bytes"): round(size / MIB, 1) for kind, size in parts.items()})
    finally:
        pool.close()


if __name__ == "__main__":
    main()
