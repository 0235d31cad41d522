"""An op's literal arguments as what torch's call takes.

In the graph, dtypes, devices, layouts and memory formats are strings and lists are tuples (see ``convert``).
"""

from typing import Any

import torch
from torch import Tensor

from autopar.graph.ir import InputRef, Op


def resolve_overload(target: str) -> Any:
    """``aten.linear.default`` -> the callable of that name; raises AttributeError for one that is not loaded."""
    found: Any = torch.ops
    for part in target.split("."):
        found = getattr(found, part)
    return found


def call_arguments(op: Op, tensors: list[Tensor], schema: Any) -> tuple[list[Any], dict[str, Any]]:
    """The call's positional and keyword arguments, tensors in place of ``Ref``s; ``schema`` tells a dtype's name from
    other strings (None: no string is translated)."""
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
