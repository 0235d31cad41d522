"""The judge: hand-worked prices, agreement with the planner, and plans that were tampered with."""

import itertools

import msgspec
import numpy as np
import pytest
import torch

from autopar.cluster.cost_tables import load_cluster
from autopar.core.dtypes import LONG_NAMES
from autopar.core.errors import CheckError
from autopar.core.placement import PARTIAL, REPLICATE, Shard, parse_placements
from autopar.core.plan import BlockProgram, Execution, OpPlan, Plan, ValuePlan
from autopar.cost.redistribution_time import MeshLinks, redistribute_s
from autopar.graph.ir import Block, Graph, InputRef, Op, TracedBatch, Value
from autopar.graph.op_profiles import profile_graph
from autopar.graph.split_into_blocks import hoist_light_ops, split_into_blocks
from autopar.graph.trace import trace
from autopar.judge.block_redistributions import find_redistributions
from autopar.judge.context import BlockContext, ModelContext
from autopar.judge.judge import differences, judge
from autopar.judge.judge_mesh import JudgeMesh, local_shape
from autopar.judge.op_price import price_op
from autopar.manual.layout_pricer import plan_layout
from autopar.planner.planner import plan
from tests.conftest import example_workload

torch.set_num_threads(1)
MODELS = {
    "gpt": {"layers": 4, "hidden": 256, "heads": 4, "vocab": 512, "seq": 128},
    "llama": {"layers": 3, "hidden": 256, "heads": 8, "kv_heads": 2, "ffn": 512, "vocab": 1024, "seq": 256},
    "wide gpt": {"layers": 4, "hidden": 2048, "heads": 16, "vocab": 1024, "seq": 2048},
    "moe": {"layers": 4, "hidden": 128, "heads": 4, "vocab": 512, "seq": 128, "experts": 4, "group_size": 128},
    "wide_resnet": {"layers": 50, "base_channels": 32, "width_factor": 2, "image_size": 64},
}
LAYOUTS = {
    "gpt": ["", "zero=1", "zero=3", "tp=2,sp=1", "tp=2,pp=2,mbs=4", "tp=2,pp=2,recompute=full,zero=1,sp=1"],
    "llama": ["zero=3", "tp=2,sp=1,mbs=4,zero=1", "pp=2,mbs=4,recompute=selective,schedule=gpipe"],
    "moe": ["", "zero=1,recompute=full", "pp=2,mbs=4"],
    "wide_resnet": ["", "zero=3", "pp=2,mbs=4,recompute=full"],
}


@pytest.fixture(scope="module")
def graphs():
    """(name, dtype) -> (workload, graph, blocks), each traced once."""
    known = {}

    def of(name, dtype):
        if (name, dtype) not in known:
            workload = example_workload(name.split()[-1], **MODELS[name])
            graph = hoist_light_ops(trace(workload, dtype=dtype).graph)
            known[name, dtype] = (workload, graph, split_into_blocks(graph))
        return known[name, dtype]

    return of


def judged(graphs, name: str, made: Plan):
    _, graph, blocks = graphs(name, LONG_NAMES[made.execution.dtype])
    return judge(made, graph, blocks, load_cluster(made.cluster.name))


def workload(graphs, name: str):
    return graphs(name, "float16")[0]


# --- redistribution paths ---------------------------------------------------------------------------------------------


def test_local_shapes_are_those_of_the_fullest_rank():
    assert local_shape((10, 4), parse_placements("S(0)S(0)"), (4, 2)) == (2, 4)  # 10 -> 3 -> 2
    assert local_shape((24, 5), parse_placements("_S(0,3)"), (4,)) == (6, 5)  # three pieces of 8, each split in 4
    # 8 samples of 2: a rank has 2 samples, half of each
    assert local_shape((16,), parse_placements("S(0)_S(0,8)"), (4, 2)) == (2,)


