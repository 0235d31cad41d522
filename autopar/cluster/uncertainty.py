"""The uncertainty of an estimate: 90 % intervals around a step time and a peak of memory, from published runs that no fit
used.

    interval = (low * estimate, high * estimate)    the shortest that contains 90 % of measured / predicted

The first class that matches (device name begins with ``device``, number of nodes, attention) counts.
"""

import functools
from typing import Literal

import msgspec

from autopar.cluster.cost_tables import uncertainty_document
from autopar.cluster.number_source import NumberSource, require_positive, require_sources


class IntervalClass(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The interval of one class of runs: factors ``low`` and ``high``, from ``num_runs`` measured runs. ``device`` is the
    beginning of a device's name, "" for any."""

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
    """All intervals: classes of step times, and one pair of factors for peaks of memory."""

    name: str
    step_time: tuple[IntervalClass, ...]
    memory_low: float
    memory_high: float
    provenance: dict[str, NumberSource]

    def __post_init__(self) -> None:
        require_sources(self, self.provenance, ())

    def step_time_factors(self, device: str, num_nodes: int, attn: str) -> tuple[float, float]:
        """(low, high) of the first class that matches; of the last class where none does."""
        nodes = "one" if num_nodes == 1 else "several"
        matching = (
            interval
            for interval in self.step_time
            if device.startswith(interval.device) and interval.nodes == nodes and interval.attn in ("any", attn)
        )
        interval = next(matching, self.step_time[-1])
        return interval.low, interval.high


@functools.cache
def load_uncertainty() -> Uncertainty:
    """The shipped table."""
    return msgspec.convert(uncertainty_document(), Uncertainty)
