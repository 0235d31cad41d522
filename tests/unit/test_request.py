"""Wrong arguments end alike in Python and on the command line: one error, one message, before any model is traced."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autopar
from autopar.cli.main import run

WHOLE = "must be a whole number of at least 1"
AMOUNT = "must be a finite number above 0"
SHARED_FAULTS: list[tuple[str, Any, str, str]] = [
    # keyword, its value in Python, the words of the command line, what the message says
    ("gpus", 0, "--gpus 0", f"gpus (--gpus) {WHOLE}, not 0"),
    ("gpus", -3, "--gpus -3", f"gpus (--gpus) {WHOLE}, not -3"),
    ("gpus", "many", "--gpus many", f"gpus (--gpus) {WHOLE}, not 'many'"),
    ("global_batch", 0, "--global-batch 0", f"global_batch (--global-batch) {WHOLE}, not 0"),
    ("global_batch", -8, "--global-batch -8", f"global_batch (--global-batch) {WHOLE}, not -8"),
    ("dtype", "int8", "--dtype int8", "dtype (--dtype) must be one of bf16, fp16, fp32, not 'int8'"),
    ("memory_gib", -1, "--memory -1", f"memory_gib (--memory) {AMOUNT}, not -1"),
    ("memory_gib", 0, "--memory 0", f"memory_gib (--memory) {AMOUNT}, not 0"),
    ("memory_gib", float("nan"), "--memory nan", f"memory_gib (--memory) {AMOUNT}, not nan"),
    ("memory_gib", float("inf"), "--memory inf", f"memory_gib (--memory) {AMOUNT}, not inf"),
    ("optimizer", "adam", "--optimizer adam", "optimizer (--optimizer) must be one of adamw, sgd, not 'adam'"),
    ("pins", [("w", "Q")], "--pin w=Q", "--pin w: placement 'Q': 'Q' at position 0 is none of"),
    ("pins", [("w", "P")], "--pin w=P", "--pin w=P: write S(dim) or R for each mesh axis"),
    ("cluster", "nowhere", "--cluster nowhere", "no cluster 'nowhere': name a file, or one of"),
]
PLAN_FAULTS: list[tuple[str, Any, str, str]] = [
    ("micro_batch", 0, "--micro-batch 0", f"micro_batch (--micro-batch) {WHOLE}, not 0"),
    ("micro_batch", 3, "--micro-batch 3", "micro_batch (--micro-batch) is 3 samples, which do not divide"),
    (
        "recompute",
        "some",
        "--recompute some",
        "recompute (--recompute) must be one of auto, none, selective, full, not",
    ),
    (
        "schedule",
        "zb",
        "--schedule zb",
        "schedule (--schedule) must be one of auto, 1f1b, gpipe, interleaved, not 'zb'",
    ),
    ("time_limit_s", 0, "--time-limit 0", f"time_limit_s (--time-limit) {AMOUNT}, not 0"),
]
ESTIMATE_FAULTS: list[tuple[str, Any, str, str]] = [
    ("layout", "tp=x", "--layout tp=x", "tp='x' is no whole number of at least 1"),
    ("layout", "tq=2", "--layout tq=2", "unknown key 'tq'; the keys are"),
]
PYTHON_FAULTS: list[tuple[str, Any, str]] = [
    ("workload", "gpt.py", "workload must be a Workload, such as autopar.load_workload returns for a model file"),
    ("workload", None, "workload must be a Workload"),
    ("cluster", None, "cluster (--cluster) must be a Cluster, or a name or file of one, not None"),
    ("gpus", None, f"gpus (--gpus) {WHOLE}, not None"),
    ("gpus", True, f"gpus (--gpus) {WHOLE}, not True"),
    ("gpus", 8.0, f"gpus (--gpus) {WHOLE}, not 8"),
    ("memory_gib", "80", f"memory_gib (--memory) {AMOUNT}, not '80'"),
    ("optimizer", None, "optimizer (--optimizer) must be one of adamw, sgd, not None"),
    ("pins", {"w": "R"}, "pins (--pin) must be a sequence of pairs (glob of parameter names, placements)"),
    ("pins", ["w=R"], "pins (--pin) must be a sequence of pairs"),
]


class Untraceable(nn.Module):
    """Whoever traces it fails the test."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the model was traced")


def workload(**fields: Any) -> autopar.Workload:
    given: dict[str, Any] = {
        "build_model": Untraceable,
        "example_inputs": lambda batch_size: {"x": torch.empty(batch_size, 8)},
        "global_batch": 16,
    }
    return autopar.Workload(**(given | fields))


