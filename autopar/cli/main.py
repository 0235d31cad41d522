"""`autopar`: the group of commands, and how each way of ending becomes a message and an exit code."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import click

from autopar.cli.claimed_stdout import ClaimedStdout, Invocation, NoReaderError
from autopar.cli.cluster_command import cluster_group
from autopar.cli.compare_command import compare_command
from autopar.cli.estimate_command import estimate_command
from autopar.cli.plan_command import plan_command
from autopar.cli.profile_command import profile_command
from autopar.cli.run_command import run_command
from autopar.cli.show_command import show_command
from autopar.cli.verify_command import verify_command
from autopar.core.errors import AutoparError, PlanFileError

INTERRUPTED_EXIT_CODE = 130


EPILOG = """Results go to stdout, progress and errors to stderr; --json prints one document, errors included; later versions may
add keys to it but remove none.

\b
Exit codes:
  0 done                                      5 the time limit came before any plan
  2 usage                                     6 a bad or stale file
  3 the model cannot be loaded or traced      7 a check failed
  4 no plan fits                              130 interrupted"""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120}, epilog=EPILOG)
@click.version_option(package_name="autopar")
def autopar() -> None:
    """Plan how to train a PyTorch model on many GPUs."""


for _command in (
    plan_command,
    estimate_command,
    compare_command,
    show_command,
    run_command,
    verify_command,
    cluster_group,
    profile_command,
):
    autopar.add_command(_command)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ErrorReport:
    """An error as it is reported: a few lines on stderr, or the one JSON document on stdout, to which ``extra`` keys are
    added."""

    code: int
    kind: str
    message: str
    hint: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


def entry() -> None:
    """The program: run the command line and exit with its code."""
    stdout = ClaimedStdout()
    code = _exit_code_of(Invocation(arguments=tuple(sys.argv[1:]), stdout=stdout))
    stdout.close()
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command line in a process that continues; returns the exit code."""
    stdout = ClaimedStdout()
    try:
        return _exit_code_of(Invocation(arguments=tuple(arguments), stdout=stdout))
    finally:
        stdout.restore()


def _exit_code_of(call: Invocation) -> int:
    """The exit code of one call; an exception that escapes is a bug of ours."""
    as_json = "--json" in _before_separator(call.arguments)
    try:
        return _run_and_report(call, as_json)
    except NoReaderError:
        return 0
    except PlanFileError as error:  # the document of the error could not be written
        print(f"autopar: {error}", file=sys.stderr)
        return error.exit_code


def _run_and_report(call: Invocation, as_json: bool) -> int:
    """Run a call, print its results or its error, and return the exit code."""
    try:
        code = autopar.main(args=list(call.arguments), prog_name="autopar", standalone_mode=False, obj=call)
        call.stdout.results.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        hint = ""
        if isinstance(error, click.UsageError) and error.ctx is not None:
            hint = f"\ntry: {error.ctx.command_path} --help"
        report = _ErrorReport(
            code=error.exit_code, kind=type(error).__name__, message=error.format_message(), hint=hint
        )
    except AutoparError as error:
        faults = getattr(error, "faults", None)
        extra = {} if faults is None else {"faults": list(faults)}
        report = _ErrorReport(code=error.exit_code, kind=type(error).__name__, message=str(error), extra=extra)
    except (click.Abort, KeyboardInterrupt):
        report = _ErrorReport(code=INTERRUPTED_EXIT_CODE, kind="Interrupted", message="interrupted")
    if not as_json or call.stdout.is_lost:
        print(f"autopar: {report.message}{report.hint}", file=sys.stderr)
        return report.code
    document = {"error": {"code": report.code, "kind": report.kind, "message": report.message, **report.extra}}
    print(json.dumps(document, indent=2), file=call.stdout.results, flush=True)
    return report.code


def _before_separator(arguments: Sequence[str]) -> list[str]:
    """The arguments before ``--``: those after it are the training script's."""
    words = list(arguments)
    return words[: words.index("--")] if "--" in words else words


if __name__ == "__main__":
    entry()
