"""A rank's tensors take what the plan says they do at most: torch's own tracker counts, on real gloo ranks."""

import msgspec
import pytest

from tests.benchmarks.runtime_memory import Case, fullest, peak
from tests.distributed.pool import Pool

GPT = {"size": "125M", "layers": 6, "hidden": 128, "heads": 4, "vocab": 1024, "seq": 128}
LLAMA = {"size": "7B", "layers": 6, "hidden": 128, "heads": 4, "kv_heads": 2, "ffn": 352, "vocab": 1024, "seq": 128}
RESNET = {"size": "250M", "base_channels": 16, "width_factor": 2, "classes": 64, "image_size": 64}
CASES = {
    "gpt, ZeRO-3 gathers at most two blocks": Case(
        file="gpt.py", layout="dp=2,mbs=2,zero=3", batch=4, classes=1024, settings=GPT
    ),
    "gpt, gradients leave the backward": Case(file="gpt.py", layout="dp=1,mbs=2", batch=8, classes=1024, settings=GPT),
    "gpt, a sharded vocabulary": Case(file="gpt.py", layout="tp=2,mbs=2", batch=2, classes=1024, settings=GPT),
    "gpt, gathered inputs are saved sharded": Case(
        file="gpt.py", layout="tp=2,mbs=2,sp=1", batch=2, classes=1024, settings=GPT
    ),
    "llama, masters among the weights": Case(
        file="llama.py", layout="dp=2,mbs=2,zero=1", batch=4, classes=1024, settings=LLAMA
    ),
    "gpt, gradients are computed while blocks are recomputed": Case(
        file="gpt.py", layout="dp=1,mbs=2,recompute=full", batch=2, classes=1024, settings=GPT
    ),
    "gpt, a tied gradient is full until it is reduce-scattered": Case(
        file="gpt.py", layout="dp=2,mbs=1,zero=3,recompute=full", batch=2, classes=1024, settings=GPT
    ),
    "llama, gathered parameters of two blocks": Case(
        file="llama.py", layout="dp=2,mbs=1,zero=3,recompute=full", batch=2, classes=1024, settings=LLAMA
    ),
    "wide-resnet, statistics of all samples": Case(
        file="wide_resnet.py", layout="dp=2,mbs=8", batch=32, classes=64, settings=RESNET
    ),
    "wide-resnet, saved first and gradients last": Case(
        file="wide_resnet.py", layout="dp=1,mbs=16", batch=16, classes=64, settings=RESNET
    ),
}


LONG = (
    "wide-resnet, statistics of all samples",
    "wide-resnet, saved first and gradients last",
    "llama, masters among the weights",
    "llama, gathered parameters of two blocks",
)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in CASES])
def test_peak_is_the_plans(pool: Pool, name: str) -> None:
    plan = CASES[name].plan()
    rank, planned = fullest(plan)
    ran, parts = pool.run(plan.gpus, peak, CASES[name], msgspec.json.encode(plan))[rank]
    assert ran == pytest.approx(planned, rel=0.05), f"{ran / planned:.3f} of the plan's bytes ran: {parts}"
