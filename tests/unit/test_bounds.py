"""Bounds of constant tensors over boxes. The oracle computes every tensor and looks at all elements of every box."""

import math
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from autopar.graph.bounds.boxes import Bounds, Span, Undecided
from autopar.graph.bounds.constant_tensors import ConstantTensors
from autopar.graph.bounds.constants import constant_nodes
from autopar.graph.ir import TracedBatch

SIZE = 23
LINE = 2 * SIZE  # elements that are computed: lines of a mask, and no square


def rows() -> Tensor:
    return torch.arange(SIZE)[:, None]


def columns() -> Tensor:
    return torch.arange(SIZE)[None, :]


def ones() -> Tensor:
    return torch.ones(SIZE, SIZE)


def zigzag() -> Tensor:
    return (torch.arange(SIZE) * 7) % SIZE


MADE: dict[str, Callable[[], Tensor]] = {
    "views": lambda: (rows() - 2 * columns()).T[3:, ::2].unsqueeze(1).expand(-1, 2, -1).permute(2, 0, 1),
    "split view": lambda: torch.ones(SIZE * SIZE).view(SIZE, SIZE).tril(2).view(1, SIZE, SIZE),
    "diagonal": lambda: (rows() * 3 + columns())[:, 2:].diagonal(),
    "unfolded": lambda: (rows() + columns()).unfold(1, 5, 3),
    "chunks": lambda: (rows() - columns()).chunk(3, 1)[1],
    "meshgrid": lambda: torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="xy")[0],
    "select": lambda: (rows() - columns())[4],
    "element": lambda: (rows() - columns())[4, 5] + columns() * rows(),
    "triangles": lambda: ones().tril(3) + 2 * ones().triu(-1),
    "eye": lambda: torch.eye(SIZE, SIZE + 2),
    "padded": lambda: nn.functional.pad(rows() - columns(), (1, 2, 3, 0), value=7),
    "flipped": lambda: (rows() * 2 - columns()).flip(0, 1),
    "repeated": lambda: (rows() - columns()).repeat(2, 1, 2),
    "each repeated": lambda: (rows() - columns()).repeat_interleave(3, dim=1),
    "joined": lambda: torch.cat((ones(), ones().tril(), -ones()), dim=-1),
    "stacked": lambda: torch.stack((ones(), ones().triu(), -ones()), dim=1),
    "sliced in": lambda: torch.slice_scatter(ones().tril(), 3 * ones()[:, :4], 1, 2, 6),
    "selected in": lambda: torch.select_scatter(ones().tril(), torch.arange(SIZE).float(), 0, -3),
    "indexed": lambda: (rows() - columns())[zigzag()],
    "indexed twice": lambda: (rows() - columns())[zigzag()[:, None], zigzag()[None] - SIZE],
    "indexed last": lambda: (rows() - columns()).expand(2, SIZE, SIZE)[:, :, zigzag()],
    "index select": lambda: torch.index_select(rows() - columns(), 1, zigzag()),
    "any": lambda: (columns() < rows()).any(-1, keepdim=True) & (columns() <= rows()),
    "all": lambda: (columns() <= rows()).all(0),
    "product": lambda: (rows() - 9) * (columns() - 14),
    "square": lambda: torch.square(rows() - columns()) - (rows() - columns()).abs(),
    "quotient": lambda: (rows() - columns()) // 4 + (rows() + 1) / (columns() + 1),
    "quotient by zero": lambda: (rows() - columns()).float() / (columns() - 5),
    "remainder": lambda: (rows() - columns()) % 5,
    "small integers": lambda: (rows() * columns()).to(torch.int8),
    "overflow": lambda: (rows() + columns()).to(torch.uint8) * torch.full((SIZE, SIZE), 20, dtype=torch.uint8),
    "equal": lambda: (rows() // 3 == columns() // 4) ^ (rows() != columns()),
    "truth": lambda: torch.logical_and(rows() - columns(), rows() - 3) | (rows() - columns()).bool(),
    "chosen": lambda: torch.where(columns() <= rows(), (rows() - columns()).float(), -math.inf),
    "filled": lambda: (rows() * columns()).float().masked_fill(columns() > rows(), -math.inf).bfloat16(),
    "no rule": lambda: torch.sin((rows() // 8).float() + 0 * columns()) + torch.log(ones().tril()),
    "not a number": lambda: (1 - ones().tril()) * -math.inf + (rows() * columns()),
    "half": lambda: (rows().half() * 300 + columns().half()) <= 2048,
    "four dims": lambda: (rows() - columns())[None, None].expand(2, 3, SIZE, SIZE) + torch.arange(3).view(3, 1, 1),
}  # fmt: skip


def random_tensor(seed: int) -> Tensor:
    """An expression of random integer and boolean ops over rows, columns and triangles."""
    choose = random.Random(seed)

    def number(depth: int) -> Tensor:
        if not depth:
            some = choose.randint(-3, 3)
            leaves = (
                rows,
                columns,
                lambda: ones().tril(some).long(),
                lambda: zigzag()[None],
                lambda: zigzag()[:, None],
            )
            return choose.choice(leaves)()
        one, other, some = number(depth - 1), number(depth - 1), choose.randint(1, 7)
        return choose.choice(
            [
                lambda: one + other, lambda: one - other, lambda: one * other, lambda: -one, lambda: one // some,
                lambda: one % some, lambda: one.abs(), lambda: torch.minimum(one, other), lambda: one.clamp(-some, some),
                lambda: torch.where(truth(depth - 1), one, other), lambda: one.expand(SIZE, SIZE).T,
                lambda: one.expand(SIZE, SIZE).flip(0), lambda: one.expand(SIZE, SIZE).triu(some), lambda: some - one,
            ]
        )()  # fmt: skip

    def truth(depth: int) -> Tensor:
        one, other, some = number(max(depth - 1, 0)), number(max(depth - 1, 0)), choose.randint(-5, 20)
        return choose.choice(
            [
                lambda: one < other, lambda: one >= other, lambda: one == other, lambda: one != some,
                lambda: (one > some) & (other <= some), lambda: ~(one < some) | (other == one), lambda: one.bool(),
                lambda: torch.logical_xor(one - some, other > some),
            ]
        )()  # fmt: skip

    return (number if seed % 2 else truth)(3).expand(SIZE, SIZE)


def tensors(functions: Sequence[Callable[[], Tensor]]) -> list[tuple[Callable[[tuple[Span, ...]], Bounds], Tensor]]:
    """For each function, bounds of what it makes, from its graph, and what it makes."""

    graph = make_fx(lambda: tuple(function() for function in functions), tracing_mode="fake", pre_dispatch=True)().graph
    batch = TracedBatch(traced_size=808, prime=101)
    found = []
    for node, function in zip(next(reversed(graph.nodes)).args[0], functions, strict=True):
        nodes = constant_nodes(node)
        assert nodes is not None
        constant = ConstantTensors(nodes, batch, LINE)
        found.append((lambda box, node=node, constant=constant: constant.bounds(node, box), function()))
    return found


def boxes(shape: torch.Size, choose: random.Random) -> list[tuple[slice, ...]]:
    """The full tensor, single elements, and others."""

    def span(size: int, longest: int) -> slice:
        first = choose.randrange(size)
        return slice(first, min(first + choose.randint(1, longest), size))

    lengths = (1, 1, 1, 2, 4, 8, SIZE)
    some = [tuple(span(size, longest) for size in shape) for longest in lengths for _ in range(12)]
    return [tuple(slice(0, size) for size in shape), *some]


def spans(slices: Sequence[tuple[slice, ...]]) -> tuple[Span, ...]:
    """The boxes of slices."""
    return tuple(
        Span(first=torch.tensor([one.start for one in dim]), last=torch.tensor([one.stop - 1 for one in dim]))
        for dim in zip(*slices, strict=True)
    )


def check(bounds: Callable[[tuple[Span, ...]], Bounds], tensor: Tensor, seed: int) -> None:
    slices = boxes(tensor.shape, random.Random(seed))
    found = bounds(spans(slices))
    assert found.low.dtype == found.high.dtype == tensor.dtype
    lows, highs = (end.expand(len(slices)) for end in (found.low, found.high))
    for at, low, high in zip(slices, lows, highs, strict=True):
        elements = tensor[at]
        if low.isnan() or high.isnan():
            continue  # nothing is said
        assert bool((low <= elements).all()), at
        assert bool((elements <= high).all()), at
        if elements.numel() == 1:
            assert low == high, at


def test_no_element_is_outside_the_bounds_of_its_box() -> None:
    for name, (bounds, tensor) in zip(MADE, tensors(list(MADE.values())), strict=True):
        try:
            check(bounds, tensor, 0)
        except Undecided as error:
            pytest.fail(f"{name}: {error}")


@pytest.mark.parametrize("seeds", [range(20), pytest.param(range(20, 1000), marks=pytest.mark.slow)])
def test_nor_outside_those_of_random_expressions(seeds: range) -> None:
    made = tensors([lambda seed=seed: random_tensor(seed) for seed in seeds])
    for seed, (bounds, tensor) in zip(seeds, made, strict=True):
        check(bounds, tensor, seed)


def test_boxes_are_looked_up_together_as_one_by_one() -> None:
    ((bounds, tensor),) = tensors([MADE["indexed twice"]])
    slices = boxes(tensor.shape, random.Random(0))
    together = bounds(spans(slices))
    for at, one in enumerate(slices):
        alone = bounds(spans([one]))
        assert (together.low[at], together.high[at]) == (alone.low, alone.high)


@pytest.mark.parametrize("make", [lambda: ones().cumsum(0), lambda: (rows() - columns()).flatten()])
def test_an_op_without_a_rule_is_undecided(make: Callable[[], Tensor]) -> None:
    ((bounds, tensor),) = tensors([make])
    with pytest.raises(Undecided):
        bounds(spans([tuple(slice(0, 2) for _ in tensor.shape)]))