@pytest.mark.parametrize(
    ("source", "target", "steps"),
    [
        ("S(0)R", "S(0)R", []),
        # (8192, 4096) fp16 is 64 MiB; a rank of the outer axis of 2 has half of it
        ("S(0)P", "S(0)R", [("all_reduce", (1,), 32)]),
        ("S(0)P", "S(0)S(1)", [("reduce_scatter", (1,), 32)]),
        ("S(0)S(1)", "S(0)R", [("all_gather", (1,), 32)]),
        ("RS(0)", "RS(1)", [("all_to_all", (1,), 32)]),  # half of 64 MiB before and after
        ("RR", "RS(1)", []),  # a slice
        ("PP", "RR", [("all_reduce", (0, 1), 64)]),  # one flattened collective, not two
        ("S(0)S(0)", "RS(0)", None),  # the inner shard must be gathered first: at least two steps
    ],
)
def test_redistribution_paths_cost_what_was_worked_out_by_hand(source, target, steps):
    mesh = JudgeMesh(load_cluster("dgx-a100"), (2, 2), 0)
    route = mesh.redistribution_path((8192, 4096), 2, parse_placements(source), parse_placements(target))
    if steps is None:
        assert len(route.collectives) >= 1
        assert route.placements[-1] == parse_placements(target)
    else:
        assert [(step.kind, step.axes, step.num_bytes / 2**20) for step in route.collectives] == steps


def test_a_path_takes_as_long_as_in_the_table_of_all_placements_that_source_and_target_have():
    cluster, shape, sizes = load_cluster("dgx-a100"), (4096, 1024), (2, 4)
    mesh, links = JudgeMesh(cluster, sizes, 0), MeshLinks(cluster, 8, sizes, (0, 1))
    pairs = itertools.product(itertools.product((REPLICATE, PARTIAL, Shard(0), Shard(1)), repeat=2), repeat=2)
    for source, target in pairs:
        placements = list(itertools.product(dict.fromkeys((*source, *target, REPLICATE)), repeat=2))
        local_bytes = np.array([[mesh.local_bytes(shape, 2, placed) for placed in placements]], float)
        table_s = redistribute_s(links, placements, local_bytes)[0]
        expected_s = table_s[placements.index(source), placements.index(target)]
        if np.isfinite(expected_s):  # the table does not make partial sums
            path = mesh.redistribution_path(shape, 2, source, target)
            assert path.time_s == pytest.approx(expected_s, rel=1e-9), (source, target)


def test_a_replicated_tensor_becomes_partial_for_free_and_a_sharded_one_by_a_gather():
    mesh = JudgeMesh(load_cluster("dgx-a100"), (2, 2), 0)
    replicated, partial, sharded = map(parse_placements, ("RR", "RP", "RS(0)"))
    assert (
        mesh.redistribution_path((8, 4), 2, replicated, partial).collectives == ()
    )  # zeros on all ranks but the first
    assert [step.kind for step in mesh.redistribution_path((8, 4), 2, sharded, partial).collectives] == ["all_gather"]


# --- a column and row linear pair on tp = 2 ---------------------------------------------------------------------------


def linear_pair():
    """x[8, 4] @ w1[6, 4]^T -> y[8, 6] @ w2[4, 6]^T -> z[8, 4], fp16, one block."""

    def value(id, name, kind, shape):
        return Value(id=id, name=name, kind=kind, shape=shape, dtype="float16", requires_grad=True)

    values = (
        value(0, "x", "activation", (808, 4)),
        value(1, "w1", "parameter", (6, 4)),
        value(2, "w2", "parameter", (4, 6)),
        value(3, "y", "activation", (808, 6)),
        value(4, "z", "activation", (808, 4)),
    )

    def op(id, name, inputs, outputs):
        return Op(
            id=id, name=name, target="aten.linear.default", inputs=inputs, outputs=outputs, args=(InputRef(0), InputRef(1)),
            kwargs=(), module_path="", source_location=""
        )  # fmt: skip

    ops = (op(0, "up", (0, 1), (3,)), op(1, "down", (3, 2), (4,)))
    batch = TracedBatch(traced_size=808, prime=101)
    graph = Graph(values=values, ops=ops, inputs=(0,), outputs=(4,), batch=batch, fingerprint="")
    block = Block(index=0, name="b", kind=0, first_op=0, end_op=2, inputs=(0,), outputs=(4,), parameters=(1, 2))
    return graph, block


