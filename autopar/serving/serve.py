"""`estimate --mode prefill|decode`: inference of a traced model on tensor-parallel groups, from the same graph, layout
rules and cost tables as its training.

A group of tp ranks serves a replica, and dp replicas serve in parallel. A replica's tensors are sharded as in the
training layout of the same tp. Ops after the last one that reads a parameter are the loss and do not run; that one, the
head, runs for the last token of a sequence only. With N the traced sequence:

    prefill   the forward of b sequences of N tokens, as the training layout prices it, without loss    (`prefill`)
    decode    every op at 1 / N of its rows                                                             (`decode_step`)
"""

from dataclasses import dataclass, fields, replace

from autopar.cluster.cluster import Cluster
from autopar.cluster.cost_tables import load_cluster
from autopar.core.errors import LayoutError, UsageError
from autopar.core.layout import Layout, parse_layout
from autopar.core.request import Mode, StorageFormat, check_context, check_request
from autopar.graph.attention import AttentionCall, attention_calls
from autopar.graph.flops import num_parameters
from autopar.graph.traced_model import trace_model
from autopar.serving.decode_step import ServedModel, largest_batch, price_decode_step
from autopar.serving.prefill import price_prefill
from autopar.serving.replica import Replica
from autopar.serving.served_model import served_model
from autopar.workload.workload import Workload

SERVING_KEYS = ("tp", "dp", "gbs", "fusion")
"""Keys of a layout that inference takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBatch:
    """A decode step of ``batch`` sequences per replica: seconds, tokens per second of all replicas, and the share of
    the device's memory bandwidth that it uses."""

    batch: int
    time_s: float
    tokens_per_s: float
    mbu: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingEstimate:
    """The price of serving ``batch`` sequences per replica of ``context`` tokens each.

    ``largest_batch`` is the most sequences per replica that fit; ``time_s`` the seconds of the prefill, or of one decode
    step, and ``parts`` where they go. Bytes are of one device. ``mbu`` is 0 for a prefill. ``curve`` are decode steps of
    other batches.
    """

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
        """Bytes of one device at ``batch`` sequences."""
        return self.weights_bytes + self.cache_bytes + self.workspace_bytes + self.fixed_bytes

    @property
    def fits(self) -> bool:
        """Whether the peak is within the budget."""
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
    """Price inference of a workload.

    ``batch`` sequences over all replicas; None is the layout's ``gbs``, else the most that fit (decode) or the fewest that
    the model can run (prefill). ``context`` tokens in the cache of a decode; None is the traced sequence. ``weights`` and
    ``kv_cache`` are storage formats. UsageError for wrong arguments, before anything is traced, and for a model that
    inference cannot price; LayoutError for a layout that it does not take.
    """
    check_request(
        workload=workload,
        cluster=cluster,
        gpus=gpus,
        layout=layout,
        mode=mode,
        batch=batch,
        context=context,
        weights=weights,
        kv_cache=kv_cache,
        dtype=dtype,
        memory_gib=memory_gib,
    )
    check_context(context, mode)
    batch = parse_layout(layout).gbs if batch is None else batch
    machine = load_cluster(cluster)
    model = trace_model(workload, dtype=dtype or machine.device.default_dtype)
    calls = attention_calls(model.graph)
    sequence = _sequence_length(calls, mode)
    chosen = _serving_layout(layout, gpus, batch, calls)
    replicas = chosen.dp or 1
    replica = Replica.of(model, machine, chosen, memory_gib)
    served = served_model(replica, calls, sequence=sequence, weight_storage=weights, kv_cache_storage=kv_cache)
    tokens = sequence if mode == "prefill" or context is None else context
    is_prefill = mode == "prefill"
    # A prefill needs workspace in proportion to its batch; a decode step is charged that of min_batch of them.
    workspace_per_sequence = served.workspace_bytes / replica.min_batch if is_prefill else 0.0
    resident_bytes = served.weights_bytes + served.workspace_bytes + served.fixed_bytes
    resident_bytes -= served.workspace_bytes if is_prefill else 0.0
    largest = largest_batch(
        replica.pricer.budget_bytes, resident_bytes, served.cache_bytes_per_token * tokens + workspace_per_sequence
    )
    smallest = replica.min_batch if is_prefill else 1
    default = smallest if is_prefill else max(largest, 1)
    per_replica = chosen.gbs // replicas if batch is not None and chosen.gbs else default
    if per_replica % smallest:
        raise LayoutError([f"{per_replica} sequences per replica; this model needs a multiple of {smallest}"])
    if is_prefill:
        price = _price_prefill(replica, served, batch=per_replica, sequence=sequence)
    else:
        price = _price_decode(replica, served, batch=per_replica, context=tokens, largest=largest)
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
        largest_batch=largest // smallest * smallest,
        kv_heads=tuple(sorted({call.kv_heads for call in calls})),
        time_s=price.time_s,
        tokens_per_s=price.tokens_per_s * replicas,
        mfu=price.mfu,
        mbu=price.mbu,
        parts=price.parts,
        weights_bytes=round(served.weights_bytes),
        cache_bytes=round(served.cache_bytes_per_token * tokens * per_replica),
        cache_bytes_per_token=served.cache_bytes_per_token,
        workspace_bytes=round(workspace_per_sequence * per_replica if is_prefill else served.workspace_bytes),
        fixed_bytes=round(served.fixed_bytes),
        budget_bytes=int(replica.pricer.budget_bytes),
        curve=price.curve,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _ReplicaPrice:
    """The price of a prefill or a decode step of one replica; fields as in `ServingEstimate`, but ``tokens_per_s`` is of
    this replica alone."""

    time_s: float
    tokens_per_s: float
    mfu: float
    mbu: float
    parts: tuple[tuple[str, float], ...]
    curve: tuple[DecodeBatch, ...] = ()


