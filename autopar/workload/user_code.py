"""The guard around the user's code: whatever it raises becomes a ModelError, in a few lines that name the user's own file
and line.

A model file that ends the program (``sys.exit(0)``, or ``argparse`` on our arguments) must not end ours, least of all
with exit code 0.
"""

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from autopar.core.errors import ModelError

MAX_MESSAGE_LENGTH = 300


@contextmanager
def guard_user_code(what_failed: str, *, reraised: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Runs the user's code, the body of the ``with``, so that whatever it raises becomes a ModelError whose message is
    ``what_failed`` ("build_model raised") and the exception. KeyboardInterrupt, GeneratorExit and the types in
    ``reraised`` are raised as they are.

    >>> with guard_user_code("build_model raised"):
    ...     raise SystemExit(0)
    Traceback (most recent call last):
    autopar.core.errors.ModelError: build_model raised SystemExit(0), which would end the program
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, GeneratorExit, *reraised)):
            raise
        raise ModelError(f"{what_failed} {describe_user_error(error)}") from error


def describe_user_error(error: BaseException) -> str:
    """One or two lines on an exception: its type, the first lines of its message, and the user's own file and line, as
    ``user_location`` gives them."""
    return _type_and_message(error) + user_location(error)


def user_location(error: BaseException) -> str:
    """``"\\n  at model.py:12: x = y.view(3)"`` for the innermost frame of an exception in a user's file, that is, outside
    of torch, autopar and Python's library; "" where there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"\n  at {os.path.basename(error.filename)}:{error.lineno}: {(error.text or '').strip()}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if is_user_file(frame.filename):
            return f"\n  at {os.path.basename(frame.filename)}:{frame.lineno}: {frame.line}"
    return ""


_OUR_FOLDERS = tuple(
    os.path.abspath(folder) + os.sep
    for folder in (os.path.dirname(torch.__file__), os.path.join(os.path.dirname(__file__), os.pardir))
)


def is_user_file(filename: str) -> bool:
    """Whether code in this file is the user's (or a model library's), rather than torch's, Python's or ours."""
    if filename.startswith(("<", *_OUR_FOLDERS)):
        return False
    return not filename.startswith(os.path.dirname(os.__file__) + os.sep) or "site-packages" in filename


def _type_and_message(error: BaseException) -> str:
    """The type of an exception and the first lines of its message.

    >>> _type_and_message(KeyError("tokens")), _type_and_message(SystemExit("no data"))
    ("KeyError: 'tokens'", "SystemExit('no data'), which would end the program")
    """
    try:
        message = str(error) if not isinstance(error, SystemExit) else "" if error.code is None else repr(error.code)
    except Exception as second:  # the user's own __str__
        message = f"(its message raised {type(second).__name__})"
    message = "; ".join([line.strip() for line in message.splitlines() if line.strip()][:2])
    if len(message) > MAX_MESSAGE_LENGTH:
        message = message[: MAX_MESSAGE_LENGTH - 3] + "..."
    if isinstance(error, SystemExit):
        return f"SystemExit({message}), which would end the program"
    return f"{type(error).__name__}: {message}"
