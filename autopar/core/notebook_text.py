"""How the public nouns show themselves: one line in a Python session, a small table in a notebook."""

from collections.abc import Iterable, Sequence
from html import escape

MAX_VALUE_CHARACTERS = 60


def short_repr(class_name: str, **fields: object) -> str:
    """One line of the most telling fields; a float has four digits, a long value its first characters.

    >>> short_repr("Plan", model="gpt.py", gpus=64, step_time_s=9.918273)
    "Plan(model='gpt.py', gpus=64, step_time_s=9.918, ...)"
    """
    return f"{class_name}({', '.join([*(f'{key}={_value_text(value)}' for key, value in fields.items()), '...'])})"


def html_table(caption: str, heading: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """An HTML table that needs no style sheet or script; the text of every cell is escaped.

    >>> html_table("a < b", ["x"], [["<script>"]])
    '<table><caption>a &lt; b</caption><thead><tr><th>x</th></tr></thead><tbody><tr><td>&lt;script&gt;</td></tr></tbody></table>'
    """
    head = _row("th", heading)
    body = "".join(_row("td", row) for row in rows)
    return f"<table><caption>{escape(caption)}</caption><thead>{head}</thead><tbody>{body}</tbody></table>"


def _row(tag: str, cells: Sequence[object]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"


def _value_text(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= MAX_VALUE_CHARACTERS else text[: MAX_VALUE_CHARACTERS - 3] + "..."