def in_python(verb: Callable[..., Any], **arguments: Any) -> autopar.UsageError:
    """The error of a call whose other arguments are right."""
    given: dict[str, Any] = {"workload": workload(), "gpus": 8}
    if verb is autopar.estimate:
        given["layout"] = "dp=8"
    with pytest.raises(autopar.UsageError) as error:
        verb(**(given | arguments))
    return error.value


@pytest.fixture
def on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str, str], dict[str, Any]]:
    """Runs a verb whose other words are right; returns the document of its error."""
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(
        "GLOBAL_BATCH = 16\n"
        "def build_model():\n    raise AssertionError('the model was traced')\n"
        "def example_inputs(batch_size):\n    return {}\n"
    )

    def call(verb: str, words: str) -> dict[str, Any]:
        right = {"--gpus": "8", **({"--layout": "dp=8"} if verb == "estimate" else {})}
        given = words.split()
        others = [word for option, value in right.items() if option not in given for word in (option, value)]
        assert run([verb, "model.py", *others, *given, "--json", "-q"]) == 2
        error: dict[str, Any] = json.loads(capsys.readouterr().out)["error"]
        return error

    return call


@pytest.mark.parametrize(
    ("verb", "keyword", "value", "words", "message"),
    [
        *(("plan", *fault) for fault in SHARED_FAULTS + PLAN_FAULTS),
        *(("estimate", *fault) for fault in SHARED_FAULTS + ESTIMATE_FAULTS),
    ],
)
def test_a_wrong_argument_ends_alike_in_python_and_on_the_command_line(
    verb: str,
    keyword: str,
    value: Any,
    words: str,
    message: str,
    on_the_command_line: Callable[[str, str], dict[str, Any]],
) -> None:
    error = in_python(getattr(autopar, verb), **{keyword: value})
    told = on_the_command_line(verb, words)
    assert message in str(error)
    assert (told["kind"], told["message"]) == (type(error).__name__, str(error))


@pytest.mark.parametrize("verb", ["plan", "estimate"])
@pytest.mark.parametrize(("keyword", "value", "message"), PYTHON_FAULTS)
def test_an_argument_of_a_wrong_type_is_refused_before_the_model_is_traced(
    verb: str, keyword: str, value: Any, message: str
) -> None:
    assert message in str(in_python(getattr(autopar, verb), **{keyword: value}))


@pytest.mark.parametrize(
    ("keyword", "value", "message"),
    [
        ("processes", 0, f"processes {WHOLE}, not 0"),
        ("progress", "yes", "progress must be a function of (stage, detail, best_s, gap), not 'yes'"),
    ],
)
def test_what_only_python_gives_a_search_is_checked_too(keyword: str, value: Any, message: str) -> None:
    assert message in str(in_python(autopar.plan, **{keyword: value}))


@pytest.mark.parametrize("verb", ["plan", "estimate"])
def test_a_request_without_a_global_batch_says_where_to_give_one(verb: str) -> None:
    message = str(in_python(getattr(autopar, verb), workload=workload(global_batch=None)))
    assert "no global batch: give --global-batch (global_batch=)" in message


@pytest.mark.parametrize(
    ("keyword", "value", "message"),
    [
        ("optimizer", "adamw", "optimizer must be a function from a list of parameters to a torch optimizer"),
        ("workload", "gpt.py", "workload must be a Workload"),
        ("clip_norm", 0.0, f"clip_norm {AMOUNT}, not 0"),
        ("clip_norm", float("nan"), f"clip_norm {AMOUNT}, not nan"),
        ("seed", 0.5, "seed must be a whole number, not 0.5"),
        ("device", "gpu0", "device must be one of torch's, such as 'cuda:0'"),
    ],
)
def test_wrong_arguments_of_apply_are_refused_before_ranks_meet(
    keyword: str, value: Any, message: str, plan: autopar.Plan
) -> None:
    for apply in (partial(autopar.apply, plan), plan.apply):
        with pytest.raises(autopar.UsageError) as error:
            apply(Untraceable(), **{keyword: value})
        assert message in str(error.value)


def test_apply_takes_a_plan_and_a_module(plan: autopar.Plan) -> None:
    no_plan: Any = "gpt.plan.json"
    with pytest.raises(autopar.UsageError, match=r"plan must be a Plan, such as autopar.load_plan returns for a file"):
        autopar.apply(no_plan, Untraceable())
    with pytest.raises(autopar.UsageError, match=r"model must be a torch\.nn\.Module, not an object of type type"):
        autopar.apply(plan, Untraceable)  # type: ignore[arg-type]
