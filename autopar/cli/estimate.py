"""`autopar estimate`: the price of one manual layout."""

from pathlib import Path
from typing import Any

import click

from autopar.cli.inputs import check_writable, global_batch_of, layout_flags, priced_layout
from autopar.cli.options import Positive, distinct, out_option, output_options, search_options, workload_options
from autopar.plan.errors import UsageError


@click.command("estimate")
@workload_options
@click.option("--layout", required=True, metavar="TEXT", help="The layout, such as tp=8,pp=4,zero=1.")
@click.option(
    "--tokens",
    type=Positive(),
    metavar="N",
    help="Tokens of the whole training, such as 15e12: adds GPU hours and days.",
)
@search_options
@out_option
@output_options
def estimate_command(
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
    layout: str,
    tokens: float | None,
    pins: tuple[tuple[str, str], ...],
    recompute: str,
    schedule: str,
    time_limit: float | None,
    output: str | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Price one manual layout of MODEL.py on N GPUs; with -o, write it as a plan. A time limit changes nothing here."""
    from autopar.cluster.load import load_cluster
    from autopar.plan.layout import parse_layout

    path = None if output is None else check_writable(Path(output))
    if pins:
        raise UsageError("--pin fixes part of a search; `estimate` prices a whole layout: use `autopar plan --pin`")
    fixed = parse_layout(layout, layout_flags(recompute=recompute, schedule=schedule))
    target = load_cluster(cluster, **distinct("--cluster-set", cluster_set))
    model_settings = distinct("--set", settings)

    from autopar.cli.progress import progress_on_stderr
    from autopar.workload.load import load_workload

    with progress_on_stderr(quiet) as progress:
        progress("model", f"loading {model}", None, None)
        workload = load_workload(model, **model_settings)
        batch = global_batch_of(global_batch, fixed.gbs, workload, model)

        progress("estimate", str(fixed) or "data parallel", None, None)
        priced = priced_layout(
            workload,
            fixed,
            cluster=target,
            gpus=gpus,
            global_batch=batch,
            micro_batch=micro_batch,
            dtype=dtype,
            memory_gib=memory,
            optimizer=optimizer,
        )

    from autopar.cli.output import print_plan, signed
    from autopar.plan.file import save_plan
    from autopar.report.training import Training

    priced = signed(priced, cluster, cluster_set)
    if path is not None:
        save_plan(priced, path)
    training = None if tokens is None else Training.of(tokens, priced.estimate.tokens_per_s, gpus)
    extra = {} if training is None else {"training": training.document()}
    print_plan(priced, path, as_json=as_json, verbose=verbose, extra=extra)
    if training is not None and not as_json:
        print(training.text)
