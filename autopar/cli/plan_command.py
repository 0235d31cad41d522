"""`autopar plan`: search the best plan, write it, print it."""

import sys
from pathlib import Path
from typing import Any

import click

from autopar.cli.claimed_stdout import ResultCommand
from autopar.cli.command_options import (
    output_file_options,
    print_options,
    search_options,
    unique_assignments,
    workload_options,
)
from autopar.cli.inputs import layout_flags, plan_of_layout
from autopar.cli.output_file import OutputFile
from autopar.core.request import RecomputeChoice, ScheduleChoice, choose_global_batch

EXAMPLES = """\b
Examples:
  autopar plan gpt.py --gpus 64 --set size=39B
  autopar plan gpt.py --gpus 16 --cluster dgx-a100 --cluster-set inter_node_gbits_per_s=800 --memory 60 -o a100.json
  autopar plan gpt.py --gpus 8 --layout tp=4,zero=1 --pin 'layers.*.mlp.fc1.weight=RS(0)'
  autopar plan gpt.py --gpus 8 --cluster table.json --json -q | jq .estimate.step_time_s"""


@click.command("plan", cls=ResultCommand, short_help="Search the fastest plan and write it to a file.", epilog=EXAMPLES)
@workload_options
@click.option("--layout", metavar="TEXT", help="Do not search: price this layout, such as tp=8,pp=4,zero=1.")
@search_options
@output_file_options("plan")
@print_options
def plan_command(
    *,
    model: str,
    gpus: int,
    cluster: str,
    cluster_set: tuple[tuple[str, Any], ...],
    settings: tuple[tuple[str, Any], ...],
    global_batch: int | None,
    micro_batch: int | None,
    dtype: str | None,
    memory: float | None,
    optimizer: str,
    layout: str | None,
    pins: tuple[tuple[str, str], ...],
    recompute: RecomputeChoice,
    schedule: ScheduleChoice,
    time_limit: float | None,
    output: str | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Find the fastest plan for MODEL.py on N GPUs and write it to FILE (default: MODEL.plan.json)."""
    from autopar.core.plan_file import PLAN_FILE, encode_plan

    name = output if output is not None else f"{Path(model).stem}.plan.json"
    file = OutputFile.checked(name, PLAN_FILE, force=force, as_json=as_json)

    from autopar.cluster.cost_tables import load_cluster
    from autopar.core.layout import parse_layout

    fixed = None
    if layout is not None:
        fixed = parse_layout(layout, layout_flags(recompute=recompute, schedule=schedule))
    target = load_cluster(cluster, **unique_assignments("--cluster-set", cluster_set))
    model_settings = unique_assignments("--set", settings)

    from autopar.cli.progress import progress_on_stderr
    from autopar.workload.model_file import load_workload

    with progress_on_stderr(quiet) as progress:
        progress("model", f"loading {model}", None, None)
        workload = load_workload(model, **model_settings)
        layout_batch = None if fixed is None else fixed.gbs
        batch = choose_global_batch(global_batch, layout_batch, workload.global_batch, model_file=model)

        options: dict[str, Any] = {
            "cluster": target,
            "gpus": gpus,
            "global_batch": batch,
            "micro_batch": micro_batch,
            "dtype": dtype,
            "memory_gib": memory,
            "optimizer": optimizer,
            "pins": pins,
        }
        if fixed is not None:
            result = plan_of_layout(workload, fixed, **options)
        else:
            from autopar.planner.planner import plan

            result = plan(
                workload,
                **options,
                recompute=recompute,
                schedule=schedule,
                time_limit_s=time_limit,
                progress=progress,
            )

    from autopar.cli.output import print_plan, with_command_line

    result = with_command_line(result, cluster, cluster_set)
    path = file.write(encode_plan(result))
    with file.text_stream():
        print_plan(result, path, as_json=as_json, verbose=verbose)
    if path is not None and not as_json and not quiet:
        print(f"wrote {path}", file=sys.stderr)
