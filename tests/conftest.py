"""What all tests share: the paths of the checkout, the workloads of the example models, a hand-made plan."""

from pathlib import Path
from typing import Any

import pytest

import autopar
from tests.unit.sample_plan import sample_plan

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def example_workload(name: str, **settings: Any) -> autopar.Workload:
    """The workload of ``examples/NAME.py``."""
    return autopar.load_workload(EXAMPLES / f"{name}.py", **settings)


@pytest.fixture
def plan() -> autopar.Plan:
    """A hand-made plan: two stages of a GPT on 4 + 4 GPUs."""
    return sample_plan()
