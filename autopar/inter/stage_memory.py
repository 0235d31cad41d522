"""The peak memory of a stage on the device that needs most.

Memory peaks during the backward of a micro-batch, in some block k, while the other n - 1 micro-batches are in flight:

    stored + (n - 1) S + max over k of  S(<= k) + L(> k) + A(k) + G(k) + max(G(k - 1), G(k + 1)) + W(k)

    S    saved tensors: those of later blocks are freed
    L    gradients that a backward makes: those of later blocks exist (all of them at its end, when nothing else does)
    A    of a parameter that several blocks use and whose gradient ZeRO reduce-scatters: the unsharded partial gradient
         of the later blocks, until the first block's
    G    gathered parameters: the block's, and those of the next one, forward or backward
    W    workspace: temporaries of one op of the block, and what its recomputation restores
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from autopar.core.plan import MemoryParts
from autopar.cost import parameter_storage as pm
from autopar.inter.block_choice import BlockChoice, block_choices
from autopar.inter.frontier_cache import FrontierCache
from autopar.inter.stage_choice import StageChoice
from autopar.intra import block_totals as tt

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class _ParameterBytes:
    """Bytes of a parameter that a block stores: ``stored_bytes`` of parameter, gradient and optimizer state between
    steps; ``new_gradient_bytes`` of gradients that only the backward makes (L); ``gathered_bytes`` of the unsharded
    parameter under ZeRO-3, else 0; ``unsharded_gradient_bytes`` as its ops make the gradient; ``reduce_scattered``:
    whether every micro-batch's gradient is reduce-scattered."""

    stored_bytes: tuple[float, float, float]
    new_gradient_bytes: float = 0.0
    gathered_bytes: float = 0.0
    unsharded_gradient_bytes: float = 0.0
    reduce_scattered: bool = False


