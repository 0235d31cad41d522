"""An op's literal arguments as what torch's call takes.

In the graph, dtypes, devices, layouts and memory formats are strings and lists are tuples (see ``convert``).
"""

from typing import Any

import torch
from torch import Tensor

from autopar.graph.ir import Op, Ref


def resolve(target: str) -> Any:
    """``aten.linear.default`` -> the callable of that name; raises AttributeError for one that is not loaded."""
    found: Any = torch.ops
    for part in target.split("."):
        found = getattr(found, part)
    return found


def restore(op: Op, tensors: list[Tensor], schema: Any) -> tuple[list[Any], dict[str, Any]]:
    """The call's positional and keyword arguments, tensors in place of ``Ref``s; ``schema`` tells a dtype's name from
    other strings (None: no string is translated)."""
    arguments = list(schema.arguments) if schema is not None else []
    types = {argument.name: str(argument.type) for argument in arguments}
    args = [
        _restored(literal, tensors, str(arguments[position].type) if position < len(arguments) else "")
        for position, literal in enumerate(op.args)
    ]
    return args, {name: _restored(literal, tensors, types.get(name, "")) for name, literal in op.kwargs}


def _restored(literal: Any, tensors: list[Tensor], kind: str) -> Any:
    if isinstance(literal, Ref):
        return tensors[literal.index]
    if isinstance(literal, tuple):
        return [_restored(element, tensors, kind) for element in literal]
    if isinstance(literal, str) and not _is_text(kind):
        if literal in ("cpu", "meta") or ":" in literal or literal == "cuda":
            return torch.device("cpu")
        return getattr(torch, literal, literal)
    return literal


def _is_text(kind: str) -> bool:
    return kind in ("str", "Optional[str]", "string", "")
