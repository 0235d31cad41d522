"""The models of the parity tests, and the plans of the shapes that they are run in."""

from pathlib import Path

import msgspec

from autopar.core.plan import Plan
from autopar.workload.workload import Workload
from tests.distributed.parity import Model
from tests.distributed.plans import interleaved_plan, layout_plan, unequal_plan

ROOT = Path(__file__).resolve().parents[2]


def model(path: str, classes: int = 64, batch: int = 8, /, **settings: object) -> Model:
    return Model(path=str(ROOT / path), settings=tuple(settings.items()), classes=classes, batch=batch)


GPT = {"size": "125M", "layers": 4, "hidden": 32, "heads": 4, "vocab": 64, "seq": 8}
MODELS = {
    "gpt-tied": model("examples/gpt.py", **GPT, tied_embeddings=True),
    "gpt-untied": model("examples/gpt.py", **GPT, tied_embeddings=False),
    "llama": model("examples/llama.py", size="7B", layers=4, hidden=32, heads=4, kv_heads=2, ffn=64, vocab=64, seq=8),
    "moe": model(
        "examples/moe.py", size="380M", layers=4, hidden=32, heads=4, experts=4, ffn=64, vocab=64, seq=8, group_size=8
    ),
    "wide-resnet": model(
        "examples/wide_resnet.py", 8, 32, size="250M", base_channels=4, width_factor=2, classes=8, image_size=64
    ),
    "t5": model("tests/distributed/models/t5.py", layers=2),
}


def make_plan(workload: Workload, shape: str, zero: int, recompute: str, batch: int, sequence: bool = False) -> Plan:
    """The plan of one point of the matrix, in micro-batches of a quarter of the batch; ``sequence``: sequence parallelism
    between tensor-parallel regions."""
    micro = batch // 4
    sp = int(sequence)
    tail = f"zero={zero},recompute={recompute}"

    def layout(text: str, dp: int = 1) -> str:
        return (
            f"{text},dp={dp},mbs={max(1, micro // dp)},{tail}" if text else f"dp={dp},mbs={max(1, micro // dp)},{tail}"
        )

    if shape == "1x2+2x2":
        return unequal_plan(workload, [layout("tp=2"), layout("tp=2", 2)], batch=batch)
    if shape == "three":
        return unequal_plan(workload, [layout("", 2), layout("tp=2"), layout("")], batch=batch)
    if shape == "interleaved":
        return interleaved_plan(layout_plan(workload, layout("pp=4", 2), batch=batch), 2, workload)
    if shape == "interleaved-four":
        return interleaved_plan(layout_plan(workload, layout("pp=8"), batch=batch), 2, workload)
    if shape == "gpipe":
        plan = layout_plan(workload, layout("pp=2", 2), batch=batch)
        return msgspec.structs.replace(plan, schedule="gpipe")
    texts = {
        "1": layout(""),
        "dp2": layout("", 2),
        "tp2": layout(f"tp=2,sp={sp}"),
        "dp4": layout("", 4),
        "dp2tp2": layout("tp=2", 2),
        "dp2tp4": layout(f"tp=4,sp={sp}", 2),
        "cp2": layout("cp=2"),
        "dp2cp2": layout("cp=2", 2),
        "tp2cp2": layout("tp=2,cp=2"),
        "ep2": layout("ep=2", 2),
        "dp4ep2": layout("ep=2", 4),
        "tp2ep2": layout("tp=2,ep=2", 2),
        "four": layout("pp=4,tp=2"),
        "four-dp2": layout("pp=4", 2),
    }
    return layout_plan(workload, texts[shape], batch=batch)
