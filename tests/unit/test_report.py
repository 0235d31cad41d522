"""Reports: golden texts of a hand-made plan, and figures that can be checked by hand."""

import json
from pathlib import Path

import msgspec
import pytest

from autopar.core.comparison import Comparison
from autopar.core.mesh_axis import Axis
from autopar.core.plan import ParameterPlan, Plan
from autopar.report.comparison_text import comparison_text
from autopar.report.json_document import comparison_document, plan_document
from autopar.report.plan_text import plan_text
from autopar.report.sharding import sharding_text
from tests.unit.sample_plan import GIB, estimate, sample_plan

PLAN_TEXT = """\
model       examples/gpt.py layers=4 size=tiny
parameters  1.3 B
cluster     8 GPUs of p3.16xlarge inter_node_gbits_per_s=100
software    fp16, adamw, flash attention, fusion megatron, gradients fp32, overlap on

stage  blocks                           GPUs  axes         forward  backward  per step  in flight  memory
    0  embedding, layers.0 .. layers.1  0-3   dp 2 x tp 2  60.0 ms  120.0 ms   30.0 ms          2  #######... 11.00 GiB
    1  layers.2 .. layers.3, head       4-7   dp 2 x tp 2  60.0 ms  120.0 ms   30.0 ms          1  ######.... 10.00 GiB

batch                  32 samples in 8 micro-batches of 4 samples
schedule               1f1b, selective recompute
step time              2.00 s, 16,384 tokens/s
model FLOPs            250.0 TFLOP a step: matmul 90.0 %, attention 10.0 %
MFU                    43.2 %
bubble                 12.5 %
exposed communication  250.0 ms
memory                 11.00 GiB of 16.00 GiB, fits (tensors 10.00 GiB)
cost basis             62.0 % of the priced time measured (40 prices), 38.0 % modelled (17)
search                 feasible, gap 5.0 % (bound 1.90 s), 12.5 s
runner-up              dp 8, 2.10 s: more exposed reduction

Where the step goes on the devices of the busiest stage
  matmul                             900.0 ms  #########...........  45.0 %
  attention                          200.0 ms  ##..................  10.0 %
  memory-bound kernels               100.0 ms  #...................   5.0 %
  all_reduce over tp, activations    200.0 ms  ##..................  10.0 %
  reduce_scatter over dp, gradients   50.0 ms  ....................   2.5 %  of 100.0 ms, the rest overlapped
  transfers between stages            10.0 ms  ....................   0.5 %  of 16.0 ms, the rest overlapped
  optimizer                           50.0 ms  ....................   2.5 %
  idle (bubble)                      490.0 ms  #####...............  24.5 %

Memory of a device in GiB, of 16.00 GiB
  stages  params P  grads G  optim O  saved A  work W  fixed F  total
  0           2.00     2.00     3.00     2.00    1.00     1.00  11.00  PPPPGGGGOOOOOOAAAAWWFF..........
  1           2.00     2.00     3.00     1.00    1.00     1.00  10.00  PPPPGGGGOOOOOOAAWWFF............

Collectives
  all_reduce      over tp  4 per micro-batch, stage 0  128.00 MiB
  reduce_scatter  over dp  1 per step, stage 1         1,024.00 MiB

Parameters
  wte.weight                S(0) on tp, ZeRO-1 over dp, gradients partial over dp
  layers.*.attn.qkv.weight  _S(0,3) on tp, ZeRO-1 over dp
  layers.*.norm.weight      ZeRO-3 over dp
  norm.weight               replicated

Notes
  - aten.weird.default has no rule: replicated, 1.2 ms a micro-batch
"""

COMPARISON_TEXT = """\
240 layouts priced, 31 of them fit in memory

                       plan         tp=8,zero=1
step time              2.00 s       2.50 s
tokens/s               16,384       13,107
MFU                    43.2 %       34.6 %
exposed communication  250.0 ms     650.0 ms
bubble                 12.5 %       14.0 %
memory                 11.00 GiB    11.00 GiB
stages                 2            2
axes                   dp 2 x tp 2  dp 2 x tp 2 (stage 0), tp 4 (stage 1)
micro-batches          8 of 4       8 of 4
schedule               1f1b         1f1b
recompute              selective    selective

The plan is 1.250x faster than the layout.
Of a step: exposed communication -400.0 ms, bubble -100.0 ms.
"""


