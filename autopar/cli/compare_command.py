"""`autopar compare`: a plan side by side with the best manual layout of a grid, or with a single one."""

from pathlib import Path

import click

from autopar.cli.claimed_stdout import ResultCommand, print_result
from autopar.cli.command_options import print_options
from autopar.core.errors import UsageError

EXAMPLES = """\b
Examples:
  autopar compare gpt.plan.json --against megatron
  autopar compare gpt.plan.json --against megatron:tp=8,pp=2,zero=1"""


@click.command(
    "compare", cls=ResultCommand, short_help="Compare a plan with the best Megatron layout.", epilog=EXAMPLES
)
@click.argument("plan_file", metavar="PLAN", type=click.Path())
@click.option(
    "--against",
    required=True,
    metavar="megatron[:LAYOUT]",
    help="megatron for the best layout, megatron:tp=8,pp=2 for that one.",
)
@click.option("--model", type=click.Path(), metavar="MODEL.py", help="The model file, instead of the plan's own.")
@click.option("--cluster", metavar="NAME|FILE", help="The cluster's name or file; else the one that the plan names.")
@print_options
def compare_command(
    *, plan_file: str, against: str, model: str | None, cluster: str | None, as_json: bool, quiet: bool, verbose: bool
) -> None:
    """Print PLAN and the best Megatron layout side by side, priced by the same cost model, budget and judge."""
    from autopar.core.plan_file import load_plan

    layout = _layout_text(against)
    path = Path(plan_file)
    plan = load_plan(path)

    from autopar.cli.inputs import load_plan_cluster, load_plan_workload
    from autopar.cli.progress import progress_on_stderr

    with progress_on_stderr(quiet) as progress:
        target = load_plan_cluster(plan, path, cluster)
        progress("model", f"loading {model or plan.model.path}", None, None)
        workload = load_plan_workload(plan, path, model)

        from autopar.manual.megatron_grid import compare_megatron

        progress("compare", f"layout {layout}" if layout is not None else "the grid of layouts", None, None)
        comparison = compare_megatron(plan, workload, target, layout)

    if as_json:
        from autopar.cli.output import print_document
        from autopar.report.json_document import comparison_document

        print_document(comparison_document(comparison, plan_file))
        return
    from autopar.cli.output import text_width
    from autopar.report.comparison_text import comparison_text

    print_result(comparison_text(comparison, width=text_width()), end="")


def _layout_text(against: str) -> str | None:
    """The layout of ``megatron:LAYOUT``, checked; None for the whole grid.

    >>> _layout_text("megatron:tp=8,pp=2"), _layout_text("megatron")
    ('tp=8,pp=2', None)
    """
    from autopar.core.layout import parse_layout

    name, colon, text = against.partition(":")
    if name != "megatron":
        raise UsageError(f"--against {against!r}: write megatron, or megatron:tp=8,pp=2 for one layout")
    return str(parse_layout(text)) if colon else None
