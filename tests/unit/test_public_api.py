"""The public face: its names, their documentation and types, and how its nouns show themselves."""

import inspect
from html.parser import HTMLParser
from typing import Any, get_type_hints

import pytest
from msgspec.structs import replace
from torch import nn

import autopar

VERBS = ("apply", "estimate", "load_cluster", "load_plan", "load_workload", "plan", "save_plan")
MAX_LINE = 250


class Tables(HTMLParser):
    """The tags and the texts of an HTML fragment; a tag that is not closed is an error."""

    def __init__(self, fragment: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.cells: list[str] = []
        self.feed(fragment)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert attrs == []
        self.open.append(tag)
        self.tags.add(tag)
        if tag in ("td", "th", "caption"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.cells[-1] += data


def test_only_public_names_are_listed() -> None:
    assert dir(autopar) == sorted(autopar.__all__)
    assert not [name for name in dir(autopar) if name.startswith("_")]


@pytest.mark.parametrize("name", autopar.__all__)
def test_every_public_name_is_documented_and_loads_from_where_it_says(name: str) -> None:
    value = getattr(autopar, name)
    assert inspect.getdoc(value)
    assert value.__name__ == name
    assert value.__module__.startswith("autopar.")


@pytest.mark.parametrize("name", VERBS)
def test_every_argument_and_result_of_a_verb_has_a_type(name: str) -> None:
    function = getattr(autopar, name)
    hints = get_type_hints(function)
    assert set(hints) == {*inspect.signature(function).parameters, "return"}


def nouns(plan: autopar.Plan) -> list[object]:
    built = autopar.Workload(
        build_model=lambda: nn.Linear(2, 2), example_inputs=lambda n: {}, settings={"name": "x" * 1000}
    )
    return [plan, plan.estimate, built, autopar.load_cluster("dgx-h100")]


def test_nouns_show_themselves_in_one_short_line(plan: autopar.Plan) -> None:
    for noun in nouns(plan):
        text = repr(noun)
        assert text.startswith(f"{type(noun).__name__}(")
        assert "\n" not in text
        assert len(text) <= MAX_LINE
    assert repr(plan) == "Plan(model='examples/gpt.py', cluster='p3.16xlarge', gpus=8, stages=2, step_time_s=2, ...)"


def test_a_plan_is_a_table_of_its_stages_in_a_notebook(plan: autopar.Plan) -> None:
    shown = Tables(plan._repr_html_())  # IPython's own name for it
    assert shown.tags == {"table", "caption", "thead", "tbody", "tr", "th", "td"}
    assert shown.cells == [
        "examples/gpt.py on 8 GPUs of p3.16xlarge, 2.00 s a step",
        *("stage", "GPUs", "axes", "blocks", "memory of a GPU"),
        *("0", "0-3", "dp 2 x tp 2", "embedding, layers.1 (3)", "11.00 GiB"),
        *("1", "4-7", "dp 2 x tp 2", "layers.2, head (3)", "10.00 GiB"),
    ]


def test_what_a_model_file_names_is_escaped_in_a_notebook(plan: autopar.Plan) -> None:
    script = "<script>alert('&')</script>"
    block = replace(plan.stages[0].blocks[0], name=script)
    stage = replace(plan.stages[0], blocks=(block,))
    odd = replace(
        plan, model=replace(plan.model, path=script), cluster=replace(plan.cluster, name=script), stages=(stage,)
    )
    shown = Tables(odd._repr_html_())
    assert "script" not in shown.tags
    assert shown.cells[0].count(script) == 2
    assert any(cell.startswith(script) for cell in shown.cells[1:])


def test_an_estimate_is_a_table_of_its_figures_in_a_notebook(plan: autopar.Plan) -> None:
    cells = Tables(plan.estimate._repr_html_()).cells
    assert dict(zip(cells[3::2], cells[4::2], strict=True)) == {
        "step time": "2.00 s",
        "tokens/s": "16,384",
        "MFU": "43.2 %",
        "exposed communication": "250.0 ms",
        "memory": "11.00 GiB of 16.00 GiB",
    }


def test_a_plan_of_a_model_built_in_python_can_be_shown(plan: autopar.Plan) -> None:
    made_in_python = replace(plan, model=replace(plan.model, path=None))
    assert Tables(made_in_python._repr_html_()).cells[0].startswith("A model on 8 GPUs")
    assert repr(made_in_python).startswith("Plan(model=None, ")
