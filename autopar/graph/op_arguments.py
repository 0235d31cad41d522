"""An op's literal arguments as the arguments of its torch call.

In the graph, dtypes, devices, layouts and memory formats are strings and lists are tuples (see ``from_fx``).
"""

from typing import Any

import torch
from torch import Tensor

from autopar.graph.ir import InputRef, Op


def resolve_overload(target: str) -> Any:
    """``aten.linear.default`` -> the torch op of that name; raises AttributeError for one that is not loaded."""
    overload: Any = torch.ops
    for part in target.split("."):
        overload = getattr(overload, part)
    return overload


def call_arguments(op: Op, tensors: list[Tensor], schema: Any) -> tuple[list[Any], dict[str, Any]]:
    """The call's positional and keyword arguments, with ``tensors[i]`` in place of ``InputRef(i)``. ``schema`` is that
    of the torch op: its types tell string arguments from names of dtypes, layouts and memory formats (None: every
    string is an ordinary one)."""
    arguments = list(schema.arguments) if schema is not None else []
    types = {argument.name: str(argument.type) for argument in arguments}
    args = [
        _to_torch(literal, tensors, str(arguments[position].type) if position < len(arguments) else "")
        for position, literal in enumerate(op.args)
    ]
    return args, {name: _to_torch(literal, tensors, types.get(name, "")) for name, literal in op.kwargs}


def _to_torch(literal: Any, tensors: list[Tensor], kind: str) -> Any:
    if isinstance(literal, InputRef):
        return tensors[literal.index]
    if isinstance(literal, tuple):
        return [_to_torch(element, tensors, kind) for element in literal]
    if isinstance(literal, str) and not _is_string_type(kind):
        if literal in ("cpu", "meta") or ":" in literal or literal == "cuda":
            return torch.device("cpu")
        return getattr(torch, literal, literal)
    return literal


def _is_string_type(kind: str) -> bool:
    return kind in ("str", "Optional[str]", "string", "")
