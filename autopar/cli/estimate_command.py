"""`autopar estimate`: the price of one manual layout, in training or in inference."""

import contextlib
from typing import Any

import click

from autopar.cli.claimed_stdout import ResultCommand, print_result
from autopar.cli.command_options import (
    CheckedNumber,
    combine_options,
    count_option,
    output_file_options,
    print_options,
    search_options,
    unique_assignments,
    workload_options,
)
from autopar.cli.inputs import layout_flags, plan_of_layout
from autopar.cli.output_file import OutputFile
from autopar.core.errors import UsageError
from autopar.core.request import SERVING_MODES, STORAGE_FORMATS, check_context, choose_global_batch, positive_number

EXAMPLES = """\b
Examples:
  autopar estimate gpt.py --gpus 64 --layout tp=8,pp=4,zero=1 --set size=39B --global-batch 1024
  autopar estimate llama.py --gpus 16000 --layout tp=8,pp=16,sp=1,zero=1,recompute=full,gbs=2000 --set size=405B --tokens 15e12
  autopar estimate llama.py --gpus 8 --layout tp=8 --mode decode --weights int4 --context 2048"""

TRAINING_ONLY_OPTIONS = (
    "tokens", "output", "force", "micro_batch", "optimizer", "recompute", "schedule", "time_limit", "pins",
)  # fmt: skip
SERVING_ONLY_OPTIONS = ("context", "weights", "kv_cache")
STORAGE_TYPE = click.Choice(STORAGE_FORMATS)

serving_options = combine_options(
    click.option(
        "--mode",
        type=click.Choice(["train", *SERVING_MODES]),
        default="train",
        show_default=True,
        help="Training, or inference on tensor-parallel replicas (layout keys tp, dp, gbs, fusion).",
    ),
    click.option(
        "--context",
        type=count_option("--context"),
        metavar="N",
        help="Decode: tokens in the cache; else the model's own sequence length.",
    ),
    click.option(
        "--weights", type=STORAGE_TYPE, default="same", show_default=True, help="Inference: how weights are stored."
    ),
    click.option(
        "--kv-cache",
        type=STORAGE_TYPE,
        default="same",
        show_default=True,
        help="Inference: how the key/value cache is stored.",
    ),
)


@click.command(
    "estimate", cls=ResultCommand, short_help="Price one manual layout, in training or in inference.", epilog=EXAMPLES
)
@workload_options
@click.option("--layout", required=True, metavar="TEXT", help="The layout, such as tp=8,pp=4,zero=1.")
@click.option(
    "--tokens",
    type=CheckedNumber(float, rule=positive_number("--tokens")),
    metavar="N",
    help="Tokens of the whole training run: prints its GPU hours and days.",
)
@serving_options
@search_options
@output_file_options("plan")
@print_options
@click.pass_context
def estimate_command(context_: click.Context, /, **arguments: Any) -> None:
    """Price one manual layout of MODEL.py on N GPUs; with -o, write it as a plan. --time-limit has no effect here.

    For inference, --global-batch is the number of sequences over all replicas; without it, decode takes as many as fit."""
    serving = arguments["mode"] != "train"
    _refuse_options(context_, TRAINING_ONLY_OPTIONS if serving else SERVING_ONLY_OPTIONS, arguments["mode"])
    (_estimate_serving if serving else _estimate_training)(**arguments)


def _refuse_options(context: click.Context, names: tuple[str, ...], mode: str) -> None:
    """UsageError for options that have no meaning in this mode."""
    from click.core import ParameterSource

    options = [
        "/".join(parameter.opts)
        for parameter in context.command.params
        if parameter.name in names and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    ]
    if options:
        other = "inference: add --mode decode" if mode == "train" else "training: leave out --mode"
        raise UsageError(f"{', '.join(options)} belong to {other}")


def _estimate_training(
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
    output: str | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **_: Any,
) -> None:
    """``estimate --mode train``: price, write and print the plan of the layout."""
    from autopar.core.plan_file import PLAN_FILE, encode_plan

    file = None if output is None else OutputFile.checked(output, PLAN_FILE, force=force, as_json=as_json)

    from autopar.cluster.cost_tables import load_cluster
    from autopar.core.layout import parse_layout

    fixed = parse_layout(layout, layout_flags(recompute=recompute, schedule=schedule))
    target = load_cluster(cluster, **unique_assignments("--cluster-set", cluster_set))
    model_settings = unique_assignments("--set", settings)

    from autopar.cli.progress import progress_on_stderr
    from autopar.workload.model_file import load_workload

    with progress_on_stderr(quiet) as progress:
        progress("model", f"loading {model}", None, None)
        workload = load_workload(model, **model_settings)
        batch = choose_global_batch(global_batch, fixed.gbs, workload.global_batch, model_file=model)
        progress("estimate", str(fixed) or "data parallel", None, None)
        priced = plan_of_layout(
            workload,
            fixed,
            cluster=target,
            gpus=gpus,
            global_batch=batch,
            micro_batch=micro_batch,
            dtype=dtype,
            memory_gib=memory,
            optimizer=optimizer,
            pins=pins,
        )

    from autopar.cli.output import print_plan, with_command_line
    from autopar.report.training_time import TrainingTime

    priced = with_command_line(priced, cluster, cluster_set)
    path = None if file is None else file.write(encode_plan(priced))
    training = None if tokens is None else TrainingTime.of(tokens, priced.estimate.tokens_per_s, gpus)
    extra = {} if training is None else {"training": training.document()}
    with contextlib.nullcontext() if file is None else file.text_stream():
        print_plan(priced, path, as_json=as_json, verbose=verbose, extra=extra)
        if training is not None and not as_json:
            print_result(training.text)


def _estimate_serving(
    *,
    model: str,
    gpus: int,
    cluster: str,
    cluster_set: tuple[tuple[str, Any], ...],
    settings: tuple[tuple[str, Any], ...],
    global_batch: int | None,
    dtype: str | None,
    memory: float | None,
    layout: str,
    mode: Any,
    context: int | None,
    weights: Any,
    kv_cache: Any,
    as_json: bool,
    quiet: bool,
    **_: Any,
) -> None:
    """``estimate --mode prefill|decode``: price and print the inference of the layout."""
    from autopar.cluster.cost_tables import load_cluster

    target = load_cluster(cluster, **unique_assignments("--cluster-set", cluster_set))
    model_settings = unique_assignments("--set", settings)
    check_context(context, mode)

    from autopar.cli.progress import progress_on_stderr
    from autopar.workload.model_file import load_workload

    with progress_on_stderr(quiet) as progress:
        progress("model", f"loading {model}", None, None)
        workload = load_workload(model, **model_settings)

        from autopar.serving.serve import estimate_serving

        progress(mode, layout or "a GPU a replica", None, None)
        priced = estimate_serving(
            workload,
            cluster=target,
            gpus=gpus,
            layout=layout,
            mode=mode,
            batch=global_batch,
            context=context,
            weights=weights,
            kv_cache=kv_cache,
            dtype=dtype,
            memory_gib=memory,
        )

    from autopar.cli.output import print_document, text_width
    from autopar.report.serving_text import serving_document, serving_text

    if as_json:
        print_document(serving_document(priced, model=model, settings=model_settings))
        return
    model_text = " ".join([model, *(f"{key}={value}" for key, value in model_settings.items())])
    print_result(serving_text(priced, model=model_text, width=text_width()), end="")
