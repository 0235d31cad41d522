"""Where the numbers of cost tables come from, and checks of them."""

import datetime
import math
from collections.abc import Mapping
from typing import Any, Literal

import msgspec


class NumberSource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Source of the number under one key of a table, and its date (ISO). ``status``: measured; published (a data sheet);
    recalled (unverified); modelled (a similar device's, scaled); assumed; given (by the user, without a date)."""

    source: str
    date: str
    status: Literal["measured", "published", "recalled", "modelled", "assumed", "given"]

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise ValueError("a source is empty")
        if self.status != "given":
            datetime.date.fromisoformat(self.date)


def require_sources(table: Any, provenance: Mapping[str, NumberSource], exempt: tuple[str, ...]) -> None:
    """ValueError unless ``provenance`` has a source for exactly the fields of ``table`` that are not ``exempt``."""
    fields = {name for name in table.__struct_fields__ if name not in (*exempt, "name", "provenance")}
    missing, unknown = sorted(fields - set(provenance)), sorted(set(provenance) - fields)
    if missing or unknown:
        raise ValueError(f"{table.name}: keys without a source: {missing}; sources of no key: {unknown}")


def require_fraction(key: str, value: float) -> None:
    """ValueError unless an efficiency is in (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"{key} = {value} is not an efficiency in (0, 1]")


def require_positive(key: str, value: float) -> None:
    """ValueError unless a size, rate or time is positive and finite."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{key} = {value} must be positive and finite")


def require_non_negative(key: str, value: float) -> None:
    """ValueError unless a size or a time is finite and not negative."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{key} = {value} must be finite and not negative")
