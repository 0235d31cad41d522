"""Initial weights of a model on the meta device, one tensor at a time: the whole model is never in memory.

The model's own initialisation runs on meta tensors while its in-place writes are recorded; then each tensor's writes
are replayed on a real tensor, of which a rank keeps its shard. Random numbers are seeded by the tensor's name, so they
depend on neither the plan nor the rank. A tensor of which no write covers all elements is an error, never zeros.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode  # private; tried on torch 2.13.0

from autopar.core.errors import AutoparError, UsageError
from autopar.workload.user_code import describe_user_error, guard_user_code
from autopar.workload.workload import Workload

_HOW_TO_INITIALISE = (
    "initialise the model on the CPU and pass it to apply(), or define init_weights(model) in the model file"
)


@dataclass(slots=True, kw_only=True, eq=False)
class _RecordedWrites:
    """The writes into one tensor, in order: the op, the part it writes (sizes, strides, offset), its other
    arguments."""

    name: str
    tensor: Tensor
    writes: list[tuple[Any, tuple[tuple[int, ...], tuple[int, ...], int], tuple[Any, ...], dict[str, Any]]] = field(
        default_factory=list
    )


class DeferredInitialisation:
    """Records what the initialisation of a meta model does; ``materialise`` does it for one parameter or buffer.

    UsageError where the initialisation needs values that a meta tensor does not have."""

    def __init__(self, model: nn.Module, workload: Workload, seed: int) -> None:
        self.seed = seed
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self._by_storage: dict[int, _RecordedWrites] = {}
        self._by_name: dict[str, _RecordedWrites] = {}
        for name, tensor in tensors:
            written = self._by_storage.setdefault(_storage_id(tensor), _RecordedWrites(name=name, tensor=tensor))
            self._by_name[name] = written
        try:
            with (
                guard_user_code("initialising the weights raised", reraised=(AutoparError, RuntimeError)),
                _WriteRecorder(self._by_storage),
                torch.no_grad(),
            ):
                _initialise_model(model, workload)
        except (RuntimeError, NotImplementedError) as error:
            raise UsageError(
                "the weights of a meta model are initialised tensor by tensor, which failed: "
                f"{describe_user_error(error)}\n"
                f"  {_HOW_TO_INITIALISE}"
            ) from error

    def materialise(self, name: str) -> Tensor:
        """The full initial tensor on the CPU, computed at each call; UsageError where no single write sets all of
        it."""
        written = self._by_name[name]
        full = (tuple(written.tensor.shape), tuple(written.tensor.stride()), written.tensor.storage_offset())
        if not any(part == full for _, part, _, _ in written.writes):
            raise UsageError(f"nothing initialises {name}; {_HOW_TO_INITIALISE}")
        digest = hashlib.sha256(f"{self.seed} {written.name}".encode()).digest()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(int.from_bytes(digest[:7], "little"))
            real = torch.empty_strided(written.tensor.shape, written.tensor.stride(), dtype=written.tensor.dtype)
            for func, (size, stride, offset), args, kwargs in written.writes:
                func(real.as_strided(size, stride, offset), *args, **kwargs)
        return real


def _initialise_model(model: nn.Module, workload: Workload) -> None:
    """Run the model file's ``init_weights``, else Hugging Face's ``initialize_weights``, else ``reset_parameters`` of
    every module."""
    if workload.init_weights is not None:
        workload.init_weights(model)
        return
    initialize_weights: Callable[[], Any] | None = getattr(model, "initialize_weights", None)
    if initialize_weights is not None:
        initialize_weights()
        return
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if reset is not None:
            reset()


def _storage_id(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _WriteRecorder(TorchDispatchMode):
    """While entered, records every in-place op on one of these tensors (by storage), or on a view of one, and does not
    run it."""

    def __init__(self, by_storage: dict[int, _RecordedWrites]) -> None:
        super().__init__()
        self.by_storage = by_storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema_arguments = func._schema.arguments
        first = schema_arguments[0] if schema_arguments else None
        if first is not None and first.alias_info is not None and first.alias_info.is_write and args:
            written = self.by_storage.get(_storage_id(args[0])) if args[0].is_meta else None
            if written is not None:
                rest = args[1:]
                if any(isinstance(each, Tensor) and each.is_meta for each in (*rest, *(kwargs or {}).values())):
                    raise UsageError(
                        f"the initial value of {written.name} is computed from other weights; {_HOW_TO_INITIALISE}"
                    )
                part = (tuple(args[0].shape), tuple(args[0].stride()), args[0].storage_offset())
                written.writes.append((func, part, rest, {k: v for k, v in (kwargs or {}).items() if k != "generator"}))
                return args[0]
        return func(*args, **(kwargs or {}))
