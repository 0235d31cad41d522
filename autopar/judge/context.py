"""What the judge prices: a model under one program (`Ground`), and one block of a stage in it (`Case`)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from autopar.cluster.software import Software, load_software
from autopar.core.placement import Placements
from autopar.core.plan import BlockProgram, Execution, OpPlan
from autopar.cost.fusion import FusionSavings, fusion_savings, with_fused_loss
from autopar.graph.ir import Block, Graph, GraphProfile, Op
from autopar.judge.judge_mesh import JudgeMesh
from autopar.judge.selective_recompute import SelectivePolicy, torchtitan_policy


def shape_at(graph: Graph, shape: Sequence[int], micro_batch: int) -> tuple[int, ...]:
    """A traced shape at ``micro_batch`` samples."""
    return tuple(graph.batch.scale(size, micro_batch) for size in shape)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelContext:
    """What judging takes from the model alone, under one ``Execution``: its profile with what the program fuses, and by op
    the traffic which that saves (``fused``); values ``free`` that are at hand anywhere; memories that some op ``keeps`` for
    its backward, and those of them that a gradient is written into (``reused``); what selective recomputation by
    operation keeps; and one block of each kind."""

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
        """``profile`` is that of ``graph``."""
        fuses = load_software(execution.fusion).fuses
        if execution.loss != "torch":
            profile = with_fused_loss(graph, profile, fuses)
        by_op = execution.selective == "products"
        kinds: dict[int, Block] = {}
        for block in blocks:
            kinds.setdefault(block.kind, block)
        keeps, reused = _saved_anywhere(graph, profile)
        return ModelContext(
            graph=graph,
            profile=profile,
            execution=execution,
            parameter_free=graph.parameter_free(),
            saved_owners=keeps,
            overwritten_owners=reused,
            fusion_savings=fusion_savings(graph, profile, fuses),
            selective=torchtitan_policy(graph, profile, blocks, execution.attn == "flash") if by_op else None,
            first_of_kind=kinds,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockContext:
    """A block (the first of its kind) under its program on the mesh of its stage, at ``micro_batch`` samples. Parameters
    ``stored`` are held by an earlier block of the stage; ``disagreed`` (parameter, axis) are used there otherwise by
    another; outputs ``read_on`` are read, and kept, by later ones. ``accumulates``: gradients of several
    micro-batches are summed. ``has_data_axis``: the first of several axes is the data axis. ``as_megatron``: the program
    is Megatron's, and ranks that share a sequence share its attention evenly under a causal mask."""

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
        """What runs the program."""
        return load_software(self.model.execution.fusion)

    @property
    def selective(self) -> SelectivePolicy | None:
        """What the block's recomputation keeps by operation; None where it does not go by operation."""
        return self.model.selective if self.program.recompute == "selective" else None

    def distributed_ops(self) -> Iterator[tuple[Op, OpPlan]]:
        """The ops of the block that some rank computes and others do not, each with its placements."""
        graph, free = self.model.graph, self.model.parameter_free
        for op, planned in zip(graph.ops[self.block.first_op : self.block.end_op], self.program.ops, strict=True):
            if not free.issuperset((*op.inputs, *op.outputs)):
                yield op, planned

    def full_shape(self, value: int) -> tuple[int, ...]:
        """A tensor's whole shape; that of a parameter or buffer does not grow with the batch."""
        tensor = self.model.graph.values[value]
        if tensor.kind in ("parameter", "buffer"):
            return tensor.shape
        return shape_at(self.model.graph, tensor.shape, self.micro_batch)

    def local_bytes(self, value: int, placements: Placements) -> int:
        """A tensor on the rank that stores most of it."""
        return self.mesh.local_bytes(self.full_shape(value), self.model.graph.values[value].itemsize, placements)

    def materialises_scores(self, op: Op) -> bool:
        """Whether an op is an attention that writes its scores out."""
        return op.is_attention and self.model.execution.attn == "math"


def _saved_anywhere(graph: Graph, profile: GraphProfile) -> tuple[frozenset[int], frozenset[int]]:
    """Values whose memory some op keeps for its backward, and those of them whose gradient is written into it."""
    found: set[int] = set()
    reused: set[int] = set()
    for op in graph.ops:
        ran, tensors = profile.ops[op.id], (*op.inputs, *op.outputs)
        for at in (*ran.saved_inputs, *(len(op.inputs) + i for i in ran.saved_outputs)):
            owner = profile.storage_owner[tensors[at]]
            if graph.values[owner].kind not in ("parameter", "buffer"):
                found.add(owner)
        reused.update(profile.storage_owner[op.inputs[at]] for at in ran.overwritten_inputs)
    return frozenset(found), frozenset(reused)
