"""Logical meshes: the named axes of a stage. ``placement`` says how a tensor is placed on them."""

import msgspec


class Axis(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mesh axis: ``size`` ranks, named after what it shards most ("dp", "tp", "cp", "ep").

    >>> Axis(name="tp", size=8).size
    8
    """

    name: str
    size: int

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"a mesh axis is named like a variable, not {self.name!r}")
        if self.size < 1:
            raise ValueError(f"mesh axis {self.name} has size {self.size}; the least is 1")


def num_ranks(axes: tuple[Axis, ...]) -> int:
    """Ranks of a mesh: the product of its axis sizes, 1 without axes."""
    product = 1
    for axis in axes:
        product *= axis.size
    return product


def axes_text(axes: tuple[Axis, ...], *, every: bool = False) -> str:
    """A mesh for people; axes of one rank are left out unless it shows ``every`` one.

    >>> axes_text((Axis(name="dp", size=4), Axis(name="cp", size=1), Axis(name="tp", size=2)))
    'dp 4 x tp 2'
    """
    return " x ".join(f"{axis.name} {axis.size}" for axis in axes if every or axis.size > 1) or "-"
