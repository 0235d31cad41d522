"""What a manual layout leaves open, filled in as Megatron's program does (Shoeybi et al., 2019; Korthikanti et al.,
2022).

Stages are cut as even as possible (``cuts``); the mesh of a stage is (data, ep, cp, tp) with axes of one rank left out.
On each axis ops are restricted (``restriction``), and what is still free (column or row) is the fastest:

    tp   matmuls shard their weights, vocabularies their rows (other tables stay whole), attention its heads; without sp
         nothing is sharded by sequence and what crosses blocks is replicated; with sp that is sharded by sequence, and
         so is all that norms, dropout and sums make of it (tensors of its shape)
    cp   everything is sharded by sequence; attention gathers keys and values
    ep   dp inside dp: everything is sharded by batch but the experts, which are sharded by expert (all-to-all between)
"""

from dataclasses import dataclass

from autopar.core.errors import LayoutError
from autopar.core.layout import Layout, StageSpec
from autopar.graph.ir import Block, Graph
from autopar.inter.block_pricer import LayoutRestriction, StageMesh
from autopar.inter.even_partition import even_ends, layers
from autopar.intra.block_space import OpNode
from autopar.intra.strategies import OptionFilter
from autopar.rules.axis_options import AxisOption
from autopar.rules.dim_factors import DimFactor