def pair_program(boundary: tuple[str, str]):
    """Column then row parallel, on one axis; ``boundary``: placement of what crosses, and of its gradient."""
    placement, gradient = boundary
    up = OpPlan(
        name="up", inputs=("R", "S(0)"), outputs=("S(1)",), input_gradients=("P", "S(0)"), output_gradients=("S(1)",)
    )
    down = OpPlan(
        name="down", inputs=("S(1)", "S(1)"), outputs=("P",), input_gradients=("S(1)", "S(1)"), output_gradients=("R",)
    )
    side = [ValuePlan(name=name, placement=placement, gradient=gradient) for name in "xz"]
    return BlockProgram(
        id="p", kind=0, recompute="none", ops=(up, down), parameters=(), inputs=(side[0],), outputs=(side[1],)
    )


@pytest.mark.parametrize(
    ("boundary", "forward", "backward"),
    [
        # 8 samples of 4 fp16 = 64 bytes. Replicated outside: z is summed forward, x's gradient backward.
        (("R", "R"), ["all_reduce"], ["all_reduce"]),
        # Sequence parallel: gather x, scatter z; backward gathers z's gradient and scatters x's.
        (("S(0)", "S(0)"), ["all_gather", "reduce_scatter"], ["reduce_scatter", "all_gather"]),
    ],
)
def test_a_column_and_row_pair_moves_64_bytes_per_collective(boundary, forward, backward):
    graph, block = linear_pair()
    mesh = JudgeMesh(load_cluster("dgx-a100"), (2,), 0)
    moved = find_redistributions(graph, block, pair_program(boundary), mesh, 8, frozenset())
    for routes, kinds in ((moved.forward_paths, forward), (moved.backward_paths, backward)):
        steps = [step for route in routes for step in route.collectives]
        assert sorted(step.kind for step in steps) == sorted(kinds)
        assert {step.num_bytes for step in steps} == {64}


def pair_case() -> BlockContext:
    """The pair on 2 ranks at 8 samples."""
    graph, block = linear_pair()
    return BlockContext(
        model=ModelContext.of(Execution(dtype="fp16", optimizer="adamw"), graph, (block,), profile_graph(graph)),
        block=block,
        program=pair_program(("R", "R")),
        mesh=JudgeMesh(load_cluster("dgx-a100"), (2,), 0),
        micro_batch=8,
        accumulates_gradients=False,
        has_data_axis=False,
        is_megatron=False,
        stored_earlier=frozenset(),
        conflicting_axes=frozenset(),
        outputs_read_later=frozenset(),
    )


def test_an_op_whose_tensors_disagree_is_refused():
    case = pair_case()
    op, good = case.model.graph.ops[0], case.program.ops[0]
    price, device = price_op(case, op, good), case.mesh.cluster.device
    # (8, 3, 4) by the device's curve, and nothing else
    assert price.forward_s == pytest.approx(float(device.matmul_s(8, 3, 4, 1, dtype="float16")))
    assert price.num_shards == 2
    for wrong in (
        {"outputs": ("R",)},  # the weight's rows are sharded, the result's columns are not
        {"inputs": ("S(1)", "R"), "outputs": ("S(1)",)},  # half of a contraction, but no sum
        {"input_gradients": ("R", "S(0)")},  # x is replicated, so its gradient is partial
    ):
        with pytest.raises(CheckError):
            price_op(case, op, msgspec.structs.replace(good, **wrong))


# --- agreement with the planner ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layout"), [(name, text) for name, texts in LAYOUTS.items() for text in texts])
def test_layouts_weigh_what_their_placements_do(graphs, name, layout):
    made = plan_layout(workload(graphs, name), cluster="p3.16xlarge", gpus=4, global_batch=32, layout=layout)
    assert list(differences(made, judged(graphs, name, made))) == []


SEARCHES = [
    ("gpt", {}),
    ("gpt", {"recompute": "full"}),
    ("gpt", {"memory_gib": 1.4}),
    ("llama", {"recompute": "selective"}),
    ("llama", {"schedule": "gpipe", "micro_batch": 8}),
    ("moe", {"micro_batch": 16}),
    ("wide_resnet", {"micro_batch": 32}),
]


@pytest.mark.parametrize(("name", "search"), SEARCHES)
def test_searched_plans_weigh_what_their_placements_do(graphs, name, search):
    made = plan(workload(graphs, name), cluster="p3.16xlarge", gpus=4, global_batch=32, **search)
    verdict = judged(graphs, name, made)
    assert list(differences(made, verdict)) == []
    assert made.estimate.collectives == verdict.collectives
    assert not any("judged" in note for note in made.notes)


