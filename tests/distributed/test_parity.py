"""Every plan trains with the same numbers as one process, and what is priced is what runs: losses, every gradient and the
collectives of a step, on real gloo ranks.

The whole matrix is ``slow``; the fast tier has a sample of it with each model and each kind of pipeline.
"""

import dataclasses

import msgspec
import pytest

from autopar.runtime.count_collectives import collective_differences, counts_of_stages
from tests.distributed import parity
from tests.distributed.once import workload_of
from tests.distributed.parity import Model
from tests.distributed.parity_models import MODELS, make_plan
from tests.distributed.pool import Pool

TOLERANCE = 1e-5


MESHES = (
    "1", "dp2", "tp2", "dp4", "dp2tp2", "dp2tp4", "cp2", "dp2cp2", "tp2cp2", "ep2", "dp4ep2", "tp2ep2",
)  # fmt: skip
PIPELINES = ("1x2+2x2", "three", "four", "four-dp2", "interleaved", "interleaved-four", "gpipe")


def reason_to_skip(name: str, shape: str) -> str | None:
    """Why a point of the matrix makes no sense, None where it does."""
    if shape == "dp2tp4" and name == "llama":
        return "tp 4 does not divide 2 KV heads"
    if "ep2" in shape and name != "moe":
        return "no experts"
    if "cp2" in shape and name == "wide-resnet":
        return "no sequence"
    return None


def at_shape(name: str, shape: str) -> Model:
    """The model with as many layers as the shape needs: one for each of eight chunks, four for other pipelines, else
    two; the convolutional one 50 and 26."""
    one = MODELS[name]
    if name == "wide-resnet":
        return dataclasses.replace(one, settings=(*one.settings, ("layers", 50 if shape == "interleaved-four" else 26)))
    layers = 8 if shape == "interleaved-four" else 4 if shape in PIPELINES else 2
    settings = dict(one.settings) | {"layers": layers // 2 if name == "t5" else layers}  # T5 has two stacks
    return dataclasses.replace(one, settings=tuple(settings.items()))


def check(pool: Pool, name: str, shape: str, zero: int, recompute: str, mode: str = "lowered") -> None:
    one = at_shape(name, shape)
    by_sequence = name not in ("moe", "wide-resnet")  # experts' groups and images are not sharded by it
    plan = make_plan(workload_of(one.workload), shape, zero, recompute, one.batch, by_sequence)
    found = pool.run(plan.gpus, parity.check_gradients, one.workload, msgspec.json.encode(plan), mode, one.classes)
    loss, parameter, error = parity.worst(found)
    assert loss <= TOLERANCE, f"loss is off by {loss:.1e}"
    assert error <= TOLERANCE, f"gradient of {parameter} is off by {error:.1e}"
    if mode == "lowered":  # the reference mode recomputes nothing
        ran = counts_of_stages([each.ran for each in found], plan)
        assert collective_differences(ran, plan, plan.estimate.collectives) == ()


SKIPPED = [
    (name, shape, reason)
    for name in MODELS
    for shape in (*MESHES, *PIPELINES)
    if (reason := reason_to_skip(name, shape)) is not None
]
MATRIX = [
    (name, shape, zero, recompute)
    for name in MODELS
    for shape in (*MESHES, *PIPELINES)
    for zero in (0, 1, 3)
    for recompute in ("none", "full")
    if reason_to_skip(name, shape) is None and (shape != "1" or zero == 0)
]
# A few points of each model; two in the reference mode, which traces nothing.
SAMPLE = [
    ("gpt-tied", "dp2tp2", 3, "full", "lowered"),
    ("gpt-tied", "three", 1, "full", "lowered"),
    ("gpt-untied", "dp2", 3, "full", "lowered"),
    ("llama", "tp2", 1, "full", "lowered"),
    ("llama", "dp2cp2", 3, "none", "lowered"),
    ("moe", "dp4ep2", 1, "none", "lowered"),
    ("t5", "interleaved", 1, "none", "reference"),
    ("t5", "gpipe", 0, "none", "lowered"),
]


LONG_SAMPLE = [
    ("gpt-untied", "four", 1, "none", "reference"),
    ("wide-resnet", "dp2", 1, "none", "lowered"),
]


@pytest.mark.parametrize("point", SAMPLE, ids="-".join(("%s",) * 5).__mod__)
def test_parity_sample(pool: Pool, point: tuple[str, str, int, str, str]) -> None:
    check(pool, *point)


@pytest.mark.slow
@pytest.mark.parametrize("point", LONG_SAMPLE, ids="-".join(("%s",) * 5).__mod__)
def test_parity_long_sample(pool: Pool, point: tuple[str, str, int, str, str]) -> None:
    check(pool, *point)


@pytest.mark.slow
@pytest.mark.parametrize("point", MATRIX, ids="-".join(("%s",) * 4).__mod__)
def test_parity(pool: Pool, point: tuple[str, str, int, str]) -> None:
    check(pool, *point)


@pytest.mark.slow
@pytest.mark.parametrize("point", SKIPPED, ids="-".join(("%s",) * 3).__mod__)
def test_parity_makes_no_sense(point: tuple[str, str, str]) -> None:
    pytest.skip(point[2])
