"""docs/cli.md, made from the commands' own help: `python -m tests.command_reference` writes it."""

from collections.abc import Iterator
from pathlib import Path

import click

from autopar.cli.main import autopar

PATH = Path(__file__).parents[1] / "docs" / "cli.md"
HELP_OPTIONS = list(autopar.context_settings["help_option_names"])
INTRODUCTION = """# The command line

Made from the commands' own help by `python -m tests.command_reference`; a test checks that it is current.
"""


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """A command and all below it, with their full names."""
    yield name, command
    if isinstance(command, click.Group):
        for child, below in sorted(command.commands.items()):
            yield from commands(below, f"{name} {child}")


def reference() -> str:
    """The page: every command's help, 100 columns wide."""
    parts = [INTRODUCTION]
    for name, command in commands(autopar, "autopar"):
        context = click.Context(
            command, info_name=name, help_option_names=HELP_OPTIONS, max_content_width=100, terminal_width=100
        )
        parts.append(f"## {name}\n\n```text\n{command.get_help(context).rstrip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PATH.write_text(reference())
