"""What the judge prices: a model under one ``Execution``, the blocks of a stage, and one block on the mesh of its stage."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from autopar.cluster.software import Software, load_software
from autopar.core.errors import CheckError
from autopar.core.placement import Placements
from autopar.core.plan import BlockProgram, Execution, OpPlan, ParameterPlan, Plan, StagePlan
from autopar.cost.fusion import FusionSavings, fusion_savings, with_fused_loss
from autopar.graph.ir import Block, Graph, GraphProfile, Op
from autopar.judge.judge_mesh import JudgeMesh
from autopar.judge.selective_recompute import SelectivePolicy, torchtitan_policy


def shape_at(graph: Graph, shape: Sequence[int], micro_batch: int) -> tuple[int, ...]:
    """A traced shape at ``micro_batch`` samples."""
    return tuple(graph.batch.scale(size, micro_batch) for size in shape)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelContext:
    """What the judge reads from the model under one ``Execution``.

    ``profile``: op profiles, with the fused cross entropy of the training software (Megatron-LM, ...); ``fusion_savings``: op -> memory traffic that its
    fusion saves; ``parameter_free``: values that depend on no parameter, which every rank computes by itself;
    ``saved_owners``: values whose memory some op saves for its backward; ``overwritten_owners``: those of them whose memory
    a gradient is written into; ``selective``: what torchtitan's selective recomputation, which decides op by op, saves; None
    under another recomputation;
    ``first_of_kind``: the first block of each kind."""

    graph: Graph
    profile: GraphProfile
    execution: Execution
    parameter_free: frozenset[int]
    saved_owners: frozenset[int]
    overwritten_owners: frozenset[int]
    fusion_savings: dict[int, FusionSavings]
    selective: SelectivePolicy | None
    first_of_kind: dict[int, Block]

    @staticmethod
    def of(execution: Execution, graph: Graph, blocks: tuple[Block, ...], profile: GraphProfile) -> "ModelContext":
        """``profile`` is that of ``graph``, before a fused cross entropy of the training software is added."""
        fuses = load_software(execution.fusion).fuses
        if execution.loss != "torch":
            profile = with_fused_loss(graph, profile, fuses)
        by_op = execution.selective == "products"
        kinds: dict[int, Block] = {}
        for block in blocks:
            kinds.setdefault(block.kind, block)
        saved_owners, overwritten_owners = _saved_anywhere(graph, profile)
        return ModelContext(
            graph=graph,
            profile=profile,
            execution=execution,
            parameter_free=graph.parameter_free(),
            saved_owners=saved_owners,
            overwritten_owners=overwritten_owners,
            fusion_savings=fusion_savings(graph, profile, fuses),
            selective=torchtitan_policy(graph, profile, blocks, execution.attn == "flash") if by_op else None,
            first_of_kind=kinds,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JudgedBlock:
    """A block of a stage, the `BlockProgram` (placements) it follows, and the first block of its kind, whose values the
    program names."""

    block: Block
    program: BlockProgram
    first_of_kind: Block

    @property
    def actual_parameters(self) -> dict[int, int]:
        """Parameter of ``first_of_kind`` -> that of the block in its place."""
        return dict(zip(self.first_of_kind.parameters, self.block.parameters, strict=True))

    def parameter_plans(self, graph: Graph) -> dict[int, ParameterPlan]:
        """By the block's own parameters and buffers; CheckError where the program names one that the block lacks."""
        actual = self.actual_parameters
        plans = parameter_plans(graph, self.first_of_kind, self.program)
        return {actual[value]: planned for value, planned in plans.items()}


def judged_blocks(
    plan: Plan, stage: StagePlan, blocks: Sequence[Block], first_of_kind: Mapping[int, Block]
) -> tuple[JudgedBlock, ...]:
    """The blocks of a stage in order; CheckError where a program is of another kind than its block."""
    found = []
    for ref in stage.blocks:
        block, program = blocks[ref.index], plan.program(ref.program)
        if program.kind != block.kind:
            raise CheckError(
                f"block {block.name} is of kind {block.kind}, its program {ref.program!r} of {program.kind}"
            )
        found.append(JudgedBlock(block=block, program=program, first_of_kind=first_of_kind[block.kind]))
    return tuple(found)


