"""The user's own model in one process: the reference that a plan's numbers are compared with. It shares nothing with
the runtime but the definition of random numbers.

In fp64 a missing addend is not lost in rounding: ``Float64Mode`` replaces every floating dtype that the model's code
names. ``IndexedRandomMode`` gives the model's random calls the numbers that the graph's random ops draw.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode  # private; tried on torch 2.13.0

from autopar.core.errors import CheckError
from autopar.graph.ir import Graph, Op
from autopar.graph.random_ops import dropout_probability, is_random
from autopar.graph.torch_export import scalar_loss
from autopar.runtime.lower.randomness import dropout_mask, micro_batch_key, normal, uniform
from autopar.workload.workload import Workload

_NARROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DTYPE_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)
_GROUPED_MM = (torch._grouped_mm, F.grouped_mm)


def _grouped_mm(
    rows: Tensor, weights: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    """torch's grouped_mm in fp64, which torch does not have: (t, k) rows times (e, k, n) weights, one weight per group
    of rows, groups ending at the rows ``offs`` (e,). Rows after the last group give zeros."""
    if offs is None or rows.dim() != 2 or weights.dim() != 3 or bias is not None:
        raise CheckError("verify supports grouped_mm only for (rows, k) x (experts, k, n) with offs and without bias")
    starts = torch.cat((offs.new_zeros(1), offs[:-1])).tolist()
    parts = [rows[start:end] @ weight for start, end, weight in zip(starts, offs.tolist(), weights, strict=True)]
    return torch.cat([*parts, rows.new_zeros(len(rows) - int(offs[-1]), weights.shape[-1])])


class Float64Mode(TorchFunctionMode):
    """While entered, torch functions that are given a floating dtype take fp64 instead."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DTYPE_CASTS:
            return args[0].double()
        if func in _GROUPED_MM:
            return _grouped_mm(*args, **(kwargs or {}))
        positional = [torch.float64 if each in _NARROW_DTYPES else each for each in args]
        named = {name: torch.float64 if each in _NARROW_DTYPES else each for name, each in (kwargs or {}).items()}
        return func(*positional, **named)


class IndexedRandomMode(TorchDispatchMode):
    """While entered, the k-th random call draws the numbers that ``ops[k]`` draws from ``key`` under any plan.

    ``num_drawn`` counts the calls; CheckError where there are more than ops."""

    def __init__(self, ops: Sequence[Op], key: Tensor) -> None:
        super().__init__()
        self.ops, self.key, self.num_drawn = tuple(ops), key, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name not in _RANDOM_CALLS:
            return func(*args, **(kwargs or {}))
        self.num_drawn += 1
        if self.num_drawn > len(self.ops):
            raise CheckError(f"the model called {func}, but its graph has only {len(self.ops)} random ops")
        op = self.ops[self.num_drawn - 1]
        sizes = tuple(args[0].shape if isinstance(args[0], Tensor) else args[0])
        indices = [torch.arange(size) for size in sizes]
        if name == "bernoulli_":
            return args[0].copy_(dropout_mask(indices, sizes, dropout_probability(op), self.key, op.id))
        if name in ("randn", "randn_like"):
            drawn = normal(indices, sizes, self.key, op.id)
        else:
            drawn = uniform(indices, sizes, self.key, op.id)
        if name == "bernoulli":
            return (drawn < args[0]).to(args[0].dtype)
        return drawn.to((kwargs or {}).get("dtype") or (args[0].dtype if isinstance(args[0], Tensor) else drawn.dtype))


_RANDOM_CALLS = frozenset(
    ("bernoulli_", "bernoulli", "rand", "rand_like", "randn", "randn_like")
)  # dropouts: bernoulli_


def build_real_model(workload: Workload, seed: int) -> nn.Module:
    """The model on the CPU, in fp64 and training mode, initialised by the model file's ``init_weights``, else by its
    own constructors."""
    torch.manual_seed(seed)
    model = workload.build(device="cpu")
    if workload.init_weights is not None:
        with torch.no_grad():
            workload.initialise(model)
    return model.double().train()


def accumulate_gradients(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    workload: Workload,
    graph: Graph,
    num_microbatches: int,
    seed: int,
    step: int,
) -> Tensor:
    """Run the micro-batches of a global batch one after the other; gradients of their mean loss, which is returned, are
    added to ``.grad``. Random numbers are those that ``graph`` draws in step ``step`` (from 0) of a training with
    ``seed``; CheckError where the model calls random functions as often as the graph does not."""
    random = [op for op in graph.ops if is_random(op)]
    total = torch.zeros((), dtype=torch.float64)
    size = max(len(tensor) for tensor in batch.values()) // num_microbatches
    for number in range(num_microbatches):
        inputs = {name: tensor[number * size : (number + 1) * size] for name, tensor in batch.items()}
        with Float64Mode(), IndexedRandomMode(random, torch.tensor(micro_batch_key(seed, step, number))) as draws:
            loss = scalar_loss(model(**inputs), workload.loss_fn, inputs) / num_microbatches
        if draws.num_drawn != len(random):
            raise CheckError(
                f"the model called random functions {draws.num_drawn} times, its graph has {len(random)} random ops"
            )
        loss.backward()
        total += loss.detach()
    return total


def random_batch(workload: Workload, graph: Graph, size: int, seed: int) -> dict[str, Tensor]:
    """A global batch of ``size`` samples: the model file's ``random_inputs``; else floats from N(0, 1), and integers
    below the smallest size that they index. Floats are fp64."""
    inputs = workload.real_inputs(size, seed)
    if inputs is None:
        generator = torch.Generator().manual_seed(seed)
        inputs = {}
        bounds = dict(zip((graph.values[value].name for value in graph.inputs), _index_bounds(graph), strict=True))
        for name, meta in workload.inputs(size).items():
            if meta.is_floating_point():
                inputs[name] = torch.randn(meta.shape, generator=generator)
            else:
                high = 2 if meta.dtype == torch.bool else bounds.get(name, 2)
                inputs[name] = torch.randint(high, meta.shape, generator=generator).to(meta.dtype)
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


def _index_bounds(graph: Graph) -> list[int]:
    """Per input, the smallest size of a dim that it, or a value of the same elements, indexes; 2 where it indexes
    nothing."""
    bounds = []
    for graph_input in graph.inputs:
        same_elements, sizes = {graph_input}, []
        for op in graph.ops:
            name = op.packet
            if same_elements.isdisjoint(op.inputs):
                continue
            if name == "embedding" and op.inputs[1] in same_elements:
                sizes.append(graph.values[op.inputs[0]].shape[0])
            elif name in ("cross_entropy_loss", "nll_loss") and op.inputs[1] in same_elements:
                sizes.append(graph.values[op.inputs[0]].shape[1])
            elif name in ("gather", "index_select") and op.inputs[-1] in same_elements:
                sizes.append(graph.values[op.inputs[0]].shape[op.args[1]])
            elif name in _INDEX_PRESERVING:
                same_elements.update(op.outputs)
        bounds.append(min(sizes, default=2))
    return bounds


_INDEX_PRESERVING = frozenset(
    ("view", "reshape", "flatten", "transpose", "permute", "slice", "to", "clone", "contiguous", "unsqueeze", "squeeze",
     "select", "expand", "_to_copy", "constant_pad_nd", "pad", "cat")
)  # fmt: skip
