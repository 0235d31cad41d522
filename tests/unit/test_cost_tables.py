"""What ``cost_tables/`` may contain, read as plain JSON: the loader's own checks are tested in ``test_cluster``."""

import datetime
import itertools
import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from autopar.cluster.cluster import CollectiveCurve
from autopar.cluster.cost_tables import load_device
from autopar.cluster.software import Software, load_software
from autopar.cluster.uncertainty import Uncertainty, load_uncertainty
from tests.conftest import ROOT

TABLES = sorted((ROOT / "cost_tables").glob("*.json"))
STATUSES = {"measured", "published", "recalled", "modelled", "assumed"}
FRACTIONS = (
    "efficiency",
    "fraction",
    "flash_speed",
    "flash_backward_speed",
    "unaligned_matmul_speed",
)
EXEMPT = {"name", "device", "provenance"}


def numbers(tree: Any) -> list[float]:
    """All numbers of a JSON tree."""
    if isinstance(tree, dict):
        return [number for part in tree.values() for number in numbers(part)]
    if isinstance(tree, list):
        return [number for part in tree for number in numbers(part)]
    return [tree] if isinstance(tree, (int, float)) and not isinstance(tree, bool) else []


def fractions(key: str, tree: Any) -> list[float]:
    """Numbers under a key that names an efficiency."""
    if isinstance(tree, dict):
        return [number for inner, part in tree.items() for number in fractions(inner, part)]
    return numbers(tree) if any(word in key for word in FRACTIONS) else []


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_key_has_a_source_a_date_and_a_status(path: Path) -> None:
    document = json.loads(path.read_text())
    assert set(document["provenance"]) == set(document) - EXEMPT
    for key, source in document["provenance"].items():
        assert set(source) == {"source", "date", "status"}, key
        assert len(source["source"].strip()) > 10, key
        assert source["status"] in STATUSES, key
        assert datetime.date.fromisoformat(source["date"]) >= datetime.date(2020, 1, 1), key


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_numbers_are_finite_and_efficiencies_in_0_to_1(path: Path) -> None:
    document = json.loads(path.read_text())
    assert all(math.isfinite(number) and number >= 0 for number in numbers(document))
    assert all(0 < number <= 1 for number in fractions("", document))


@pytest.mark.parametrize("path", [p for p in TABLES if p.stem.startswith("cluster")], ids=lambda path: path.stem)
def test_more_bytes_take_no_less_time(path: Path) -> None:
    curves = json.loads(path.read_text())["collectives"]
    assert curves
    for curve in curves:
        for line, strictly in (("num_bytes", True), ("time_s", False)):
            assert all(a < b or (a == b and not strictly) for a, b in itertools.pairwise(curve[line]))


def test_a_curve_that_falls_is_refused() -> None:
    with pytest.raises(ValueError, match="more bytes take less time"):
        CollectiveCurve(kind="all_reduce", num_ranks=2, num_bytes=(1, 2), time_s=(2.0, 1.0))


@pytest.mark.parametrize("name", ["A100-SXM-80GB", "H100-SXM-80GB", "H200-SXM-141GB", "L40S"])
def test_more_work_takes_no_less_time_along_every_axis_of_a_matmul_table(name: str) -> None:
    table = load_device(name).matmul
    shape = (len(table.m), len(table.n), len(table.k))
    flat = iter(table.efficiency)
    time_s = [[[m * n * k / next(flat) for k in table.k] for n in table.n] for m in table.m]
    for i, j, o in itertools.product(*(range(size) for size in shape)):
        for a, b, c in ((i + 1, j, o), (i, j + 1, o), (i, j, o + 1)):
            if a < shape[0] and b < shape[1] and c < shape[2]:
                assert time_s[a][b][c] >= time_s[i][j][o] * (1 - 2e-3)  # tables have four digits


@pytest.mark.parametrize(("kind", "table"), [(Software, load_software("megatron")), (Uncertainty, load_uncertainty())])
def test_unknown_keys_and_keys_without_source_are_refused(kind: type, table: Any) -> None:
    document = msgspec.to_builtins(table)
    assert msgspec.convert(document, kind) == table
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({**document, "colour": 1.0}, kind)
    sources = dict(document["provenance"])
    sources.pop(next(iter(sources)))
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({**document, "provenance": sources}, kind)


def test_software_refuses_negative_calls() -> None:
    document = msgspec.to_builtins(load_software("megatron"))
    for change in ({"step_calls": -1.0}, {"microbatch_calls": float("nan")}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert({**document, **change}, Software)


def test_intervals_hold_the_estimate() -> None:
    table = load_uncertainty()
    assert all(one.low <= 1 <= one.high and one.num_runs > 0 for one in table.step_time)
    assert table.memory_low <= 1 <= table.memory_high
