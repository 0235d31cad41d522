"""Plans frozen as files: what the product plans and prints for a request, without what differs from run to run.

``python -m tests.golden.frozen`` makes the files of ``tests/golden/plans`` anew (``slow`` behind it also those of the
published sizes, a request's name only that one): read their diff before committing it.
"""

import io
import json
import re
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autopar.cli.main import run

ROOT = Path(__file__).resolve().parents[2]
PLANS = Path(__file__).resolve().parent / "plans"
WIDTH = 150

GPT = "examples/gpt.py --set layers=4 --set hidden=1024 --set heads=16 --set vocab=8192 --set seq=512"
SMALL_GPT = "examples/gpt.py --set layers=4 --set hidden=64 --set heads=4 --set vocab=128 --set seq=16"
DECODER = "tests/golden/decoder.py"
MOE = "examples/moe.py --set layers=4 --set hidden=512 --set experts=8 --set vocab=4096 --set seq=256"
RESNET = "examples/wide_resnet.py --set layers=50 --set base_channels=64 --set width_factor=1 --set image_size=64"
REQUESTS = {
    "gpt_8_h100": f"plan {GPT} --gpus 8 --global-batch 64",
    "gpt_16_v100_tight": f"plan {GPT} --gpus 16 --cluster p3.16xlarge --global-batch 64 --memory 1.3",
    "gpt_12_a100_sgd": f"plan {GPT} --gpus 12 --cluster dgx-a100 --global-batch 48 --optimizer sgd --dtype fp32",
    "gpt_gpipe_cpu": f"plan {SMALL_GPT} --gpus 4 --cluster cpu-gloo --dtype fp32 --global-batch 16 --schedule gpipe",
    "gpt_pinned": f"plan {GPT} --gpus 8 --global-batch 32 --pin layers.*.mlp.fc1.weight=RS(0) --micro-batch 8",
    "gpt_interleaved": f"estimate {GPT} --gpus 8 --layout tp=2,pp=2,vpp=2,sp=1,zero=1,mbs=2,gbs=64,recompute=selective",
    "gpt_unequal_stages": f"estimate {GPT} --gpus 16 --layout stages=2@dp8+4@dp4*tp2,mbs=2,gbs=64,zero=3,recompute=full",
    "decoder_8_h100": f"plan {DECODER} --gpus 8 --memory 2",
    "decoder_context": f"estimate {DECODER} --gpus 8 --set dropout=0.1 --layout cp=2,tp=2,zero=2,mbs=1,attn=math",
    "moe_8_a100": f"plan {MOE} --gpus 8 --cluster dgx-a100-40g --global-batch 64",
    "moe_experts": f"estimate {MOE} --gpus 8 --layout ep=4,pp=2,mbs=8,gbs=128",
    "resnet_8_v100": f"plan {RESNET} --gpus 8 --cluster p3.16xlarge --global-batch 256",
    "gpt_decode": f"estimate {GPT} --gpus 4 --layout tp=2 --mode decode --weights int8",
}
SLOW_REQUESTS = {
    "gpt_39b_64_v100": "plan examples/gpt.py --gpus 64 --set size=39B --cluster p3.16xlarge",
    "gpt_39b_64_h100": "plan examples/gpt.py --gpus 64 --set size=39B",
    "gpt_175b_1024_a100": "plan examples/gpt.py --gpus 1024 --set size=175B --cluster dgx-a100 --global-batch 1536",
    "moe_27b_32_v100": "plan examples/moe.py --gpus 32 --set size=27B --cluster p3.16xlarge",
    "resnet_4b_16_v100": "plan examples/wide_resnet.py --gpus 16 --set size=4B --cluster p3.16xlarge",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """What a request gives: ``document`` as JSON, from the plan's file (or stdout, where none is written), and the text
    as printed."""

    document: str
    text: str


def made(words: str) -> Frozen:
    """Run a request from the repository's root, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        serving = "--mode" in words
        text = _printed([*words.split(), "-q", *([] if serving else ["-o", str(path)])])
        document = json.loads(_printed([*words.split(), "-q", "--json"]) if serving else path.read_text())
    return Frozen(document=as_lines(without_what_varies(document)) + "\n", text=_without_seconds(text))


def without_what_varies(document: dict[str, Any]) -> dict[str, Any]:
    """The plan without the search's seconds, versions, paths, and prose (which the text has)."""
    document = {key: value for key, value in document.items() if key not in ("versions", "command", "notes")}
    for key, varying in (("model", ("path", "source_hash")), ("search", ("seconds", "runner_up"))):
        if isinstance(document.get(key), dict):
            document[key] = {name: value for name, value in document[key].items() if name not in varying}
    return document


def as_lines(value: Any, indent: str = "") -> str:
    """JSON in lines of up to ``WIDTH`` characters, nested further only where that is too short.

    >>> as_lines({"a": [1, 2]})
    '{"a": [1, 2]}'
    """
    line = json.dumps(value)
    if len(line) + len(indent) <= WIDTH or not isinstance(value, dict | list) or not value:
        return line
    inner = indent + " "
    if isinstance(value, list):
        return "[\n" + ",\n".join(inner + as_lines(item, inner) for item in value) + f"\n{indent}]"
    items = (f"{inner}{json.dumps(key)}: {as_lines(item, inner)}" for key, item in value.items())
    return "{\n" + ",\n".join(items) + f"\n{indent}}}"


def differences(frozen: Any, found: Any, place: str = "") -> list[str]:
    """Where two documents differ: numbers by more than rounding (1e-9), anything else at all."""
    if isinstance(frozen, dict) and isinstance(found, dict):
        keys = [*frozen, *(key for key in found if key not in frozen)]
        pairs = [(f"{place}.{key}", frozen.get(key), found.get(key)) for key in keys]
    elif isinstance(frozen, list) and isinstance(found, list) and len(frozen) == len(found):
        pairs = [(f"{place}[{at}]", *pair) for at, pair in enumerate(zip(frozen, found, strict=True))]
    elif isinstance(frozen, float) and isinstance(found, float | int) and not isinstance(found, bool):
        close = abs(frozen - found) <= 1e-9 * max(abs(frozen), abs(found))
        return [] if close else [f"{place}: {frozen} was frozen, {found} found"]
    else:
        return (
            [] if frozen == found and type(frozen) is type(found) else [f"{place}: {frozen} was frozen, {found} found"]
        )
    return [line for name, one, other in pairs for line in differences(one, other, name)]


def _printed(words: list[str]) -> str:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run(words)
    assert code == 0, (words, code, err.getvalue())
    return out.getvalue()


def _without_seconds(text: str) -> str:
    """The search's own time is not part of what is frozen."""
    return re.sub(r"(?m)^(search .*), [0-9.]+ s$", r"\1, ... s", text)


def main(wanted: str = "") -> None:
    PLANS.mkdir(exist_ok=True)
    for name, words in {**REQUESTS, **SLOW_REQUESTS}.items():
        slow = name in SLOW_REQUESTS
        if wanted not in (("slow", name) if slow else ("", "slow", name)):
            continue
        found = made(words)
        if not slow:
            (PLANS / f"{name}.json").write_text(found.document)
        else:
            (PLANS / f"{name}.json").write_text(summary(found.document))
        (PLANS / f"{name}.txt").write_text(found.text)
        print(name, file=sys.stderr, flush=True)


def summary(document: str) -> str:
    """A large plan without the placements of its ops: their fingerprint stands for them."""
    import hashlib

    plan = json.loads(document)
    programs = json.dumps(plan.pop("programs"), sort_keys=True)
    return as_lines({**plan, "programs_sha256": hashlib.sha256(programs.encode()).hexdigest()}) + "\n"


if __name__ == "__main__":
    main(*sys.argv[1:])
