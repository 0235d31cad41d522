"""Only results reach stdout, whatever solvers, models and child processes write to descriptor 1.

Results are written to a stream of their own (``ClaimedStdout.results``). Descriptor 1 itself points to stderr meanwhile,
and so does Python's ``sys.stdout`` while a command runs, that is after click has printed ``--help`` or ``--version``.
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

import click

from autopar.core.errors import PlanFileError
from autopar.core.stdout_descriptor import (
    STDERR_DESCRIPTOR,
    STDOUT_DESCRIPTOR,
    flush_output,
    redirect_stdout_descriptor,
    restore_stdout_descriptor,
)


class NoReaderError(Exception):
    """The reader of our stdout has closed it (``autopar show P | head``), which is not an error."""


class ResultStream(io.TextIOWrapper):
    """A stream to the user's stdout. Where it cannot be written, the rest is dropped, so that Python does not retry at
    exit, and NoReaderError (the reader went away) or PlanFileError (the disk is full) is raised."""

    is_lost = False

    def write(self, text: str) -> int:
        """Write text, as a text stream does."""
        with self._dropped_on_failure():
            return super().write(text)

    def flush(self) -> None:
        """Flush, as a text stream does."""
        with self._dropped_on_failure():
            super().flush()

    @contextlib.contextmanager
    def _dropped_on_failure(self) -> Iterator[None]:
        """Point the stream to the null device and raise one of our errors where writing inside the ``with`` fails."""
        try:
            yield
        except OSError as error:
            self.is_lost = True
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            if isinstance(error, BrokenPipeError):
                raise NoReaderError from None
            raise PlanFileError(f"cannot write to stdout: {error.strerror or error}") from None


class ClaimedStdout:
    """Points descriptor 1 to stderr from its construction on. ``results`` is the stream that reaches the user's stdout.

    Where ``sys.stdout`` is not descriptor 1 (a test, a notebook), results go where ``sys.stdout`` went; where stdout is
    closed, they go nowhere."""

    def __init__(self) -> None:
        self._python_stdout = sys.stdout
        self._saved = redirect_stdout_descriptor(STDERR_DESCRIPTOR)
        self.results = self._stream()
        sys.stdout = self.results

    def _stream(self) -> TextIO:
        """The stream for results."""
        stdout = self._python_stdout
        if stdout is None or self._saved is None:
            return open(os.devnull, "w")
        if _descriptor(stdout) != STDOUT_DESCRIPTOR:
            return stdout
        binary = io.BufferedWriter(io.FileIO(os.dup(self._saved), "w"))
        return ResultStream(binary, stdout.encoding, stdout.errors, line_buffering=os.isatty(self._saved))

    @property
    def is_lost(self) -> bool:
        """Whether stdout cannot be written any more."""
        return isinstance(self.results, ResultStream) and self.results.is_lost

    @contextlib.contextmanager
    def diverted(self) -> Iterator[None]:
        """Results that are printed inside the ``with`` go to stderr, because stdout carries another document."""
        results, self.results = self.results, sys.stderr
        try:
            yield
        finally:
            self.results = results

    def restore(self) -> None:
        """Give stdout back, to this process or to the program that replaces it."""
        self.results.flush()
        restore_stdout_descriptor(self._saved)
        sys.stdout = self._python_stdout

    def close(self) -> None:
        """End the results: what a model's exit handlers and threads still print goes to stderr."""
        self.results.flush()
        flush_output()
        sys.stdout = sys.stderr


@dataclass(frozen=True, slots=True, kw_only=True)
class Invocation:
    """One call of the program: its ``arguments`` as the user wrote them, and the stdout of its results."""

    arguments: tuple[str, ...]
    stdout: ClaimedStdout


class ResultCommand(click.Command):
    """A command during which ``sys.stdout`` is stderr; it prints its results by ``print_result``."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with contextlib.redirect_stdout(sys.stderr):
            return super().invoke(ctx)


def invocation() -> Invocation:
    """The call of the program that the current command belongs to."""
    call = click.get_current_context().find_root().obj
    assert isinstance(call, Invocation)
    return call


def print_result(text: str, end: str = "\n") -> None:
    """Write text to the user's stdout; NoReaderError or PlanFileError where that cannot be written."""
    print(text, end=end, file=invocation().stdout.results, flush=True)


def _descriptor(stream: TextIO) -> int | None:
    """The descriptor that a stream writes to; None for one in memory."""
    try:
        return stream.fileno()
    except (OSError, ValueError):  # io.UnsupportedOperation is both
        return None
