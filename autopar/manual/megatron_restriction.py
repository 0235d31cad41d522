"""What a manual layout leaves open, filled in as Megatron's program does (Shoeybi et al., 2019; Korthikanti et al.,
2022).

Stages are as even as possible (`layout_stages`); the mesh of a stage is (data, ep, cp, tp) without axes of one rank. On
each axis an op's options are restricted (`megatron_restriction`); what remains open (column or row) is the fastest:

    tp   matmuls shard their weights, vocabularies their rows (other tables are replicated), attention its heads. Without
         sp nothing is sharded by sequence and what goes from block to block is replicated; with sp that is sharded by
         sequence, and so is all that norms, dropout and sums compute from it (tensors of its shape)
    cp   everything is sharded by sequence; attention gathers keys and values
    ep   a part of dp: everything is sharded by batch but the experts, which are sharded by expert (all-to-all between)
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
"""Rows of the smallest table that is a vocabulary: Megatron-LM pads those to a multiple of 128 and replicates the tables
of positions and of token types (megatron/training/arguments.py, ``make-vocab-size-divisible-by``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutStage:
    """Blocks first_block..end_block-1, as chunk number ``chunk`` of the submesh that begins at ``first_device``."""

    first_block: int
    end_block: int
    first_device: int
    spec: StageSpec
    chunk: int = 0


def layout_stages(blocks: tuple[Block, ...], layout: Layout, gpus: int) -> tuple[LayoutStage, ...]:
    """The stages of a resolved layout in model order, interleaved ones chunk by chunk. LayoutError where there are more
    stages than layers, or where ``stages=`` does not list the model's number of blocks."""
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
            first_device=devices[index % len(specs)],
            spec=specs[index % len(specs)],
            chunk=index // len(specs),
        )
        for index, (begin, end) in enumerate(zip([0, *ends], ends, strict=False))
    )


def stage_ends(blocks: tuple[Block, ...], layout: Layout) -> list[int]:
    """The last block + 1 of every stage of a layout, resolved or not; LayoutError as of `layout_stages`."""
    return _listed_ends(blocks, layout) if layout.stages else even_ends(blocks, layout.pp * layout.vpp)


def _listed_ends(blocks: tuple[Block, ...], layout: Layout) -> list[int]:
    """The ends by the counts of ``stages=``: of all blocks, or of layers, where the embedding belongs to the first stage
    and the head to the last."""
    first, last = layers(blocks).start, layers(blocks).stop
    listed = [stage.blocks for stage in layout.stages]
    if sum(listed) == len(blocks):
        first, last = 0, len(blocks)
    elif sum(listed) != last - first:
        raise LayoutError(
            [f"stages= lists {sum(listed)} blocks, the model has {last - first} layers ({len(blocks)} blocks in all)"]
        )
    ends = [first + sum(listed[: index + 1]) for index in range(len(listed))]
    ends[-1] = len(blocks)
    return ends