class StageMemory:
    """The peak memory of stages; equal ones are computed once. ``fixed_bytes`` of a device are not tensors."""

    def __init__(self, frontiers: FrontierCache, fixed_bytes: float) -> None:
        self._frontiers, self._fixed_bytes = frontiers, fixed_bytes
        self._peaks: dict[tuple[StageChoice, int, int, int], MemoryParts] = {}

    def release(self) -> None:
        """Free what was computed."""
        self._peaks.clear()

    def peak(self, choice: StageChoice, first_block: int, end_block: int, in_flight: int) -> MemoryParts:
        """The peak of blocks ``first_block <= i < end_block`` under ``choice`` with ``in_flight`` micro-batches."""
        key = (choice, first_block, end_block, in_flight)
        if key not in self._peaks:
            blocks = block_choices(self._frontiers, choice, first_block, end_block)
            self._peaks[key] = self.peak_of_blocks(blocks, first_block, in_flight)
        return self._peaks[key]

    def peak_of_blocks(self, choices: Sequence[BlockChoice], first_block: int, in_flight: int) -> MemoryParts:
        """The same of blocks that were decided one by one, from ``first_block`` on."""
        by_block = self._block_bytes(choices, first_block)
        S, L = by_block.saved, by_block.new_gradients
        next_gathered = np.maximum(np.append(by_block.gathered[1:], 0.0), np.append(0.0, by_block.gathered[:-1]))
        temporary = by_block.workspace + by_block.gathered + next_gathered
        alive = np.cumsum(S) + L.sum() - np.cumsum(L) + by_block.waiting_gradients
        totals = np.append(L.sum(), alive + temporary)  # at the end of the backward, and in each block
        fullest = int(np.flatnonzero(totals >= totals.max() * (1 - 1e-9))[-1])
        peak_bytes, workspace_bytes = float(totals[fullest]), float(np.append(0.0, temporary)[fullest])
        parameters, gradients, optimizer = by_block.stored
        # MemoryParts counts all saved tensors and all gradients, even those that are not alive together
        accumulates = self._frontiers.pricer.execution.accumulates_gradients
        counted_bytes = float(S.sum() + workspace_bytes + (0.0 if accumulates else gradients))
        return MemoryParts(
            parameters_bytes=round(parameters),
            gradients_bytes=round(gradients),
            optimizer_bytes=round(optimizer),
            saved_activations_bytes=round(in_flight * S.sum()),
            workspace_bytes=round(workspace_bytes + max(peak_bytes - counted_bytes, 0.0)),
            fixed_bytes=round(self._fixed_bytes),
            overlaid_bytes=round(max(counted_bytes - peak_bytes, 0.0)),
        )

    def _block_bytes(self, choices: Sequence[BlockChoice], first_block: int) -> "_BlockBytes":
        pricer = self._frontiers.pricer
        blocks = pricer.blocks[first_block : first_block + len(choices)]
        users: dict[int, list[int]] = {}
        for index, block in enumerate(blocks):
            for value in block.parameters:
                users.setdefault(value, []).append(index)
        found = _BlockBytes.of(choices)
        by_program: dict[tuple[object, ...], dict[int, _ParameterBytes]] = {}
        for index, (block, choice) in enumerate(zip(blocks, choices, strict=True)):
            key = (choice.variant, choice.frontier_ref, choice.boundary, choice.mesh)
            if key not in by_program:
                by_program[key] = self._parameter_bytes(choice)
            in_this_block = dict(zip(pricer.first_of_kind[block.kind].parameters, block.parameters, strict=True))
            for parameter, sizes in by_program[key].items():
                found.add(index, users[in_this_block[parameter]], sizes)
        return found

    def _parameter_bytes(self, choice: BlockChoice) -> dict[int, _ParameterBytes]:
        """What a block stores, by parameter or buffer (value) of the first block of its kind."""
        execution = self._frontiers.pricer.execution
        _, stored_elsewhere = self._frontiers.variants[choice.variant]
        found: dict[int, _ParameterBytes] = {}
        for op_index, parameters in enumerate(choice.frontier.tables.parameter_uses):
            strategy = choice.strategy(op_index)
            storages, chosen = choice.frontier.storages[op_index]
            for number, (value, per_strategy) in enumerate(parameters):
                is_repeated = (op_index, number) in choice.frontier.tables.repeated_parameter_uses
                if value.id in stored_elsewhere or is_repeated:
                    continue
                elements = per_strategy[strategy][0]
                size = float(elements * value.itemsize)
                if value.kind == "buffer" or not value.requires_grad:
                    found[value.id] = _ParameterBytes(stored_bytes=(size, 0.0, 0.0))
                    continue
                storage = storages[number * len(per_strategy) + strategy][int(chosen[number][choice.row, strategy])]
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


@dataclass(slots=True, kw_only=True, eq=False)
class _BlockBytes:
    """Bytes by block, each (blocks,), summed parameter by parameter: S, L, A, G and W of the module's docstring;
    ``stored`` (3,) of parameters, gradients and optimizer state of all blocks."""

    saved: Floats
    new_gradients: Floats
    waiting_gradients: Floats
    gathered: Floats
    workspace: Floats
    stored: Floats

    @staticmethod
    def of(choices: Sequence[BlockChoice]) -> "_BlockBytes":
        """Without the parameters."""
        return _BlockBytes(
            saved=np.array([float(choice.totals[tt.SAVED]) for choice in choices]),
            new_gradients=np.zeros(len(choices)),
            waiting_gradients=np.zeros(len(choices)),
            gathered=np.zeros(len(choices)),
            workspace=np.array([float(choice.totals[tt.WORKSPACE]) for choice in choices]),
            stored=np.zeros(3),
        )

    def add(self, index: int, users: list[int], sizes: _ParameterBytes) -> None:
        """Count a parameter that block ``index`` stores and the blocks ``users`` use (indices, ascending)."""
        last = users[-1]
        self.stored += sizes.stored_bytes
        self.workspace[index] -= 2 * sizes.gathered_bytes  # the totals count the block's and the next block's there
        self.gathered[users] += sizes.gathered_bytes
        self.new_gradients[index if sizes.reduce_scattered else last] += sizes.new_gradient_bytes
        self.waiting_gradients[index:last] += sizes.unsharded_gradient_bytes if sizes.reduce_scattered else 0.0
