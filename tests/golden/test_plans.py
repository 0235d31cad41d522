"""What the product plans and prints today is what was frozen. ``python -m tests.golden.frozen`` freezes anew."""

import json

import pytest

from tests.golden.frozen import PLANS, REQUESTS, SLOW_REQUESTS, as_lines, differences, made, summary


@pytest.mark.parametrize("name", REQUESTS)
def test_the_plan_is_the_frozen_one(name: str) -> None:
    found = made(REQUESTS[name])
    frozen = json.loads((PLANS / f"{name}.json").read_text())
    assert differences(frozen, json.loads(found.document)) == []
    assert found.text == (PLANS / f"{name}.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_REQUESTS)
def test_the_plan_of_a_published_size_is_the_frozen_one(name: str) -> None:
    found = made(SLOW_REQUESTS[name])
    frozen = json.loads((PLANS / f"{name}.json").read_text())
    assert differences(frozen, json.loads(summary(found.document))) == []
    assert found.text == (PLANS / f"{name}.txt").read_text()


def test_every_frozen_file_has_its_request() -> None:
    names = {path.stem for path in PLANS.iterdir()}
    assert names == {*REQUESTS, *SLOW_REQUESTS}


def test_a_difference_is_found_wherever_it_is() -> None:
    frozen = {"a": [1, {"b": 2.0, "c": "x"}], "d": True}
    assert differences(frozen, json.loads(as_lines(frozen))) == []
    assert differences(frozen, {"a": [1, {"b": 2.0 + 1e-12, "c": "x"}], "d": True}) == []
    for other in (
        {"a": [1, {"b": 2.1, "c": "x"}], "d": True},
        {"a": [1, {"b": 2.0, "c": "y"}], "d": True},
        {"a": [1, {"b": 2.0}], "d": True},
        {"a": [1], "d": True},
        {"a": [1, {"b": 2.0, "c": "x"}], "d": 1},
        {"a": [1, {"b": 2.0, "c": "x"}], "d": True, "e": 0},
    ):
        assert len(differences(frozen, other)) == 1