def test_stages_of_one_program_are_priced_by_their_own_axes(graphs):
    """A rank awaits the hosts of those that share its samples: of all eight where no axis is the data axis."""
    made = plan_layout(
        workload(graphs, "gpt"), cluster="p3.16xlarge", gpus=16, global_batch=32, layout="pp=2,tp=2,launch=blocking"
    )
    other = tuple(
        msgspec.structs.replace(axis, name={"dp": "cp"}.get(axis.name, axis.name)) for axis in made.stages[1].axes
    )
    first, second = made.stages
    second = msgspec.structs.replace(second, blocks=first.blocks[:-1])  # the same programs
    renamed = msgspec.structs.replace(second, axes=other)

    def second_stage(*stages):
        return judged(graphs, "gpt", msgspec.structs.replace(made, stages=stages)).stages[1]

    alone = second_stage(msgspec.structs.replace(first, axes=other), renamed)
    assert second_stage(first, renamed) == alone
    assert alone.forward_s > second_stage(first, second).forward_s


# --- the list of collectives ------------------------------------------------------------------------------------------


def listed(made: Plan, per: str):
    return {(c.kind, c.axes, c.num_bytes): c.count for c in made.estimate.collectives if c.per == per}


def test_megatron_collectives_of_a_layer_as_published(graphs):
    """Shoeybi et al., 2019, section 3: two all-reduces forward and two backward per layer, of s * b * h; with sequence
    parallelism each is a gather and a scatter (Korthikanti et al., 2022, section 4.2.2)."""
    made = plan_layout(workload(graphs, "gpt"), cluster="dgx-a100", gpus=2, global_batch=8, layout="tp=2,mbs=2")
    whole = 2 * 128 * 256 * 2  # 2 samples of 128 tokens, 256 wide, bf16
    tp = tuple(axis.name for axis in made.stages[0].axes if axis.size == 2)
    assert listed(made, "microbatch")["all_reduce", tp, whole] >= 4 * 4  # four layers


def test_sequence_parallelism_regathers_inputs_in_the_backward(graphs):
    """Korthikanti et al., 2022, section 4.2.2: a layer gathers two inputs in the forward, and in the backward two gradients
    and the same two inputs, which it saves sharded; it scatters two sums in each pass. The vocabulary, sharded by rows,
    scatters its sum in the forward and gathers the gradient."""
    made = plan_layout(
        workload(graphs, "wide gpt"), cluster="dgx-a100", gpus=2, global_batch=8, layout="tp=2,mbs=2,sp=1"
    )
    whole = 2 * 2048 * 2048 * 2  # 2 samples of 2048 tokens, 2048 wide, bf16
    counts = listed(made, "microbatch")
    assert counts["all_gather", ("tp",), whole] == 4 * 6 + 1
    assert counts["reduce_scatter", ("tp",), whole] == 4 * 4 + 1
    assert ("all_reduce", ("tp",), whole) not in counts


def test_where_memory_binds_gathered_inputs_are_saved_as_shards(graphs):
    """The choice is the search's: with room for full tensors nothing is gathered twice."""
    search = {"cluster": "p3.16xlarge", "gpus": 4, "global_batch": 1, "recompute": "none"}
    regathered = {}
    for memory_gib in (16, 1.8):
        made = plan(workload(graphs, "wide gpt"), memory_gib=memory_gib, **search)
        assert list(differences(made, judged(graphs, "wide gpt", made))) == []
        regathered[memory_gib] = [op.name for program in made.programs for op in program.ops if op.regathered]
    assert not regathered[16]
    assert regathered[1.8]


def test_zero_3_gathers_what_each_pass_reads_and_scatters_once(graphs):
    """A backward reads no bias of a linear and no table of positions, so these are gathered once."""
    made = plan_layout(workload(graphs, "gpt"), cluster="dgx-a100", gpus=4, global_batch=8, layout="zero=3,grads=same")
    counts = dict.fromkeys(("all_gather", "reduce_scatter"), 0)
    for (kind, _, size), count in listed(made, "microbatch").items():
        if kind in counts:
            counts[kind] += size * count
    biases = 4 * (3 * 256 + 256 + 1024 + 256)  # of four layers, 256 wide
    once = 2 * (biases + 128 * 256)  # bf16, with 128 positions
    assert counts["all_gather"] == 2 * counts["reduce_scatter"] - once
    assert not any(kind in counts for kind, _, _ in listed(made, "step"))


