"""Programs follow their plans: placements op by op, and the collectives that run are those of the graphs."""

from collections import Counter

import msgspec
import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from autopar.core.placement import format_placements, parse_placements
from autopar.core.plan import Plan
from autopar.graph.split_into_blocks import hoist_light_ops, split_into_blocks
from autopar.graph.trace import trace
from autopar.runtime.apply import build_trainer
from autopar.runtime.lower.build_programs import build_programs
from autopar.runtime.lower.lowered_collectives import count_lowered_collectives
from autopar.runtime.lower.op_sharding import replicate_unit_axes
from tests.distributed import parity
from tests.distributed.parity_models import MODELS, make_plan
from tests.distributed.pool import Pool


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("shape", ["dp2tp2"])
def test_every_op_runs_as_planned(name: str, shape: str) -> None:
    """No op needs other placements than its plan names: nothing is redistributed that was not priced."""
    one = MODELS[name]
    graph = hoist_light_ops(trace(one.workload(), dtype="float32").graph)
    blocks = split_into_blocks(graph)
    plan = make_plan(one.workload(), shape, 1, "none", one.batch)
    programs, _ = build_programs(plan, graph, blocks)
    planned = {ref.index: plan.program(ref.program) for stage in plan.stages for ref in stage.blocks}
    for program in programs:
        sizes = [axis.size for axis in program.plan.axes]
        for op in program.ops:
            if op.block < 0:
                continue
            text = planned[op.block].ops[op.op.id - blocks[op.block].first_op]
            said = [replicate_unit_axes(parse_placements(each), sizes) for each in (*text.inputs, *text.outputs)]
            runs = [replicate_unit_axes(each, sizes) for each in (*op.sharding.inputs, *op.sharding.outputs)]
            assert list(map(format_placements, runs)) == list(map(format_placements, said)), op.op.name


class Counting(TorchDispatchMode):
    """Counts the collectives that start; torch's own ``CommDebugMode`` does not count gathers into preallocated memory."""

    def __init__(self) -> None:
        super().__init__()
        self.started: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        namespace, name, _ = str(func).split(".")
        if namespace == "_c10d_functional" and name != "wait_tensor":
            self.started[name] += 1
        return func(*args, **(kwargs or {}))


def count_collectives(plan_json: bytes, name: str) -> tuple[dict[str, int], dict[str, int]]:
    """Per kind: the collectives that start while a step's micro-batches run, and those in the graphs."""
    plan = msgspec.json.decode(plan_json, type=Plan)
    one = MODELS[name]
    workload = one.workload()
    trainer = build_trainer(plan, parity.real_model(workload, 0), workload=workload)
    stage = trainer.stages[0]
    data = trainer.micro_batches(parity.random_batch(workload, plan.global_batch, 0, one.classes))
    with Counting() as counting:
        for microbatch, inputs in enumerate(data):
            result = stage.forward(microbatch, inputs, {})
            assert result.loss is not None
            stage.backward(microbatch, [result.loss / plan.microbatches], last=False)
    assert stage.lowered is not None
    listed: Counter[str] = Counter()
    for collective, count in count_lowered_collectives(stage.lowered, stage.function.mesh).items():
        listed[collective.kind] += count * plan.microbatches
    return dict(counting.started), dict(listed)


@pytest.mark.parametrize("name", ["gpt-untied"])
def test_collectives_of_the_graph_are_those_that_run(pool: Pool, name: str) -> None:
    one = MODELS[name]
    plan = make_plan(one.workload(), "dp2", 3, "none", one.batch)
    names = {"all_gather_into_tensor_out": "all_gather", "reduce_scatter_tensor": "reduce_scatter"}
    for ran, listed in pool.run(plan.gpus, count_collectives, msgspec.json.encode(plan), name):
        assert {names.get(kind, kind): count for kind, count in ran.items()} == listed
        assert listed["all_gather"] > 0
        assert listed["reduce_scatter"] > 0


def gathers(plan_json: bytes, name: str) -> set[str]:
    """The ops by which the graphs of a stage all-gather."""
    plan = msgspec.json.decode(plan_json, type=Plan)
    workload = MODELS[name].workload()
    trainer = build_trainer(plan, parity.real_model(workload, 0), workload=workload)
    trainer.forward_backward(parity.random_batch(workload, plan.global_batch, 0, MODELS[name].classes))
    lowered = trainer.stages[0].lowered
    assert lowered is not None
    nodes = [*lowered.forward.graph.nodes, *lowered.backward.graph.nodes]
    return {str(node.target) for node in nodes if "all_gather" in str(node.target)}


def test_a_gather_is_given_its_memory(pool: Pool) -> None:
    """gloo's all-gather on lists of tensors corrupts the heap: four ranks with fifteen in flight crash in a minute."""
    one = MODELS["gpt-untied"]
    plan = make_plan(one.workload(), "dp2", 3, "none", one.batch)
    for found in pool.run(plan.gpus, gathers, msgspec.json.encode(plan), "gpt-untied"):
        assert found == {"_c10d_functional.all_gather_into_tensor_out.default"}


def saved_bytes(plan_json: bytes, name: str) -> int:
    """Bytes that the forward of one micro-batch saves for its backward, parameters and inputs apart."""
    plan = msgspec.json.decode(plan_json, type=Plan)
    one = MODELS[name]
    workload = one.workload()
    trainer = build_trainer(plan, parity.real_model(workload, 0), workload=workload)
    stage = trainer.stages[0]
    assert stage.lowered is not None
    data = trainer.micro_batches(parity.random_batch(workload, plan.global_batch, 0, one.classes))
    stage.forward(0, data[0], {})
    saved = stage.saved_tensors(0)
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in saved}.values())


@pytest.mark.parametrize(
    ("name", "recompute"),
    [("gpt-tied", "none"), ("gpt-tied", "full"), pytest.param("llama", "none", marks=pytest.mark.slow)],
)
def test_saved_tensors_are_those_the_plan_charges_for(pool: Pool, name: str, recompute: str) -> None:
    one = MODELS[name]
    plan = make_plan(one.workload(), "1", 0, recompute, one.batch)
    charged = plan.stages[0].memory.saved_activations_bytes / plan.stages[0].in_flight
    (saved,) = pool.run(1, saved_bytes, msgspec.json.encode(plan), name)
    assert abs(saved - charged) < 0.03 * charged
