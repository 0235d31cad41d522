"""`estimate --mode prefill|decode`: inference of a traced model on tensor-parallel groups, from the same graph, layout
rules and tables as its training.

A group of tp ranks serves a replica, dp replicas work side by side. What tp cuts is what the training layout of the
same tp cuts. Ops behind the last one that reads a parameter are the loss and do not run; that one, the head, runs for
the last token of a sequence only. N is the traced sequence:

    prefill   forward of b sequences of N tokens, as the training layout prices it, without loss
    decode    `cost.inference`: every op at 1 / N of its rows
"""

from dataclasses import dataclass, fields, replace
from typing import Literal

from autopar.cluster.cluster import Cluster
from autopar.cluster.cost_tables import load_cluster
from autopar.core.errors import LayoutError, UsageError
from autopar.core.layout import Layout, parse_layout
from autopar.graph.attention import AttentionCall, attention_calls
from autopar.graph.flops import num_parameters
from autopar.graph.traced_model import trace_model
from autopar.serving.decode_step import StorageFormat, largest_batch, price_decode_step
from autopar.serving.replica import Replica
from autopar.workload.workload import Workload

Mode = Literal["prefill", "decode"]
SERVING_KEYS = ("tp", "dp", "gbs", "fusion")  # keys of a layout that inference takes


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBatch:
    """A decode step of ``batch`` sequences per replica: seconds, tokens per second of all replicas, bandwidth used."""

    batch: int
    time_s: float
    tokens_per_s: float
    mbu: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingEstimate:
    """The price of serving. ``batch`` sequences per replica of ``context`` tokens each, ``largest_batch`` that fits;
    ``time_s`` is that of the prefill, or of one decode step, ``parts`` what it is made of. Bytes are of one device.
    ``mbu`` is 0 of a prefill. ``curve`` are other batches of a decode."""

    mode: Mode
    parameters: int
    dtype: str
    weights: str
    kv_cache: str
    cluster: str
    gpus: int
    tp: int
    replicas: int
    batch: int
    context: int
    largest_batch: int
    kv_heads: tuple[int, ...]
    time_s: float
    tokens_per_s: float
    mfu: float
    mbu: float
    parts: tuple[tuple[str, float], ...]
    weights_bytes: int
    cache_bytes: int
    cache_bytes_per_token: float
    workspace_bytes: int
    fixed_bytes: int
    budget_bytes: int
    curve: tuple[DecodeBatch, ...]

    @property
    def peak_memory_bytes(self) -> int:
        return self.weights_bytes + self.cache_bytes + self.workspace_bytes + self.fixed_bytes

    @property
    def fits(self) -> bool:
        return self.peak_memory_bytes <= self.budget_bytes


