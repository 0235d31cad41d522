"""Fixtures of all tests."""

import pytest

from autopar.core.plan import Plan
from tests.unit.sample_plan import sample_plan


@pytest.fixture
def plan() -> Plan:
    """A hand-made plan: two stages of a GPT on 4 + 4 GPUs."""
    return sample_plan()
