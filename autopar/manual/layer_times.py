"""Times of single blocks in a priced layout, and measured times in their place: what benchmarks of layers compare."""

from collections.abc import Iterator
from dataclasses import replace

from autopar.graph.ir import Block
from autopar.inter.frontier_cache import UNPRICED
from autopar.intra import block_totals as tt
from autopar.manual.priced_layout import PricedLayout, PricedStage


def block_times(priced: PricedLayout, name: str) -> tuple[float, float]:
    """Forward and backward seconds of one micro-batch in the block called ``name``; KeyError where there is none."""
    for stage in priced.stages:
        for block, forward_s, backward_s in _times_of_blocks(stage):
            if block.name == name:
                return forward_s, backward_s
    raise KeyError(name)


def layer_times(priced: PricedLayout) -> tuple[float, float]:
    """Forward and backward seconds of one micro-batch in one layer (a block of the most frequent kind): the form of
    ``measured_layer_s``."""
    blocks = priced.stages[0].stage_costs.pricer.blocks
    kind = _layer_kind(blocks)
    return block_times(priced, next(block.name for block in blocks if block.kind == kind))


def with_measured_layers(
    stages: tuple[PricedStage, ...], measured_layer_s: tuple[float, float]
) -> tuple[PricedStage, ...]:
    """The stages with every layer's forward and backward seconds replaced by the measured ones."""
    layer = _layer_kind(stages[0].stage_costs.pricer.blocks)
    replaced = []
    for stage in stages:
        forward_change_s = backward_change_s = 0.0
        for block, forward_s, backward_s in _times_of_blocks(stage):
            if block.kind == layer:
                forward_change_s += measured_layer_s[0] - forward_s
                backward_change_s += measured_layer_s[1] - backward_s
        price = replace(
            stage.price,
            forward_s=stage.price.forward_s + forward_change_s,
            backward_s=stage.price.backward_s + backward_change_s,
        )
        replaced.append(replace(stage, price=price))
    return tuple(replaced)


def _times_of_blocks(stage: PricedStage) -> Iterator[tuple[Block, float, float]]:
    """Every block of a stage in order, with its forward and backward seconds per micro-batch."""
    costs, choice = stage.stage_costs, stage.price.choice
    first, end, _ = stage.span
    for block, variant in zip(costs.pricer.blocks[first:end], costs.frontiers.variants_of(first, end), strict=True):
        totals = costs.frontiers.frontier(variant, choice.mesh, UNPRICED).totals[0, choice.boundary]
        yield block, float(totals[tt.FORWARD]), float(totals[tt.BACKWARD])


def _layer_kind(blocks: tuple[Block, ...]) -> int:
    """The most frequent kind of block."""
    kinds = [block.kind for block in blocks]
    return max(kinds, key=kinds.count)
