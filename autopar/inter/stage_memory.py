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
from autopar.inter.block_choice import BlockChoice, block_choices
from autopar.inter.stage_choice import StageChoice
from autopar.inter.stage_costs import StageCosts
from autopar.intra import block_totals as tt


@dataclass(frozen=True, slots=True, kw_only=True)
class _ParameterBytes:
    """Bytes of a parameter that a block stores: parameter, gradient and optimizer state at rest; ``late_bytes`` as L
    above; ``gathered_bytes`` (0 where it is not cut at rest) and ``gradient_bytes`` as its ops use them; ``scattered``:
    whether each micro-batch's gradient is cut."""

    stored_bytes: tuple[float, float, float]
    new_gradient_bytes: float
    gathered_bytes: float
    unsharded_gradient_bytes: float
    reduce_scattered: bool


def stage_memory(
    stage_costs: StageCosts, choice: StageChoice, first_block: int, end_block: int, in_flight: int
) -> MemoryParts:
    """What a stage holds on its fullest device."""
    return memory_of_choices(
        stage_costs, block_choices(stage_costs, choice, first_block, end_block), first_block, in_flight
    )


def memory_of_choices(
    stage_costs: StageCosts, choices: list[BlockChoice], first_block: int, in_flight: int
) -> MemoryParts:
    """Bytes on the fullest device with ``in_flight`` micro-batches held; ``uses`` begin at block ``first``."""
    count = len(choices)
    saved = np.array([float(use.totals[tt.SAVED]) for use in choices])
    late, waiting, gathered = (np.zeros(count) for _ in range(3))
    passing = np.array([float(use.totals[tt.WORKSPACE]) for use in choices])
    rest = np.zeros(3)
    known: dict[tuple[object, ...], dict[int, _ParameterBytes]] = {}
    blocks = stage_costs.pricer.blocks[first_block : first_block + count]
    readers: dict[int, list[int]] = {}
    for at, block in enumerate(blocks):
        for value in block.parameters:
            readers.setdefault(value, []).append(at)
    for at, (block, use) in enumerate(zip(blocks, choices, strict=True)):
        key = (use.variant, use.frontier_ref, use.boundary, use.mesh)
        if key not in known:
            known[key] = _parameter_bytes(stage_costs, use)
        alike = dict(zip(stage_costs.pricer.first_of_kind[block.kind].parameters, block.parameters, strict=True))
        for own, stored in known[key].items():
            reading = readers[alike[own]]
            last = reading[-1]
            rest += stored.stored_bytes
            passing[at] -= 2 * stored.gathered_bytes  # which the totals count for one block as if for all
            gathered[reading] += stored.gathered_bytes
            late[at if stored.reduce_scattered else last] += stored.new_gradient_bytes
            waiting[at:last] += stored.unsharded_gradient_bytes if stored.reduce_scattered else 0.0
    beside = np.maximum(np.append(gathered[1:], 0.0), np.append(0.0, gathered[:-1]))
    work = passing + gathered + beside
    lasting = np.cumsum(saved) + late.sum() - np.cumsum(late) + waiting
    together, passes = np.append(late.sum(), lasting + work), np.append(0.0, work)  # the end, and while in each block
    fullest = int(np.flatnonzero(together >= together.max() * (1 - 1e-9))[-1])
    peak, passing_bytes = float(together[fullest]), float(passes[fullest])
    # the parts say: all saved tensors, and gradients at rest, whether or not they were there before the backward
    told = float(saved.sum() + passing_bytes + (0.0 if stage_costs.pricer.execution.accumulates_gradients else rest[1]))
    return MemoryParts(
        parameters_bytes=round(rest[0]),
        gradients_bytes=round(rest[1]),
        optimizer_bytes=round(rest[2]),
        saved_activations_bytes=round(in_flight * saved.sum()),
        workspace_bytes=round(passing_bytes + max(peak - told, 0.0)),
        fixed_bytes=round(stage_costs.fixed_bytes()),
        overlaid_bytes=round(max(told - peak, 0.0)),
    )


def _parameter_bytes(stage_costs: StageCosts, choice: BlockChoice) -> dict[int, _ParameterBytes]:
    """What a block stores, by parameter or buffer of the first block of its kind."""
    execution = stage_costs.pricer.execution
    held = stage_costs.variants[choice.variant][1]
    found: dict[int, _ParameterBytes] = {}
    for at, of_op in enumerate(choice.frontier.tables.parameter_uses):
        strategy = choice.strategy(at)
        names, chosen = choice.frontier.storages[at]
        for number, (value, per_strategy) in enumerate(of_op):
            if value.id in held or (at, number) in choice.frontier.tables.repeated_parameter_uses:
                continue
            elements = per_strategy[strategy][0]
            size = float(elements * value.itemsize)
            if value.kind == "buffer" or not value.requires_grad:
                found[value.id] = _ParameterBytes(
                    stored_bytes=(size, 0.0, 0.0),
                    new_gradient_bytes=0.0,
                    gathered_bytes=0.0,
                    unsharded_gradient_bytes=0.0,
                    reduce_scattered=False,
                )
                continue
            storage = names[number * len(per_strategy) + strategy][int(chosen[number][choice.row, strategy])]
            shards = prod(choice.mesh.sizes[axis] for axis in storage.axes)
            state = pm.state_bytes(storage, shards, elements, value.itemsize, execution)
            found[value.id] = _ParameterBytes(
                stored_bytes=state,
                new_gradient_bytes=pm.new_gradient_bytes(storage, state[1], elements, value.itemsize, execution),
                gathered_bytes=size if storage.stage == 3 and shards > 1 else 0.0,
                unsharded_gradient_bytes=size,
                reduce_scattered=storage.stage >= 2 and execution.overlap,
            )
    return found