def slower_plan() -> Plan:
    """The sample with 0.4 s more exposed communication and 0.1 s more bubble (0.14 x 2.5 - 0.125 x 2)."""
    time = msgspec.structs.replace(sample_plan().estimate.time, exposed_communication_s=0.65)
    figures = estimate(
        step_time_s=2.5,
        tokens_per_s=13107.2,
        samples_per_s=12.8,
        mfu=0.34568,
        bubble_fraction=0.14,
        exposed_communication_s=0.65,
        time=time,
    )
    plan = sample_plan(estimate=figures)
    second = msgspec.structs.replace(plan.stages[1], axes=(Axis(name="dp", size=1), Axis(name="tp", size=4)))
    return msgspec.structs.replace(plan, stages=(plan.stages[0], second))


def comparison() -> Comparison:
    return Comparison(plan=sample_plan(), best=slower_plan(), num_layouts=240, num_fit=31, layout="tp=8,zero=1")


def test_a_plan_s_report_is_the_golden_text() -> None:
    assert plan_text(sample_plan()) == PLAN_TEXT


def test_a_comparison_s_report_is_the_golden_text() -> None:
    assert comparison_text(comparison()) == COMPARISON_TEXT


@pytest.mark.parametrize("width", [72, 80, 100, 120, 200])
def test_no_figure_is_truncated_at_any_width(width: int) -> None:
    text = plan_text(sample_plan(), width=width, verbose=True)
    assert max(map(len, text.splitlines())) <= width
    for figure in ("11.00 GiB", "10.00 GiB", "60.0 ms", "120.0 ms", "dp 2", "4 per micro-batch", "1,024.00 MiB"):
        assert figure in text
    assert "…" not in text
    assert max(map(len, comparison_text(comparison(), width=width).splitlines())) <= width


def test_a_plan_that_does_not_fit_says_so() -> None:
    figures = estimate(budget_bytes=8 * GIB, fits=False)
    text = plan_text(sample_plan(estimate=figures))
    assert "11.00 GiB of 8.00 GiB, DOES NOT FIT" in text
    assert "#########! 11.00 GiB" in text
    best = sample_plan(estimate=figures)
    side_by_side = comparison_text(Comparison(plan=sample_plan(), best=best, num_layouts=1, num_fit=0, layout="tp=8"))
    assert "1 layout priced, 0 of them fit" in side_by_side
    assert "The layout needs 11.00 GiB of 8.00 GiB." in side_by_side


def test_a_comparison_says_where_no_layout_fits() -> None:
    none = Comparison(plan=sample_plan(), best=None, num_layouts=240, num_fit=0, layout="")
    assert "240 layouts priced, 0 of them fit in memory: nothing to compare with" in comparison_text(none)
    assert comparison_document(none, None)["speedup"] is None


@pytest.mark.parametrize(
    ("placements", "text"),
    [
        (("RR", "RR", "RR", "RR"), "replicated"),
        (("RS(1)", "RS(1)", "RS(1)", "RS(1)"), "S(1) on tp"),
        (("S(1)S(0)", "S(1)S(0)", "S(1)S(0)", "S(1)S(0)"), "S(1) on ep, S(0) on tp"),
        (("RR", "RR", "S(0)R", "S(0)R"), "ZeRO-2 over ep"),
        (("RR", "S(0)S(0)", "S(0)S(0)", "S(0)S(0)"), "ZeRO-3 over ep*tp"),
        (("RR", "RS(0)", "RS(0)", "S(0)S(0)"), "ZeRO-1 over ep, ZeRO-3 over tp"),
    ],
)
def test_a_parameter_s_sharding_is_in_words(placements: tuple[str, str, str, str], text: str) -> None:
    compute, parameter, gradient, optimizer = placements
    line = ParameterPlan(name="w", compute=compute, parameter=parameter, gradient=gradient, optimizer=optimizer)
    mesh = (Axis(name="ep", size=2), Axis(name="tp", size=4))
    assert sharding_text(line, mesh) == text


def test_a_pattern_that_differs_by_stage_names_the_stages() -> None:
    plan = sample_plan()
    second = msgspec.structs.replace(plan.stages[1], axes=(Axis(name="dp", size=4), Axis(name="tp", size=1)))
    text = plan_text(msgspec.structs.replace(plan, stages=(plan.stages[0], second)))
    assert "layers.*.attn.qkv.weight  _S(0,3) on tp, ZeRO-1 over dp" in text
    rows = [line.split()[-2:] for line in text.splitlines() if "layers.*.attn.qkv.weight" in line]
    assert rows == [["stage", "0"], ["stage", "1"]]


def test_documents_are_json(tmp_path: Path) -> None:
    document = json.loads(json.dumps(comparison_document(comparison(), "p.json"), allow_nan=False))
    assert document["speedup"] == 1.25
    assert document["plan"] == plan_document(sample_plan(), "p.json")
    assert document["num_fit"] == 31
