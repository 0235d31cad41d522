"""The folder of a training's checkpoints: their names, which of them is the newest, and how a written one becomes it.

    folder/latest          name of the newest complete checkpoint, replaced atomically
    folder/step-12/        a complete checkpoint
    folder/.step-12.tmp/   one that is being written, or whose writer was interrupted
    folder/.step-12.old/   a complete one, while another of the same step takes its name: a folder cannot be replaced
                           atomically. Where the writer was interrupted, this is the checkpoint of that step

Whatever has another name is ignored. One rank at a time changes the folder; any rank may read it.
"""

import os
import re
import shutil
from pathlib import Path

from autopar.core.errors import CheckpointError, PlanFileError
from autopar.core.write_file import write_atomically

LATEST = "latest"
_NAME = re.compile(r"step-(0|[1-9][0-9]{0,17})")
MAX_STEP = 10**18 - 1


def checkpoint_path(root: Path, step: int) -> Path:
    """Where the complete checkpoint of a step is."""
    return root / f"step-{step}"


def readable_path(root: Path, step: int) -> Path:
    """Where the complete checkpoint of a step can be read now, also where the writer of another was interrupted."""
    final, replaced = checkpoint_path(root, step), _replaced_path(root, step)
    return replaced if replaced.is_dir() and not final.exists() else final


def temporary_path(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is written."""
    return root / f".step-{step}.tmp"


def _replaced_path(root: Path, step: int) -> Path:
    return root / f".step-{step}.old"


def prepare_folder(root: Path, step: int) -> None:
    """Create the folder, finish or remove what interrupted saves left, and check that the checkpoint's name is free or
    that of an earlier one. Raises OSError, CheckpointError."""
    root.mkdir(parents=True, exist_ok=True)
    for path in sorted(root.iterdir()):
        name = path.name.removeprefix(".").removesuffix(path.suffix)
        if not path.name.startswith(".") or not _NAME.fullmatch(name):
            continue
        if path.suffix == ".old" and not (root / name).exists():
            os.replace(path, root / name)
        elif path.suffix in (".old", ".tmp"):
            shutil.rmtree(path)
    final = checkpoint_path(root, step)
    if final.exists() and not final.is_dir():
        raise CheckpointError("a file of this name is there, which is not a checkpoint; remove or rename it")


def complete_checkpoint(root: Path, step: int) -> None:
    """Give the written checkpoint of a step its name, and name it in ``latest``. At every moment the newest complete
    checkpoint is at its ``readable_path``. Raises OSError, PlanFileError."""
    final, replaced = checkpoint_path(root, step), _replaced_path(root, step)
    if final.exists():
        os.replace(final, replaced)
    os.replace(temporary_path(root, step), final)
    write_atomically(root / LATEST, final.name.encode())
    shutil.rmtree(replaced, ignore_errors=True)


def remove_old_checkpoints(root: Path, step: int, keep: int) -> None:
    """Remove all checkpoints but the one of ``step`` and those of the highest steps, ``keep`` in all; those that cannot
    be removed remain."""
    others = sorted(set(saved_steps(root)) - {step})
    for old in others[: max(0, len(others) + 1 - keep)]:
        shutil.rmtree(checkpoint_path(root, old), ignore_errors=True)


def saved_steps(root: Path) -> list[int]:
    """The steps of all checkpoints of a folder, ascending."""
    try:
        names = [path.name for path in root.iterdir() if path.is_dir()]
    except OSError:
        return []
    return sorted(int(match[1]) for match in map(_NAME.fullmatch, names) if match is not None)


def latest_step(root: Path) -> int:
    """The step of the newest checkpoint of a folder; PlanFileError where it names none, CheckpointError where the name
    cannot be read."""
    try:
        name = (root / LATEST).read_text().strip()
    except FileNotFoundError as error:
        raise PlanFileError(f"no checkpoint in {root}: {error.strerror}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {root / LATEST}: {error}") from None
    match = _NAME.fullmatch(name)
    if match is None:
        raise CheckpointError(f"{root / LATEST} has {name[:80]!r}, not the name of a checkpoint such as step-12")
    return int(match[1])
