"""Layouts: keys and defaults, every fault at once, and text that parses back."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.core.errors import LayoutError
from autopar.core.layout import Layout, StageSpec, parse_layout


def faults(text: str, gpus: int = 64, batch: int | None = 512, **heads: tuple[int, ...]) -> tuple[str, ...]:
    with pytest.raises(LayoutError) as raised:
        parse_layout(text).resolve(gpus, batch, **heads)
    return raised.value.faults


def test_an_empty_text_is_the_default_layout() -> None:
    layout = parse_layout("")
    assert (layout.tp, layout.pp, layout.cp, layout.ep, layout.vpp, layout.mbs, layout.zero) == (1,) * 6 + (0,)
    assert (layout.dp, layout.gbs, layout.sp, layout.recompute, layout.schedule) == (None, None, False, "none", "1f1b")
    assert (layout.attn, layout.overlap, layout.fusion, layout.grads) == ("flash", True, "megatron", None)


def test_the_documented_example_resolves() -> None:
    text = "tp=8,pp=4,dp=2,mbs=1,gbs=512,sp=1,zero=1,recompute=selective,vpp=2"
    layout = parse_layout(text).resolve(64, 512)
    assert layout.schedule == "interleaved"
    assert layout.num_microbatches == 512 // 2
    assert layout.micro_batch_size == 2
    assert layout.grads == "fp32"


def test_open_keys_are_filled_in() -> None:
    layout = parse_layout("tp=4,cp=2").resolve(64, 8)
    assert (layout.dp, layout.gbs, layout.num_microbatches) == (8, 8, 1)
    assert layout.grads == "same"  # nothing is accumulated
    assert parse_layout("grads=same").resolve(8, 512).grads == "same"
    assert parse_layout("gbs=16").resolve(4, None).num_microbatches == 4


def test_expert_parallelism_does_not_multiply_the_gpus() -> None:
    assert parse_layout("tp=2,ep=8").resolve(16, 64).dp == 8
    assert faults("tp=2,ep=3", 16) == ("ep=3 does not divide dp=8",)


def test_stages_may_be_unequal() -> None:
    layout = parse_layout("stages=8@dp2+8@dp2+16@dp4").resolve(8, 64)
    assert layout.stages == (StageSpec(blocks=8, dp=2), StageSpec(blocks=8, dp=2), StageSpec(blocks=16, dp=4))
    assert (layout.num_stages, layout.pp, layout.dp, layout.num_microbatches) == (3, 3, 4, 16)
    both = parse_layout("stages=1@dp2*tp4")
    assert both.stages == (StageSpec(blocks=1, dp=2, tp=4),)
    assert faults("stages=8@dp2+8@dp4", 8) == ("stages use 2 + 4 = 6 GPUs, not 8",)
    assert faults("stages=8@dp2+8@dp3", 5, 30) == ("stage 0: dp=2 does not divide a micro-batch of 3 samples",)
    assert parse_layout("stages=8@dp2+8@dp3,mbs=2").resolve(5, 30).num_microbatches == 5
    assert len(faults("stages=8@dp2,tp=2,pp=3,dp=1", 2)) == 3


@pytest.mark.parametrize(
    "text", ["stages=8", "stages=8@", "stages=8@xp2", "stages=8@dp2*dp2", "stages=0@dp2", "stages="]
)
def test_stages_that_cannot_be_read_are_refused(text: str) -> None:
    assert "is not blocks@axes" in faults(text)[0]


def test_all_faults_of_the_text_at_once() -> None:
    numbers, words = "tp=0,pp=x,zero=4,sp=yes", "recompute=some,attn=fast,fusion=all,grads=fp64,overlap=2"
    assert faults(f"{numbers},{words},foo=1,mbs,dp=2,dp=4") == (
        "tp='0' is no whole number of at least 1",
        "pp='x' is no whole number of at least 1",
        "zero='4' is none of 0, 1, 2, 3",
        "sp='yes' is none of 0, 1",
        "recompute='some' is none of none, selective, full",
        "attn='fast' is none of flash, math",
        "fusion='all' is none of none, megatron, compiler",
        "grads='fp64' is none of fp32, same",
        "overlap='2' is none of 0, 1",
        "unknown key 'foo'; the keys are tp, pp, cp, ep, dp, mbs, gbs, sp, zero, recompute, vpp, schedule, attn, "
        "overlap, fusion, grads, launch, stages",
        "'mbs' is no key=value",
        "dp is given twice",
    )  # fmt: skip


def test_all_faults_of_the_fit_at_once() -> None:
    assert faults("tp=3,pp=2,dp=4,gbs=510,ep=3,mbs=2", 64, 512, heads=(32, 32), kv_heads=(8,)) == (
        "tp * pp * cp * dp = 3 * 2 * 1 * 4 = 24, not 64 GPUs",
        "gbs=510 in the layout, but the global batch is 512; give one of them",
        "tp=3 does not divide 32 attention heads",
        "tp=3 does not divide 8 key/value heads",
        "ep=3 does not divide dp=4",
        "gbs=510 is no multiple of dp * mbs = 4 * 2 = 8",
    )


@pytest.mark.parametrize(
    ("text", "gpus", "batch", "fault"),
    [
        ("tp=16", 8, 8, "tp * pp * cp = 16 * 1 * 1 = 16 does not divide 8 GPUs"),
        ("", 0, 8, "0 GPUs; the least is 1"),
        ("", 8, None, "no global batch: write gbs= in the layout or give --global-batch"),
        ("vpp=2", 8, 64, "vpp=2 needs a pipeline: pp of at least 2"),
        ("vpp=2,pp=2,schedule=1f1b", 8, 64, "vpp=2 needs schedule=interleaved, not 1f1b"),
        ("pp=2,schedule=interleaved", 8, 64, "schedule=interleaved needs vpp of at least 2"),
        ("vpp=2,pp=4", 8, 6, "vpp=2 needs a multiple of pp=4 micro-batches, gbs / (dp * mbs) = 3"),
    ],
)
def test_each_single_fault_is_reported(text: str, gpus: int, batch: int | None, fault: str) -> None:
    assert faults(text, gpus, batch) == (fault,)


def test_harmless_keys_are_accepted() -> None:
    parse_layout("zero=3,sp=1,tp=1,dp=1").resolve(1, 4)


def test_flags_fill_and_may_not_disagree() -> None:
    assert parse_layout("tp=2", {"recompute": "full", "schedule": "gpipe"}).schedule == "gpipe"
    assert parse_layout("recompute=full", {"recompute": "full"}).recompute == "full"
    with pytest.raises(LayoutError, match="recompute=none in the layout, but --recompute full"):
        parse_layout("recompute=none", {"recompute": "full"})


def test_an_open_layout_has_no_micro_batches() -> None:
    with pytest.raises(LayoutError, match="resolve"):
        _ = parse_layout("tp=2").num_microbatches


def test_resolve_accepts_exactly_the_products() -> None:
    """Against a plain count of the ranks, for every small layout."""
    for tp, pp, cp, dp, gpus in itertools.product((1, 2, 3), (1, 2), (1, 2), (1, 2, 3), (6, 8, 12)):
        layout = parse_layout(f"tp={tp},pp={pp},cp={cp},dp={dp}")
        ranks = len(list(itertools.product(range(tp), range(pp), range(cp), range(dp))))
        if ranks == gpus:
            assert layout.resolve(gpus, 12 * dp).dp == dp
        else:
            with pytest.raises(LayoutError):
                layout.resolve(gpus, 12 * dp)


degrees = st.integers(1, 1024)
layouts = st.builds(
    Layout,
    tp=degrees, pp=degrees, cp=degrees, ep=degrees, dp=st.none() | degrees, mbs=degrees, gbs=st.none() | degrees,
    sp=st.booleans(), zero=st.integers(0, 3), recompute=st.sampled_from(["none", "selective", "full"]),
    schedule=st.sampled_from(["1f1b", "gpipe"]), attn=st.sampled_from(["flash", "math"]), overlap=st.booleans(),
    fusion=st.sampled_from(["none", "megatron", "compiler"]), grads=st.sampled_from([None, "fp32", "same"]), launch=st.sampled_from(["async", "blocking"]),
)  # fmt: skip


@given(layouts)
@settings(max_examples=200, deadline=None)
def test_canonical_text_parses_back(layout: Layout) -> None:
    assert parse_layout(str(layout)) == layout


@pytest.mark.parametrize(
    "text",
    [
        "tp=8,pp=4,dp=2,gbs=512,sp=1,zero=1,recompute=selective,vpp=2",
        "gbs=64,stages=8@dp2+8@dp2*tp2+16@dp1",
        "overlap=0",
    ],
)
def test_equal_layouts_have_one_canonical_text(text: str) -> None:
    assert str(parse_layout(text)) == text
