"""Results on stdout: text as wide as the terminal, or one JSON document."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopar.cli.claimed_stdout import invocation, print_result

if TYPE_CHECKING:
    from autopar.core.plan import Plan

PIPED_WIDTH = 120
MIN_WIDTH = 72


def text_width() -> int:
    """Columns of the terminal; in a pipe a fixed width, so that a plan always prints the same text."""
    if not invocation().stdout.results.isatty():
        return PIPED_WIDTH
    return max(MIN_WIDTH, shutil.get_terminal_size((PIPED_WIDTH, 24)).columns)


def print_document(document: dict[str, Any]) -> None:
    """Print a JSON document; its numbers are finite."""
    print_result(json.dumps(document, indent=2, allow_nan=False))


def print_plan(
    plan: "Plan", path: Path | None, *, as_json: bool, verbose: bool, extra: dict[str, Any] | None = None
) -> None:
    """Print the plan as text, or as its JSON document with ``extra`` keys."""
    if as_json:
        from autopar.report.json_document import plan_document

        print_document(plan_document(plan, None if path is None else str(path)) | (extra or {}))
        return
    from autopar.report.plan_text import plan_text

    print_result(plan_text(plan, width=text_width(), verbose=verbose), end="")


def with_command_line(plan: "Plan", cluster: str, overrides: tuple[tuple[str, Any], ...]) -> "Plan":
    """The plan with the command line that made it, and with the cluster as the command line names it, so that commands
    that take only the plan find the same tables."""
    import shlex

    import msgspec

    named = msgspec.structs.replace(plan.cluster, name=cluster, overrides=dict(overrides))
    return msgspec.structs.replace(plan, cluster=named, command=shlex.join(["autopar", *invocation().arguments]))
