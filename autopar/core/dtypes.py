"""Data types by name: as torch names them in full ("bfloat16"), and in the short form of the command line ("bf16")."""

from typing import Literal

from autopar.core.errors import UsageError

Dtype = Literal["bfloat16", "float16", "float32"]
"""A dtype that a model may be trained in, by torch's name."""
ShortDtype = Literal["bf16", "fp16", "fp32"]
"""The same in the command line's short form."""

TRAINING_DTYPES: tuple[Dtype, ...] = ("bfloat16", "float16", "float32")
"""In order of preference: a device's default is the first that it has."""
SHORT_NAMES: dict[Dtype, ShortDtype] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
LONG_NAMES: dict[ShortDtype, Dtype] = {short: long for long, short in SHORT_NAMES.items()}

ITEMSIZE = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint8": 1, "bool": 1, "complex64": 8, "complex128": 16,
}  # fmt: skip
"""Bytes of an element, by torch's name of the dtype."""


def long_dtype(name: str) -> Dtype:
    """torch's name of a training dtype given in either form; UsageError for any other.

    >>> long_dtype("bf16"), long_dtype("float16")
    ('bfloat16', 'float16')
    """
    for long, short in SHORT_NAMES.items():
        if name in (long, short):
            return long
    raise UsageError(f"unknown dtype {name!r}; it is one of {', '.join(LONG_NAMES)}")
