"""Option types and the options that several commands share."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import click

from autopar.core.errors import UsageError

Function = TypeVar("Function", bound=Callable[..., Any])


class AtLeastOne(click.ParamType):  # type: ignore[type-arg]
    """A whole number of at least 1."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            number = int(value)
        except ValueError:
            number = 0
        if number < 1:
            self.fail(f"{value} is no whole number of at least 1", param, ctx)
        return number


class Positive(click.ParamType):  # type: ignore[type-arg]
    """A finite number above 0."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and number > 0):
            self.fail(f"{value} is no number above 0", param, ctx)
        return number


class Assignment(click.ParamType):  # type: ignore[type-arg]
    """``KEY=VALUE``: a value that reads as an int, float or bool is one, anything else is text.

    >>> Assignment().convert("layers=96", None, None), Assignment().convert("tied=true", None, None)
    (('layers', 96), ('tied', True))
    """

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
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
        if isinstance(value, tuple):
            return value
        from autopar.core.placement import parse_placements

        glob, equals, placements = str(value).rpartition("=")
        if not equals or not glob or not placements:
            self.fail(f"{value!r} is not GLOB=PLACEMENTS, such as 'layers.*.wq.weight=S(0)R'", param, ctx)
        try:
            parse_placements(placements)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return glob, placements


def parse_scalar(text: str) -> bool | int | float | str:
    """
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
    """Assignments as a dict; a key given twice is a usage error, not a silent choice."""
    values: dict[str, Any] = {}
    for key, value in assignments:
        if values.setdefault(key, value) is not value:
            raise UsageError(f"{option} {key} is given twice, as {values[key]} and as {value}")
    return values


def combine_options(*options: Callable[[Function], Function]) -> Callable[[Function], Function]:
    """One decorator of several, shown by ``--help`` in the order given."""

    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


print_options = combine_options(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document, errors included."),
    click.option("-q", "--quiet", is_flag=True, help="No progress."),
    click.option("-v", "--verbose", is_flag=True, help="Every collective, not only their sums."),
)

cluster_options = combine_options(
    click.option("--cluster", default="dgx-h100", show_default=True, metavar="NAME|FILE", help="What to plan for."),
    click.option(
        "--cluster-set", multiple=True, type=Assignment(), metavar="K=V", help="Override a key of the cluster's table."
    ),
)

workload_options = combine_options(
    click.argument("model", type=click.Path()),
    click.option("--gpus", required=True, type=AtLeastOne(), metavar="N", help="GPUs to use."),
    cluster_options,
    click.option("--set", "settings", multiple=True, type=Assignment(), metavar="K=V", help="A setting of the model."),
    click.option("--global-batch", type=AtLeastOne(), metavar="B", help="Samples per step; else the file's own."),
    click.option("--micro-batch", type=AtLeastOne(), metavar="b", help="Samples of a micro-batch, over all its ranks."),
    click.option(
        "--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), help="Default bf16, fp16 where the device has none."
    ),
    click.option("--memory", type=Positive(), metavar="GIB", help="Budget per GPU; else the device's usable memory."),
    click.option("--optimizer", type=click.Choice(["adamw", "sgd"]), default="adamw", show_default=True),
)

search_options = combine_options(
    click.option(
        "--pin",
        "pins",
        multiple=True,
        type=PinParameter(),
        metavar="GLOB=PLACEMENTS",
        help="Fix how parameters lie, leave the rest open.",
    ),
    click.option(
        "--recompute",
        type=click.Choice(["auto", "none", "selective", "full"]),
        default="auto",
        show_default=True,
        help="What the backward computes again.",
    ),
    click.option(
        "--schedule",
        type=click.Choice(["auto", "1f1b", "gpipe", "interleaved"]),
        default="auto",
        show_default=True,
        help="The order of the pipeline's micro-batches.",
    ),
    click.option("--time-limit", type=Positive(), metavar="S", help="Seconds to search; the best plan so far is kept."),
)


def output_file_options(result: str, *, required: bool = False) -> Callable[[Function], Function]:
    """``-o`` and ``--force``, for a file that holds a ``result`` ("plan")."""
    return combine_options(
        click.option(
            "-o",
            "--output",
            required=required,
            type=click.Path(dir_okay=False, readable=False, allow_dash=True),
            metavar="FILE",
            help=f"The {result}'s file, which replaces nothing but an earlier {result}; - is stdout, the text then goes "
            "to stderr.",
        ),
        click.option(
            "--force",
            is_flag=True,
            help="Let -o replace any file, or the file that a link leads to, and write into a device or pipe.",
        ),
    )
