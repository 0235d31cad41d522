"""Traces a workload at one batch size, from which the graph at every other batch size follows.

The batch size is ``8 p`` with ``p`` a prime that divides no other size, so exactly the sizes divisible by ``p`` are
proportional to the batch. That is checked: where a size or literal might break the rule, the model is traced another
time at another prime, and the two graphs must agree after scaling (``batch_scaling``).
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

_BATCH_MULTIPLES = (8, 2, 1, 32)  # of the prime; the later ones for models that need another divisibility
_PRIMES = (101, 103, 107, 109, 113, 131, 137, 139, 149, 151, 157, 163, 167, 173, 179, 181, 191, 193, 197, 199)


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedGraph:
    """A graph and the torch.fx module behind it, traced with weights in ``dtype``.

    The i-th tensor placeholder of ``module`` is ``graph.values[i]``; its call nodes have the names of ``graph.ops``, in
    addition to which there are ``getitem`` nodes. Code that runs the module must detach the values with
    ``requires_grad`` False, as ``no_grad`` regions are no nodes. ``constants`` are the literal tensors that the model
    made while tracing, by value name."""

    graph: Graph
    module: fx.GraphModule
    dtype: Dtype
    constants: dict[str, Tensor]


def trace(workload: Workload, *, dtype: Dtype) -> TracedGraph:
    """The forward graph of the workload's loss with weights in ``dtype``; raises ModelError, with the user's file and
    line, for a model that cannot be traced or whose sizes do not scale with the batch.

    >>> trace(load_workload("examples/gpt.py", size="125M"), dtype="bfloat16").graph.values[0].shape  # doctest: +SKIP
    (51200, 768)
    """
    # The guard is for methods of the model other than its forward, which the export guards by itself.
    with guard_user_code("the model raised", reraised=(Exception,)):
        model = workload.build()
        primes = _unused_primes(workload, model)
        traced = _trace_at_any_multiple(workload, model, next(primes), dtype)
        if may_break_batch_scaling(traced.graph):
            batch, prime = traced.graph.batch, next(primes)
            retraced = _trace_at(workload, model, batch.traced_size // batch.prime * prime, prime, dtype)
            check_batch_scaling(traced.graph, retraced.graph)
    return traced


def _trace_at_any_multiple(workload: Workload, model: nn.Module, prime: int, dtype: Dtype) -> TracedGraph:
    """The trace at the first multiple of the prime that the model accepts; raises the ModelError of the first one where
    it accepts none."""
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
    """Whether the model may accept another batch size: it raised an error as torch does for sizes that do not fit."""
    cause = error.__cause__
    sizes = isinstance(cause, (RuntimeError, ValueError, AssertionError)) and not isinstance(cause, NotImplementedError)
    return sizes and not is_data_dependent_error(cause)  # type: ignore[arg-type]


def _trace_at(workload: Workload, model: nn.Module, batch_size: int, prime: int, dtype: Dtype) -> TracedGraph:
    """The trace at one batch size, a multiple of ``prime``."""
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
    """Primes that divide no size of a parameter, buffer or input (the batch apart), nor the end of an open slice, which
    is 2^63 - 1; raises ModelError where fewer than two are left, or where the batch changes more than sizes of the
    inputs."""
    sizes = {2**63 - 1}
    for tensor in (*model.parameters(), *model.buffers()):
        sizes.update(tensor.shape)
    inputs_at_8, inputs_at_16 = (input_tensors(workload.inputs(batch_size)) for batch_size in (8, 16))
    _check_same_structure(inputs_at_8, inputs_at_16)
    for at_8, at_16 in zip(inputs_at_8, inputs_at_16, strict=True):
        sizes.update(size for size, other in zip(at_8.shape, at_16.shape, strict=True) if size == other)
    unused = [prime for prime in _PRIMES if all(size % prime or not size for size in sizes)]
    if len(unused) < 2:
        raise ModelError(
            f"cannot tell the batch size from the model's other sizes: of {len(_PRIMES)} primes from {_PRIMES[0]} to "
            f"{_PRIMES[-1]} that mark it, {len(_PRIMES) - len(unused)} divide one of them\n"
            "  change a size a little, for example pad a vocabulary"
        )
    yield from unused


def _check_same_structure(at_8: list[Tensor], at_16: list[Tensor]) -> None:
    """Raises ModelError unless the inputs at batches 8 and 16 are as many tensors with as many dims."""
    if len(at_8) != len(at_16):
        raise ModelError(
            f"example_inputs returned {len(at_8)} tensors at batch 8 and {len(at_16)} at batch 16: their number must not "
            "depend on the batch\n"
            "  stack a list with a tensor per sample into one tensor whose first dim is the batch"
        )
    for first, second in zip(at_8, at_16, strict=True):
        if first.dim() != second.dim():
            raise ModelError(
                f"example_inputs returned a tensor of shape {tuple(first.shape)} at batch 8 and {tuple(second.shape)} at "
                "batch 16: the number of dims must not depend on the batch"
            )
