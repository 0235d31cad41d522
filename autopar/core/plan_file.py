"""Plan files: versioned JSON, written atomically, refused when truncated, of another version or inconsistent."""

import os
from pathlib import Path
from typing import Any

import msgspec

from autopar.core.errors import PlanFileError
from autopar.core.invariants import check_plan
from autopar.core.plan import FORMAT_VERSION, Plan
from autopar.core.write_file import FileKind, write_file


class _PlanMarker(msgspec.Struct):
    """The fields that plan files of every format have. ``format_version`` alone would not tell them from what ``--json``
    prints and from files of other programs."""

    format_version: str
    programs: list[msgspec.Raw]
    stages: list[msgspec.Raw]


PLAN_FILE = FileKind(name="an autopar plan", marker=_PlanMarker)


def save_plan(plan: Plan, path: str | os.PathLike[str], *, force: bool = True) -> None:
    """Write a plan to ``path`` atomically: whatever happens, the file there is the old one or the complete new one.

    It replaces any file, as Python's own functions do; a link stays and its target becomes the plan, a device or pipe is
    written into. With ``force=False`` it is as careful as ``autopar plan -o``: only a plan is replaced
    (``core.write_file`` has the rules). Raises PlanFileError when the plan breaks an invariant, or the file cannot or may
    not be written."""
    write_file(Path(path), encode_plan(plan), PLAN_FILE, force=force)


def encode_plan(plan: Plan) -> bytes:
    """The bytes of a plan's file; PlanFileError when the plan breaks an invariant."""
    check_plan(plan)
    return msgspec.json.format(msgspec.json.encode(plan), indent=1) + b"\n"


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """The plan of a file; PlanFileError, one short message, for anything but a complete plan of this version."""
    source = Path(path)
    try:
        content = source.read_bytes()
    except OSError as error:
        raise PlanFileError(f"cannot read plan {source}: {error.strerror or error}") from None
    try:
        _check_version(msgspec.json.decode(content), source)
        plan = msgspec.json.decode(content, type=Plan)
    except msgspec.ValidationError as error:
        raise PlanFileError(f"{source} is no plan of format {FORMAT_VERSION}: {error}; {_REPLAN_HINT}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PlanFileError(
            f"{source} is torn or no JSON ({len(content)} bytes): {error or type(error).__name__}; {_REPLAN_HINT}"
        ) from None
    try:
        check_plan(plan)
    except PlanFileError as error:
        raise PlanFileError(f"{source}: {error}") from None
    return plan


_REPLAN_HINT = "make it again with `autopar plan`"


def _check_version(document: Any, source: Path) -> None:
    """Refuse another version before its fields are checked, so that the message names the actual problem."""
    version = document.get("format_version") if isinstance(document, dict) else None
    if not isinstance(version, str):
        raise PlanFileError(f"{source} is no autopar plan: it has no format_version; {_REPLAN_HINT}")
    if version != FORMAT_VERSION:
        raise PlanFileError(
            f"{source} has plan format {version!r}, this autopar reads {FORMAT_VERSION!r}; "
            "use the autopar that wrote it, or make it again with `autopar plan`"
        )
