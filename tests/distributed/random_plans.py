"""Random plans: every op takes any option of its rule on every axis, whatever its neighbours do."""

import random
from collections.abc import Sequence

from msgspec.structs import replace

from autopar.core.invariants import recompute_summary
from autopar.core.mesh_axis import Axis
from autopar.core.placement import PARTIAL, REPLICATE, Placement, Shard, format_placements
from autopar.core.plan import BlockProgram, BlockRef, OpPlan, ParameterPlan, Plan
from autopar.graph.ir import Block, Graph
from autopar.graph.split_into_blocks import hoist_light_ops, split_into_blocks
from autopar.graph.trace import trace
from autopar.intra.block_space import build_block_space
from autopar.manual.layout_pricer import plan_layout
from autopar.rules.axis_options import AxisOption
from autopar.rules.placement_pair import PlacementPair, forward_placements, gradient_placements
from autopar.workload.workload import Workload


def random_plan(workload: Workload, seed: int, max_ranks: int = 4, batch: int = 8) -> Plan:
    """One or two stages on meshes of one or two axes of 1 to ``max_ranks`` ranks in all."""
    draw = random.Random(seed)
    layout = f"mbs={batch // 2}"
    base = plan_layout(workload, cluster="cpu-gloo", gpus=1, layout=layout, global_batch=batch, dtype="fp32")
    graph = hoist_light_ops(trace(workload, dtype="float32").graph)
    blocks = split_into_blocks(graph)
    num_stages = draw.choice((1, 1, 2)) if len(blocks) > 1 and max_ranks > 1 else 1
    bounds = sorted(draw.sample(range(1, len(blocks)), num_stages - 1))
    stages, programs, device = [], [], 0
    for first, end in zip((0, *bounds), (*bounds, len(blocks)), strict=True):
        sizes = draw.choice(
            [s for s in ((1,), (2,), (2, 2), (1, 2), (4,), (2, 1)) if _count(s) * num_stages <= max_ranks]
        )
        programs += [_program(draw, graph, blocks, block, sizes, base.micro_batch_size) for block in blocks[first:end]]
        refs = tuple(BlockRef(index=b.index, name=b.name, program=f"b{b.index}") for b in blocks[first:end])
        axes = tuple(Axis(name=f"a{at}", size=size) for at, size in enumerate(sizes))
        stages.append(replace(base.stages[0], blocks=refs, first_device=device, num_devices=_count(sizes), axes=axes))
        device += _count(sizes)
    return replace(
        base,
        programs=tuple(programs),
        stages=tuple(stages),
        gpus=device,
        recompute=recompute_summary(tuple(programs)),
        schedule=draw.choice(("1f1b", "gpipe")),
    )


def _count(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def _program(
    draw: random.Random, graph: Graph, blocks: Sequence[Block], block: Block, sizes: Sequence[int], micro: int
) -> BlockProgram:
    space = build_block_space(graph, block, graph.parameter_free())
    planned: dict[int, OpPlan] = {}
    parameters: dict[int, ParameterPlan] = {}
    for node in space.ops:
        chosen = [draw.choice(_fitting(node.options, size, graph, micro)) for size in sizes]
        inputs = [[option.inputs[at] for option in chosen] for at in range(len(node.op.inputs))]
        outputs = [[option.outputs[at] for option in chosen] for at in range(len(node.op.outputs))]
        planned[node.op.id] = OpPlan(
            name=node.op.name,
            inputs=tuple(_text(graph, micro, forward_placements(pairs)) for pairs in inputs),
            outputs=tuple(_text(graph, micro, forward_placements(pairs)) for pairs in outputs),
            output_gradients=tuple(_text(graph, micro, gradient_placements(pairs)) for pairs in outputs),
        )
        for position in node.parameter_inputs:
            value = graph.values[node.op.inputs[position]]
            parameter = _parameter(draw, graph, micro, value.qualified_names[0], inputs[position], sizes, value.shape)
            parameters.setdefault(value.id, parameter)
    for op in space.parameter_free_ops:
        replicated = "R" * len(sizes)
        planned[op.id] = OpPlan(
            name=op.name, inputs=tuple(replicated for _ in op.inputs), outputs=tuple(replicated for _ in op.outputs)
        )
    kind = next(other for other in blocks if other.kind == block.kind)
    names = {
        value: graph.values[of_kind].qualified_names[0]
        for value, of_kind in zip(block.parameters, kind.parameters, strict=True)
    }
    return BlockProgram(
        id=f"b{block.index}",
        kind=block.kind,
        recompute=draw.choice(("none", "none", "selective", "full")),
        ops=tuple(planned[op] for op in sorted(planned)),
        parameters=tuple(replace(parameter, name=names[value]) for value, parameter in parameters.items()),
    )


def _fitting(options: Sequence[AxisOption], degree: int, graph: Graph, micro: int) -> list[AxisOption]:
    """Options whose shards the axis divides evenly; a single dim may be divided unevenly if every rank gets some of it."""
    found = []
    for option in options:
        size = graph.batch.scale(option.max_shards, micro) if option.is_sharded else 0
        if not option.is_sharded or size % degree == 0 or (len(option.labels) == 1 and size > 2 * degree):
            found.append(option)
    return found


def _text(graph: Graph, micro: int, placements: Sequence[Placement]) -> str:
    """Placements at the traced batch, as text at ``micro`` samples."""
    return format_placements(
        Shard(placement.dim, graph.batch.scale(placement.split_factor, micro))
        if isinstance(placement, Shard)
        else placement
        for placement in placements
    )


def _parameter(
    draw: random.Random,
    graph: Graph,
    micro: int,
    name: str,
    pairs: Sequence[PlacementPair],
    sizes: Sequence[int],
    shape: tuple[int, ...],
) -> ParameterPlan:
    compute = [pair.factor if pair.factor is not None else REPLICATE for pair in pairs]
    free = [axis for axis, placement in enumerate(compute) if placement == REPLICATE]
    axes = [axis for axis in free if draw.random() < 0.7] if shape else []
    zero = draw.randint(0, 3) if axes else 0
    pieces = 1
    for placement, size in zip(compute, sizes, strict=True):
        if isinstance(placement, Shard) and placement.dim == 0:
            pieces *= placement.split_factor * size
    sharded = [Shard(0, pieces) if axis in axes else placement for axis, placement in enumerate(compute)]
    gradient = [
        sharded[axis] if zero >= 2 and axis in axes else PARTIAL if axis in axes or draw.random() < 0.5 else REPLICATE
        for axis in range(len(compute))
    ]
    gradient = [own if used == REPLICATE else used for own, used in zip(gradient, compute, strict=True)]
    return ParameterPlan(
        name=name,
        compute=_text(graph, micro, compute),
        parameter=_text(graph, micro, sharded if zero == 3 else compute),
        gradient=_text(graph, micro, gradient),
        optimizer=_text(graph, micro, sharded if zero >= 1 else compute),
    )
