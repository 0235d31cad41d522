"""`autopar verify`: a plan's numbers against one process, on CPU ranks."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autopar.cli.claimed_stdout import ResultCommand, print_result
from autopar.cli.command_options import Assignment, count_option, print_options, unique_assignments
from autopar.core.dtypes import LONG_NAMES
from autopar.core.errors import CheckError

if TYPE_CHECKING:
    from autopar.cluster.cluster import Cluster
    from autopar.core.plan import Collective, Plan
    from autopar.verify.verify_plan import VerifyReport

MAX_LISTED_ERRORS = 3
EXAMPLES = """\b
Examples:
  autopar verify gpt.plan.json --ranks 4
  autopar verify gpt.plan.json --model examples/gpt.py --set hidden=64 --set seq=16"""


@click.command("verify", cls=ResultCommand, short_help="Check a plan's numbers against one process.", epilog=EXAMPLES)
@click.argument("plan_file", metavar="PLAN", type=click.Path())
@click.option("--model", type=click.Path(), metavar="MODEL.py", help="The model file, instead of the plan's own.")
@click.option("--cluster", metavar="NAME|FILE", help="The cluster's name or file; else the one that the plan names.")
@click.option(
    "--ranks", type=count_option("--ranks"), default=8, show_default=True, metavar="N", help="CPU processes, at most."
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    type=Assignment(),
    metavar="K=V",
    help="Give the model another size, such as hidden=64, with the same blocks.",
)
@print_options
def verify_command(
    *,
    plan_file: str,
    model: str | None,
    cluster: str | None,
    ranks: int,
    settings: tuple[tuple[str, Any], ...],
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> int:
    """Run PLAN, shrunk to N ranks, on CPU processes and compare loss, gradients and optimizer steps with one process; exit
    code 7 if they differ. Every layer and sample of the micro-batch is computed in fp64: give large models small sizes."""
    from autopar.cli.inputs import load_plan_cluster, load_plan_workload
    from autopar.core.plan_file import load_plan

    plan = load_plan(plan_file)
    target = load_plan_cluster(plan, Path(plan_file), cluster)
    workload = load_plan_workload(plan, Path(plan_file), model)
    changed = {**plan.model.settings, **unique_assignments("--set", settings)}

    from autopar.cli.progress import progress_on_stderr
    from autopar.verify.verify_plan import verify_plan

    with progress_on_stderr(quiet) as progress:
        progress("verify", f"starting up to {ranks} ranks", None, None)
        report = verify_plan(
            plan,
            model=str(workload.path),
            settings=changed,
            max_ranks=ranks,
            list_collectives=lambda shrunk: _list_collectives(shrunk, target, str(workload.path), changed),
        )
    if as_json:
        from autopar.cli.output import print_document

        print_document(_report_document(report))
        return 0 if report.passed else CheckError.exit_code
    print_result("\n".join(_report_lines(report, verbose)))
    if not report.passed:
        numbers = "the plan's numbers differ from those of one process"
        raise CheckError(
            "the collectives that ran are not those that the plan lists" if report.collective_differences else numbers
        )
    return 0


def _list_collectives(
    shrunk: "Plan", cluster: "Cluster", model: str, settings: dict[str, Any]
) -> "tuple[Collective, ...]":
    """The collectives of a shrunk plan, as the judge lists them on the plan's cluster."""
    from autopar.graph.split_into_blocks import hoist_light_ops, split_into_blocks
    from autopar.graph.trace import trace
    from autopar.judge.judge import judge
    from autopar.workload.model_file import load_workload

    traced = trace(load_workload(model, **settings), dtype=LONG_NAMES[shrunk.execution.dtype])
    graph = hoist_light_ops(traced.graph)
    return judge(shrunk, graph, split_into_blocks(graph), cluster, shrunk=True).collectives


def _report_lines(report: "VerifyReport", verbose: bool) -> list[str]:
    """The report for people; ``verbose`` lists every collective and more of the largest errors."""
    lines = [f"{report.num_ranks} ranks, fp64" + (", a shrunk plan:" if report.changes else "")]
    lines += [f"  {change}" for change in report.changes]
    lines.append(
        f"loss        {report.expected_loss:.12g} one process, {report.loss:.12g} plan: error {report.loss_error:.1e}"
    )
    for title, errors in (("gradients", report.gradients), ("parameters", report.parameters)):
        what = "" if title == "gradients" else " after 3 optimizer steps"
        worst = sorted(errors, key=lambda name: -errors[name])
        lines.append(f"{title:<11} {len(errors)} tensors{what}, worst {errors[worst[0]]:.1e} {worst[0]}")
        lines += [f"            {errors[name]:.1e} {name}" for name in worst[1:MAX_LISTED_ERRORS] if verbose]
    count = sum(sum(sizes.values()) for sizes in report.collectives.values())
    if report.not_compared_because is not None:
        verdict = f"not compared with the plan's list: {report.not_compared_because}"
    else:
        verdict = "those that the plan lists" if not report.collective_differences else "not those that the plan lists"
    lines.append(f"collectives {count} a step in the plan's dtype, {verdict}")
    lines += [f"            {line}" for line in report.collective_differences]
    if verbose:
        for (stage, kind, axes), sizes in sorted(report.collectives.items()):
            lines += [
                f"  {count:4} stage {stage} {kind}{' over ' + '*'.join(axes) if axes else ''} of {size} bytes"
                for size, count in sorted(sizes.items())
            ]
    lines.append("PASS" if report.passed else "FAIL")
    return lines


def _report_document(report: "VerifyReport") -> dict[str, Any]:
    """The JSON document of ``verify --json``."""
    return {
        "passed": report.passed,
        "ranks": report.num_ranks,
        "twin": list(report.changes),
        "loss": report.loss,
        "expected_loss": report.expected_loss,
        "gradients": dict(report.gradients),
        "parameters": dict(report.parameters),
        "collectives": [
            {"stage": stage, "kind": kind, "axes": list(axes), "num_bytes": size, "count_per_step": count}
            for (stage, kind, axes), sizes in sorted(report.collectives.items())
            for size, count in sorted(sizes.items())
        ],
        "unlisted_collectives": list(report.collective_differences),
        "collectives_not_compared": report.not_compared_because,
    }
