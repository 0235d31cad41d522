"""Loads a model file: plain Python that defines ``build_model`` and ``example_inputs`` and need not import autopar."""

import contextlib
import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from autopar.core.errors import ModelError, UsageError
from autopar.workload.user_code import guard_user_code
from autopar.workload.workload import Workload, accepted_settings

_REQUIRED_FUNCTIONS = {
    "build_model": "def build_model(**settings) -> torch.nn.Module",
    "example_inputs": "def example_inputs(batch_size, **settings) -> dict of keyword inputs",
}
_OPTIONAL_FUNCTIONS = ("loss_fn", "random_inputs", "init_weights")


def load_workload(path: str | Path, /, **settings: Any) -> Workload:
    """The workload of a model file; ``settings`` are passed to those of its functions that accept them.

    Raises ModelError (exit 3) where the file cannot be read, raises on import (``sys.exit()`` included) or lacks a
    required function, and UsageError (exit 2) on a setting that no function accepts.

    >>> load_workload("examples/gpt.py", size="350M").global_batch  # doctest: +SKIP
    1024
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise ModelError(
                f"no model file {path}: give the path of a Python file with {' and '.join(_REQUIRED_FUNCTIONS)}"
            )
        source = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read model file {path}: {error.strerror or error}") from None
    module = _run_model_file(path)
    with guard_user_code(f"{path} raised:"):  # a module may have a __getattr__
        functions: dict[str, Any] = {
            name: getattr(module, name, None) for name in (*_REQUIRED_FUNCTIONS, *_OPTIONAL_FUNCTIONS)
        }
        global_batch = getattr(module, "GLOBAL_BATCH", None)
    for name, signature in _REQUIRED_FUNCTIONS.items():
        if not callable(functions[name]):
            raise ModelError(f"{path} has no {name}: add\n  {signature}")
    for name in _OPTIONAL_FUNCTIONS:
        if functions[name] is not None and not callable(functions[name]):
            raise ModelError(f"{path}: {name} is a {type(functions[name]).__name__}, it must be a function")
    if global_batch is not None and (type(global_batch) is not int or global_batch < 1):
        raise ModelError(f"{path}: GLOBAL_BATCH is {global_batch!r}, it must be a positive whole number of samples")
    _check_settings(path, functions, settings)
    return Workload(
        **functions,
        global_batch=global_batch,
        settings=dict(settings),
        path=str(path),
        source_hash=hashlib.sha256(source).hexdigest(),
    )


def _run_model_file(path: Path) -> ModuleType:
    """Runs the file as a module of its own, with its folder on the import path so that it may import its neighbours;
    raises ModelError on failure."""
    resolved = path.resolve()
    name = f"_autopar_model_{hashlib.sha256(str(resolved).encode()).hexdigest()[:12]}_{resolved.stem}"
    spec = importlib.util.spec_from_file_location(name, resolved)
    if spec is None or spec.loader is None:
        raise ModelError(f"{path} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling inside the file look their module up by name
    sys.path.insert(0, str(resolved.parent))
    try:
        with guard_user_code(f"{path} raised on import:"):
            spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    finally:
        with contextlib.suppress(ValueError):  # the file may have rearranged sys.path
            sys.path.remove(str(resolved.parent))
    return module


def _check_settings(path: Path, functions: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises UsageError for settings that none of the file's functions accepts."""
    accepted: set[str] = set()
    for name in ("build_model", "example_inputs", "random_inputs"):
        if functions[name] is None:
            continue
        with guard_user_code(f"{path}: the parameters of {name} cannot be read:"):
            names = accepted_settings(functions[name])
        if names is None:
            return
        accepted |= names
    unknown = sorted(set(settings) - accepted)
    if unknown:
        known = ", ".join(sorted(accepted)) or "none"
        raise UsageError(f"{path} has no setting {', '.join(unknown)}; it accepts: {known}")