def megatron_restriction(graph: Graph, blocks: tuple[Block, ...], layout: Layout, spec: StageSpec) -> LayoutRestriction:
    """The mesh of a stage, the options that each inner axis allows, and the boundary roles: "B" sharded by batch, "S" by
    sequence, "R" replicated."""
    boundary_shapes = {graph.values[value].shape for block in blocks for value in block.outputs}
    degrees = (("ep", layout.ep), ("cp", spec.cp), ("tp", spec.tp))
    axes = tuple((name, size) for name, size in degrees if size > 1)
    roles = {"ep": "B", "cp": "S", "tp": "S" if layout.sp else "R"}
    names = tuple(name for name, _ in axes)
    rules = _MegatronRules(
        graph=graph,
        boundary_shapes=frozenset(shape for shape in boundary_shapes if len(shape) > 1),
        sequence_lengths=_sequence_lengths(graph),
        sequence_parallel=layout.sp,
    )
    return LayoutRestriction(
        mesh=StageMesh(data_size=spec.dp // layout.ep, inner_sizes=tuple(size for _, size in axes)),
        option_filter=rules.option_filter(names),
        zero_stage=layout.zero,
        boundary_roles=tuple(roles[name] for name in names),
        axis_names=names,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _MegatronRules:
    """Which options of an op each axis of Megatron's program allows. ``boundary_shapes`` are the shapes of what goes
    from block to block, ``sequence_lengths`` those of the model's inputs; ``sequence_parallel`` is the layout's sp."""

    graph: Graph
    boundary_shapes: frozenset[tuple[int, ...]]
    sequence_lengths: frozenset[int]
    sequence_parallel: bool

    def option_filter(self, axis_names: tuple[str, ...]) -> OptionFilter:
        """The rule of every inner axis, by its position."""
        rules = {"tp": self._allows_tensor, "cp": self._allows_context, "ep": self._allows_expert}
        return lambda axis, node, option: rules[axis_names[axis]](node, option)

    def _allows_tensor(self, node: OpNode, option: AxisOption) -> bool:
        """tp: weights of matmuls, rows of vocabularies and heads of attention are sharded."""
        if self._shards_batch(option):
            return False
        is_table = _is_table(node)
        has_sharded_weight = (
            self._is_vocabulary(node) if is_table else node.rule.compute == "matmul" and bool(node.parameter_inputs)
        )
        if has_sharded_weight and any(self._shards_weights(node, other) for other in node.options):
            return self._shards_weights(node, option)
        if is_table and self._weight_atoms(node, option):
            return False
        if node.rule.compute == "attention":
            return _has_role(node, option, "h")
        shape = self.graph.values[node.op.outputs[0]].shape
        if self.sequence_parallel and node.rule.compute == "memory" and shape in self.boundary_shapes:
            return self._shards_sequence(node, option) or not self._can_shard_sequence(node)
        return self.sequence_parallel or len(shape) == 4 or not self._shards_sequence(node, option)

    def _allows_context(self, node: OpNode, option: AxisOption) -> bool:
        """cp: what has a sequence is sharded by it, attention by its queries; anything else is replicated."""
        if node.rule.compute == "attention":
            return _has_role(node, option, "q")
        if self._can_shard_sequence(node):
            return self._shards_sequence(node, option)
        return not option.is_sharded

    def _allows_expert(self, node: OpNode, option: AxisOption) -> bool:
        """ep: experts are sharded by expert, anything else by batch where it can be."""
        if any(self._shards_experts(node, other) for other in node.options):
            return self._shards_experts(node, option)
        if any(self._shards_batch(other) for other in node.options):
            return self._shards_batch(option) or (not node.parameter_inputs and option.is_sharded)
        return not option.is_sharded

    def _can_shard_sequence(self, node: OpNode) -> bool:
        """Whether some option of the op shards an activation along the sequence."""
        return any(self._shards_sequence(node, option) for option in node.options)

    def _shards_sequence(self, node: OpNode, option: AxisOption) -> bool:
        """Whether the option shards an activation along the sequence: dim 1, dim 2 where heads come before it, or
        tokens merged with the batch."""
        tensors = zip((*node.op.inputs, *node.op.outputs), (*option.inputs, *option.outputs), strict=True)
        return any(
            (factor := pair.factor) is not None
            and factor.size in self.sequence_lengths
            and self.graph.values[value].kind != "parameter"
            and not self.graph.batch.is_proportional(factor.size)
            and (
                factor.dim == 1
                or factor.split_factor > 1
                or (factor.dim == 2 and len(self.graph.values[value].shape) == 4)
            )
            for value, pair in tensors
        )

    def _weight_atoms(self, node: OpNode, option: AxisOption) -> list[tuple[DimFactor, int]]:
        """(factor, tensor rank) of every weight that the option shards; vectors do not count."""
        ranks = [(i, len(self.graph.values[node.op.inputs[i]].shape)) for i in node.parameter_inputs]
        return [(factor, rank) for i, rank in ranks if rank > 1 and (factor := option.inputs[i].factor) is not None]

    def _is_vocabulary(self, node: OpNode) -> bool:
        """Whether the op, a table, looks up the tokens of samples in a table of many rows."""
        table, index = (self.graph.values[value].shape for value in node.op.inputs[:2])
        return table[0] >= MIN_VOCABULARY and any(self.graph.batch.is_proportional(size) for size in index)

    def _shards_weights(self, node: OpNode, option: AxisOption) -> bool:
        """Whether the option shards the rows of a table, a matrix, or the inside of stacked experts."""
        factors = self._weight_atoms(node, option)
        if _is_table(node):
            return any(factor.dim == 0 for factor, _ in factors)
        return any(rank == 2 or factor.dim > 0 for factor, rank in factors)

    def _shards_experts(self, node: OpNode, option: AxisOption) -> bool:
        """Whether the option shards stacked weights (experts, rows, columns) by expert."""
        return any(rank == 3 and factor.dim == 0 for factor, rank in self._weight_atoms(node, option))

    def _shards_batch(self, option: AxisOption) -> bool:
        """Whether the option shards the batch."""
        return option.is_sharded and self.graph.batch.is_proportional(option.max_shards)


def _is_table(node: OpNode) -> bool:
    """Whether the op looks rows of a parameter up."""
    return node.op.target.startswith("aten.embedding") and bool(node.parameter_inputs)


def _has_role(node: OpNode, option: AxisOption, role: str) -> bool:
    """Whether the option shards the dim that plays ``role`` in the op's rule."""
    return role in {dict(node.rule.roles).get(label) for label in option.labels}


def _sequence_lengths(graph: Graph) -> frozenset[int]:
    """Sizes of dim 1 of the inputs of shape (batch, size)."""
    shapes = [graph.values[value].shape for value in graph.inputs]
    return frozenset(shape[1] for shape in shapes if len(shape) == 2 and graph.batch.is_proportional(shape[0]))
