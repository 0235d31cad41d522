"""What the arguments of a request may be: one rule and one message for each, whether Python or the command line gives it.

``autopar.plan``, ``autopar.estimate``, ``autopar.apply`` and ``estimate_serving`` check all of their arguments before they load or trace
anything; the command line checks each word as it parses it. Nothing is imported for it but our errors, since
``autopar --help`` lists the choices.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from autopar.core.dtypes import LONG_NAMES, SHORT_NAMES
from autopar.core.errors import UsageError

DTYPES = tuple(LONG_NAMES)
Optimizer = Literal["adamw", "sgd"]
RecomputeChoice = Literal["auto", "none", "selective", "full"]
ScheduleChoice = Literal["auto", "1f1b", "gpipe", "interleaved"]
Mode = Literal["prefill", "decode"]
StorageFormat = Literal["same", "int8", "int4"]
"""How weights or the cache are stored: "same" as the model's dtype, or quantised."""
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
RECOMPUTE_MODES: tuple[RecomputeChoice, ...] = get_args(RecomputeChoice)
SCHEDULES: tuple[ScheduleChoice, ...] = get_args(ScheduleChoice)
SERVING_MODES: tuple[Mode, ...] = get_args(Mode)
STORAGE_FORMATS: tuple[StorageFormat, ...] = get_args(StorageFormat)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArgumentRule:
    """``expects`` completes "must be ...", ``allows`` says whether a value is that; ``flag`` is the argument's option on
    the command line, "" where it has none. None is allowed where the argument ``has_default``."""

    expects: str
    allows: Callable[[Any], bool]
    flag: str = ""
    has_default: bool = False

    def check(self, name: str, value: object) -> None:
        """UsageError where ``value`` is not allowed.

        >>> ARGUMENT_RULES["gpus"].check("gpus", 0)
        Traceback (most recent call last):
        autopar.core.errors.UsageError: gpus (--gpus) must be a whole number of at least 1, not 0
        """
        if (value is None and self.has_default) or self.allows(value):
            return
        named = f"{name} ({self.flag})" if self.flag and self.flag != name else name
        raise UsageError(f"{named} must be {self.expects}, not {_value_text(value)}")


def _value_text(value: object) -> str:
    """A value as a message shows it: numbers alike whether the command line parsed them or Python gave them.

    >>> _value_text(-1.0), _value_text("eight"), _value_text(None)
    ('-1', "'eight'", 'None')
    """
    if type(value) is float:
        return f"{value:g}"
    if value is None or isinstance(value, bool | int | str):
        return repr(value)
    return f"an object of type {type(value).__name__}"


def _is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_positive_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _has_members(*names: str) -> Callable[[object], bool]:
    """Whether a value is an object with these members: the types themselves would have to be imported."""
    return lambda value: not isinstance(value, type) and all(hasattr(value, name) for name in names)


def _is_cluster(value: object) -> bool:
    return isinstance(value, str | os.PathLike) or _has_members("devices_per_node")(value)


def _are_pins(value: object) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(pin, list | tuple) and len(pin) == 2 and all(isinstance(text, str) for text in pin) for pin in value
    )


def whole_number(flag: str, *, has_default: bool = False) -> ArgumentRule:
    """The rule of a count."""
    return ArgumentRule(
        expects="a whole number of at least 1", allows=_is_positive_int, flag=flag, has_default=has_default
    )


def positive_number(flag: str, *, has_default: bool = False) -> ArgumentRule:
    """The rule of an amount."""
    return ArgumentRule(
        expects="a finite number above 0", allows=_is_positive_number, flag=flag, has_default=has_default
    )


def one_of(choices: tuple[str, ...], flag: str, *, has_default: bool = False) -> ArgumentRule:
    """The rule of a choice between words."""
    return ArgumentRule(
        expects=f"one of {', '.join(choices)}", allows=choices.__contains__, flag=flag, has_default=has_default
    )


