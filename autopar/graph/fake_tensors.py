"""Lends a model fake cpu tensors: sizes, strides and dtypes, no memory.

Tracing on the meta device loses kernels and sees `.item()` fail; fake *cpu* tensors behave like a real machine's.
Parameters and buffers are swapped by identity, so tied weights stay tied, and put back afterwards, so the user's model
object is left as it was. Inputs are not: ``dict(input_ids=ids, labels=ids)`` is two inputs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # private; tried on torch 2.13.0
from torch.utils import _pytree as pytree  # private; tried on torch 2.13.0


class FakeTensorFactory:
    """Makes one fake tensor per original, floating ones in ``dtype`` (training in mixed precision stores weights
    so)."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._dtype = dtype
        self._made: dict[int, tuple[Tensor, Tensor]] = {}  # the original is kept, else its id could be used again

    def fake_of(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._made:
            self._made[id(tensor)] = (tensor, self._make(tensor))
        return self._made[id(tensor)][1]

    def fake_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The same nested structure with a fake tensor of its own for every tensor in it; other leaves stay."""
        return pytree.tree_map(lambda leaf: self._make(leaf) if isinstance(leaf, Tensor) else leaf, inputs)

    def _make(self, tensor: Tensor) -> Tensor:
        dtype = self._dtype if tensor.is_floating_point() else tensor.dtype
        with self.mode:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake


def input_tensors(inputs: dict[str, Any]) -> list[Tensor]:
    """The tensors of a nested structure, in a fixed order."""
    return [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has no memory."""
    return isinstance(tensor, FakeTensor)


@contextmanager
def with_fake_tensors(model: nn.Module, faker: FakeTensorFactory) -> Iterator[nn.Module]:
    """The model in training mode with fake parameters, buffers and tensor attributes, for the length of a ``with``."""
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
            config.use_cache = False  # type: ignore[union-attr]  # training fills no key/value cache
        yield model.train()
    finally:
        for slots, name, tensor in restore:
            slots[name] = tensor
        for module, training in modes:
            module.training = training
        if use_cache:
            config.use_cache = use_cache  # type: ignore[union-attr]
