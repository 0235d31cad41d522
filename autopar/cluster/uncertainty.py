"""How sure an estimate is: 90 % intervals around a step time and a peak of memory, from published runs that were left out
of every fit.

    interval = (low * estimate, high * estimate)    the shortest that holds 90 % of measured / predicted

The first class that matches (device name begins with ``device``, number of nodes, attention) counts.
"""

import functools
from typing import Literal

import msgspec

from autopar.cluster.cost_tables import uncertainty_document
from autopar.cluster.number_source import NumberSource, require_positive, require_sources


class IntervalClass(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``device`` "" is any; ``num_runs`` says how many measured runs the interval stands on."""

    device: str
    nodes: Literal["one", "several"]
    attn: Literal["flash", "math", "any"]
    low: float
    high: float
    num_runs: int

    def __post_init__(self) -> None:
        require_positive("low", self.low)
        if self.low > self.high:
            raise ValueError(f"interval {self.low} .. {self.high} is empty")


class Uncertainty(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``memory_low`` and ``memory_high`` are of peaks of memory."""

    name: str
    step_time: tuple[IntervalClass, ...]
    memory_low: float
    memory_high: float
    provenance: dict[str, NumberSource]

    def __post_init__(self) -> None:
        require_sources(self, self.provenance, ())

    def step_time_factors(self, device: str, num_nodes: int, attn: str) -> tuple[float, float]:
        """(low, high) of the first class that matches; the last class matches all."""
        nodes = "one" if num_nodes == 1 else "several"
        found = next(
            (
                one
                for one in self.step_time
                if device.startswith(one.device) and one.nodes == nodes and one.attn in ("any", attn)
            ),
            self.step_time[-1],
        )
        return found.low, found.high


@functools.cache
def load_uncertainty() -> Uncertainty:
    """The shipped table."""
    return msgspec.convert(uncertainty_document(), Uncertainty)
