"""The user's own model in one process: what a plan's numbers are held against. It shares nothing with the runtime.

In fp64 rounding does not hide a wrong term: ``Widened`` turns every floating dtype that the model's code names into it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autopar.graph.export import scalar_loss
from autopar.graph.ir import Graph
from autopar.workload.workload import Workload

_NARROW = (torch.float32, torch.bfloat16, torch.float16)
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


class Widened(TorchFunctionMode):
    """Calls that name a floating dtype take fp64 instead."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CASTS:
            return args[0].double()
        wide = [torch.float64 if each in _NARROW else each for each in args]
        named = {name: torch.float64 if each in _NARROW else each for name, each in (kwargs or {}).items()}
        return func(*wide, **named)


def real_model(workload: Workload, seed: int) -> nn.Module:
    """The model on the CPU in fp64 and training mode, initialised by ``init_weights``, else by its own constructors."""
    torch.manual_seed(seed)
    model = workload.build(device="cpu")
    if workload.init_weights is not None:
        with torch.no_grad():
            workload.init_weights(model)
    return model.double().train()


def gradients(model: nn.Module, workload: Workload, batch: Mapping[str, Any], microbatches: int) -> Tensor:
    """The mean loss of the micro-batches, one after the other; gradients are added to ``.grad``."""
    total = torch.zeros((), dtype=torch.float64)
    size = max(len(tensor) for tensor in batch.values()) // microbatches
    for at in range(microbatches):
        inputs = {name: tensor[at * size : (at + 1) * size] for name, tensor in batch.items()}
        with Widened():
            loss = scalar_loss(model(**inputs), workload.loss_fn, inputs) / microbatches
        loss.backward()
        total += loss.detach()
    return total


def random_batch(workload: Workload, graph: Graph, size: int, seed: int) -> dict[str, Tensor]:
    """``random_inputs`` of the model file; else integers below the smallest size they index, floats N(0, 1)."""
    given = workload.real_inputs(size, seed)
    if given is None:
        generator = torch.Generator().manual_seed(seed)
        given = {}
        bounds = dict(zip((graph.values[value].name for value in graph.inputs), _bounds(graph), strict=True))
        for name, meta in workload.inputs(size).items():
            if meta.is_floating_point():
                given[name] = torch.randn(meta.shape, generator=generator)
            else:
                high = 2 if meta.dtype == torch.bool else bounds.get(name, 2)
                given[name] = torch.randint(high, meta.shape, generator=generator).to(meta.dtype)
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in given.items()}


def _bounds(graph: Graph) -> list[int]:
    """Per input, the smallest size of a dim that it, or a view of it, indexes; 2 where it indexes nothing."""
    bounds = []
    for start in graph.inputs:
        alike, found = {start}, []
        for op in graph.ops:
            name = op.target.split(".")[1]
            if alike.isdisjoint(op.inputs):
                continue
            if name == "embedding" and op.inputs[1] in alike:
                found.append(graph.values[op.inputs[0]].shape[0])
            elif name in ("cross_entropy_loss", "nll_loss") and op.inputs[1] in alike:
                found.append(graph.values[op.inputs[0]].shape[1])
            elif name in ("gather", "index_select") and op.inputs[-1] in alike:
                found.append(graph.values[op.inputs[0]].shape[op.args[1]])
            elif name in _VIEWS:
                alike.update(op.outputs)
        bounds.append(min(found, default=2))
    return bounds


_VIEWS = frozenset(
    ("view", "reshape", "flatten", "transpose", "permute", "slice", "to", "clone", "contiguous", "unsqueeze", "squeeze",
     "select", "expand", "_to_copy", "constant_pad_nd", "pad", "cat")
)  # fmt: skip
