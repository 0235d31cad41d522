"""Prefetches ZeRO-3 parameters: starts their all-gathers one block ahead of the block that reads them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from torch import fx

from autopar.runtime.lower.fx_nodes import (
    WAIT,
    ZERO3_GATHER,
    ancestors_until,
    block_and_recompute,
    starts_collective,
)

Item = TypeVar("Item")


def prefetch_zero3_gathers(
    order: Sequence[fx.Node | Item], inputs: Sequence[fx.Node], *, is_backward: bool
) -> list[fx.Node | Item]:
    """``order`` with the gathers of each block's parameters started where the block before it first waits for its own; those
    of the first block at that block's own first wait.

    ``order`` has the nodes of a pass and whatever else runs between them, ``inputs`` are the nodes that the pass is given;
    ``is_backward``: it runs the last block first."""
    positions = {item: at for at, item in enumerate(order) if isinstance(item, fx.Node)}
    starts_of_block, first_wait = _zero3_gathers(positions, len(order), is_backward=is_backward)
    moved: set[fx.Node] = set()
    inserted: dict[int, list[fx.Node]] = {}
    blocks = sorted(starts_of_block, key=lambda block: first_wait[block])
    for before, block in zip([*blocks[:1], *blocks], blocks, strict=False):
        target = first_wait[before]
        for start in starts_of_block[block]:
            preparation = ancestors_until(
                [start], [*inputs, *moved], lambda node: block_and_recompute(node)[0] == ZERO3_GATHER
            )
            preparation = {node for node in preparation if positions[node] >= target}  # others may read earlier ones
            outside = _outside_inputs(preparation) - moved
            if any(positions[node] >= target for node in outside if node in positions):
                continue
            inserted.setdefault(target, []).extend(sorted(preparation, key=positions.__getitem__))
            moved |= preparation
    new_order: list[fx.Node | Item] = []
    for at, item in enumerate(order):
        new_order += inserted.get(at, [])
        if not (isinstance(item, fx.Node) and item in moved):
            new_order.append(item)
    return new_order


def _zero3_gathers(
    positions: Mapping[fx.Node, int], end: int, *, is_backward: bool
) -> tuple[dict[int, list[fx.Node]], dict[int, int]]:
    """Block -> the nodes that start the gathers of its ZeRO-3 parameters, and block -> the position of its first wait for
    them (``end`` where there is none). ``positions`` are those of a pass's nodes, in order. A parameter that several blocks
    read counts for the block that runs first."""
    starts_of_block: dict[int, list[fx.Node]] = {}
    first_wait: dict[int, int] = {}
    for node in positions:
        if starts_collective(node) and block_and_recompute(node)[0] == ZERO3_GATHER:
            readers = _reading_blocks(node)
            block = (max(readers) if is_backward else min(readers)) if readers else ZERO3_GATHER
            starts_of_block.setdefault(block, []).append(node)
            waits = [positions[user] for user in node.users if user in positions]
            first_wait[block] = min([*waits, first_wait.get(block, end)])
    return starts_of_block, first_wait


def _outside_inputs(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The inputs of a set of nodes that are not in it."""
    inside = set(nodes)
    return {source for node in inside for source in node.all_input_nodes} - inside


def _reading_blocks(start: fx.Node) -> set[int]:
    """The blocks whose ops read the result of the gather started by ``start``."""
    blocks, stack, seen = set(), [start], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        block = block_and_recompute(node)[0]
        if block == ZERO3_GATHER or node.target is WAIT:
            stack.extend(node.users)
        elif block >= 0:
            blocks.add(block)
    return blocks
