"""The blocks of a stage priced one by one, and the peak of its memory."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from autopar.core.plan import Plan, StagePlan
from autopar.judge.block_price import BlockPrice, IssuedCollective, price_block
from autopar.judge.context import BlockContext, JudgedBlock, ModelContext
from autopar.judge.judge_mesh import JudgeMesh
from autopar.judge.parameter_price import find_conflicting_axes
from autopar.judge.peak_memory import PeakMoment, find_peak
from autopar.judge.redistribution_path import PricedCollective
from autopar.judge.tied_parameter_price import tied_redistributions


def is_manual(plan: Plan) -> bool:
    """Whether the plan is a layout written by hand, which is Megatron-LM's program."""
    return plan.search.status == "fixed"


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedStage:
    """The blocks of a stage in order, and the peak of its backward."""

    block_prices: list[BlockPrice]
    peak: PeakMoment


class JudgedStagePricer:
    """Prices the stages of a plan; blocks of one program in the same situation are priced once."""

    def __init__(self, plan: Plan, context: ModelContext) -> None:
        self._plan, self._context = plan, context
        self._price_cache: dict[tuple[object, ...], BlockPrice] = {}

    def price_stage(self, stage: StagePlan, blocks: Sequence[JudgedBlock], mesh: JudgeMesh) -> JudgedStage:
        """All ``blocks`` of one stage; CheckError where their programs contradict themselves."""
        graph = self._context.graph
        conflicting_axes = find_conflicting_axes(graph, blocks)
        stored: set[int] = set()
        forward_gathers: dict[int, PricedCollective] = {}  # of parameters that no backward has gathered so far
        prices = []
        for position, block in enumerate(blocks):
            own = {value: own for own, value in block.actual_parameters.items()}
            later = {value for other in blocks[position + 1 :] for value in other.block.inputs}
            price = self._price_block(
                stage,
                block,
                mesh,
                stored_earlier=frozenset(own[value] for value in block.block.parameters if value in stored),
                conflicting_axes=frozenset((own[value], axis) for value, axis in conflicting_axes if value in own),
                outputs_read_later=frozenset(
                    output
                    for output, value in zip(block.first_of_kind.outputs, block.block.outputs, strict=True)
                    if value in later
                ),
            )
            stored.update(block.block.parameters)
            regathers = [
                forward_gathers.pop(value)
                for value in own
                if own[value] in price.read_in_backward and value in forward_gathers
            ]
            gathers = dict(price.gathered_in_forward_only)
            forward_gathers.update((value, gathers[own[value]]) for value in own if own[value] in gathers)
            prices.append(_with_parameter_collectives(price, regathers))
        peak = find_peak(
            graph, blocks, prices, mesh, self._plan.execution, accumulates_gradients=self._plan.microbatches > 1
        )
        if conflicting_axes:
            read = [price.read_in_backward for price in prices]
            tied = tied_redistributions(graph, blocks, read, conflicting_axes, mesh)
            prices = [_with_parameter_collectives(price, steps) for price, steps in zip(prices, tied, strict=True)]
        return JudgedStage(block_prices=prices, peak=peak)

    def _price_block(
        self,
        stage: StagePlan,
        block: JudgedBlock,
        mesh: JudgeMesh,
        *,
        stored_earlier: frozenset[int],
        conflicting_axes: frozenset[tuple[int, int]],
        outputs_read_later: frozenset[int],
    ) -> BlockPrice:
        """The price of a block from the first of its kind; the keywords as in ``BlockContext``."""
        plan, program = self._plan, block.program
        if program.recompute == "none" or (program.recompute == "selective" and self._context.selective is None):
            outputs_read_later = frozenset()  # at most attention is recomputed, which needs no output of the block
        # links depend on where in a node the stage begins, not on which node
        place = mesh.first_device % mesh.cluster.devices_per_node
        has_data_axis = len(stage.axes) > 1 and stage.axes[0].name == "dp"
        key = (program.id, mesh.sizes, has_data_axis, place, stored_earlier, conflicting_axes, outputs_read_later)
        if key not in self._price_cache:
            self._price_cache[key] = price_block(
                BlockContext(
                    model=self._context,
                    block=block.first_of_kind,
                    program=program,
                    mesh=mesh,
                    micro_batch=plan.micro_batch_size,
                    accumulates_gradients=plan.microbatches > 1,
                    has_data_axis=has_data_axis,
                    is_megatron=is_manual(plan),
                    stored_earlier=stored_earlier,
                    conflicting_axes=conflicting_axes,
                    outputs_read_later=outputs_read_later,
                )
            )
        return self._price_cache[key]


def _with_parameter_collectives(price: BlockPrice, collectives: Iterable[PricedCollective]) -> BlockPrice:
    """A price with further collectives on parameters in each micro-batch; its seconds stay as they are."""
    issued = tuple(
        IssuedCollective(collective=step, count=1, per="microbatch", of="parameters") for step in collectives
    )
    return replace(price, collectives=(*price.collectives, *issued))
