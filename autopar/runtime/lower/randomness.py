"""Random numbers that do not depend on the plan: an element's number is a hash of its global index.

    u(i) = splitmix64(key + op * A + i * B) mod 2^24 / 2^24;  dropout keeps where u(i) >= p, and scales by 1 / (1 - p)

``key`` is made of the seed, the step and the micro-batch. The same key gives the same mask, so recomputation is exact.
Hash: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_BITS = 24


def _as_int64(number: int) -> int:
    """The 64 bits of a number as torch's int64."""
    number %= 1 << 64
    return number - (1 << 64) if number >= 1 << 63 else number


def micro_batch_key(seed: int, step: int, microbatch: int) -> int:
    """The key, an int64, of all random ops of one micro-batch.

    >>> micro_batch_key(0, 1, 2) == micro_batch_key(0, 1, 2), micro_batch_key(0, 1, 2) == micro_batch_key(0, 2, 1)
    (True, False)
    """
    return _as_int64(
        (seed * 0xD1342543DE82EF95 + step * 0x2545F4914F6CDD1D + microbatch * _GOLDEN) ^ 0x5851F42D4C957F2D
    )


def splitmix64(number: Tensor) -> Tensor:
    """splitmix64's finaliser, elementwise, on int64 that wraps around."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        number = (number ^ _logical_shift_right(number, shift)) * _as_int64(factor)
    return number ^ _logical_shift_right(number, 31)


def _logical_shift_right(number: Tensor, bits: int) -> Tensor:
    """``number >> bits`` with zeros shifted in."""
    return (number >> bits) & ((1 << (64 - bits)) - 1)


def uniform(indices: Sequence[Tensor], sizes: Sequence[int], key: Tensor | None, op: int, draw: int = 0) -> Tensor:
    """u(i) in [0, 1), fp32, one number per element of the local tensor whose global indices, per dim of a tensor of global
    ``sizes``, are ``indices``. ``op`` is the op's id in the graph, ``draw`` tells its several numbers per element apart."""
    assert key is not None
    flat_index = torch.zeros((), dtype=torch.int64, device=key.device)
    for dim, (index, size) in enumerate(zip(indices, sizes, strict=True)):
        shape = [1] * len(sizes)
        shape[dim] = len(index)
        flat_index = flat_index * size + index.view(shape)
    start = splitmix64(key + _as_int64(op * _GOLDEN)) + draw
    number = splitmix64(start + flat_index * _as_int64(_GOLDEN))
    return (number & ((1 << _BITS) - 1)).to(torch.float32) / (1 << _BITS)


def normal(indices: Sequence[Tensor], sizes: Sequence[int], key: Tensor | None, op: int) -> Tensor:
    """N(0, 1), fp32, from two numbers of ``uniform`` per element (Box and Muller, 1958)."""
    radius = torch.sqrt(-2 * torch.log(1 - uniform(indices, sizes, key, op)))  # the logarithm is of numbers in (0, 1]
    return radius * torch.cos(2 * torch.pi * uniform(indices, sizes, key, op, 1))


def dropout_mask(
    indices: Sequence[Tensor], sizes: Sequence[int], probability: float, key: Tensor | None, op: int
) -> Tensor:
    """True for the elements that dropout keeps; arguments as of ``uniform``."""
    return uniform(indices, sizes, key, op) >= probability


def apply_dropout(
    tensor: Tensor, indices: Sequence[Tensor], sizes: Sequence[int], probability: float, key: Tensor | None, op: int
) -> Tensor:
    """``tensor`` with dropout. Where ``indices`` and ``sizes`` are of its first dims only, elements along the other dims
    are dropped together."""
    mask = dropout_mask(indices, sizes, probability, key, op)
    mask = mask.view(*mask.shape, *[1] * (tensor.dim() - len(sizes)))
    return tensor * mask.to(tensor.dtype) / (1.0 - probability)
