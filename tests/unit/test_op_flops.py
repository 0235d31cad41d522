"""FLOPs of convolutions and other products against loops that count every multiply-add: 2 FLOPs each."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.graph.ir import Graph, InputRef, Op, TracedBatch, Value
from autopar.graph.op_arguments import call_arguments, resolve_overload
from autopar.graph.op_profiles import profile_ops

torch.set_num_threads(1)
Shape = tuple[int, ...]


def flops(
    target: str, shapes: tuple[Shape, ...], literals: tuple[Any, ...], grads: tuple[bool, ...]
) -> tuple[int, int]:
    """FLOPs forward and backward of the op on inputs of these shapes, those with ``grads`` getting a gradient."""
    values = [_value(number, shape, grad) for number, (shape, grad) in enumerate(zip(shapes, grads, strict=True))]
    op = Op(
        id=0, name="op", target=target, inputs=tuple(range(len(values))), outputs=(len(values),), args=literals, kwargs=(),
        module_path="", source_location="",
    )  # fmt: skip
    overload = resolve_overload(target)
    with FakeTensorMode():
        args, kwargs = call_arguments(op, [torch.empty(shape) for shape in shapes], overload._schema)
        result = overload(*args, **kwargs)
    values.append(_value(len(values), tuple(result.shape), any(grads)))
    batch = TracedBatch(traced_size=101, prime=101)
    graph = Graph(values=tuple(values), ops=(op,), inputs=(0,), outputs=(len(values) - 1,), batch=batch, fingerprint="")
    profile = profile_ops(graph)[0]
    return profile.forward_flops, profile.backward_flops


def _value(number: int, shape: Shape, grad: bool) -> Value:
    return Value(id=number, name=f"v{number}", kind="activation", shape=shape, dtype="float32", requires_grad=grad)


def indices(*sizes: int) -> Iterator[tuple[int, ...]]:
    return product(*map(range, sizes))


def window_multiply_adds(x: Shape, weight: Shape, windows: Shape, groups: int, *, transposed: bool) -> int:
    """Multiply-adds of a convolution, one at a time: a window per position of ``windows``, each reading every tap of the
    kernel (in the padding as well) from the input channels of its own group."""
    in_channels = x[1]
    out_channels = weight[1] * groups if transposed else weight[0]
    count = 0
    for _ in indices(x[0], *windows):
        for c_in, c_out in indices(in_channels, out_channels):
            if c_in * groups // in_channels == c_out * groups // out_channels:
                for _ in indices(*weight[2:]):
                    count += 1
    return count


# Name: spatial size, output channels of 4 input channels, kernel, groups, stride, padding, dilation.
CONVOLUTIONS = {
    "1d": ((7,), 6, (3,), 1, 1, 0, 1),
    "1d_grouped": ((7,), 6, (3,), 2, 2, 1, 1),
    "1d_depthwise": ((7,), 4, (3,), 4, 1, 1, 2),
    "2d": ((5, 4), 6, (3, 2), 1, 1, 1, 1),
    "2d_dilated": ((7, 6), 6, (3, 2), 1, 1, 1, 2),
    "2d_grouped": ((5, 4), 6, (3, 3), 2, 2, 1, 1),
    "2d_depthwise": ((5, 4), 4, (3, 3), 4, 1, 1, 1),
    "2d_depthwise_double": ((5, 4), 8, (3, 3), 4, 2, 1, 1),
    "3d": ((4, 3, 3), 2, (2, 2, 2), 1, 1, 0, 1),
    "3d_grouped": ((4, 3, 3), 4, (2, 2, 2), 2, 2, 1, 1),
    "3d_depthwise": ((4, 3, 3), 4, (2, 2, 2), 4, 1, 0, 1),
}


@pytest.mark.parametrize("grads", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_each_pass_of_a_convolution_has_the_multiply_adds_of_its_windows(
    name: str, transposed: bool, grads: tuple[bool, bool]
) -> None:
    space, out_channels, kernel, groups, stride, padding, dilation = CONVOLUTIONS[name]
    rank = len(space)
    x = (2, 4, *space)
    weight = (4, out_channels // groups, *kernel) if transposed else (out_channels, 4 // groups, *kernel)
    geometry = ((stride,) * rank, (padding,) * rank)
    if transposed:
        windows = space
        target = f"aten.conv_transpose{rank}d." + ("default" if rank == 1 else "input")
        literals: tuple[Any, ...] = (*geometry, (0,) * rank, groups, (dilation,) * rank)
    else:
        windows = tuple(
            (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
            for size, taps in zip(space, kernel, strict=True)
        )
        target, literals = f"aten.conv{rank}d.default", (*geometry, (dilation,) * rank, groups)
    expected = 2 * window_multiply_adds(x, weight, windows, groups, transposed=transposed)
    forward, backward = flops(target, (x, weight), (InputRef(0), InputRef(1), None, *literals), grads)
    assert forward == expected
    assert backward == expected * sum(grads)


# Name: target, shapes, literals after the inputs, sizes over which the loop runs (one multiply-add each).
PRODUCTS: dict[str, tuple[str, tuple[Shape, ...], tuple[Any, ...], Shape]] = {
    "linear": ("aten.linear.default", ((2, 3, 4), (5, 4)), (), (2, 3, 4, 5)),
    "matmul_broadcast": ("aten.matmul.default", ((2, 1, 3, 4), (6, 4, 5)), (), (2, 6, 3, 4, 5)),
    "bmm": ("aten.bmm.default", ((2, 3, 4), (2, 4, 5)), (), (2, 3, 4, 5)),
    "inner": ("aten.inner.default", ((3, 4), (5, 4)), (), (3, 4, 5)),
    "tensordot": ("aten.tensordot.default", ((2, 3, 4), (4, 3, 5)), ((1, 2), (1, 0)), (2, 3, 4, 5)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_each_gradient_of_a_product_has_the_multiply_adds_of_its_forward(name: str) -> None:
    target, shapes, literals, loops = PRODUCTS[name]
    expected = 2 * sum(1 for _ in indices(*loops))
    inputs = tuple(InputRef(number) for number in range(len(shapes)))
    forward, backward = flops(target, shapes, (*inputs, *literals), (True,) * len(shapes))
    assert (forward, backward) == (expected, 2 * expected)


def test_what_is_added_to_a_sum_of_batched_products_costs_no_multiply_adds() -> None:
    expected = 2 * sum(1 for _ in indices(2, 3, 4, 5))
    inputs = (InputRef(0), InputRef(1), InputRef(2))
    assert flops("aten.addbmm.default", ((3, 5), (2, 3, 4), (2, 4, 5)), inputs, (True,) * 3) == (expected, 2 * expected)


def test_a_bilinear_layer_sums_over_both_inputs_and_each_of_three_gradients_likewise() -> None:
    expected = 2 * sum(1 for _ in indices(2, 5, 3, 4))
    inputs = (InputRef(0), InputRef(1), InputRef(2), None)
    shapes = ((2, 3), (2, 4), (5, 3, 4))
    assert flops("aten.bilinear.default", shapes, inputs, (True,) * 3) == (expected, 3 * expected)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3)])
def test_attention_has_the_multiply_adds_of_scores_and_weighted_sums_whatever_dims_lead(lead: Shape) -> None:
    queries, keys, width, value_width = 4, 5, 6, 2
    scores = sum(1 for _ in indices(*lead, queries, keys, width))
    sums = sum(1 for _ in indices(*lead, queries, keys, value_width))
    shapes = ((*lead, queries, width), (*lead, keys, width), (*lead, keys, value_width))
    inputs = (InputRef(0), InputRef(1), InputRef(2))
    forward, backward = flops("aten.scaled_dot_product_attention.default", shapes, inputs, (True,) * 3)
    assert forward == 2 * (scores + sums)
    assert backward == 2 * (3 * scores + 2 * sums)


def test_attention_to_keys_that_all_samples_share_runs_for_every_sample() -> None:
    expected = 2 * 2 * sum(1 for _ in indices(2, 3, 4, 5, 6))
    inputs = (InputRef(0), InputRef(1), InputRef(2))
    for query, key in (((2, 3, 4, 6), (1, 1, 5, 6)), ((1, 1, 4, 6), (2, 3, 5, 6))):
        target = "aten.scaled_dot_product_attention.default"
        assert flops(target, (query, key, key), inputs, (True,) * 3)[0] == expected
