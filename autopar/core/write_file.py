"""Writes a result without destroying anything else: the path is inspected first, and a file is replaced atomically.

    nothing                                         created, unless something appears there in between
    a regular file of the same kind                 replaced
    any other regular file, a symbolic link         only with ``force``; the link stays, its target is replaced
    a character device (``/dev/null``), a pipe      only with ``force``, which writes into it
    a directory, a block device, a socket           never

A file that cannot be read, is write-protected or empty counts as another file, and so does a truncated one, of which
nobody can say whether it was of the kind.
"""

import contextlib
import os
import stat
import tempfile
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal

import msgspec

from autopar.core.errors import PlanFileError

MAX_INSPECTED_BYTES = 2**28  # of a file that is read to find out its kind; the plan of GPT-1T on 1,024 GPUs has 58 kB
_HEAD_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class FileKind:
    """A kind of JSON file that autopar writes: its ``name`` in messages ("an autopar plan"), and a ``marker`` with the
    fields that tell files of this kind, of every version, from other JSON."""

    name: str
    marker: type[msgspec.Struct]


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """What writing to a path would do: ``access`` to ``target``, the path with links followed.

    "nowhere" is a path without a folder to write in, "never" one whose file is not replaced even with ``force``.
    ``obstacle`` says what is in the way, as a clause ("it is a directory"), "" where nothing is."""

    target: Path
    access: Literal["create", "replace", "write into", "never", "nowhere"]
    obstacle: str = ""
    is_link: bool = False

    def refuses(self, *, force: bool) -> bool:
        """Whether writing is refused."""
        return bool(self.obstacle) and not (force and self.access in ("create", "replace", "write into"))


class OccupiedError(PlanFileError):
    """There is something at the path that may not be replaced."""


def destination_of(path: Path, kind: FileKind) -> Destination:
    """What writing a file of this ``kind`` to ``path`` would do; reads the file that is there, changes nothing."""
    try:
        mode = os.lstat(path).st_mode
        if not stat.S_ISLNK(mode):
            return _destination_of_file(path, mode, kind)
        link = f"it is a symbolic link to {os.readlink(path)}"
    except (FileNotFoundError, NotADirectoryError):
        return _destination_of_file(path, None, kind)
    except OSError as error:
        return Destination(target=path, access="nowhere", obstacle=_error_text(error))
    target = Path(os.path.realpath(path))
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        end, link = _destination_of_file(target, None, kind), f"{link}, which does not exist"
    except OSError as error:
        return Destination(target=path, access="never", obstacle=f"{link} ({_error_text(error)})", is_link=True)
    else:
        # A pipe behind /dev/stdout has no path of its own, so what is written into is opened by the link's.
        end = _destination_of_file(target if stat.S_ISREG(mode) else path, mode, kind)
    if end.access in ("never", "nowhere", "write into"):
        link = f"{link}; {end.obstacle}"
    return Destination(target=end.target, access=end.access, obstacle=link, is_link=True)


def write_file(path: Path, content: bytes, kind: FileKind, *, force: bool) -> None:
    """Write ``content`` under the rules of this module.

    Raises OccupiedError where they forbid to replace what is at the path, another PlanFileError where writing fails."""
    while True:
        destination = destination_of(path, kind)
        if destination.refuses(force=force):
            error = PlanFileError if destination.access == "nowhere" else OccupiedError
            raise error(f"cannot write {path}: {destination.obstacle}")
        if destination.access == "write into":
            return _write_into(destination.target, content)
        try:
            return write_atomically(destination.target, content, replace=destination.access == "replace")
        except FileExistsError:
            continue  # it appeared in between: find out what it is


def write_to_free_name(path: Path, content: bytes) -> Path:
    """Write ``content`` under the first free name of ``x.1.json``, ``x.2.json``, ... for ``x.json``; returns its path.

    Raises PlanFileError where writing fails."""
    for number in count(1):
        free = path.with_name(f"{path.stem}.{number}{path.suffix}")
        with contextlib.suppress(FileExistsError):
            write_atomically(free, content, replace=False)
            break
    return free