def test_stages_that_hold_a_tied_table_pay_for_its_gradient(graphs):
    """Two stages of 8 V100s, a node each: 512 x 256 in fp32, sharded by tp=2 and, under ZeRO-1, by dp=4, over a node's NICs."""
    cluster = load_cluster("p3.16xlarge")
    own = {}
    for tied in (True, False):
        made = example_workload("gpt", **MODELS["gpt"], tied_embeddings=tied)
        for zero in (0, 1):
            layout = f"tp=2,pp=2,mbs=1,zero={zero}"
            priced = plan_layout(made, cluster=cluster, gpus=16, global_batch=32, layout=layout)
            own[tied, zero] = [stage.step_s for stage in priced.stages]
            sent = [c.num_bytes for c in priced.estimate.collectives if (c.kind, c.per) == ("send", "step")]
            assert sent == ([512 * 256 * 4 // (8 if zero else 2)] * 2 if tied else [])
    for zero in (0, 1):
        part_s = float(cluster.transfer_s(512 * 256 * 4 / (8 if zero else 2), same_node=False, num_senders=8))
        assert own[True, zero][1] == pytest.approx(own[False, zero][1] + part_s, rel=1e-6)


# --- tampering --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(graphs):
    return plan_layout(
        workload(graphs, "gpt"), cluster="p3.16xlarge", gpus=8, global_batch=32, layout="tp=2,pp=2,mbs=4,sp=1"
    )


def changed(noun, **fields):
    return msgspec.structs.replace(noun, **fields)


def with_stage(made: Plan, **fields) -> Plan:
    return changed(made, stages=(changed(made.stages[0], **fields), *made.stages[1:]))


def test_a_lowered_memory_and_a_wrong_number_in_flight_are_found(graphs, pipeline):
    stage = pipeline.stages[0]
    less = changed(stage.memory, saved_activations_bytes=stage.memory.saved_activations_bytes // 2)
    for tampered, name in (
        (with_stage(pipeline, memory=less), "saved_activations_bytes"),
        (with_stage(pipeline, in_flight=stage.in_flight + 1), "in_flight"),
    ):
        assert any(name in line for line in differences(tampered, judged(graphs, "gpt", tampered)))


def test_a_changed_placement_is_found(graphs, pipeline):
    """In turn, the plan gives the result of every op of a layer another placement than the op's."""
    id = next(ref.program for ref in pipeline.stages[0].blocks if ref.name == "layers.0")
    program = pipeline.program(id)
    tried = 0
    for at, op in enumerate(program.ops):
        whole = tuple(text[:4] + "R" if text.startswith("S(0)") else text for text in op.outputs)
        if whole == op.outputs:
            continue
        ops = (*program.ops[:at], changed(op, outputs=whole), *program.ops[at + 1 :])
        programs = tuple(changed(p, ops=ops) if p.id == id else p for p in pipeline.programs)
        tampered = changed(pipeline, programs=programs)
        tried += 1
        try:
            verdict = judged(graphs, "gpt", tampered)
        except CheckError:
            continue
        if op.name.startswith(("view", "unbind", "transpose", "reshape")):
            continue  # no kernel and no memory of its own: sharding its result afterwards is free
        assert list(differences(tampered, verdict)) or verdict.collectives != pipeline.estimate.collectives, op.name
    assert tried >= 8


def test_a_parameter_that_is_stored_otherwise_is_found(graphs, pipeline):
    """The optimizer state of every replicated parameter in turn is sharded over the data axis without a change of the figures."""
    tried = 0
    for program in pipeline.programs:
        for at, parameter in enumerate(program.parameters):
            if parameter.compute[0] == "R" and parameter.gradient[0] == "P" and parameter.optimizer[0] == "R":
                sharded = changed(parameter, optimizer="S(0)" + parameter.compute[1:])
                parameters = (*program.parameters[:at], sharded, *program.parameters[at + 1 :])
                programs = tuple(
                    changed(p, parameters=parameters) if p.id == program.id else p for p in pipeline.programs
                )
                tampered = changed(pipeline, programs=programs)
                verdict = judged(graphs, "gpt", tampered)
                assert verdict.collectives != pipeline.estimate.collectives, parameter.name
                assert any("optimizer_bytes" in line for line in differences(tampered, verdict)), parameter.name
                tried += 1
    assert tried >= 8
