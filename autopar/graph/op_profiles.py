"""What every op saves for the backward pass, and what its backward runs.

Every distinct op (target, literal arguments, shapes, strides, dtypes and ``requires_grad`` of its inputs) is run once,
alone, on fake cpu tensors at the traced batch:

    forward    under ``KernelRecorder`` and ``saved_tensors_hooks``: what autograd really keeps. A kept tensor that
               shares memory with an input or output is that input or output, anything else is internal
    backward   ``torch.autograd.grad`` of the results that carry a gradient, to the inputs that want one, recorded too

Strides are carried from op to op, so a ``reshape`` of a transposed tensor costs its copy and any other nothing. What
the cpu would do otherwise than CUDA is corrected in ``fused``: flash attention, fused RMS norm, dropout's boolean mask,
fp32 statistics of norms. Cross entropy is eager CUDA's: log_softmax (result kept) and nll_loss, two kernels each way.
A value read by n ops receives n gradients; the n - 1 additions are charged to the ops that run their backward later.

An op whose backward cannot be run alone has none, and one that cannot be run at all is priced as one kernel that reads
its inputs and writes its outputs; ``GraphProfile.notes`` names both.
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
    """A profile with what the walk needs: per output its strides and the position of the input whose memory it is (or
    None), and the positions of the inputs that get a gradient."""

    profile: OpProfile
    strides: tuple[Strides, ...]
    aliases: tuple[int | None, ...]
    inputs_with_gradient: tuple[int, ...]
    note: str = ""


def profile_ops(graph: Graph, ops: Iterable[int] | None = None) -> dict[int, OpProfile]:
    """Profiles of the given ops (all without ``ops``), whole at the traced batch. Time grows with the distinct ops
    only.

    >>> profile_ops(graph)[5].saved_inputs  # a linear layer keeps its input and weight  # doctest: +SKIP
    (0, 1)
    """
    profiles = profile_graph(graph).ops
    return {op: profiles[op] for op in (range(len(profiles)) if ops is None else ops)}


def profile_graph(graph: Graph) -> GraphProfile:
    """Profiles of all ops, who owns the memory of each value, and what could not be profiled."""
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
    """Profiles with the additions of gradients that meet: backward goes from the last op to the first, the first
    gradient of a value is kept, each later one is added to it (two reads, one write)."""
    reached: set[int] = set()
    profiles: list[OpProfile] = []
    for op, outcome in zip(reversed(graph.ops), reversed(outcomes), strict=True):
        profile = outcome.profile
        sums = 0
        num_bytes = 0
        for position in outcome.inputs_with_gradient:
            value = graph.values[op.inputs[position]]
            if value.id in reached:
                sums += 1
                num_bytes += 3 * prod(value.shape) * value.itemsize
            reached.add(value.id)
        if sums:
            profile = replace(
                profile,
                backward_bytes=profile.backward_bytes + num_bytes,
                backward_kernels=profile.backward_kernels + sums,
            )
        profiles.append(profile)
    return tuple(reversed(profiles))


def _profile_op(op: Op, inputs: list[Value], outputs: list[Value], layout: tuple[Strides, ...]) -> _ProfiledOp:
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
        return _unprofiled(inputs, outputs, f"{op.target} cannot run on fake tensors: {str(error).splitlines()[:1]}")


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
        # A leaf may not be written in place; the gradient of a copy passes through to it without a kernel.
        arguments = [leaf.clone() if mutable and leaf.requires_grad else leaf for leaf in leaves]
        args, kwargs = call_arguments(op, arguments, schema)
        saved: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        forward, backward = KernelRecorder(), KernelRecorder()
        with torch.set_grad_enabled(grad), torch.autograd.graph.saved_tensors_hooks(keep, _identity), forward:
            results = list(nested_tensors(function(*args, **kwargs)))[: len(outputs)]
        staying = forward.live_bytes()
        assert len(results) == len(outputs), f"{op.target} returned {len(results)} tensors, not {len(outputs)}"
        of_input, of_output = _positions_by_storage(arguments), _positions_by_storage(results)
        kept = _classify_saved(saved, (of_output, of_input) if mutable else (of_input, of_output), of_input, op.packet)
        try:
            gradients = _record_backward(leaves, results, outputs, backward) if grad else ()
            note = ""
        except Exception as error:
            gradients, note = (), f"{op.target} has no backward on its own: {str(error).splitlines()[:1]}"
            backward = KernelRecorder()
        profile = _op_profile(forward, backward, kept)
        written = sum(leaves[at].numel() * leaves[at].element_size() for at in gradients)
        profile = replace(
            profile,
            forward_workspace_bytes=max(forward.peak_bytes - staying, 0),
            backward_workspace_bytes=max(backward.peak_bytes - written, 0),
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
    """oneDNN runs a recurrent layer as one kernel, which hides its matmuls."""
    before: bool = bool(torch.backends.mkldnn.enabled)
    try:
        if disabled:
            setattr(torch.backends.mkldnn, "enabled", False)  # noqa: B010  # a property of the module
        yield
    finally:
        if disabled:
            setattr(torch.backends.mkldnn, "enabled", before)  # noqa: B010


_SavedTensors: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[tuple[int, ...], int], ...]]


def _classify_saved(
    saved: list[Tensor],
    positions_by_owner: tuple[dict[int, list[int]], ...],
    of_input: dict[int, list[int]],
    packet: str,
) -> _SavedTensors:
    """Saved tensors as (input positions, output positions, internal tensors), each memory once. An in-place op's result
    has its input's memory: the first map of ``order`` that knows the memory has it."""
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
    """Runs the backward under the recorder; the positions of the inputs that got a gradient."""
    heads = [
        tensor for tensor, value in zip(results, outputs, strict=True) if tensor.requires_grad and value.requires_grad
    ]
    wanted = [position for position, leaf in enumerate(leaves) if leaf.requires_grad]
    if not heads or not wanted:
        return ()
    gradients = [_gradient_like(head) for head in heads]
    with recorder:
        found = torch.autograd.grad(heads, [leaves[position] for position in wanted], gradients, allow_unused=True)
    return tuple(position for position, gradient in zip(wanted, found, strict=True) if gradient is not None)


def _gradient_like(head: Tensor) -> Tensor:
    """A gradient in the layout of its result; that of a broadcast result is dense."""
    if any(stride == 0 and size > 1 for size, stride in zip(head.shape, head.stride(), strict=True)):
        return torch.empty(head.shape, dtype=head.dtype)
    return torch.empty_strided(head.shape, head.stride(), dtype=head.dtype)


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
    """One kernel that reads every input and writes every output, without a backward."""
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


def _any_requires_grad(outputs: list[Value]) -> bool:
    return any(value.requires_grad for value in outputs)


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _positions_by_storage(tensors: list[Tensor]) -> dict[int, list[int]]:
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
