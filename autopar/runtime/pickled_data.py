"""Reads a pickle as data. Python's own reader imports and calls whatever a pickle names, so a hostile one runs what it
likes; this one imports nothing and calls nothing.

    bytes of a pickle  ->  dicts, lists, tuples, strings and numbers; for each object an ``Instance``: the name of its
                           class, the arguments it is made with, the state it is given

A pickle is a program for a stack machine. ``pickletools`` decodes its instructions and documents them; understood are
those by which protocols 2 to 5 write such data. A class is only a name, which must be on the caller's list.
"""

import pickletools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any


class NotAllowedError(Exception):
    """A pickle names a class or function that is not on the list: ``name``, with its module."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that a pickle names."""

    name: str


@dataclass(slots=True, eq=False)
class Instance:
    """The object that calling ``name`` would make. It equals nothing but itself, so that it can be the key of a dict."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


def read_data(content: bytes, allowed: Collection[str]) -> Any:
    """The value of a pickle. ``allowed`` are the names (module.name) of classes and functions that it may contain.

    Raises NotAllowedError where it names another, ValueError where it is damaged or has an instruction that data does
    not need. Time and memory are proportional to its length, whatever it says.

    >>> import pickle
    >>> read_data(pickle.dumps({"step": 12, "shape": (4, 8)}), allowed=())
    {'step': 12, 'shape': (4, 8)}
    """
    machine, at = _Machine(allowed), 0
    try:
        for instruction, argument, position in pickletools.genops(content):
            at = position or 0
            if instruction.name not in _STEPS:
                raise ValueError(f"instruction {instruction.name}")
            _STEPS[instruction.name](machine, argument)
        (value,) = machine.stack
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"no whole pickle of data: byte {at} of {len(content)}: {error}") from None
    return value


class _Machine:
    """The stack machine. ``marks`` are heights of its stack: some instructions take all that is above the last."""

    def __init__(self, allowed: Collection[str]) -> None:
        self.allowed = allowed
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def remember(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def above_mark(self) -> list[Any]:
        return self.taken(len(self.stack) - self.marks.pop())

    def taken(self, count: int) -> list[Any]:
        """The topmost values, taken off the stack."""
        start = len(self.stack) - count
        if start < 0:
            raise IndexError("the stack is empty")
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise TypeError("items of no list")
        self.stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise TypeError("items of no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int, Instance)):  # to hash a tuple of tuples of tuples ... ends the process
                raise TypeError("a key that is neither a string, an integer nor an object")
            self.stack[-1][key] = value

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("a class without a name")
        full = f"{module}.{name}"
        if full not in self.allowed:
            raise NotAllowedError(full)
        self.stack.append(Global(full))

    def make(self) -> None:
        called, arguments = self.taken(2)
        if not isinstance(called, Global) or not isinstance(arguments, tuple):
            raise TypeError("an object without a class or arguments")
        self.stack.append(Instance(called.name, arguments))

    def set_state(self) -> None:
        target, state = self.taken(2)
        if not isinstance(target, Instance):
            raise TypeError("a state of no object")
        target.state = state
        self.stack.append(target)


_Step = Callable[[_Machine, Any], object]


def _always(make: Callable[[], Any]) -> _Step:
    return lambda machine, _: machine.push(make())


_STEPS: dict[str, _Step] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, argument: None),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _Machine.push),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _Machine.push),
    "NONE": _always(lambda: None),
    "NEWTRUE": _always(lambda: True),
    "NEWFALSE": _always(lambda: False),
    "EMPTY_DICT": _always(dict),
    "EMPTY_LIST": _always(list),
    "EMPTY_TUPLE": _always(tuple),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.taken(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.taken(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.taken(3))),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.above_mark())),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "APPEND": lambda machine, _: machine.extend(machine.taken(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.above_mark()),
    "SETITEM": lambda machine, _: machine.update(machine.taken(2)),
    "SETITEMS": lambda machine, _: machine.update(machine.above_mark()),
    "STACK_GLOBAL": lambda machine, _: machine.name(*machine.taken(2)),
    **dict.fromkeys(("GLOBAL", "INST"), lambda machine, argument: machine.name(*argument.split(" ", 1))),
    **dict.fromkeys(("NEWOBJ", "REDUCE"), lambda machine, _: machine.make()),
    "BUILD": lambda machine, _: machine.set_state(),
    "MEMOIZE": lambda machine, _: machine.remember(len(machine.memo)),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, place: machine.push(machine.memo[place])),
}
"""What each instruction does, by its name. INST, protocol 0's way to make an object, is here for the name in it."""
