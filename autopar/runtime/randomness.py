"""Dropout that does not depend on the plan: an element's fate is a hash of its global index.

    u(i) = splitmix64(key + op * A + i * B) mod 2^24 / 2^24,  kept where u(i) >= p, and scaled by 1 / (1 - p)

``key`` holds the seed, the step and the micro-batch. Computing it again gives the same mask, so recomputation is exact.
Hash: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_BITS = 24


def _signed(number: int) -> int:
    """The 64 bits of a number as torch's int64."""
    number %= 1 << 64
    return number - (1 << 64) if number >= 1 << 63 else number


def step_key(seed: int, step: int, microbatch: int) -> int:
    """The number that all random ops of one micro-batch start from.

    >>> step_key(0, 1, 2) == step_key(0, 1, 2), step_key(0, 1, 2) == step_key(0, 2, 1)
    (True, False)
    """
    return _signed((seed * 0xD1342543DE82EF95 + step * 0x2545F4914F6CDD1D + microbatch * _GOLDEN) ^ 0x5851F42D4C957F2D)


def mixed(number: Tensor) -> Tensor:
    """splitmix64's finaliser, element by element, on int64 that wraps around."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        number = (number ^ _shifted(number, shift)) * _signed(factor)
    return number ^ _shifted(number, 31)


def _shifted(number: Tensor, bits: int) -> Tensor:
    """A logical shift to the right."""
    return (number >> bits) & ((1 << (64 - bits)) - 1)


def drop(
    tensor: Tensor, indices: Sequence[Tensor], sizes: Sequence[int], probability: float, key: Tensor | None, op: int
) -> Tensor:
    """``tensor`` with dropout; ``indices`` are the global indices per dim of a tensor of global ``sizes``."""
    assert key is not None
    place = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for dim, (index, size) in enumerate(zip(indices, sizes, strict=True)):
        shape = [1] * len(sizes)
        shape[dim] = len(index)
        place = place * size + index.view(shape)
    number = mixed(mixed(key + _signed(op * _GOLDEN)) + place * _signed(_GOLDEN))
    uniform = (number & ((1 << _BITS) - 1)).to(torch.float32) / (1 << _BITS)
    kept = (uniform >= probability).to(tensor.dtype)
    return tensor * kept / (1.0 - probability)
