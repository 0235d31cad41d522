"""What a stage holds on its fullest device, and when it holds most.

Most is held while the backward of a micro-batch runs in some block k, beside the other n - 1 micro-batches in flight:

    at rest + (n - 1) S + max over k of  S(<= k) + L(> k) + A(k) + G(k) + max(G(k - 1), G(k + 1)) + W(k)

    S    saved tensors: those of later blocks are gone
    L    gradients that a backward makes: those of later blocks are there (all at its end, when nothing else is)
    A    of a parameter of several blocks whose gradient ZeRO cuts: the later blocks' terms, whole until the first's
    G    gathered parameters: the block's and those of the one that comes next, forward or backward
    W    what passes in one op of the block, and what its recomputation brings back
"""

from dataclasses import dataclass
from math import prod

import numpy as np

from autopar.core.plan import MemoryParts
from autopar.cost import parameter_storage as pm
from autopar.inter.block_choice import Use, uses_of
from autopar.inter.stage_choice import StageChoice
from autopar.inter.stage_costs import StageBook
from autopar.intra import block_totals as tt


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """Bytes of a parameter that a block stores: parameter, gradient and optimizer state at rest; ``late_bytes`` as L
    above; ``gathered_bytes`` (0 where it is not cut at rest) and ``gradient_bytes`` as its ops use them; ``scattered``:
    whether each micro-batch's gradient is cut."""

    rest_bytes: tuple[float, float, float]
    late_bytes: float
    gathered_bytes: float
    gradient_bytes: float
    scattered: bool


def stage_memory(book: StageBook, choice: StageChoice, first: int, end: int, in_flight: int) -> MemoryParts:
    """What a stage holds on its fullest device."""
    return memory_of(book, uses_of(book, choice, first, end), first, in_flight)


def memory_of(book: StageBook, uses: list[Use], first: int, in_flight: int) -> MemoryParts:
    """Bytes on the fullest device with ``in_flight`` micro-batches held; ``uses`` begin at block ``first``."""
    count = len(uses)
    saved = np.array([float(use.totals[tt.SAVED]) for use in uses])
    late, waiting, gathered = (np.zeros(count) for _ in range(3))
    passing = np.array([float(use.totals[tt.WORKSPACE]) for use in uses])
    rest = np.zeros(3)
    known: dict[tuple[object, ...], dict[int, _Stored]] = {}
    blocks = book.blocks.blocks[first : first + count]
    readers: dict[int, list[int]] = {}
    for at, block in enumerate(blocks):
        for value in block.parameters:
            readers.setdefault(value, []).append(at)
    for at, (block, use) in enumerate(zip(blocks, uses, strict=True)):
        key = (use.column, use.ref, use.boundary, use.mesh)
        if key not in known:
            known[key] = _stored(book, use)
        alike = dict(zip(book.blocks.kinds[block.kind].parameters, block.parameters, strict=True))
        for own, stored in known[key].items():
            reading = readers[alike[own]]
            last = reading[-1]
            rest += stored.rest_bytes
            passing[at] -= 2 * stored.gathered_bytes  # which the totals count for one block as if for all
            gathered[reading] += stored.gathered_bytes
            late[at if stored.scattered else last] += stored.late_bytes
            waiting[at:last] += stored.gradient_bytes if stored.scattered else 0.0
    beside = np.maximum(np.append(gathered[1:], 0.0), np.append(0.0, gathered[:-1]))
    work = passing + gathered + beside
    lasting = np.cumsum(saved) + late.sum() - np.cumsum(late) + waiting
    together, passes = np.append(late.sum(), lasting + work), np.append(0.0, work)  # the end, and while in each block
    fullest = int(np.flatnonzero(together >= together.max() * (1 - 1e-9))[-1])
    peak, passing_bytes = float(together[fullest]), float(passes[fullest])
    # the parts say: all saved tensors, and gradients at rest, whether or not they were there before the backward
    told = float(saved.sum() + passing_bytes + (0.0 if book.blocks.execution.accumulate else rest[1]))
    return MemoryParts(
        parameters_bytes=round(rest[0]),
        gradients_bytes=round(rest[1]),
        optimizer_bytes=round(rest[2]),
        saved_activations_bytes=round(in_flight * saved.sum()),
        workspace_bytes=round(passing_bytes + max(peak - told, 0.0)),
        fixed_bytes=round(book.fixed_bytes()),
        overlaid_bytes=round(max(told - peak, 0.0)),
    )


def _stored(book: StageBook, use: Use) -> dict[int, _Stored]:
    """What a block stores, by parameter or buffer of the first block of its kind."""
    execution = book.blocks.execution
    held = book.columns[use.column][1]
    found: dict[int, _Stored] = {}
    for at, of_op in enumerate(use.points.tables.parameter_uses):
        strategy = use.strategy(at)
        names, chosen = use.points.storages[at]
        for number, (value, per_strategy) in enumerate(of_op):
            if value.id in held or (at, number) in use.points.tables.again:
                continue
            elements = per_strategy[strategy][0]
            size = float(elements * value.itemsize)
            if value.kind == "buffer" or not value.requires_grad:
                found[value.id] = _Stored(
                    rest_bytes=(size, 0.0, 0.0), late_bytes=0.0, gathered_bytes=0.0, gradient_bytes=0.0, scattered=False
                )
                continue
            storage = names[number * len(per_strategy) + strategy][int(chosen[number][use.row, strategy])]
            shards = prod(use.mesh.sizes[axis] for axis in storage.axes)
            state = pm.state_bytes(storage, shards, elements, value.itemsize, execution)
            found[value.id] = _Stored(
                rest_bytes=state,
                late_bytes=pm.late_bytes(storage, state[1], elements, value.itemsize, execution),
                gathered_bytes=size if storage.stage == 3 and shards > 1 else 0.0,
                gradient_bytes=size,
                scattered=storage.stage >= 2 and execution.overlap,
            )
    return found
