"""Descriptor 1, below Python's ``sys.stdout``: solvers, models and child processes write there.

C code prints through a buffer of its own, which may reach the descriptor long after the call; so buffers are flushed
before and after each change.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

STDOUT_DESCRIPTOR, STDERR_DESCRIPTOR = 1, 2


def redirect_stdout_descriptor(destination: int | None) -> int | None:
    """Point descriptor 1 to the file of ``destination``, or to the null device where that is None or closed.

    Returns a duplicate of descriptor 1 as it was, for ``restore_stdout_descriptor``; None where it was closed."""
    flush_output()
    saved = duplicate_descriptor(STDOUT_DESCRIPTOR)
    target = None if destination is None else duplicate_descriptor(destination)
    if target is None:
        target = os.open(os.devnull, os.O_WRONLY)
    if target != STDOUT_DESCRIPTOR:  # equal where descriptor 1 was closed: it is the lowest free number
        os.dup2(target, STDOUT_DESCRIPTOR)
        os.close(target)
    return saved


def restore_stdout_descriptor(saved: int | None) -> None:
    """Point descriptor 1 back to the duplicate that ``redirect_stdout_descriptor`` returned, and close that."""
    flush_output()
    if saved is None:
        os.close(STDOUT_DESCRIPTOR)
    else:
        os.dup2(saved, STDOUT_DESCRIPTOR)
        os.close(saved)


@contextlib.contextmanager
def muted_stdout() -> Iterator[None]:
    """Discard what is written to descriptor 1 inside the ``with``; what Python printed before it is not lost."""
    saved = redirect_stdout_descriptor(None)
    try:
        yield
    finally:
        restore_stdout_descriptor(saved)


def duplicate_descriptor(descriptor: int) -> int | None:
    """A new descriptor of the same file, not inherited by child processes; None where ``descriptor`` is closed."""
    try:
        return os.dup(descriptor)
    except OSError:
        return None


def flush_output() -> None:
    """Write out the buffers of Python and C."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    ctypes.CDLL(None).fflush(None)
