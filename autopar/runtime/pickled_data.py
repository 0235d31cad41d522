"""Reads a pickle as data. Python's own reader imports and calls whatever a pickle names, so a hostile pickle runs any
code; this one imports nothing and calls nothing.

    bytes of a pickle  ->  dicts, lists, tuples, strings and numbers; for each object an ``Instance``: the name of its
                           class, the arguments of its constructor, the state that is set on it

A pickle is a program for a stack machine. ``pickletools`` decodes and documents its instructions; supported are those
with which protocols 2 to 5 write such data. A class is only a name, which must be on the caller's list.
"""

import pickletools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any


class NotAllowedError(Exception):
    """A pickle names a class or function that is not on the list: ``name``, as module.name."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that a pickle names, as module.name."""

    name: str


@dataclass(slots=True, eq=False)
class Instance:
    """The object that calling ``name`` with ``arguments`` would create. It equals only itself, so that it can be a key
    of a dict."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


def read_data(content: bytes, allowed: Collection[str]) -> Any:
    """The value of a pickle. ``allowed`` are the names (module.name) of classes and functions that it may contain.

    Raises NotAllowedError where it names another, ValueError where it is damaged or has an instruction that plain data
    does not need. Time and memory are proportional to its length, whatever its content.

    >>> import pickle
    >>> read_data(pickle.dumps({"step": 12, "shape": (4, 8)}), allowed=())
    {'step': 12, 'shape': (4, 8)}
    """
    machine, last_position = _Machine(allowed), 0
    try:
        for instruction, argument, position in pickletools.genops(content):
            last_position = position or 0
            if instruction.name not in _STEPS:
                raise ValueError(f"instruction {instruction.name}")
            _STEPS[instruction.name](machine, argument)
        (value,) = machine.stack
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"not a complete pickle of plain data (at byte {last_position} of {len(content)}): {error}"
        ) from None
    return value


class _Machine:
    """The stack machine. ``marks`` are heights of its stack: some instructions take all values above the last mark.
    Methods raise IndexError, TypeError or ValueError where an instruction does not fit the stack."""

    def __init__(self, allowed: Collection[str]) -> None:
        self.allowed = allowed
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def remember(self, key: int) -> None:
        """Note the topmost value in the memo, from which later instructions push it."""
        self.memo[key] = self.stack[-1]

    def pop_to_mark(self) -> list[Any]:
        """Remove the last mark, and the values above it from the stack; returns these."""
        return self.pop(len(self.stack) - self.marks.pop())

    def pop(self, count: int) -> list[Any]:
        """Remove the topmost ``count`` values from the stack; returns them, the topmost last."""
        start = len(self.stack) - count
        if start < 0:
            raise IndexError("the stack is empty")
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def extend(self, items: list[Any]) -> None:
        """Append to the list on top of the stack."""
        if not isinstance(self.stack[-1], list):
            raise TypeError("items without a list")
        self.stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        """Set items (key, value, key, value, ...) of the dict on top of the stack."""
        if not isinstance(self.stack[-1], dict):
            raise TypeError("items without a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int, Instance)):  # hashing deeply nested tuples overflows the C stack
                raise TypeError("a key that is neither a string, an integer nor an object")
            self.stack[-1][key] = value

    def push_global(self, module: Any, name: Any) -> None:
        """Push a class or function by its name; NotAllowedError where it is not on the list."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("a class without a name")
        full = f"{module}.{name}"
        if full not in self.allowed:
            raise NotAllowedError(full)
        self.stack.append(Global(full))

    def create(self) -> None:
        """Replace a class and a tuple of arguments by the object."""
        called, arguments = self.pop(2)
        if not isinstance(called, Global) or not isinstance(arguments, tuple):
            raise TypeError("an object without a class or arguments")
        self.stack.append(Instance(called.name, arguments))

    def set_state(self) -> None:
        """Replace an object and its state by the object with that state."""
        target, state = self.pop(2)
        if not isinstance(target, Instance):
            raise TypeError("a state without an object")
        target.state = state
        self.stack.append(target)


_Step = Callable[[_Machine, Any], object]


def _pushing(create: Callable[[], Any]) -> _Step:
    """The step that pushes a new value."""
    return lambda machine, _: machine.push(create())


_STEPS: dict[str, _Step] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, argument: None),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _Machine.push),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _Machine.push),
    "NONE": _pushing(lambda: None),
    "NEWTRUE": _pushing(lambda: True),
    "NEWFALSE": _pushing(lambda: False),
    "EMPTY_DICT": _pushing(dict),
    "EMPTY_LIST": _pushing(list),
    "EMPTY_TUPLE": _pushing(tuple),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.pop(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.pop(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.pop(3))),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "APPEND": lambda machine, _: machine.extend(machine.pop(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_to_mark()),
    "SETITEM": lambda machine, _: machine.update(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.update(machine.pop_to_mark()),
    "STACK_GLOBAL": lambda machine, _: machine.push_global(*machine.pop(2)),
    **dict.fromkeys(("GLOBAL", "INST"), lambda machine, argument: machine.push_global(*argument.split(" ", 1))),
    **dict.fromkeys(("NEWOBJ", "REDUCE"), lambda machine, _: machine.create()),
    "BUILD": lambda machine, _: machine.set_state(),
    "MEMOIZE": lambda machine, _: machine.remember(len(machine.memo)),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, key: machine.push(machine.memo[key])),
}
"""What each instruction does, by its name. INST creates an object in protocol 0; here only its class is read, whose
name is checked."""
