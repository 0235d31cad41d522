"""`autopar`: the group of commands, and how every ending becomes a message and an exit code."""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from autopar.cli.cluster import cluster_group
from autopar.cli.compare import compare_command
from autopar.cli.estimate import estimate_command
from autopar.cli.plan import plan_command
from autopar.cli.profile import profile_command
from autopar.cli.run import run_command
from autopar.cli.show import show_command
from autopar.cli.verify import verify_command
from autopar.plan.errors import AutoparError

INTERRUPTED = 130


EPILOG = """Results go to stdout, progress and errors to stderr; --json prints one document, errors included, to whose keys later
versions only add.

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


def entry() -> None:
    """The program: run the command line's arguments, end with its exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; no exception but a bug of ours leaves."""
    as_json = "--json" in _before_separator(arguments)
    try:
        code = autopar.main(args=list(arguments), prog_name="autopar", standalone_mode=False, obj=list(arguments))
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        hint = ""
        if isinstance(error, click.UsageError) and error.ctx is not None:
            hint = f"\ntry: {error.ctx.command_path} --help"
        return _report(error.exit_code, type(error).__name__, error.format_message(), hint, as_json, {})
    except AutoparError as error:
        faults = getattr(error, "faults", None)
        extra = {} if faults is None else {"faults": list(faults)}
        return _report(error.exit_code, type(error).__name__, str(error), "", as_json, extra)
    except (click.Abort, KeyboardInterrupt):
        return _report(INTERRUPTED, "Interrupted", "interrupted", "", as_json, {})
    except BrokenPipeError:
        # The reader went away (`autopar show P | head`): nothing to tell it, and Python must not flush into the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _report(code: int, kind: str, message: str, hint: str, as_json: bool, extra: dict[str, Any]) -> int:
    """Tell one error: a few lines on stderr, or the one JSON document on stdout."""
    if as_json:
        print(json.dumps({"error": {"code": code, "kind": kind, "message": message, **extra}}, indent=2))
    else:
        print(f"autopar: {message}{hint}", file=sys.stderr)
    return code


def _before_separator(arguments: Sequence[str]) -> list[str]:
    """Arguments up to ``--``, which are ours."""
    words = list(arguments)
    return words[: words.index("--")] if "--" in words else words


if __name__ == "__main__":
    entry()
