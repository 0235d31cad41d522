"""Where a number comes from: every number of a table has one of these under its key."""

import datetime
import math
from collections.abc import Mapping
from typing import Any, Literal

import msgspec


class NumberSource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``status``: measured; published (a data sheet); recalled (unverified); modelled (a sibling's, scaled); assumed;
    given (an override of the user's, which has no date)."""

    source: str
    date: str
    status: Literal["measured", "published", "recalled", "modelled", "assumed", "given"]

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise ValueError("a source is empty")
        if self.status != "given":
            datetime.date.fromisoformat(self.date)


def require_sources(table: Any, provenance: Mapping[str, NumberSource], exempt: tuple[str, ...]) -> None:
    """ValueError when a field of ``table`` outside ``exempt`` has no source, or a source no field."""
    fields = {name for name in table.__struct_fields__ if name not in (*exempt, "name", "provenance")}
    missing, unknown = sorted(fields - set(provenance)), sorted(set(provenance) - fields)
    if missing or unknown:
        raise ValueError(f"{table.name}: keys without a source: {missing}; sources of no key: {unknown}")


def require_fraction(key: str, value: float) -> None:
    """ValueError when an efficiency is not in (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"{key} = {value} is not an efficiency in (0, 1]")


def require_positive(key: str, value: float) -> None:
    """ValueError when a size, rate or time is not a positive finite number."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{key} = {value} must be positive and finite")


def require_non_negative(key: str, value: float) -> None:
    """ValueError when a size or a time is negative."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{key} = {value} must be finite and not negative")
