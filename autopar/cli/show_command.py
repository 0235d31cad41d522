"""`autopar show`: a plan file as text."""

from pathlib import Path

import click

from autopar.cli.claimed_stdout import ResultCommand
from autopar.cli.command_options import print_options

EXAMPLES = """\b
Examples:
  autopar show gpt.plan.json
  autopar show gpt.plan.json --verbose
  autopar show gpt.plan.json --json | jq .estimate.items"""


@click.command("show", cls=ResultCommand, short_help="Print a plan.", epilog=EXAMPLES)
@click.argument("plan_file", metavar="PLAN", type=click.Path())
@print_options
def show_command(*, plan_file: str, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Print a plan: its stages, times, memory, and the placement of each parameter."""
    from autopar.cli.output import print_plan
    from autopar.core.plan_file import load_plan

    print_plan(load_plan(plan_file), Path(plan_file), as_json=as_json, verbose=verbose)