def parameter_plans(graph: Graph, block: Block, program: BlockProgram) -> dict[int, ParameterPlan]:
    """How a program places the parameters and buffers of ``block``, the first of its kind. CheckError where the program
    names one that the block lacks."""
    by_name = {
        name: value
        for value in block.parameters
        for name in graph.values[value].qualified_names or (graph.values[value].name,)
    }
    for planned in program.parameters:
        if planned.name not in by_name:
            raise CheckError(f"program {program.id!r}: block {block.name} has no parameter {planned.name}")
    return {by_name[planned.name]: planned for planned in program.parameters}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockContext:
    """A block (the first of its kind) under its program on the mesh of its stage, at ``micro_batch`` samples.

    ``accumulates_gradients``: gradients of several micro-batches are summed. ``has_data_axis``: the first of several axes
    is the data axis. ``is_megatron``: the plan is a manual layout, run as Megatron-LM does: ranks that share a sequence take equal parts of
    its attention under a causal mask. ``stored_earlier``: parameters that an earlier block of the stage stores.
    ``conflicting_axes``: (parameter, axis) on which another block of the stage places the parameter, or its gradient,
    differently. ``outputs_read_later``: outputs that later blocks of the stage read and save."""

    model: ModelContext
    block: Block
    program: BlockProgram
    mesh: JudgeMesh
    micro_batch: int
    accumulates_gradients: bool
    has_data_axis: bool
    is_megatron: bool
    stored_earlier: frozenset[int]
    conflicting_axes: frozenset[tuple[int, int]]
    outputs_read_later: frozenset[int]

    @property
    def software(self) -> Software:
        """The table of the training software that runs the plan."""
        return load_software(self.model.execution.fusion)

    @property
    def selective(self) -> SelectivePolicy | None:
        """What the block saves under torchtitan's selective recomputation (op by op); None under any other."""
        return self.model.selective if self.program.recompute == "selective" else None

    def distributed_ops(self) -> Iterator[tuple[Op, OpPlan]]:
        """The ops of the block that are not computed by every rank alike, each with its placements."""
        graph, free = self.model.graph, self.model.parameter_free
        for op, planned in zip(graph.ops[self.block.first_op : self.block.end_op], self.program.ops, strict=True):
            if not free.issuperset((*op.inputs, *op.outputs)):
                yield op, planned

    def full_shape(self, value: int) -> tuple[int, ...]:
        """A tensor's unsharded shape at ``micro_batch`` samples; that of a parameter or buffer does not grow with them."""
        tensor = self.model.graph.values[value]
        if tensor.kind in ("parameter", "buffer"):
            return tensor.shape
        return shape_at(self.model.graph, tensor.shape, self.micro_batch)

    def local_bytes(self, value: int, placements: Placements) -> int:
        """Bytes of a tensor on the rank that stores most of it."""
        return self.mesh.local_bytes(self.full_shape(value), self.model.graph.values[value].itemsize, placements)

    def materialises_scores(self, op: Op) -> bool:
        """Whether an op is an attention that materialises its scores."""
        return op.is_attention and self.model.execution.attn == "math"


def _saved_anywhere(graph: Graph, profile: GraphProfile) -> tuple[frozenset[int], frozenset[int]]:
    """Values whose memory some op saves for its backward, and those of them that a gradient is written into."""
    saved: set[int] = set()
    overwritten: set[int] = set()
    for op in graph.ops:
        op_profile, tensors = profile.ops[op.id], (*op.inputs, *op.outputs)
        outputs = (len(op.inputs) + position for position in op_profile.saved_outputs)
        for position in (*op_profile.saved_inputs, *outputs):
            owner = profile.storage_owner[tensors[position]]
            if graph.values[owner].kind not in ("parameter", "buffer"):
                saved.add(owner)
        overwritten.update(profile.storage_owner[op.inputs[position]] for position in op_profile.overwritten_inputs)
    return frozenset(saved), frozenset(overwritten)
