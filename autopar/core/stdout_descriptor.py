"""Descriptor 1, below Python's ``sys.stdout``: what solvers, models and child processes write there.

C code prints through a buffer of its own, which may reach the descriptor long after the call; so buffers are flushed on
both sides of a change.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

STDOUT, STDERR = 1, 2


def redirect_stdout(to: int | None) -> int | None:
    """Point descriptor 1 to the file of descriptor ``to``, or to the null device where ``to`` is None or closed.

    Returns a duplicate of descriptor 1 as it was, for ``restore_stdout``; None where it was closed."""
    flush()
    saved = duplicate(STDOUT)
    target = None if to is None else duplicate(to)
    if target is None:
        target = os.open(os.devnull, os.O_WRONLY)
    if target != STDOUT:  # it is where descriptor 1 was closed: the lowest free number
        os.dup2(target, STDOUT)
        os.close(target)
    return saved


def restore_stdout(saved: int | None) -> None:
    """Point descriptor 1 back to what ``redirect_stdout`` returned, which is closed."""
    flush()
    if saved is None:
        os.close(STDOUT)
    else:
        os.dup2(saved, STDOUT)
        os.close(saved)


@contextlib.contextmanager
def muted_stdout() -> Iterator[None]:
    """Nothing that is written to descriptor 1 inside the ``with`` is seen; Python's own prints before it are."""
    saved = redirect_stdout(None)
    try:
        yield
    finally:
        restore_stdout(saved)


def duplicate(descriptor: int) -> int | None:
    """A new descriptor of the same file, not inherited by child processes; None where ``descriptor`` is closed."""
    try:
        return os.dup(descriptor)
    except OSError:
        return None


def flush() -> None:
    """Write out what Python and C hold in buffers."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    ctypes.CDLL(None).fflush(None)
