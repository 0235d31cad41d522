"""Published training runs: the records of a measurements file, each mapped to what `autopar estimate` takes.

    flash_attn true -> attn=flash,overlap=1; false or null -> attn=math,overlap=0
    null zero, vpp, cp, sp -> 0, 1, 1, 0; ``selective_*`` -> selective; ``amp_bf16`` -> bf16; fp8 is skipped
    a record that says CUDA_LAUNCH_BLOCKING=1 -> launch=blocking, which no key of the schema records
    target: result.step_time_s or derived.step_time_s; of a record of kind "layer" result.other.combined_ms

A cluster is the shipped one of the machine that the record names, else of its GPU, with the record's node size and NIC
rate, where it names them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DTYPES = {"fp16": "fp16", "bf16": "bf16", "amp_bf16": "bf16", "amp_fp16": "fp16", "fp32": "fp32"}
RECOMPUTE = {None: "none", "none": "none", "full": "full"}
GIB = 2**30

# GPU of a record -> (cluster, overrides)
CLUSTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "V100-SXM-16GB": ("p3.16xlarge", {}),
    "V100-SXM-32GB": ("p3.16xlarge", {"device": "V100-SXM-32GB"}),
    "A100-SXM-40GB": ("dgx-a100-40g", {}),
    "A100-SXM-80GB": ("dgx-a100", {}),
    "H100-SXM-80GB": ("dgx-h100", {}),
    "H100-SXM-96GB-HBM2e": ("dgx-h100", {"memory_bytes_per_s": 2.4e12, "memory_gib": 94.5}),
    "H200-SXM-141GB": ("dgx-h200", {}),
    "B200-SXM-180GB": ("dgx-b200", {}),
    "A40": ("a40", {}),
    "T4": ("t4", {}),
}


# beginning of a record's cluster -> the shipped cluster of that machine
MACHINES = {"Jean Zay, 8x A100": "jean-zay-a100"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One measured run. ``time_s`` is None where it ran out of memory; ``memory_bytes`` is the published peak."""

    id: str
    set: str
    kind: str
    model_file: str
    settings: tuple[tuple[str, Any], ...]
    dtype: str
    cluster: str
    overrides: tuple[tuple[str, Any], ...]
    gpus: int
    layout: str
    gbs: int
    time_s: float | None
    ran: bool
    memory_bytes: float | None
    memory_kind: str

    @property
    def group(self) -> tuple[Any, ...]:
        """Runs of one model on as many GPUs with one batch: what a user would choose between."""
        return (self.settings, self.gpus, self.gbs, self.cluster)

    @property
    def model(self) -> tuple[Any, ...]:
        """What is left out together when something is fitted."""
        return (self.settings, self.cluster)


def read_runs(path: Path) -> tuple[list[Run], list[tuple[str, str]]]:
    """All runs that map, and (id, reason) of those that do not."""
    runs, skipped = [], []
    for line in path.read_text().splitlines():
        if line.strip():
            record = json.loads(line)
            found = _run(record)
            if isinstance(found, str):
                skipped.append((record["id"], found))
            else:
                runs.append(found)
    return runs, skipped


def _run(record: dict[str, Any]) -> Run | str:
    model, hardware, layout, result = (record[key] for key in ("model", "hardware", "layout", "result"))
    if layout["dtype"] not in DTYPES:
        return f"dtype {layout['dtype']}"
    if model.get("experts"):
        return "mixture of experts: the record does not fix its routing"
    if model["family"] not in ("gpt", "llama") or hardware["gpu"] not in CLUSTERS:
        return f"no model or cluster for {model['family']} on {hardware['gpu']}"
    layer = record["kind"] == "layer"
    other = result.get("other") or {}
    time_s = other["combined_ms"] * 1e-3 if layer else result["step_time_s"]
    if time_s is None:
        time_s = (record["derived"] or {}).get("step_time_s")
    if time_s is None and result["status"] == "ok" and not result.get("mem_gb"):
        return "neither a time nor a memory"
    said = " ".join(str(text) for text in (layout.get("inferred"), layout.get("notes"), record["notes"]))
    blocking = "CUDA_LAUNCH_BLOCKING=1" in said
    cluster, overrides = CLUSTERS[hardware["gpu"]]
    if cluster == "p3.16xlarge" and hardware.get("gpus_per_node") == 16:
        cluster, overrides = "dgx-2", {}
    for beginning, name in MACHINES.items():
        if str(hardware.get("cluster")).startswith(beginning):
            cluster = name
    return Run(
        id=record["id"],
        set=record["set"],
        kind=record["kind"],
        model_file=str(EXAMPLES / ("gpt.py" if model["family"] == "gpt" else "llama.py")),
        settings=tuple(sorted(_settings(model).items())),
        dtype=DTYPES[layout["dtype"]],
        cluster=cluster,
        overrides=tuple(sorted((overrides | _fabric(cluster, hardware)).items())),
        gpus=record["n_gpus"],
        layout=layout_text(layout) + (",launch=blocking" if blocking else ""),
        gbs=layout["gbs"],
        time_s=time_s,
        ran=result["status"] == "ok",
        memory_bytes=_memory(result),
        memory_kind=result.get("mem_kind") or "",
    )


def _settings(model: dict[str, Any]) -> dict[str, Any]:
    keys = ["layers", "hidden", "heads", "ffn", "vocab", "seq"] + (["kv_heads"] if model["family"] == "llama" else [])
    return {key: model[key] for key in keys}


def _fabric(cluster: str, hardware: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if hardware.get("inter_gbits_s_per_node"):
        found["inter_node_gbits_per_s"] = float(hardware["inter_gbits_s_per_node"])
    if hardware.get("gpus_per_node"):
        found["devices_per_node"] = hardware["gpus_per_node"]
    return found


def _memory(result: dict[str, Any]) -> float | None:
    if not result.get("mem_gb"):
        return None
    return result["mem_gb"] * (GIB if "GiB" in (result.get("mem_kind") or "") else 1e9)


def layout_text(layout: dict[str, Any]) -> str:
    """The layout as `--layout` takes it.

    >>> layout_text({"tp": 2, "pp": 1, "dp": 4, "mbs": 2, "gbs": 16, "recompute": "full", "flash_attn": None})
    'tp=2,pp=1,cp=1,dp=4,mbs=2,gbs=16,vpp=1,ep=1,sp=0,zero=0,recompute=full,attn=math,overlap=0'
    """
    recompute = layout.get("recompute")
    recompute = "selective" if str(recompute).startswith("selective") else RECOMPUTE[recompute]
    flash = bool(layout.get("flash_attn"))
    parts: dict[str, Any] = {key: layout.get(key) or 1 for key in ("tp", "pp", "cp", "dp", "mbs", "gbs", "vpp", "ep")}
    parts |= {"sp": int(bool(layout.get("sp"))), "zero": layout.get("zero") or 0, "recompute": recompute}
    parts |= {"attn": "flash" if flash else "math", "overlap": int(flash)}
    return ",".join(f"{key}={value}" for key, value in parts.items())
