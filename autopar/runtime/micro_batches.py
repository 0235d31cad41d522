"""A global batch divided into the graph's inputs of each micro-batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autopar.core.errors import UsageError
from autopar.core.plan import Plan
from autopar.graph.ir import Graph


def slice_batch(
    batch: Mapping[str, Any], *, graph: Graph, plan: Plan, input_names: Sequence[str], device: torch.device
) -> list[dict[int, Tensor]]:
    """The graph's inputs by value, one dict per micro-batch, on ``device``, floating inputs in the plan's dtype.

    ``batch`` has one entry, of one or several tensors, per name of ``input_names``. A tensor is divided along its first
    dim that is proportional to the batch; one without such a dim is the same in every micro-batch. UsageError where
    names or shapes are not those of the plan's model and global batch."""
    micro_batches = [dict[int, Tensor]() for _ in range(plan.microbatches)]
    for value, tensor in zip(graph.inputs, _batch_tensors(batch, input_names), strict=True):
        traced = graph.values[value]
        expected = tuple(graph.batch.scale(size, plan.global_batch) for size in traced.shape)
        if tuple(tensor.shape) != expected:
            raise UsageError(
                f"input {traced.name} has shape {tuple(tensor.shape)}; for the plan's global batch of "
                f"{plan.global_batch} samples it must be {expected}"
            )
        tensor = tensor.to(device)
        if traced.dtype.startswith(("float", "bfloat")):
            tensor = tensor.to(getattr(torch, traced.dtype))
        dims = (dim for dim, size in enumerate(traced.shape) if graph.batch.is_proportional(size))
        batch_dim = next(dims, None)
        if batch_dim is None:
            for inputs in micro_batches:
                inputs[value] = tensor
            continue
        length = graph.batch.scale(traced.shape[batch_dim], plan.micro_batch_size)
        for number, inputs in enumerate(micro_batches):
            inputs[value] = tensor.narrow(batch_dim, number * length, length)
    return micro_batches


def _batch_tensors(batch: Mapping[str, Any], names: Sequence[str]) -> list[Tensor]:
    """The tensors of a batch in the order of the graph's inputs."""
    if set(batch) != set(names):
        raise UsageError(
            f"the batch has the keys {', '.join(sorted(batch))}; the model's inputs are {', '.join(names)}"
        )
    leaves = (leaf for name in names for leaf in torch.utils._pytree.tree_leaves(batch[name]))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
