"""Progress on stderr: one line that updates itself on a terminal, plain lines elsewhere, nothing with ``--quiet``."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

Progress = Callable[[str, str, float | None, float | None], None]


@contextlib.contextmanager
def progress_on_stderr(quiet: bool) -> Iterator[Progress]:
    """Yields ``progress(stage, detail, best_s, gap)``: the step time of the incumbent in seconds and its gap, both None while
    there is none."""
    if quiet:
        yield lambda stage, detail, best_s, gap: None
    elif sys.stderr.isatty():
        from rich.console import Console

        with Console(stderr=True).status("starting") as status:
            yield lambda stage, detail, best_s, gap: status.update(
                _line(stage, detail, best_s, gap).replace("[", "\\[")
            )
    else:
        yield _PlainLines()


class _PlainLines:
    """Prints a line when a stage begins or a better plan is found, and otherwise at most one every two seconds."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._printed_s = -1e9
        self._last: tuple[str, float | None] = ("", None)

    def __call__(self, stage: str, detail: str, best_s: float | None, gap: float | None) -> None:
        now_s = time.monotonic()
        if (stage, best_s) == self._last and now_s - self._printed_s < 2:
            return
        self._last, self._printed_s = (stage, best_s), now_s
        print(f"[{now_s - self._started_s:6.1f} s] {_line(stage, detail, best_s, gap)}", file=sys.stderr, flush=True)


def _line(stage: str, detail: str, best_s: float | None, gap: float | None) -> str:
    """One line of progress.

    >>> _line("search", "240 of 812 meshes", 1.5, 0.031)
    'search: 240 of 812 meshes, best 1.500 s, gap 3.1 %'
    """
    parts = [f"{stage}: {detail}" if detail else stage]
    if best_s is not None:
        parts.append(f"best {best_s:.3f} s")
    if gap is not None:
        parts.append(f"gap {100 * gap:.1f} %")
    return ", ".join(parts)
