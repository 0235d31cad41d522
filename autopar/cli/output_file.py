"""The file that ``-o`` names: checked before any work is done, and written so that the result of a long search is never
lost."""

import contextlib
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autopar.cli.claimed_stdout import invocation, print_result
from autopar.core.errors import PlanFileError, UsageError

if TYPE_CHECKING:
    from autopar.core.write_file import Destination, FileKind

STDOUT_NAME = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFile:
    """Where a command writes its result: to ``path`` as the user gave it, relative to ``folder`` (a model file may change
    the working folder); ``path`` is None for stdout."""

    path: Path | None
    folder: Path
    kind: "FileKind"
    force: bool

    @classmethod
    def checked(cls, output: str, kind: "FileKind", *, force: bool, as_json: bool) -> "OutputFile":
        """The file of ``-o OUTPUT``; UsageError where it may not be written, or where stdout would get two documents."""
        from autopar.core.write_file import destination_of

        if output == STDOUT_NAME:
            if as_json:
                raise UsageError("-o - and --json would both print to stdout: leave out one of them")
            return cls(path=None, folder=Path(), kind=kind, force=force)
        path = Path(output)
        destination = destination_of(path, kind)
        if destination.refuses(force=force):
            raise UsageError(f"cannot write {path}: {destination.obstacle}; {_hint(destination)}")
        try:
            return cls(path=path, folder=Path.cwd(), kind=kind, force=force)
        except OSError as error:
            raise UsageError(f"cannot write {path}: the working folder is gone ({error.strerror})") from None

    def write(self, content: bytes) -> Path | None:
        """Write the result; returns its path, None for stdout.

        Where something has appeared at the path since it was checked, the result goes to a free name in the same folder,
        and a line on stderr says so. Where nothing can be written there at all, it goes to a folder for temporary files,
        which the PlanFileError names."""
        from autopar.core.write_file import OccupiedError, write_file, write_to_free_name

        try:
            if self.path is None:
                print_result(content.decode(), end="")
                return None
            try:
                write_file(self._resolved(self.path), content, self.kind, force=self.force)
                return self.path
            except OccupiedError as error:
                written = self.path.with_name(write_to_free_name(self._resolved(self.path), content).name)
                print(f"autopar: {error}; the result is in {written}", file=sys.stderr)
                return written
        except PlanFileError as error:
            rescued = _write_rescue_copy(self.path or Path("result.json"), content)
            raise PlanFileError(f"{error}; the result is in {rescued}" if rescued else str(error)) from None

    def text_stream(self) -> contextlib.AbstractContextManager[object]:
        """A context in which text for people goes to stdout, or to stderr where stdout has the result."""
        return contextlib.nullcontext() if self.path is not None else invocation().stdout.diverted()

    def _resolved(self, path: Path) -> Path:
        """The path, absolute where the working folder has changed since it was given."""
        with contextlib.suppress(OSError):  # the working folder may be gone
            if Path.cwd() == self.folder:
                return path
        return self.folder / path


def _hint(destination: "Destination") -> str:
    """What the user can do about a destination that is refused."""
    if destination.access in ("never", "nowhere"):
        return "choose another file with -o"
    if destination.access == "write into":
        return "-o - writes to stdout, --force into it"
    if destination.is_link:
        return "choose another file with -o, or write through the link with --force"
    return "choose another file with -o, or replace this one with --force"


def _write_rescue_copy(path: Path, content: bytes) -> Path | None:
    """The path of a copy in a new folder for temporary files, or None where that cannot be written either."""
    from autopar.core.write_file import write_atomically

    with contextlib.suppress(OSError):
        folder = Path(tempfile.mkdtemp(prefix="autopar."))
        try:
            write_atomically(folder / path.name, content)
            return folder / path.name
        except PlanFileError:
            folder.rmdir()
    return None
