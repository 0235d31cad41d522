"""An op's literal arguments: as a key that can be compared, and back as what torch's call takes.

In the graph, dtypes, devices, layouts and memory formats are strings and lists are tuples (see ``convert``).
"""

from typing import Any

import torch
from torch import Tensor

from autopar.graph.ir import Op, Ref


def frozen(literal: Any) -> Any:
    """A hashable key, equal for equal literals only: 1, 1.0 and True differ, and so do nan's of one kind not.

    >>> frozen((1, 2.0)) == frozen((1, 2)), frozen((Ref(0), "a")) == frozen((Ref(0), "a"))
    (False, True)
    """
    if isinstance(literal, (tuple, list)):
        return tuple(map(frozen, literal))
    if isinstance(literal, float):
        return ("float", repr(literal))
    if isinstance(literal, bool):
        return ("bool", literal)
    return literal


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