def estimate_serving(
    workload: Workload,
    *,
    cluster: Cluster | str = "dgx-h100",
    gpus: int,
    layout: str,
    mode: Mode,
    batch: int | None = None,
    context: int | None = None,
    weights: StorageFormat = "same",
    kv_cache: StorageFormat = "same",
    dtype: str | None = None,
    memory_gib: float | None = None,
) -> ServingEstimate:
    """Price inference; ``batch`` sequences over all replicas, else the most that fit (decode) or the fewest there can
    be (prefill). ``context`` tokens in the cache, else the traced sequence. LayoutError for a layout that inference
    does not take, UsageError for a model that does not generate."""
    machine = load_cluster(cluster)
    model = trace_model(workload, dtype=dtype or machine.device.default_dtype)
    calls = attention_calls(model.graph)
    sequence = _sequence_length(calls, mode)
    chosen = _serving_layout(layout, gpus, batch, calls)
    replicas = chosen.dp or 1
    if "fusion=" not in layout.replace(" ", ""):
        chosen = replace(chosen, fusion="compiler")  # what engines that serve do
    group = Replica.of(model, machine, chosen, memory_gib)
    served = group.served_model(calls, sequence, weights, kv_cache)
    tokens = sequence if mode == "prefill" or context is None else context
    held = served.weights_bytes + served.workspace_bytes + served.fixed_bytes
    growing = served.workspace_bytes / group.min_batch if mode == "prefill" else 0.0
    held -= served.workspace_bytes if mode == "prefill" else 0.0
    largest = largest_batch(group.pricer.budget_bytes, held, served.cache_bytes_per_token * tokens + growing)
    fewest = group.min_batch if mode == "prefill" else 1
    per_replica = (
        chosen.gbs // replicas
        if batch is not None and chosen.gbs
        else (fewest if mode == "prefill" else max(largest, 1))
    )
    if per_replica % fewest:
        raise LayoutError([f"{per_replica} sequences per replica are no multiple of {fewest}, which the model needs"])
    peak = machine.device.peak(model.dtype)
    curve: tuple[DecodeBatch, ...] = ()
    if mode == "prefill":
        parts, flops = group.prefill(per_replica, sequence, served)
        time_s, mbu = sum(seconds for _, seconds in parts), 0.0
        mfu, rate = flops / (time_s * peak * chosen.tp), per_replica * sequence / time_s
    else:
        points = sorted({*(2**at for at in range(largest.bit_length())), per_replica, *([largest] if largest else [])})
        replayed = chosen.fusion != "none"
        steps = {size: price_decode_step(served, size, tokens, machine, cuda_graph=replayed) for size in points}
        step = steps[per_replica]
        names = ("matmul", "attention", "other", "exchange", "launches")
        parts = tuple((name, getattr(step, f"{name}_s")) for name in names)
        time_s, mbu, mfu = step.time_s, step.mbu(machine.device), step.mfu(machine.device, model.dtype)
        rate = per_replica / time_s
        curve = tuple(
            DecodeBatch(
                batch=size,
                time_s=one.time_s,
                tokens_per_s=size / one.time_s * replicas,
                mbu=one.mbu(machine.device),
            )
            for size, one in steps.items()
        )
    return ServingEstimate(
        mode=mode,
        parameters=num_parameters(model.graph),
        dtype=model.dtype,
        weights=model.dtype if weights == "same" else weights,
        kv_cache=model.dtype if kv_cache == "same" else kv_cache,
        cluster=machine.name,
        gpus=gpus,
        tp=chosen.tp,
        replicas=replicas,
        batch=per_replica,
        context=tokens,
        largest_batch=largest // fewest * fewest,
        kv_heads=tuple(sorted({call.kv_heads for call in calls})),
        time_s=time_s,
        tokens_per_s=rate * replicas,
        mfu=mfu,
        mbu=mbu,
        parts=parts,
        weights_bytes=round(served.weights_bytes),
        cache_bytes=round(served.cache_bytes_per_token * tokens * per_replica),
        cache_bytes_per_token=served.cache_bytes_per_token,
        workspace_bytes=round(growing * per_replica if mode == "prefill" else served.workspace_bytes),
        fixed_bytes=round(served.fixed_bytes),
        budget_bytes=int(group.pricer.budget_bytes),
        curve=curve,
    )


def _sequence_length(calls: tuple[AttentionCall, ...], mode: Mode) -> int:
    """The traced sequence; UsageError for models that keep no keys and values of one sequence, or do not generate."""
    if not calls:
        raise UsageError(
            "the model calls no scaled_dot_product_attention, so it keeps no keys and values: --mode train prices it"
        )
    lengths = sorted({length for call in calls for length in (call.query_length, call.key_length)})
    if len(lengths) > 1 or any(call.is_cross_attention for call in calls):
        told = " and ".join(map(str, lengths))
        raise UsageError(
            f"the model attends from one sequence to another ({told} tokens); inference is priced of decoder-only models"
        )
    if mode == "decode" and not all(call.is_masked for call in calls):
        raise UsageError("the model attends without a causal mask, so it generates nothing: --mode prefill prices it")
    return lengths[0]


def _serving_layout(text: str, gpus: int, batch: int | None, calls: tuple[AttentionCall, ...]) -> Layout:
    """The layout, resolved; LayoutError lists every key that inference does not take and every fault."""
    layout, plain = parse_layout(text), Layout()
    refused = [
        field.name
        for field in fields(Layout)
        if field.name not in SERVING_KEYS and getattr(layout, field.name) != getattr(plain, field.name)
    ]
    faults = [f"{key}=: inference takes {', '.join(SERVING_KEYS)} only" for key in refused]
    kept = replace(plain, **{key: getattr(layout, key) for key in SERVING_KEYS})
    total = batch if batch is not None or layout.gbs is not None else layout.dp or max(gpus // layout.tp, 1)
    heads, kv_heads = tuple({call.heads for call in calls}), tuple({call.kv_heads for call in calls})
    try:
        resolved = kept.resolve(gpus, total, heads=heads, kv_heads=kv_heads)
    except LayoutError as error:
        raise LayoutError([*faults, *error.faults]) from None
    if faults:
        raise LayoutError(faults)
    return resolved
