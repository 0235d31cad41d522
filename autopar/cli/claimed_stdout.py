"""stdout carries results and nothing else, whatever solvers, models and child processes write to descriptor 1.

Results leave through a stream of their own (``ClaimedStdout.results``). Descriptor 1 itself points to stderr meanwhile,
and so does Python's ``sys.stdout`` while a command runs: only what click prints (``--help``, ``--version``) comes before.
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
    """Whoever read our stdout wants no more of it (``autopar show P | head``), which is no error of ours."""


class ResultStream(io.TextIOWrapper):
    """A stream to the user's stdout. Where it cannot be written, what is left is dropped, so that Python does not try
    again at exit: NoReaderError where the reader went away, PlanFileError where the disk is full."""

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
    """Points descriptor 1 to stderr when made. ``results`` is the stream that reaches the user's stdout.

    Where ``sys.stdout`` is not descriptor 1 (a test, a notebook), results go where ``sys.stdout`` went; where stdout is
    closed, they go nowhere."""

    def __init__(self) -> None:
        self._python_stdout = sys.stdout
        self._saved = redirect_stdout_descriptor(STDERR_DESCRIPTOR)
        self.results = self._stream()
        sys.stdout = self.results

    def _stream(self) -> TextIO:
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
        """What is printed inside the ``with`` goes to stderr: stdout has something else."""
        results, self.results = self.results, sys.stderr
        try:
            yield
        finally:
            self.results = results

    def restore(self) -> None:
        """Give stdout back to a process, or to a program in its place, that goes on."""
        self.results.flush()
        restore_stdout_descriptor(self._saved)
        sys.stdout = self._python_stdout

    def close(self) -> None:
        """No more results: what a model's exit handlers and threads still print goes to stderr."""
        self.results.flush()
        flush_output()
        sys.stdout = sys.stderr


@dataclass(frozen=True, slots=True, kw_only=True)
class Invocation:
    """One call of the program: its ``arguments`` as given, and where its results go."""

    arguments: tuple[str, ...]
    stdout: ClaimedStdout


class ResultCommand(click.Command):
    """A command during which ``sys.stdout`` is stderr; its results leave through ``print_result``."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with contextlib.redirect_stdout(sys.stderr):
            return super().invoke(ctx)


def invocation() -> Invocation:
    """The call of the program that the current command belongs to."""
    found = click.get_current_context().find_root().obj
    assert isinstance(found, Invocation)
    return found


def print_result(text: str, end: str = "\n") -> None:
    """Write text to the user's stdout; PlanFileError where that cannot be written."""
    print(text, end=end, file=invocation().stdout.results, flush=True)


def _descriptor(stream: TextIO) -> int | None:
    """The descriptor that a stream writes to; None for one in memory."""
    try:
        return stream.fileno()
    except (OSError, ValueError):  # io.UnsupportedOperation is both
        return None
