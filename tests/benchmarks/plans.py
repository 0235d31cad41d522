"""Plans every published size of the examples, and real models of transformers: ``python -m tests.benchmarks.plans``.

Each by the command line in a process of its own; a line for each as it is done. ``python -m tests.benchmarks.plans gpt``
plans those whose line has ``gpt`` in it; with ``compare`` behind it each plan is compared with the best Megatron layout of
the grid, too, which takes minutes. Prints, asserts nothing.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

V100, H100, A100 = "--cluster p3.16xlarge", "--cluster dgx-h100", "--cluster dgx-a100"
WEAK_SCALING = {  # Alpa OSDI'22: one size for each number of GPUs
    "examples/gpt.py": ("350M", "760M", "1.3B", "2.6B", "6.7B", "15B", "39B"),
    "examples/moe.py": ("380M", "690M", "1.3B", "2.4B", "10B", "27B", "70B"),
    "examples/wide_resnet.py": ("250M", "500M", "1B", "2B", "4B", "6.8B", "13B"),
}
CASES = [
    *(
        f"{path} --set size={size} --gpus {2**at} {V100}{' --global-batch 1520' if size == '13B' else ''}"
        for path, sizes in WEAK_SCALING.items()
        for at, size in enumerate(sizes)
    ),
    f"examples/moe.py --set size=70B --gpus 64 {V100} --optimizer sgd",  # with AdamW, 16 bytes a parameter are too many
    f"examples/gpt.py --set size=39B --gpus 64 {H100}",
    f"examples/llama.py --set size=8B --gpus 64 {H100} --global-batch 512",
    f"examples/llama.py --set size=70B --gpus 64 {H100} --global-batch 512",
    f"examples/gpt.py --set size=175B --gpus 1024 {A100} --global-batch 1536",
    *(
        f"tests/benchmarks/models.py --set name={name} --gpus 64 {H100}"
        for name in ("gpt2-xl", "mixtral-8x7b", "t5-3b", "vit-l", "bert-large", "vgg-16")
    ),
]


def main(wanted: str = "", compare: str = "") -> None:
    print("| model | GPUs | step | gap | plan | memory | runner-up | command | peak | best Megatron layout |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for case in CASES:
        if wanted in case:
            print(f"| {_row(case, compare == 'compare')} |", flush=True)


def _row(case: str, compare: bool) -> str:
    path, _, setting, _, gpus, _, cluster, *_ = case.split()
    row = f"{Path(path).stem} {setting.split('=')[1]} | {gpus} {cluster}"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "autopar", "plan", *case.split(), "--json", "-q", "-o", str(out)]
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            printed = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        against = _against(path, out) if compare and out.exists() else "-"
    found = json.loads(printed)
    if "error" in found:
        return f"{row} | {found['error']['message']}"
    estimate, search = found["estimate"], found["search"]
    axes = dict.fromkeys(
        " x ".join(f"{name} {size}" for name, size in stage["axes"].items() if size > 1) or "alone"
        for stage in found["stages"]
    )
    stages = f"{len(found['stages'])} x " if len(found["stages"]) > 1 else ""
    chunks = f", {found['num_chunks']} chunks" if found["num_chunks"] > 1 else ""
    return " | ".join(
        (
            row,
            f"{estimate['step_time_s']:.4g} s",
            f"{search['gap']:.1%}",
            f"{stages}({'; '.join(axes)}){chunks}, micro-batch {found['micro_batch_size']}, "
            f"{found['recompute']} recompute",
            f"{estimate['peak_memory_bytes'] / 2**30:.1f} of {estimate['budget_bytes'] / 2**30:.1f} GiB",
            str(search["runner_up"]),
            f"{seconds:.1f} s",
            f"{usage.ru_maxrss / 2**10:.0f} MiB",
            against,
        )
    )


def _against(path: str, plan: Path) -> str:
    """How much faster the plan is than the best layout of the grid, by the same model."""
    command = [sys.executable, "-m", "autopar", "compare", str(plan), "--against", "megatron"]
    done = subprocess.run([*command, "--model", path, "--json", "-q"], capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    if "error" in found or found["best"] is None:
        return "none fits"
    return f"{found['speedup']:.3f}x {found['layout']} ({found['num_layouts']} layouts, {found['num_fit']} fit)"


if __name__ == "__main__":
    main(*sys.argv[1:])
