"""A workload: how to build a model, its inputs and its loss, on the meta device (without memory, whatever the size)."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from autopar.core.errors import ModelError
from autopar.core.notebook_text import short_repr
from autopar.workload.user_code import guard_user_code


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is trained. ``settings`` are passed to every callable that accepts them; ``path`` and ``source_hash`` (sha256
    of the model file) are None for a workload made in Python.

    >>> workload = Workload(build_model=lambda: nn.Linear(4, 1), example_inputs=lambda batch_size: {})
    >>> workload.build().weight.is_meta
    True
    """

    build_model: Callable[..., nn.Module]
    example_inputs: Callable[..., dict[str, Any]]
    loss_fn: Callable[[Any, dict[str, Any]], torch.Tensor] | None = None
    global_batch: int | None = None
    random_inputs: Callable[..., dict[str, Any]] | None = None
    init_weights: Callable[[nn.Module], None] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    path: str | None = None
    source_hash: str | None = None

    def __repr__(self) -> str:
        source = self.path if self.path is not None else getattr(self.build_model, "__qualname__", "")
        return short_repr("Workload", source=source, settings=dict(self.settings), global_batch=self.global_batch)

    def build(self, device: str = "meta") -> nn.Module:
        """The model on a device, by default the meta device, where it takes no memory; raises ModelError where
        ``build_model`` fails or returns no module."""
        with torch.device(device):
            model = self._call("build_model", self.build_model)
        if not isinstance(model, nn.Module):
            raise ModelError(f"build_model returned a {type(model).__name__}: it must return a torch.nn.Module")
        return model

    def inputs(self, batch_size: int) -> dict[str, Any]:
        """Meta tensors of one micro-batch of ``batch_size`` samples, by keyword; raises ModelError where
        ``example_inputs`` fails or returns no dict of names."""
        with torch.device("meta"):
            inputs = self._call("example_inputs", self.example_inputs, batch_size)
        if not isinstance(inputs, dict) or not all(isinstance(name, str) for name in inputs):
            raise ModelError(
                f"example_inputs returned a {type(inputs).__name__}: it must return a dict of the keyword arguments "
                "of the model's forward, e.g. {'tokens': torch.empty(batch_size, 1024, dtype=torch.long)}"
            )
        return inputs

    def real_inputs(self, batch_size: int, seed: int) -> dict[str, Any] | None:
        """Inputs with random elements by the file's ``random_inputs``, or None where the file has none."""
        if self.random_inputs is None:
            return None
        return self._call("random_inputs", self.random_inputs, batch_size, seed)

    def initialise(self, model: nn.Module) -> None:
        """Initialises a model's weights in place by the file's ``init_weights``, which must not be None; raises ModelError
        where that fails."""
        assert self.init_weights is not None
        with guard_user_code("init_weights raised"):
            self.init_weights(model)

    def _call(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """Calls one of the user's functions with the settings that it accepts."""
        with guard_user_code(f"{name} raised"):
            accepted = accepted_settings(function)
            settings = {key: value for key, value in self.settings.items() if accepted is None or key in accepted}
            return function(*args, **settings)


def accepted_settings(function: Callable[..., Any]) -> frozenset[str] | None:
    """Names of the settings that ``function`` accepts by keyword; None if it accepts any (``**settings``).

    >>> def example_inputs(batch_size, seq=1024): ...
    >>> sorted(accepted_settings(example_inputs))
    ['seq']
    """
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    by_keyword = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = (parameter.name for parameter in parameters if parameter.kind in by_keyword)
    return frozenset(names) - {"batch_size", "seed"}