ARGUMENT_RULES: dict[str, ArgumentRule] = {
    "workload": ArgumentRule(
        expects="a Workload, such as autopar.load_workload returns for a model file",
        allows=_has_members("build_model", "example_inputs", "global_batch"),
    ),
    "cluster": ArgumentRule(expects="a Cluster, or a name or file of one", allows=_is_cluster, flag="--cluster"),
    "gpus": whole_number("--gpus"),
    "layout": ArgumentRule(
        expects="a text such as 'tp=8,pp=4,zero=1'", allows=lambda value: isinstance(value, str), flag="--layout"
    ),
    "global_batch": whole_number("--global-batch", has_default=True),
    "micro_batch": whole_number("--micro-batch", has_default=True),
    "dtype": ArgumentRule(
        expects=f"one of {', '.join(DTYPES)}",
        allows=(*DTYPES, *SHORT_NAMES).__contains__,
        flag="--dtype",
        has_default=True,
    ),
    "memory_gib": positive_number("--memory", has_default=True),
    "optimizer": one_of(OPTIMIZERS, "--optimizer"),
    "pins": ArgumentRule(
        expects="a sequence of pairs (glob of parameter names, placements)", allows=_are_pins, flag="--pin"
    ),
    "recompute": one_of(RECOMPUTE_MODES, "--recompute"),
    "schedule": one_of(SCHEDULES, "--schedule"),
    "time_limit_s": positive_number("--time-limit", has_default=True),
    "mode": one_of(SERVING_MODES, "--mode"),
    "batch": whole_number("--global-batch", has_default=True),
    "context": whole_number("--context", has_default=True),
    "weights": one_of(STORAGE_FORMATS, "--weights"),
    "kv_cache": one_of(STORAGE_FORMATS, "--kv-cache"),
    "progress": ArgumentRule(expects="a function of (stage, detail, best_s, gap)", allows=callable, has_default=True),
    "processes": whole_number(""),
    "plan": ArgumentRule(
        expects="a Plan, such as autopar.load_plan returns for a file",
        allows=_has_members("stages", "programs", "estimate"),
    ),
    "model": ArgumentRule(expects="a torch.nn.Module", allows=_has_members("named_parameters")),
    "make_optimizer": ArgumentRule(
        expects="a function from a list of parameters to a torch optimizer", allows=callable, has_default=True
    ),
    "clip_norm": positive_number("", has_default=True),
    "seed": ArgumentRule(
        expects="a whole number", allows=lambda value: isinstance(value, int) and not isinstance(value, bool)
    ),
}
"""By keyword of ``autopar.plan``, ``autopar.estimate``, ``autopar.apply`` and ``serving.serve.estimate_serving``; apply's
``optimizer`` is ``make_optimizer``."""


def check_request(**arguments: object) -> None:
    """UsageError for the first of the keyword arguments that breaks its rule in ``ARGUMENT_RULES``.

    >>> check_request(gpus=8, optimizer="adam")
    Traceback (most recent call last):
    autopar.core.errors.UsageError: optimizer (--optimizer) must be one of adamw, sgd, not 'adam'
    """
    for name, value in arguments.items():
        ARGUMENT_RULES[name].check(name, value)


def choose_global_batch(*batches: int | None, model_file: str | None) -> int:
    """The first batch that is given: the request's own, the layout's ``gbs``, the model file's GLOBAL_BATCH.

    >>> choose_global_batch(None, 64, 1024, model_file="gpt.py")
    64
    """
    for batch in batches:
        if batch is not None:
            return batch
    where = f"set GLOBAL_BATCH = 1024 (say) in {model_file}" if model_file else "make the Workload with one"
    raise UsageError(f"no global batch: give --global-batch (global_batch=), or {where}")


def check_micro_batch(micro_batch: int | None, global_batch: int) -> None:
    """UsageError for a micro-batch that does not divide the global batch.

    >>> check_micro_batch(3, 32)
    Traceback (most recent call last):
    autopar.core.errors.UsageError: micro_batch (--micro-batch) is 3 samples, which do not divide the global batch of 32
    """
    if micro_batch is not None and global_batch % micro_batch:
        raise UsageError(
            f"micro_batch (--micro-batch) is {micro_batch} samples, which do not divide the global batch of {global_batch}"
        )


def check_context(context: int | None, mode: str) -> None:
    """UsageError for tokens in the cache of a prefill.

    >>> check_context(64, "prefill")
    Traceback (most recent call last):
    autopar.core.errors.UsageError: context (--context) is for the mode decode; a prefill runs the model's own sequence
    """
    if context is not None and mode == "prefill":
        raise UsageError("context (--context) is for the mode decode; a prefill runs the model's own sequence")