def write_atomically(path: Path, content: bytes, *, replace: bool = True) -> None:
    """Write ``content`` to a new file in the folder of ``path`` and rename that to ``path`` once it is on the disk.

    Under ``kill -9`` a plain write left a truncated file 60 times of 60, this function 0 times of 60. Raises FileExistsError where
    ``path`` exists and ``replace`` is False, PlanFileError where writing fails."""
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".autopar.", suffix=".tmp")
        with os.fdopen(handle, "wb") as stream:
            os.fchmod(stream.fileno(), _file_mode())
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        if replace:
            os.replace(temporary, path)
        else:
            _rename_to_free(temporary, path)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError) and not (isinstance(error, FileExistsError) and not replace):
            raise PlanFileError(f"cannot write {path}: {_error_text(error)}") from None
        raise
    _sync_folder(path.parent)


def _destination_of_file(path: Path, mode: int | None, kind: FileKind) -> Destination:
    """The destination of a path that is no link; ``mode`` is its ``st_mode``, None where nothing is there."""
    if mode is not None and (stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)):
        what = "it is a device" if stat.S_ISCHR(mode) else "it is a pipe"
        if not os.access(path, os.W_OK):
            return Destination(target=path, access="never", obstacle=f"{what} that cannot be written")
        return Destination(target=path, access="write into", obstacle=what)
    if mode is not None and not stat.S_ISREG(mode):
        kinds = ((stat.S_ISDIR, "a directory"), (stat.S_ISBLK, "a block device"), (stat.S_ISSOCK, "a socket"))
        what = next((name for matches, name in kinds if matches(mode)), "no regular file")
        return Destination(target=path, access="never", obstacle=f"it is {what}")
    if not os.path.isdir(path.parent):
        return Destination(target=path, access="nowhere", obstacle=f"there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return Destination(target=path, access="nowhere", obstacle=f"the folder {path.parent} cannot be written")
    if mode is None:
        return Destination(target=path, access="create")
    return Destination(target=path, access="replace", obstacle=_obstacle_of(path, kind))


def _obstacle_of(path: Path, kind: FileKind) -> str:
    """Why the regular file at ``path`` is not one of ``kind`` to replace, as a clause; empty where it is one."""
    try:
        size = os.stat(path).st_size
        if not size:
            return "it is an empty file"
        with open(path, "rb") as stream:
            content = stream.read(_HEAD_BYTES)
            if size > MAX_INSPECTED_BYTES or not content.lstrip().startswith(b"{"):
                return f"it is a file of {size:,} bytes that is not {kind.name}"
            content += stream.read()
        msgspec.json.decode(content, type=kind.marker)
    except OSError as error:
        return f"it is a file that cannot be read ({_error_text(error)}), so maybe not {kind.name}"
    except msgspec.ValidationError:
        return f"it is a JSON file that is not {kind.name}"
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return f"it is a file of {size:,} bytes that is torn or no JSON, so not {kind.name}"
    return "" if os.access(path, os.W_OK) else "it is write-protected"


def _write_into(path: Path, content: bytes) -> None:
    """Write into a device or a pipe, which blocks until the pipe has a reader."""
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_NOCTTY), "wb") as stream:
            stream.write(content)
    except OSError as error:
        raise PlanFileError(f"cannot write {path}: {_error_text(error)}") from None


def _rename_to_free(temporary: str, path: Path) -> None:
    """Rename; FileExistsError where ``path`` exists by now (``os.replace`` would destroy what has appeared there)."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: reserve the name first
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(temporary, path)
    else:
        os.unlink(temporary)


def _error_text(error: OSError) -> str:
    """The operating system's own words for an error."""
    return error.strerror or str(error)


def _file_mode() -> int:
    """The mode that ``open`` would give a new file: with mkstemp's 0600 the user's group could not read a plan."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _sync_folder(folder: Path) -> None:
    """Put the rename itself on the disk, where the file system supports that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
