"""Pickles that run something where Python reads them."""

from typing import Any


class Call:
    """Pickled, it is a call of ``function``; ``state`` is what its result is given then."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.call