MIN_VOCABULARY = 128
"""Rows of the smallest table that is a vocabulary: Megatron-LM pads those to a multiple of 128 and leaves the tables of
positions and of token types whole (megatron/training/arguments.py, ``make-vocab-size-divisible-by``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutStage:
    """Blocks first..end-1 as chunk ``chunk`` of the run of devices that begins at ``first_device``."""

    first_block: int
    end_block: int
    first_device: int
    spec: StageSpec
    chunk: int = 0


def layout_stages(blocks: tuple[Block, ...], layout: Layout, gpus: int) -> tuple[LayoutStage, ...]:
    """The stages of a resolved layout in model order, interleaved ones chunk by chunk; LayoutError where there are
    fewer layers than stages, or other blocks than ``stages=`` counts."""
    ends = stage_ends(blocks, layout)
    if layout.stages:
        specs = list(layout.stages)
    else:
        assert layout.dp is not None
        specs = [StageSpec(blocks=1, dp=layout.dp, cp=layout.cp, tp=layout.tp)] * layout.pp
    devices = [0]
    for spec in specs:
        devices.append(devices[-1] + spec.num_gpus)
    return tuple(
        LayoutStage(
            first_block=begin,
            end_block=end,
            first_device=devices[at % len(specs)],
            spec=specs[at % len(specs)],
            chunk=at // len(specs),
        )
        for at, (begin, end) in enumerate(zip([0, *ends], ends, strict=False))
    )


def stage_ends(blocks: tuple[Block, ...], layout: Layout) -> list[int]:
    """Where the stages of a layout, resolved or not, end; LayoutError where the model's blocks are too few or
    others."""
    return _listed_ends(blocks, layout) if layout.stages else even_ends(blocks, layout.pp * layout.vpp)


def _listed_ends(blocks: tuple[Block, ...], layout: Layout) -> list[int]:
    first, last = layers(blocks).start, layers(blocks).stop
    listed = [stage.blocks for stage in layout.stages]
    if sum(listed) == len(blocks):
        first, last = 0, len(blocks)
    elif sum(listed) != last - first:
        raise LayoutError(
            [f"stages= lists {sum(listed)} blocks, the model has {last - first} layers ({len(blocks)} blocks in all)"]
        )
    ends = [first + sum(listed[: at + 1]) for at in range(len(listed))]
    ends[-1] = len(blocks)
    return ends


def megatron_restriction(graph: Graph, blocks: tuple[Block, ...], layout: Layout, spec: StageSpec) -> LayoutRestriction:
    """The mesh of a stage and what its axes allow."""
    crossing = {graph.values[value].shape for block in blocks for value in block.outputs}
    streams = frozenset(shape for shape in crossing if len(shape) > 1)
    degrees = (("ep", layout.ep), ("cp", spec.cp), ("tp", spec.tp))
    axes = tuple((name, size) for name, size in degrees if size > 1)
    roles = {"ep": "B", "cp": "S", "tp": "S" if layout.sp else "R"}
    names = tuple(name for name, _ in axes)
    return LayoutRestriction(
        mesh=StageMesh(data_size=spec.dp // layout.ep, inner_sizes=tuple(size for _, size in axes)),
        option_filter=_megatron_options(graph, streams, names, layout.sp),
        zero_stage=layout.zero,
        boundary_roles=tuple(roles[name] for name in names),
        axis_names=names,
    )


def _megatron_options(
    graph: Graph, boundary_shapes: frozenset[tuple[int, ...]], axis_names: tuple[str, ...], sequence_parallel: bool
) -> OptionFilter:
    sequences = {
        graph.values[value].shape[1]
        for value in graph.inputs
        if len(graph.values[value].shape) == 2 and graph.batch.is_proportional(graph.values[value].shape[0])
    }

    def by_sequence(node: OpNode, option: AxisOption) -> bool:
        """Whether it shards an activation along the sequence: dim 1, dim 2 behind heads, or tokens merged with the
        batch."""
        tensors = zip((*node.op.inputs, *node.op.outputs), (*option.inputs, *option.outputs), strict=True)
        return any(
            (atom := pair.atom) is not None
            and atom.size in sequences
            and graph.values[value].kind != "parameter"
            and not graph.batch.is_proportional(atom.size)
            and (atom.dim == 1 or atom.split_factor > 1 or (atom.dim == 2 and len(graph.values[value].shape) == 4))
            for value, pair in tensors
        )

    def weight_atoms(node: OpNode, option: AxisOption) -> list[tuple[DimFactor, int]]:
        """(atom, rank) of the weights that it shards."""
        shapes = [(i, len(graph.values[node.op.inputs[i]].shape)) for i in node.parameter_inputs]
        return [(atom, rank) for i, rank in shapes if rank > 1 and (atom := option.inputs[i].atom) is not None]

    def is_table(node: OpNode) -> bool:
        return node.op.target.startswith("aten.embedding") and bool(node.parameter_inputs)

    def is_vocabulary(node: OpNode) -> bool:
        """Whether it looks samples' tokens up, of which there are many."""
        table, index = (graph.values[value].shape for value in node.op.inputs[:2])
        return (
            is_table(node) and table[0] >= MIN_VOCABULARY and any(graph.batch.is_proportional(size) for size in index)
        )

    def shards_weights(node: OpNode, option: AxisOption) -> bool:
        atoms = weight_atoms(node, option)
        if is_table(node):
            return any(atom.dim == 0 for atom, _ in atoms)
        return any(rank == 2 or atom.dim > 0 for atom, rank in atoms)

    def shards_experts(node: OpNode, option: AxisOption) -> bool:
        return any(rank == 3 and atom.dim == 0 for atom, rank in weight_atoms(node, option))

    def shards_batch(option: AxisOption) -> bool:
        return option.is_sharded and graph.batch.is_proportional(option.max_shards)

    def tp(node: OpNode, option: AxisOption) -> bool:
        if shards_batch(option):
            return False
        cut = is_vocabulary(node) if is_table(node) else node.rule.compute == "matmul" and bool(node.parameter_inputs)
        if cut and any(shards_weights(node, o) for o in node.options):
            return shards_weights(node, option)
        if is_table(node) and weight_atoms(node, option):
            return False
        if node.rule.compute == "attention":
            return "h" in {dict(node.rule.roles).get(label) for label in option.labels}
        if (
            sequence_parallel
            and node.rule.compute == "memory"
            and graph.values[node.op.outputs[0]].shape in boundary_shapes
        ):
            return by_sequence(node, option) or not any(by_sequence(node, o) for o in node.options)
        return sequence_parallel or len(graph.values[node.op.outputs[0]].shape) == 4 or not by_sequence(node, option)

    def cp(node: OpNode, option: AxisOption) -> bool:
        if node.rule.compute == "attention":
            return "q" in {dict(node.rule.roles).get(label) for label in option.labels}
        if any(by_sequence(node, o) for o in node.options):
            return by_sequence(node, option)
        return not option.is_sharded

    def ep(node: OpNode, option: AxisOption) -> bool:
        if any(shards_experts(node, o) for o in node.options):
            return shards_experts(node, option)
        if any(shards_batch(o) for o in node.options):
            return shards_batch(option) or (not node.parameter_inputs and option.is_sharded)
        return not option.is_sharded

    rules = {"tp": tp, "cp": cp, "ep": ep}
    return lambda axis, node, option: rules[axis_names[axis]](node, option)