def _price_prefill(replica: Replica, served: ServedModel, *, batch: int, sequence: int) -> _ReplicaPrice:
    """A prefill of ``batch`` sequences."""
    parts, flops = price_prefill(replica, served, batch=batch, sequence=sequence)
    time_s = sum(seconds for _, seconds in parts)
    peak = replica.pricer.cluster.device.peak(served.dtype)
    return _ReplicaPrice(
        time_s=time_s,
        tokens_per_s=batch * sequence / time_s,
        mfu=flops / (time_s * peak * replica.layout.tp),
        mbu=0.0,
        parts=parts,
    )


def _price_decode(replica: Replica, served: ServedModel, *, batch: int, context: int, largest: int) -> _ReplicaPrice:
    """A decode step of ``batch`` sequences; the curve has powers of two up to ``largest``, it and ``batch``."""
    cluster, replicas = replica.pricer.cluster, replica.layout.dp or 1
    batches = sorted({*(2**power for power in range(largest.bit_length())), batch, *([largest] if largest else [])})
    cuda_graph = replica.layout.fusion != "none"
    steps = {size: price_decode_step(served, size, context, cluster, cuda_graph=cuda_graph) for size in batches}
    step = steps[batch]
    return _ReplicaPrice(
        time_s=step.time_s,
        tokens_per_s=batch / step.time_s,
        mfu=step.mfu(cluster.device, served.dtype),
        mbu=step.mbu(cluster.device),
        parts=step.parts,
        curve=tuple(
            DecodeBatch(
                batch=size,
                time_s=at_size.time_s,
                tokens_per_s=size / at_size.time_s * replicas,
                mbu=at_size.mbu(cluster.device),
            )
            for size, at_size in steps.items()
        ),
    )


def _sequence_length(calls: tuple[AttentionCall, ...], mode: Mode) -> int:
    """The traced sequence in tokens; UsageError for models without self-attention over one sequence, and for a decode of
    models without a causal mask."""
    if not calls:
        raise UsageError(
            "the model calls no scaled_dot_product_attention, so it has no KV cache to serve from; price it with --mode train"
        )
    lengths = sorted({length for call in calls for length in (call.query_length, call.key_length)})
    if len(lengths) > 1 or any(call.is_cross_attention for call in calls):
        tokens = " and ".join(map(str, lengths))
        raise UsageError(
            f"the model has cross-attention ({tokens} tokens); inference is priced for decoder-only models only"
        )
    if mode == "decode" and not all(call.is_masked for call in calls):
        raise UsageError("the model attends without a causal mask and cannot decode; price it with --mode prefill")
    return lengths[0]


def _serving_layout(text: str, gpus: int, batch: int | None, calls: tuple[AttentionCall, ...]) -> Layout:
    """The layout, resolved, with a compiler's fusion unless it says otherwise; LayoutError lists every key that
    inference does not take and every fault."""
    layout, plain = parse_layout(text), Layout()
    refused = [
        field.name
        for field in fields(Layout)
        if field.name not in SERVING_KEYS and getattr(layout, field.name) != getattr(plain, field.name)
    ]
    faults = [f"{key}=: inference takes {', '.join(SERVING_KEYS)} only" for key in refused]
    accepted = replace(plain, **{key: getattr(layout, key) for key in SERVING_KEYS})
    total = batch if batch is not None else layout.dp or max(gpus // layout.tp, 1)
    heads, kv_heads = tuple({call.heads for call in calls}), tuple({call.kv_heads for call in calls})
    try:
        resolved = accepted.resolve(gpus, total, heads=heads, kv_heads=kv_heads)
    except LayoutError as error:
        raise LayoutError([*faults, *error.faults]) from None
    if faults:
        raise LayoutError(faults)
    return resolved if "fusion=" in text.replace(" ", "") else replace(resolved, fusion="compiler")
