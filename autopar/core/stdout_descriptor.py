"""Descriptor 1, below Python's ``sys.stdout``: what solvers, models and child processes write there.

C code prints through a buffer of its own, which may reach the descriptor long after the call; so buffers are flushed on
both sides of a change.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

STDOUT_DESCRIPTOR, STDERR_DESCRIPTOR = 1, 2


def redirect_stdout_descriptor(destination: int | None) -> int | None:
    """Point descriptor 1 to the file of descriptor ``to``, or to the null device where ``to`` is None or closed.

    Returns a duplicate of descriptor 1 as it was, for ``restore_stdout``; None where it was closed."""
    flush_output()
    saved = duplicate_descriptor(STDOUT_DESCRIPTOR)
    target = None if destination is None else duplicate_descriptor(destination)
    if target is None:
        target = os.open(os.devnull, os.O_WRONLY)
    if target != STDOUT_DESCRIPTOR:  # it is where descriptor 1 was closed: the lowest free number
        os.dup2(target, STDOUT_DESCRIPTOR)
        os.close(target)
    return saved


def restore_stdout_descriptor(saved: int | None) -> None:
    """Point descriptor 1 back to what ``redirect_stdout`` returned, which is closed."""
    flush_output()
    if saved is None:
        os.close(STDOUT_DESCRIPTOR)
    else:
        os.dup2(saved, STDOUT_DESCRIPTOR)
        os.close(saved)


@contextlib.contextmanager
def muted_stdout() -> Iterator[None]:
    """Nothing that is written to descriptor 1 inside the ``with`` is seen; Python's own prints before it are."""
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
    """Write out what Python and C hold in buffers."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    ctypes.CDLL(None).fflush(None)
