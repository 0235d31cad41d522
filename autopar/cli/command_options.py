"""Option types and the options that several commands share."""

import contextlib
import math
from collections.abc import Callable
from typing import Any, TypeVar

import click

from autopar.core.errors import UsageError
from autopar.core.request import (
    ARGUMENT_RULES,
    DTYPES,
    OPTIMIZERS,
    RECOMPUTE_MODES,
    SCHEDULES,
    ArgumentRule,
    whole_number,
)

Function = TypeVar("Function", bound=Callable[..., Any])


class CheckedNumber(click.ParamType):  # type: ignore[type-arg]
    """A number under the rule of a ``keyword`` of the Python API, or under the ``rule`` of an option that only the command
    line has, and with the same message."""

    def __init__(self, kind: type[int] | type[float], *, keyword: str = "", rule: ArgumentRule | None = None) -> None:
        self.name = "integer" if kind is int else "number"
        self.kind, self.keyword = kind, keyword
        self.rule = rule or ARGUMENT_RULES[keyword]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        """The number that a word is; UsageError where the rule does not allow it."""
        with contextlib.suppress(ValueError):  # a word that is no number breaks the rule
            value = self.kind(value)
        self.rule.check(self.keyword or self.rule.flag, value)
        number: int | float = value
        return number


class CheckedChoice(click.Choice):  # type: ignore[type-arg]
    """One of several words, under the rule of a ``keyword`` of the Python API and with the same message."""

    def __init__(self, choices: tuple[str, ...], *, keyword: str) -> None:
        super().__init__(choices)
        self.keyword = keyword

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The word itself; UsageError where it is none of the choices."""
        ARGUMENT_RULES[self.keyword].check(self.keyword, value)
        return str(value)


def count_option(flag: str) -> CheckedNumber:
    """The type of an option that only the command line has, a whole number of at least 1."""
    return CheckedNumber(int, rule=whole_number(flag))


class Assignment(click.ParamType):  # type: ignore[type-arg]
    """``KEY=VALUE``: a value that reads as an int, float or bool is one, anything else is text.

    >>> Assignment().convert("layers=96", None, None), Assignment().convert("tied=true", None, None)
    (('layers', 96), ('tied', True))
    """

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        """The key and the value of a word."""
        if isinstance(value, tuple):
            return value
        key, equals, text = str(value).partition("=")
        if not equals or not key.isidentifier() or not text:
            self.fail(f"{value!r} is not KEY=VALUE, such as layers=96", param, ctx)
        return key, parse_scalar(text)


class PinParameter(click.ParamType):  # type: ignore[type-arg]
    """``GLOB=PLACEMENTS``: names of parameters, and one placement per mesh axis."""

    name = "glob=placements"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """The glob and the placements of a word; UsageError for a placement that is none or that no parameter has."""
        if isinstance(value, tuple):
            return value
        from autopar.core.pin import parse_pin

        glob, equals, placements = str(value).rpartition("=")
        if not equals or not glob or not placements:
            self.fail(f"{value!r} is not GLOB=PLACEMENTS, such as 'layers.*.wq.weight=S(0)R'", param, ctx)
        parse_pin(glob, placements)
        return glob, placements


def parse_scalar(text: str) -> bool | int | float | str:
    """A word as the bool or the finite number that it reads as, else as it is.

    >>> parse_scalar("1e3"), parse_scalar("12"), parse_scalar("False"), parse_scalar("39B")
    (1000.0, 12, False, '39B')
    """
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        return number if math.isfinite(number) else text
    return text


def unique_assignments(option: str, assignments: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """The assignments of a repeatable option as a dict; UsageError for a key that is given twice."""
    values: dict[str, Any] = {}
    for key, value in assignments:
        if values.setdefault(key, value) is not value:
            raise UsageError(f"{option} {key} is given twice, as {values[key]} and as {value}")
    return values


def combine_options(*options: Callable[[Function], Function]) -> Callable[[Function], Function]:
    """One decorator that adds several options, which ``--help`` shows in this order."""

    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


print_options = combine_options(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document, errors included."),
    click.option("-q", "--quiet", is_flag=True, help="No progress."),
    click.option("-v", "--verbose", is_flag=True, help="List every collective, not only totals."),
)

cluster_options = combine_options(
    click.option("--cluster", default="dgx-h100", show_default=True, metavar="NAME|FILE", help="The cluster."),
    click.option(
        "--cluster-set", multiple=True, type=Assignment(), metavar="K=V", help="Override a key of the cluster's table."
    ),
)

workload_options = combine_options(
    click.argument("model", type=click.Path()),
    click.option("--gpus", required=True, type=CheckedNumber(int, keyword="gpus"), metavar="N", help="GPUs to use."),
    cluster_options,
    click.option(
        "--set", "settings", multiple=True, type=Assignment(), metavar="K=V", help="Set a parameter of the model file."
    ),
    click.option(
        "--global-batch",
        type=CheckedNumber(int, keyword="global_batch"),
        metavar="B",
        help="Samples per optimizer step; else GLOBAL_BATCH of the model file.",
    ),
    click.option(
        "--micro-batch",
        type=CheckedNumber(int, keyword="micro_batch"),
        metavar="b",
        help="Samples of a micro-batch, over all ranks of a stage.",
    ),
    click.option(
        "--dtype",
        type=CheckedChoice(DTYPES, keyword="dtype"),
        help="Default: bf16, or fp16 on devices without bf16.",
    ),
    click.option(
        "--memory",
        type=CheckedNumber(float, keyword="memory_gib"),
        metavar="GIB",
        help="Memory budget per GPU; else the device's usable memory.",
    ),
    click.option(
        "--optimizer", type=CheckedChoice(OPTIMIZERS, keyword="optimizer"), default="adamw", show_default=True
    ),
)

search_options = combine_options(
    click.option(
        "--pin",
        "pins",
        multiple=True,
        type=PinParameter(),
        metavar="GLOB=PLACEMENTS",
        help="Fix the placements of matching parameters, one per mesh axis; search the rest.",
    ),
    click.option(
        "--recompute",
        type=CheckedChoice(RECOMPUTE_MODES, keyword="recompute"),
        default="auto",
        show_default=True,
        help="What the backward recomputes.",
    ),
    click.option(
        "--schedule",
        type=CheckedChoice(SCHEDULES, keyword="schedule"),
        default="auto",
        show_default=True,
        help="Pipeline schedule.",
    ),
    click.option(
        "--time-limit",
        type=CheckedNumber(float, keyword="time_limit_s"),
        metavar="S",
        help="Stop searching after S seconds, with the best plan found by then.",
    ),
)


def output_file_options(result: str, *, required: bool = False) -> Callable[[Function], Function]:
    """``-o`` and ``--force`` of a command whose ``result`` ("plan") is a file."""
    return combine_options(
        click.option(
            "-o",
            "--output",
            required=required,
            type=click.Path(dir_okay=False, readable=False, allow_dash=True),
            metavar="FILE",
            help=f"Write the {result} to FILE, which may exist only if it is a {result}; - is stdout, and the text then "
            "goes to stderr.",
        ),
        click.option(
            "--force",
            is_flag=True,
            help="Let -o replace any file, or the file that a link leads to, and write into a device or pipe.",
        ),
    )
