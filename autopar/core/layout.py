"""Manual layouts: the text of ``--layout``, parsed, resolved against a GPU count and a batch, and printed back.

    tp=8,pp=4,dp=2,mbs=1,gbs=512,sp=1,zero=1,recompute=selective,vpp=2
    stages=8@dp2+8@dp2+16@dp2*tp2,gbs=256

Ranks are numbered in Megatron's order: tp fastest, then cp, dp (ep inside dp), pp slowest. With P = pp stages:

    gpus = tp * cp * dp * pp                     dp, where it is not given, is what is left          (_gpu_faults)
    microbatches = gbs / (dp * mbs)              mbs is per data-parallel rank                    (_batch_faults)
    interleaved: vpp > 1, pp > 1, microbatches a multiple of pp                                   (_schedule_faults)

Only what no runtime can run is a fault, and all faults are reported at once.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from autopar.core.errors import LayoutError

STAGE_AXES = ("dp", "cp", "tp")  # outermost first


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """One stage of ``stages=``: ``blocks`` blocks on dp * cp * tp GPUs.

    >>> str(StageSpec(blocks=16, dp=2, tp=4))
    '16@dp2*tp4'
    """

    blocks: int
    dp: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def num_gpus(self) -> int:
        """GPUs of the stage."""
        return self.dp * self.cp * self.tp

    def __str__(self) -> str:
        axes = [f"{axis}{getattr(self, axis)}" for axis in STAGE_AXES if getattr(self, axis) > 1]
        return f"{self.blocks}@{'*'.join(axes) or 'dp1'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A manual layout. Degrees count ranks; ``mbs`` samples per data-parallel rank; ``gbs`` samples per step.

    ``dp`` and ``gbs`` are None until ``resolve``; ``grads`` None means fp32 when gradients are accumulated over
    micro-batches. ``stages`` replaces tp, cp, dp and pp: the fields of the first three are then the largest of the
    stages, pp is their number. A micro-batch gives ``mbs`` samples to each rank of the stages with the largest dp, more
    to the others. ``overlap``: reductions of gradients, gathers of parameters and exchanges of the input gradients of
    linear ops overlap with compute; with ``sp`` the last always do, as in Megatron-LM.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    dp: int | None = None
    mbs: int = 1
    gbs: int | None = None
    sp: bool = False
    zero: int = 0
    recompute: Literal["none", "selective", "full"] = "none"
    vpp: int = 1
    schedule: Literal["1f1b", "gpipe", "interleaved"] = "1f1b"
    attn: Literal["flash", "math"] = "flash"
    overlap: bool = True
    fusion: Literal["none", "megatron", "compiler"] = "megatron"
    grads: Literal["fp32", "same"] | None = None
    launch: Literal["async", "blocking"] = "async"
    stages: tuple[StageSpec, ...] = ()

    @property
    def num_stages(self) -> int:
        """Submeshes in the pipeline: pp, or the number of the stages listed."""
        return len(self.stages) or self.pp

    @property
    def num_microbatches(self) -> int:
        """gbs / (dp * mbs); LayoutError before the layout is resolved."""
        if self.dp is None or self.gbs is None:
            raise LayoutError(["dp and gbs are open; resolve the layout against a GPU count and a global batch first"])
        return self.gbs // (self.dp * self.mbs)

    @property
    def micro_batch_size(self) -> int:
        """Samples of one micro-batch over all ranks of a stage: dp * mbs."""
        return (self.dp or 1) * self.mbs

    def resolve(
        self,
        gpus: int,
        global_batch: int | None,
        *,
        heads: tuple[int, ...] = (),
        kv_heads: tuple[int, ...] = (),
    ) -> "Layout":
        """The layout with dp, gbs and grads filled in; LayoutError lists all faults of one that cannot run.

        ``heads`` and ``kv_heads`` are the head counts of the model's attentions, which tp must divide.

        >>> parse_layout("tp=2,pp=2").resolve(8, 16).dp
        2
        >>> parse_layout("tp=3,gbs=10").resolve(8, 16, heads=(16,)).dp
        Traceback (most recent call last):
        autopar.core.errors.LayoutError: impossible layout:
          - tp * pp * cp = 3 * 1 * 1 = 3 does not divide 8 GPUs
          - gbs=10 in the layout, but the global batch is 16; give one of them
          - tp=3 does not divide 16 attention heads
        """
        faults: list[str] = []
        dp = self._resolved_dp(gpus, faults)
        gbs = self._resolved_gbs(global_batch, faults)
        layout = replace(self, dp=dp or None, gbs=gbs)
        layout._head_faults(heads, kv_heads, faults)
        if dp:
            layout._batch_faults(faults)
        if faults:
            raise LayoutError(faults)
        accumulated = layout.num_microbatches > 1
        return layout if layout.grads else replace(layout, grads="fp32" if accumulated else "same")

    def _resolved_dp(self, gpus: int, faults: list[str]) -> int:
        """The data-parallel degree (of the first stage), 0 after a fault of the GPU product."""
        if gpus < 1:
            faults.append(f"{gpus} GPUs; the least is 1")
            return 0
        if self.stages:
            used = [stage.num_gpus for stage in self.stages]
            if sum(used) != gpus:
                faults.append(f"stages use {' + '.join(map(str, used))} = {sum(used)} GPUs, not {gpus}")
            return max(stage.dp for stage in self.stages)
        model = self.tp * self.pp * self.cp
        product = f"{self.tp} * {self.pp} * {self.cp}"
        if self.dp is None and gpus % model:
            faults.append(f"tp * pp * cp = {product} = {model} does not divide {gpus} GPUs")
            return 0
        if self.dp is not None and model * self.dp != gpus:
            faults.append(f"tp * pp * cp * dp = {product} * {self.dp} = {model * self.dp}, not {gpus} GPUs")
        return self.dp if self.dp is not None else gpus // model

    def _resolved_gbs(self, global_batch: int | None, faults: list[str]) -> int | None:
        """The global batch, None after a fault."""
        if self.gbs is not None and global_batch is not None and self.gbs != global_batch:
            faults.append(f"gbs={self.gbs} in the layout, but the global batch is {global_batch}; give one of them")
        gbs = self.gbs if self.gbs is not None else global_batch
        if gbs is None:
            faults.append("no global batch: write gbs= in the layout or give --global-batch")
        return gbs

    def _head_faults(self, heads: tuple[int, ...], kv_heads: tuple[int, ...], faults: list[str]) -> None:
        """Add a fault for each tensor-parallel degree that does not divide a head count."""
        for tp in sorted({stage.tp for stage in self.stages} or {self.tp}):
            for what, counts in (("attention heads", heads), ("key/value heads", kv_heads)):
                for count in sorted(set(counts)):
                    if count % tp:
                        faults.append(f"tp={tp} does not divide {count} {what}")

    def _batch_faults(self, faults: list[str]) -> None:
        """Add the faults of batch, experts and schedule of a layout whose dp is known."""
        assert self.dp is not None
        for dp in sorted({stage.dp for stage in self.stages} or {self.dp}):
            if dp % self.ep:
                faults.append(f"ep={self.ep} does not divide dp={dp}")
        if self.gbs is None:
            return
        micro_batch = self.dp * self.mbs
        if self.gbs % micro_batch:
            faults.append(f"gbs={self.gbs} is no multiple of dp * mbs = {self.dp} * {self.mbs} = {micro_batch}")
            return
        for position, stage in enumerate(self.stages):
            if micro_batch % stage.dp:
                faults.append(f"stage {position}: dp={stage.dp} does not divide a micro-batch of {micro_batch} samples")
        if self.schedule == "interleaved" and self.num_microbatches % self.num_stages:
            faults.append(
                f"vpp={self.vpp} needs a multiple of pp={self.num_stages} micro-batches, "
                f"gbs / (dp * mbs) = {self.num_microbatches}"
            )

    def __str__(self) -> str:
        """The canonical text: degrees first, then what differs from the defaults; ``parse_layout`` reads it back.

        >>> str(parse_layout("zero=1, tp=8,pp=1,sp=1"))
        'tp=8,sp=1,zero=1'
        """
        parts = []
        for key in _KEYS:
            value = getattr(self, key)
            derived = self.stages and key in ("tp", "pp", "cp", "dp")
            if derived or value == _DEFAULTS[key] or (key == "schedule" and self.vpp > 1):
                continue
            if key == "stages":
                value = "+".join(map(str, value))
            parts.append(f"{key}={int(value) if isinstance(value, bool) else value}")
        return ",".join(parts)


def parse_layout(text: str, flags: Mapping[str, str] | None = None) -> Layout:
    """Read a layout; LayoutError lists every unknown key, bad value and contradiction at once.

    >>> parse_layout("stages=8@dp2+16@dp2*tp4").stages[1].num_gpus
    8
    >>> parse_layout("tp=x,zero=4")
    Traceback (most recent call last):
    autopar.core.errors.LayoutError: impossible layout:
      - tp='x' is no whole number of at least 1
      - zero='4' is none of 0, 1, 2, 3

    ``flags`` are keys given elsewhere (``--recompute full``): they fill what the text leaves open and may not disagree.

    >>> str(parse_layout("tp=8", {"recompute": "full"}))
    'tp=8,recompute=full'
    """
    faults: list[str] = []
    given: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not part.strip():
            continue
        if not equals:
            faults.append(f"{part.strip()!r} is no key=value")
        elif key not in _KEYS:
            faults.append(f"unknown key {key!r}; the keys are {', '.join(_KEYS)}")
        elif key in given:
            faults.append(f"{key} is given twice")
        else:
            given[key] = _parse_value(key, value, faults)
    for key, text in (flags or {}).items():
        value = _parse_value(key, text, faults)
        if given.setdefault(key, value) != value:
            faults.append(f"{key}={given[key]} in the layout, but --{key} {text}; give one of them")
    known = {key: value for key, value in given.items() if value is not None}
    if "schedule" not in given and known.get("vpp", 1) > 1:
        known["schedule"] = "interleaved"
    _schedule_faults(known, faults)
    if "stages" in known:
        faults.extend(f"stages= replaces {key}=; give one of them" for key in ("tp", "pp", "cp", "dp") if key in given)
        known |= {axis: max(getattr(stage, axis) for stage in known["stages"]) for axis in STAGE_AXES}
        known["pp"] = len(known["stages"])
    if faults:
        raise LayoutError(faults)
    return Layout(**known)


_KEYS = tuple(field.name for field in fields(Layout))
_DEFAULTS: dict[str, Any] = {key: getattr(Layout(), key) for key in _KEYS}
_CHOICES = {
    "zero": ("0", "1", "2", "3"),
    "sp": ("0", "1"),
    "overlap": ("0", "1"),
    "recompute": ("none", "selective", "full"),
    "schedule": ("1f1b", "gpipe", "interleaved"),
    "attn": ("flash", "math"),
    "fusion": ("none", "megatron", "compiler"),
    "grads": ("fp32", "same"),
    "launch": ("async", "blocking"),
}
_STAGE = re.compile(r"([1-9]\d*)@((?:dp|cp|tp)[1-9]\d*(?:\*(?:dp|cp|tp)[1-9]\d*)*)")


def _parse_value(key: str, text: str, faults: list[str]) -> Any:
    """The value of one key, or None after adding a fault."""
    if key == "stages":
        return _parse_stages(text, faults)
    if key in _CHOICES:
        if text not in _CHOICES[key]:
            faults.append(f"{key}={text!r} is none of {', '.join(_CHOICES[key])}")
            return None
        return text == "1" if key in ("sp", "overlap") else int(text) if key == "zero" else text
    if re.fullmatch(r"[0-9]{1,12}", text) is None or int(text) < 1:
        faults.append(f"{key}={text!r} is no whole number of at least 1")
        return None
    return int(text)


def _parse_stages(text: str, faults: list[str]) -> tuple[StageSpec, ...] | None:
    """The stages of ``stages=``, or None after adding a fault for each that cannot be read."""
    stages = []
    for part in text.split("+"):
        match = _STAGE.fullmatch(part.strip())
        degrees = [(axis[:2], int(axis[2:])) for axis in match[2].split("*")] if match else []
        if match is None or len({axis for axis, _ in degrees}) != len(degrees):
            faults.append(f"stage {part.strip()!r} is not blocks@axes, such as 8@dp2 or 16@dp2*tp4")
            continue
        stages.append(StageSpec(blocks=int(match[1]), **dict(degrees)))
    return tuple(stages) if len(stages) == len(text.split("+")) else None


def _schedule_faults(known: dict[str, Any], faults: list[str]) -> None:
    """Add the faults of vpp and the schedule: they have to agree, and chunks need a pipeline."""
    vpp, schedule = known.get("vpp", 1), known.get("schedule", "1f1b")
    num_stages = len(known.get("stages", ())) or known.get("pp", 1)
    if vpp > 1 and schedule != "interleaved":
        faults.append(f"vpp={vpp} needs schedule=interleaved, not {schedule}")
    if schedule == "interleaved":
        if vpp == 1:
            faults.append("schedule=interleaved needs vpp of at least 2")
        elif num_stages == 1:
            faults.append(f"vpp={vpp} needs a pipeline: pp of at least 2")
        if len({stage.num_gpus for stage in known.get("stages", ())}) > 1:
            faults.append("schedule=interleaved needs stages of equal size")
