"""The source of a node of the graph: the module that ran it, and the user's file and line."""

import os
import re
from collections.abc import Callable
from typing import Any

from torch import fx

from autopar.workload.user_code import is_user_file

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_CALL_NUMBER = re.compile(r"@\d+")


def location_of_node(node: fx.Node, prefix: str = "") -> str:
    """``prefix`` and the innermost user frame of a node, ``"model.py:41"`` (base name only); "" where unknown."""
    for filename, line in reversed(_FRAME.findall(node.meta.get("stack_trace") or "")):
        if is_user_file(filename):
            return f"{prefix}{os.path.basename(filename)}:{line}"
    return ""


def location_of_function(function: Callable[..., Any] | None) -> str:
    """The place where a function is defined, ``"model.py:30"``; "" for None and for callables without code."""
    code = getattr(function, "__code__", None)
    return f"{os.path.basename(code.co_filename)}:{code.co_firstlineno}" if code is not None else ""


def module_path_of(node: fx.Node, prefix: str) -> str:
    """Dotted path of the innermost module that ran a node, without the wrapper's ``prefix``; "" at the root."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = _CALL_NUMBER.sub("", next(reversed(stack.values()))[0])
    return path.removeprefix(prefix).removeprefix(".")
