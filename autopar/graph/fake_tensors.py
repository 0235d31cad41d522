"""Gives a model fake CPU tensors for the time of a trace: sizes, strides and dtypes, no memory.

On the meta device some ops have no kernel and ``.item()`` fails; fake *CPU* tensors behave like those of a real
machine. Parameters and buffers are replaced by identity, so tied weights stay tied, and restored afterwards, so the
user's model object is unchanged. Inputs are not: ``dict(input_ids=ids, labels=ids)`` is two inputs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # private; tried on torch 2.13.0
from torch.utils import _pytree as pytree  # private; tried on torch 2.13.0


class FakeTensorFactory:
    """Makes one fake tensor per original; floating-point ones have the dtype ``dtype``, in which a training program in
    mixed precision stores its weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._dtype = dtype
        # id -> (original, fake); it refers to the original, as Python may reuse the id of an object that is freed
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def fake_of(self, tensor: Tensor) -> Tensor:
        """The fake tensor that stands for ``tensor``, the same one at every call."""
        if id(tensor) not in self._made:
            self._made[id(tensor)] = (tensor, self._make(tensor))
        return self._made[id(tensor)][1]

    def fake_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The same nested structure with a new fake tensor for every tensor; other leaves are unchanged."""
        return pytree.tree_map(lambda leaf: self._make(leaf) if isinstance(leaf, Tensor) else leaf, inputs)

    def _make(self, tensor: Tensor) -> Tensor:
        dtype = self._dtype if tensor.is_floating_point() else tensor.dtype
        with self.mode:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake


def input_tensors(inputs: dict[str, Any]) -> list[Tensor]:
    """The tensors of a nested structure, in pytree order."""
    return [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor is a fake one, without memory."""
    return isinstance(tensor, FakeTensor)


@contextmanager
def with_fake_tensors(model: nn.Module, faker: FakeTensorFactory) -> Iterator[nn.Module]:
    """The model in training mode with fake parameters, buffers and tensor attributes; all are restored on exit."""
    restore: list[tuple[dict[str, Any], str, Tensor]] = []
    modes = [(module, module.training) for module in model.modules()]
    for module in model.modules():
        tensors: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)
        for slots in tensors:
            for name, tensor in slots.items():
                if isinstance(tensor, Tensor):
                    restore.append((slots, name, tensor))
                    slots[name] = faker.fake_of(tensor)
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    try:
        if use_cache:
            config.use_cache = False  # type: ignore[union-attr]  # training has no key/value cache
        yield model.train()
    finally:
        for slots, name, tensor in restore:
            slots[name] = tensor
        for module, training in modes:
            module.training = training
        if use_cache:
            config.use_cache = use_cache  # type: ignore[union-attr]
