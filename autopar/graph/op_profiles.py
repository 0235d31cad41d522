"""The profile of every op: what its forward and backward run, and what it saves for the backward.

Every distinct op (target, literal arguments, shapes, strides, dtypes and ``requires_grad`` of its inputs) is run once,
alone, on fake CPU tensors at the traced batch:

    forward    under ``KernelRecorder`` and ``saved_tensors_hooks``: the tensors that autograd saves. A saved tensor that
               shares storage with an input or output counts as that input or output, any other is internal
    backward   ``torch.autograd.grad`` of the results that carry a gradient with respect to the inputs that require one,
               under ``KernelRecorder``

Strides are propagated from op to op, so a ``reshape`` of a transposed tensor costs its copy and any other is free.
Where the CPU runs other kernels than CUDA, ``cuda_profiles`` corrects it (flash attention, fused RMS norm, dropout's
boolean mask), and statistics of norms count as fp32. Cross entropy is that of eager CUDA: log_softmax (its result is
saved) and nll_loss, two kernels in each pass. A value with n users gets n gradients; the n - 1 additions are charged to
the ops whose backward runs later.

An op whose backward cannot be run alone has none, and one that cannot be run at all is priced as one kernel that reads
its inputs and writes its outputs; ``GraphProfile.unprofiled_ops`` names both.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.graph.cuda_profiles import CUDA_SUBSTITUTES, HANDWRITTEN_PROFILES
from autopar.graph.ir import Graph, GraphProfile, Op, OpProfile, Value, hashable_literal
from autopar.graph.kernel_recorder import FP32_STATISTICS_OPS, KernelRecorder, nested_tensors, storage_key
from autopar.graph.op_arguments import call_arguments, resolve_overload

Strides: TypeAlias = tuple[int, ...]
RECURRENT_OPS = ("lstm", "gru", "rnn_tanh", "rnn_relu")


@dataclass(frozen=True, slots=True, kw_only=True)
class _ProfiledOp:
    """The profile of an op with what later ops need: for each output its strides and the position of the input whose
    storage it shares (or None), the positions of the inputs that get a gradient, and in ``note`` what could not be
    profiled."""

    profile: OpProfile
    strides: tuple[Strides, ...]
    aliases: tuple[int | None, ...]
    inputs_with_gradient: tuple[int, ...]
    note: str = ""


def profile_ops(graph: Graph, ops: Iterable[int] | None = None) -> dict[int, OpProfile]:
    """Profiles of the ops with these ids (None: all), unsharded, at the traced batch.

    >>> profile_ops(graph)[5].saved_inputs  # a linear layer saves its input and weight  # doctest: +SKIP
    (0, 1)
    """
    profiles = profile_graph(graph).ops
    return {op: profiles[op] for op in (range(len(profiles)) if ops is None else ops)}


def profile_graph(graph: Graph) -> GraphProfile:
    """Profiles of all ops, the owner of each value's storage, and what could not be profiled. Linear in the number of
    distinct ops."""
    strides: dict[int, Strides] = {}
    owners = list(range(len(graph.values)))
    seen: dict[Any, _ProfiledOp] = {}
    outcomes: list[_ProfiledOp] = []
    for op in graph.ops:
        inputs = [graph.values[value] for value in op.inputs]
        outputs = [graph.values[value] for value in op.outputs]
        layout = tuple(strides.get(value.id) or _contiguous_strides(value.shape) for value in inputs)
        tensors = tuple((value.shape, value.dtype, value.requires_grad) for value in (*inputs, *outputs))
        signature = (op.target, hashable_literal(op.args), hashable_literal(op.kwargs), tensors, layout)
        outcome = seen.get(signature)
        if outcome is None:
            outcome = seen[signature] = _profile_op(op, inputs, outputs, layout)
        outcomes.append(outcome)
        for value, stride, alias in zip(op.outputs, outcome.strides, outcome.aliases, strict=True):
            strides[value] = stride
            if alias is not None:
                owners[value] = owners[op.inputs[alias]]
    notes = tuple((op.id, outcome.note) for op, outcome in zip(graph.ops, outcomes, strict=True) if outcome.note)
    return GraphProfile(
        ops=_with_gradient_accumulation(graph, outcomes), storage_owner=tuple(owners), unprofiled_ops=notes
    )


def _with_gradient_accumulation(graph: Graph, outcomes: list[_ProfiledOp]) -> tuple[OpProfile, ...]:
    """Profiles with the accumulation of gradients: the backward goes from the last op to the first, the first gradient
    of a value is stored, each later one accumulates into it (two reads, one write)."""
    with_gradient: set[int] = set()
    profiles: list[OpProfile] = []
    for op, outcome in zip(reversed(graph.ops), reversed(outcomes), strict=True):
        profile = outcome.profile
        num_additions = 0
        num_bytes = 0
        for position in outcome.inputs_with_gradient:
            value = graph.values[op.inputs[position]]
            if value.id in with_gradient:
                num_additions += 1
                num_bytes += 3 * prod(value.shape) * value.itemsize
            with_gradient.add(value.id)
        if num_additions:
            profile = replace(
                profile,
                backward_bytes=profile.backward_bytes + num_bytes,
                backward_kernels=profile.backward_kernels + num_additions,
            )
        profiles.append(profile)
    return tuple(reversed(profiles))


def _profile_op(op: Op, inputs: list[Value], outputs: list[Value], layout: tuple[Strides, ...]) -> _ProfiledOp:
    """The profile of one op whose inputs have the strides ``layout``."""
    packet = op.target.rsplit(".", 1)[0]
    if packet in HANDWRITTEN_PROFILES:
        profile, strides = HANDWRITTEN_PROFILES[packet](op, inputs, outputs)
        gradients = (
            tuple(i for i, value in enumerate(inputs) if value.requires_grad) if _any_requires_grad(outputs) else ()
        )
        return _ProfiledOp(
            profile=profile, strides=strides, aliases=(None,) * len(outputs), inputs_with_gradient=gradients
        )
    try:
        return _profile_on_fake_tensors(op, inputs, outputs, layout)
    except Exception as error:  # fake tensors raise anything from RuntimeError to their own classes
        note = f"priced as one kernel that reads its inputs and writes its outputs: {_first_line(error)}"
        return _unprofiled(inputs, outputs, f"{op.target} could not be profiled, so it is {note}")


def _profile_on_fake_tensors(
    op: Op, inputs: list[Value], outputs: list[Value], layout: tuple[Strides, ...]
) -> _ProfiledOp:
    function = CUDA_SUBSTITUTES.get(op.target) or resolve_overload(op.target)
    grad = _any_requires_grad(outputs)
    with FakeTensorMode(), _without_onednn(op.packet in RECURRENT_OPS):
        leaves = [
            torch.empty_strided(
                value.shape, stride, dtype=getattr(torch, value.dtype), requires_grad=value.requires_grad and grad
            )
            for value, stride in zip(inputs, layout, strict=True)
        ]
        schema = getattr(function, "_schema", None)
        mutable = schema is not None and schema.is_mutable
        # A leaf may not be written in place; the gradient of a copy reaches it without a kernel.
        arguments = [leaf.clone() if mutable and leaf.requires_grad else leaf for leaf in leaves]
        args, kwargs = call_arguments(op, arguments, schema)
        saved: list[Tensor] = []

        def record_saved(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        forward, backward = KernelRecorder(), KernelRecorder()
        with torch.set_grad_enabled(grad), torch.autograd.graph.saved_tensors_hooks(record_saved, _identity), forward:
            results = list(nested_tensors(function(*args, **kwargs)))[: len(outputs)]
        live_bytes = forward.live_bytes()
        assert len(results) == len(outputs), f"{op.target} returned {len(results)} tensors, not {len(outputs)}"
        of_input, of_output = _positions_by_storage(arguments), _positions_by_storage(results)
        by_owner = (of_output, of_input) if mutable else (of_input, of_output)
        classified = _classify_saved(saved, by_owner, of_input, op.packet)
        try:
            gradients = _record_backward(leaves, results, outputs, backward) if grad else ()
            note = ""
        except Exception as error:
            note = f"the backward of {op.target} could not be profiled, so it is priced as none: {_first_line(error)}"
            gradients = ()
            backward = KernelRecorder()
        profile = _op_profile(forward, backward, classified)
        gradient_bytes = sum(leaves[position].numel() * leaves[position].element_size() for position in gradients)
        profile = replace(
            profile,
            forward_workspace_bytes=max(forward.peak_bytes - live_bytes, 0),
            backward_workspace_bytes=max(backward.peak_bytes - gradient_bytes, 0),
        )
        return _ProfiledOp(
            profile=profile,
            strides=tuple(tuple(result.stride()) for result in results),
            aliases=tuple(of_input.get(storage_key(result), [None])[0] for result in results),
            inputs_with_gradient=gradients,
            note=note,
        )


@contextmanager
def _without_onednn(disabled: bool) -> Iterator[None]:
    """Switches oneDNN off where ``disabled``: it runs a recurrent layer as one kernel, in which its matmuls cannot be
    seen."""
    before: bool = bool(torch.backends.mkldnn.enabled)
    try:
        if disabled:
            setattr(torch.backends.mkldnn, "enabled", False)  # noqa: B010  # a property of the module
        yield
    finally:
        if disabled:
            setattr(torch.backends.mkldnn, "enabled", before)  # noqa: B010


# Positions of saved inputs, positions of saved outputs, (shape, itemsize) of internal tensors.
_SavedTensors: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[tuple[int, ...], int], ...]]


def _classify_saved(
    saved: list[Tensor],
    positions_by_owner: tuple[dict[int, list[int]], ...],
    of_input: dict[int, list[int]],
    packet: str,
) -> _SavedTensors:
    """The saved tensors by what they are, each storage once. ``positions_by_owner`` are maps from a storage to the
    positions of the inputs or outputs that have it, ``of_input`` is that of the inputs. The first map with a storage
    counts: the result of an in-place op has the storage of its input."""
    saved_inputs: set[int] = set()
    saved_outputs: set[int] = set()
    internal: dict[int, tuple[tuple[int, ...], int]] = {}
    for tensor in saved:
        key = storage_key(tensor)
        owner = next((positions for positions in positions_by_owner if key in positions), None)
        if owner is of_input:
            saved_inputs.update(owner[key])
        elif owner is not None:
            saved_outputs.update(owner[key][:1])
        else:
            itemsize = max(4, tensor.element_size()) if packet in FP32_STATISTICS_OPS else tensor.element_size()
            elements = tensor.untyped_storage().nbytes() // tensor.element_size()
            shape = tuple(tensor.shape) if elements == tensor.numel() else (elements,)
            internal.setdefault(key, (shape, itemsize))
    return tuple(sorted(saved_inputs)), tuple(sorted(saved_outputs)), tuple(internal.values())


def _record_backward(
    leaves: list[Tensor], results: list[Tensor], outputs: list[Value], recorder: KernelRecorder
) -> tuple[int, ...]:
    """Runs the backward under the recorder and returns the positions of the inputs that got a gradient."""
    differentiable = [
        tensor for tensor, value in zip(results, outputs, strict=True) if tensor.requires_grad and value.requires_grad
    ]
    positions = [position for position, leaf in enumerate(leaves) if leaf.requires_grad]
    if not differentiable or not positions:
        return ()
    output_gradients = [_gradient_like(result) for result in differentiable]
    with recorder:
        gradients = torch.autograd.grad(
            differentiable, [leaves[position] for position in positions], output_gradients, allow_unused=True
        )
    return tuple(position for position, gradient in zip(positions, gradients, strict=True) if gradient is not None)


def _gradient_like(result: Tensor) -> Tensor:
    """A gradient with the strides of its result; that of a broadcast result is dense."""
    if any(stride == 0 and size > 1 for size, stride in zip(result.shape, result.stride(), strict=True)):
        return torch.empty(result.shape, dtype=result.dtype)
    return torch.empty_strided(result.shape, result.stride(), dtype=result.dtype)


def _op_profile(forward: KernelRecorder, backward: KernelRecorder, saved: _SavedTensors) -> OpProfile:
    return OpProfile(
        forward_flops=forward.flops,
        backward_flops=backward.flops,
        forward_bytes=forward.num_bytes,
        backward_bytes=backward.num_bytes,
        forward_kernels=forward.kernels,
        backward_kernels=backward.kernels,
        saved_inputs=saved[0],
        saved_outputs=saved[1],
        saved_internal_tensors=saved[2],
    )


def _unprofiled(inputs: list[Value], outputs: list[Value], note: str) -> _ProfiledOp:
    """The profile of one kernel that reads every input and writes every output, without a backward."""
    recorder = KernelRecorder()
    recorder.num_bytes = sum(prod(value.shape) * value.itemsize for value in (*inputs, *outputs))
    recorder.kernels = 1
    return _ProfiledOp(
        profile=_op_profile(recorder, KernelRecorder(), ((), (), ())),
        strides=tuple(_contiguous_strides(value.shape) for value in outputs),
        aliases=(None,) * len(outputs),
        inputs_with_gradient=(),
        note=note,
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _any_requires_grad(outputs: list[Value]) -> bool:
    return any(value.requires_grad for value in outputs)


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _positions_by_storage(tensors: list[Tensor]) -> dict[int, list[int]]:
    """Storage key -> positions of the tensors that have this storage."""
    positions: dict[int, list[int]] = {}
    for position, tensor in enumerate(tensors):
        positions.setdefault(storage_key(tensor), []).append(position)
    return positions


def _contiguous_strides(shape: tuple[int, ...]) -> Strides:
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
