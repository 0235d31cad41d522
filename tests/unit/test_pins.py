"""Pins: what they name, what they fix of a layout, and what is refused."""

import pytest

from autopar.cluster import load_cluster
from autopar.core.errors import LayoutError, UsageError
from autopar.core.layout import parse_layout
from autopar.core.pin import satisfies
from autopar.core.placement import REPLICATE, Shard
from autopar.core.plan import Plan
from autopar.graph.traced_model import TracedModel, trace_model
from autopar.inter.block_pins import BlockPins
from autopar.manual.layout_pricer import LayoutPricer
from tests.conftest import example_workload


@pytest.fixture(scope="module")
def model() -> TracedModel:
    settings = {"layers": 4, "hidden": 512, "heads": 8, "vocab": 2048, "seq": 128}
    return trace_model(example_workload("gpt", **settings), dtype="bf16")


def priced(model: TracedModel, layout: str, *pins: tuple[str, str]) -> Plan:
    pricer = LayoutPricer(
        model,
        cluster=load_cluster("dgx-h100"),
        gpus=8,
        global_batch=16,
        memory_gib=None,
        optimizer="adamw",
        pins=pins,
    )
    return pricer.plan(pricer.price(parse_layout(layout)), 0.0)


def placed_as(plan: Plan, name: str) -> str:
    return next(p.compute for program in plan.programs for p in program.parameters if p.name == name)


@pytest.mark.parametrize("placements", ["RS(0)", "RS(1)", "RR"])
def test_a_pin_decides_what_a_layout_leaves_open(model: TracedModel, placements: str) -> None:
    plan = priced(model, "tp=4", ("layers.*.mlp.fc1.weight", placements))
    assert placed_as(plan, "layers.0.mlp.fc1.weight") == placements
    free = priced(model, "tp=4")
    assert placed_as(free, "layers.0.mlp.fc1.weight") == "RS(0)"  # Megatron-LM's columns, unpinned the fastest
    assert plan.estimate.step_time_s >= free.estimate.step_time_s * (1 - 1e-9)
    assert (plan.estimate.step_time_s == free.estimate.step_time_s) == (placements == "RS(0)")


def test_a_pin_holds_for_every_layout_that_a_pricer_prices(model: TracedModel) -> None:
    """The pin is of the tp axis without a data axis; with one it names that, and leaves tp open."""
    pricer = LayoutPricer(
        model,
        cluster=load_cluster("dgx-h100"),
        gpus=8,
        global_batch=16,
        memory_gib=None,
        optimizer="adamw",
        pins=[("layers.*.mlp.fc1.weight", "S(1)")],
    )
    pricer.price(parse_layout("tp=4"))
    plan = pricer.plan(pricer.price(parse_layout("tp=4,pp=2")), 0.0)
    assert placed_as(plan, "layers.0.mlp.fc1.weight") == "S(1)"


def test_any_name_of_a_tied_table_pins_it(model: TracedModel) -> None:
    """The head multiplies by the table of the tokens: pinned by the second name, it is placed so under the first."""
    plan = priced(model, "tp=4", ("head.weight", "RS(0)"))
    assert placed_as(plan, "tokens.weight") == "RS(0)"


def test_a_strided_shard_is_a_shard() -> None:
    assert satisfies(Shard(0, split_factor=3), Shard(0))
    assert satisfies(Shard(0, split_factor=3), Shard(0, split_factor=3))
    assert not satisfies(Shard(0, split_factor=3), Shard(0, split_factor=2))
    assert not satisfies(Shard(1, split_factor=3), Shard(0))
    assert not satisfies(REPLICATE, Shard(0))
    assert satisfies(REPLICATE, REPLICATE)


def test_the_data_axis_says_what_is_stored_sharded(model: TracedModel) -> None:
    priced(model, "zero=3", ("layers.*.mlp.*.weight", "S(0)"))
    with pytest.raises(LayoutError, match=r"layers.0.mlp.fc1.weight is placed as R on \(dp\)"):
        priced(model, "zero=1", ("layers.*.mlp.*.weight", "S(0)"))


@pytest.mark.parametrize(
    ("glob", "placements", "message"),
    [
        ("layer.*.qkv.weight", "RS(0)", r"no parameter matches; the closest names are .*layers\.\*"),
        ("layers.2.mlp.fc1.weight", "RS(0)", "but not layers.0.mlp.fc1.weight in an equal block"),
        ("layers.*.mlp.fc1.weight", "RP", "no parameter is a partial sum"),
        ("layers.*.mlp.fc1.weight", "", "for each mesh axis"),
    ],
)
def test_pins_that_make_no_sense_are_refused(model: TracedModel, glob: str, placements: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BlockPins(model.graph, model.blocks, [(glob, placements)])


def test_pins_that_contradict_each_other_or_the_mesh(model: TracedModel) -> None:
    with pytest.raises(UsageError, match="both match"):
        BlockPins(model.graph, model.blocks, [("*fc1.weight", "RR"), ("layers.*.mlp.fc1.weight", "RS(0)")])
    with pytest.raises(LayoutError, match=r"1 placements, the mesh has 2 axes \(dp, tp\)"):
        priced(model, "tp=2", ("*fc1.weight", "S(0)"))
    with pytest.raises(LayoutError, match="is placed as"):
        priced(model, "tp=2", ("*norm1.weight", "RS(0)"))
