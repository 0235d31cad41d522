"""Traces a workload once, at a batch from which every other batch size follows.

The batch is ``8 p`` with ``p`` a prime that divides no other size, so exactly the sizes divisible by ``p`` grow with
it. That this holds is not taken on trust: a size or literal of unclear origin makes a second trace at another prime,
and every size of the first must follow from the rule (``batch_rule``).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from autopar.core.dtypes import Dtype
from autopar.core.errors import ModelError
from autopar.graph.batch_scaling import check_batch_scaling, may_break_batch_scaling
from autopar.graph.fake_tensors import input_tensors, is_fake
from autopar.graph.from_fx import graph_from_fx
from autopar.graph.ir import Graph, TracedBatch
from autopar.graph.normalise import normalise
from autopar.graph.random_ops import check_random_ops
from autopar.graph.source_location import location_of_function
from autopar.graph.torch_export import MODEL_PREFIX, export_loss, is_data_dependent_error
from autopar.workload import Workload, guard_user_code

_BATCH_MULTIPLES = (8, 2, 1, 32)  # of the prime; the later ones for models that want another divisibility
_PRIMES = (101, 103, 107, 109, 113, 131, 137, 139, 149, 151, 157, 163, 167, 173, 179, 181, 191, 193, 197, 199)


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedGraph:
    """A graph and the torch.fx module behind it.

    ``module``'s i-th tensor placeholder is ``graph.values[i]``, its call nodes carry the names of ``graph.ops`` (and
    ``getitem`` nodes besides). Who runs it must detach the values with ``requires_grad`` False, as ``no_grad`` regions
    are not nodes. ``constants`` holds the literal tensors that the model made while tracing, by value name."""

    graph: Graph
    module: fx.GraphModule
    dtype: Dtype
    constants: dict[str, Tensor]


def trace(workload: Workload, *, dtype: Dtype) -> TracedGraph:
    """The forward graph of the workload's loss, weights in ``dtype``; raises ModelError with the user's file and line.

    >>> trace(load_workload("examples/gpt.py", size="125M"), dtype="bfloat16").graph.values[0].shape  # doctest: +SKIP
    (51200, 768)
    """
    with guard_user_code(
        "the model raised", reraised=(Exception,)
    ):  # from a method of the module that is not its forward
        model = workload.build()
        primes = _unused_primes(workload, model)
        traced = _trace_at_any_multiple(workload, model, next(primes), dtype)
        if may_break_batch_scaling(traced.graph):
            batch = traced.graph.batch
            again = _trace_at(workload, model, batch.traced_size // batch.prime * (other := next(primes)), other, dtype)
            check_batch_scaling(traced.graph, again.graph)
    return traced


def _trace_at_any_multiple(workload: Workload, model: nn.Module, prime: int, dtype: Dtype) -> TracedGraph:
    first: ModelError | None = None
    for multiple in _BATCH_MULTIPLES:
        try:
            return _trace_at(workload, model, multiple * prime, prime, dtype)
        except ModelError as error:
            first = first or error
            if not _may_be_divisibility(error):
                break
    assert first is not None
    raise first


def _may_be_divisibility(error: ModelError) -> bool:
    """Whether another batch size could help: the model raised a complaint on sizes, nothing else is wrong with it."""
    cause = error.__cause__
    sizes = isinstance(cause, (RuntimeError, ValueError, AssertionError)) and not isinstance(cause, NotImplementedError)
    return sizes and not is_data_dependent_error(cause)  # type: ignore[arg-type]


def _trace_at(workload: Workload, model: nn.Module, batch_size: int, prime: int, dtype: Dtype) -> TracedGraph:
    program = export_loss(workload, model, batch_size, getattr(torch, dtype))
    names = _names_of_same_tensor(model)
    tied = {f"{MODEL_PREFIX}.{name}": all_names[0] for name, all_names in names.items()}
    batch = TracedBatch(traced_size=batch_size, prime=prime)
    program, module = normalise(program, tied, batch)
    graph = graph_from_fx(module, program, names, batch, location_of_function(workload.loss_fn))
    check_random_ops(graph)
    constants = {
        name.removeprefix(f"{MODEL_PREFIX}."): tensor
        for name, tensor in program.constants.items()
        if isinstance(tensor, Tensor) and not is_fake(tensor)
    }
    return TracedGraph(graph=graph, module=module, dtype=dtype, constants=constants)


def _names_of_same_tensor(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Path of a parameter or buffer -> all paths of the same tensor, in the model's order."""
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    by_identity: dict[int, list[str]] = {}
    for name, tensor in tensors:
        by_identity.setdefault(id(tensor), []).append(name)
    return {name: tuple(by_identity[id(tensor)]) for name, tensor in tensors}


def _unused_primes(workload: Workload, model: nn.Module) -> Iterator[int]:
    """Primes that divide no size of a parameter, buffer or input but the batch, nor the end of an open slice."""
    sizes = {2**63 - 1}
    for tensor in (*model.parameters(), *model.buffers()):
        sizes.update(tensor.shape)
    for one, other in zip(input_tensors(workload.inputs(8)), input_tensors(workload.inputs(16)), strict=True):
        sizes.update(size for size, twin in zip(one.shape, other.shape, strict=True) if size == twin)
    free = [prime for prime in _PRIMES if all(size % prime or not size for size in sizes)]
    if len(free) < 2:
        raise ModelError("the model has a size divisible by each of the primes that tell the batch from other sizes")
    yield from free
