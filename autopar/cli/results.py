"""stdout carries results and nothing else, whatever solvers, models and child processes write to descriptor 1.

Results leave through a stream of their own (``Invocation.results``). Descriptor 1 itself points to stderr meanwhile, and
so does Python's ``sys.stdout`` while a command runs: only what click prints (``--help``, ``--version``) comes before.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

import click

from autopar.plan.descriptors import STDERR, STDOUT, flush, redirect_stdout, restore_stdout
from autopar.plan.errors import PlanFileError


class ClaimedStdout:
    """Points descriptor 1 to stderr when made. ``results`` is the stream that reaches the user's stdout.

    Where ``sys.stdout`` is not descriptor 1 (a test, a notebook), results go where ``sys.stdout`` went; where stdout is
    closed, they go nowhere."""

    def __init__(self) -> None:
        self._python_stdout = sys.stdout
        self._saved = redirect_stdout(STDERR)
        self.results = self._stream()
        sys.stdout = self.results

    def _stream(self) -> TextIO:
        stdout = self._python_stdout
        if stdout is None or self._saved is None:
            return open(os.devnull, "w")
        if _descriptor(stdout) != STDOUT:
            return stdout
        copy = os.dup(self._saved)
        buffering = 1 if os.isatty(copy) else -1
        return open(copy, "w", encoding=stdout.encoding, errors=stdout.errors, buffering=buffering)

    @contextlib.contextmanager
    def diverted(self) -> Iterator[None]:
        """What is printed inside the ``with`` goes to stderr: stdout has something else."""
        results, self.results = self.results, sys.stderr
        try:
            yield
        finally:
            self.results = results

    def restore(self) -> None:
        """Give stdout back to a process, or to a program in its place, that goes on."""
        self.results.flush()
        restore_stdout(self._saved)
        sys.stdout = self._python_stdout

    def abandon(self) -> None:
        """Drop what could not be written: its reader is gone, and Python must not flush into the pipe at exit."""
        if _descriptor(self.results) is not None:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.results.fileno())
            os.close(null)

    def close(self) -> None:
        """No more results: what a model's exit handlers and threads still print goes to stderr."""
        self.results.flush()
        flush()
        sys.stdout = sys.stderr


@dataclass(frozen=True, slots=True, kw_only=True)
class Invocation:
    """One call of the program: its ``arguments`` as given, and where its results go."""

    arguments: tuple[str, ...]
    stdout: ClaimedStdout


class ResultCommand(click.Command):
    """A command during which ``sys.stdout`` is stderr; its results leave through ``print_result``."""

    def invoke(self, ctx: click.Context) -> Any:
        with contextlib.redirect_stdout(sys.stderr):
            return super().invoke(ctx)


def invocation() -> Invocation:
    """The call of the program that the current command belongs to."""
    found = click.get_current_context().find_root().obj
    assert isinstance(found, Invocation)
    return found


def print_result(text: str, end: str = "\n") -> None:
    """Write text to the user's stdout; PlanFileError where that is full or cannot be written.

    A reader that went away (BrokenPipeError) wants no more of it, and is no error."""
    results = invocation().stdout.results
    try:
        print(text, end=end, file=results, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        invocation().stdout.abandon()
        raise PlanFileError(f"cannot write to stdout: {error.strerror or error}") from None


def _descriptor(stream: TextIO) -> int | None:
    """The descriptor that a stream writes to; None for one in memory."""
    try:
        return stream.fileno()
    except (OSError, ValueError):  # io.UnsupportedOperation is both
        return None
