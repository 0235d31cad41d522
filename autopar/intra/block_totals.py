"""What the solutions of a block cost, (objectives, boundary placements, NUM_TOTALS):

FORWARD, BACKWARD    seconds per micro-batch: compute and redistribution, or the host that launches them, and ZeRO-3
                     gathers, which overlap with the compute of the block
STEP_OVERLAPPABLE    seconds per step that may overlap with the last backward (gradient reductions)
STEP_EXPOSED         seconds per step that do not (the optimizer)
STATE                bytes that do not depend on what is in flight: parameters, gradients, optimizer state
SAVED                bytes per micro-batch in flight
WORKSPACE            temporary bytes: the most that one op needs while it runs, with gathered parameters
NEW_GRADIENTS        bytes of gradients that a backward creates

    busy        kernels + host where launches block, else max(kernels, host)
    seconds     max(busy, gathers) + contention * min(busy, gathers)                                  (_phase_seconds)
    kernels     F + C forward; W + A + gradient accumulation backward       (symbols of `priced_objectives`)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.cost import parameter_storage as pm
from autopar.intra import op_metrics as om
from autopar.intra.block_space import FIRST_OP_NODE
from autopar.intra.block_tables import BlockTables
from autopar.intra.priced_objectives import PricedObjective

Floats = NDArray[np.float64]
FORWARD, BACKWARD, STEP_OVERLAPPABLE, STEP_EXPOSED, STATE, SAVED, WORKSPACE, NEW_GRADIENTS = range(8)
NUM_TOTALS = 8


def memory_bytes(totals: Floats, in_flight: float | Floats) -> Floats:
    """Bytes with ``in_flight`` micro-batches, all but the fixed share: the larger of the start of a backward, and of its
    end, when its saved tensors are freed and its new gradients exist."""
    new_gradients = np.maximum(totals[..., NEW_GRADIENTS] - totals[..., SAVED], 0.0)
    return np.asarray(totals[..., STATE] + in_flight * totals[..., SAVED] + new_gradients + totals[..., WORKSPACE])


def sum_totals(
    tables: BlockTables,
    objectives: Sequence[PricedObjective],
    choices: NDArray[np.integer],
    parameter_metrics: Sequence[tuple[Floats, NDArray[np.integer]]],
    regathered: Mapping[int, NDArray[np.bool_]],
) -> Floats:
    """The totals of solutions: ``choices`` (nodes, objectives, boundary placements). By op, ``parameter_metrics`` are
    (uses, strategies, storages, metrics) and the (uses, objectives, strategies) chosen storages; ``regathered`` maps an
    edge (index) to (objectives, boundary placements) whether it is regathered. Cells of infeasible solutions are
    arbitrary."""
    sums, workspace = _sum_ops(tables, choices)
    _add_regathers(tables, choices, regathered, sums, workspace)
    flags_by_edge = {edge: flags.reshape(-1) for edge, flags in regathered.items()}
    saved = tables.saved_memory.saved_and_freed_bytes(choices.reshape(len(choices), -1), flags_by_edge)
    sums[..., [om.SAVED, om.SELECTIVE_FREED]] += saved.reshape(*choices.shape[1:], 2)
    edges = _sum_edges(tables, choices, sums)
    stored = _sum_storages(choices, parameter_metrics)
    return _assemble(tables, objectives, _BlockSums(sums=sums, workspace=workspace, edges=edges, stored=stored))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _EdgeSums:
    """``waits_s`` (..., 4): seconds that ranks wait for each other, in the order of `LaunchSeconds` but with the repeated
    forwards of full, then selective recomputation last; ``selective_s``: what selective recomputation redistributes
    once more."""

    waits_s: Floats
    selective_s: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _BlockSums:
    """Sums over ops and edges in the metrics of `op_metrics` (``workspace`` is a maximum), and over parameters in those
    of `parameter_storage` (``stored``)."""

    sums: Floats
    workspace: Floats
    edges: _EdgeSums
    stored: Floats


def _sum_ops(tables: BlockTables, choices: NDArray[np.integer]) -> tuple[Floats, Floats]:
    """Sums of the nodes' metrics without the bytes of saved tensors, which are charged to their first savers and counted
    anew for a solution, and the largest workspace."""
    sums = np.zeros((*choices.shape[1:], om.NUM_OP_METRICS))
    workspace = np.zeros(choices.shape[1:])
    for node, metrics in enumerate(tables.node_metrics):
        picked = metrics[choices[node]]
        np.maximum(workspace, picked[..., om.WORKSPACE], out=workspace)
        sums += picked
    for at, saved in enumerate(tables.op_saved_bytes):
        sums[..., [om.SAVED, om.SELECTIVE_FREED]] -= saved[choices[FIRST_OP_NODE + at]]
    return sums, workspace


def _add_regathers(
    tables: BlockTables,
    choices: NDArray[np.integer],
    regathered: Mapping[int, NDArray[np.bool_]],
    sums: Floats,
    workspace: Floats,
) -> None:
    """Add the seconds of optional regathers (those of forced ones are in their edges) and the workspace of all."""
    for at, flags in regathered.items():
        regather, edge = tables.regathers[at], tables.edges[at]
        source, target = choices[edge.source], choices[edge.target]
        seconds = np.where(regather.is_forced, 0.0, regather.optional_s)[source, target]
        sums[..., om.BACKWARD] += np.where(flags, seconds, 0.0)
        for node in regather.saving_nodes:
            temporary = tables.node_metrics[node][choices[node], om.WORKSPACE] + regather.gathered_bytes[target]
            np.maximum(workspace, np.where(flags, temporary, 0.0), out=workspace)


def _sum_edges(tables: BlockTables, choices: NDArray[np.integer], sums: Floats) -> _EdgeSums:
    """Add the edges' seconds to FORWARD, BACKWARD and FULL_RECOMPUTE of ``sums``."""
    waits_s = np.zeros((*choices.shape[1:], 4))
    selective_s = np.zeros(choices.shape[1:])
    edges = zip(tables.edges, tables.sync_s, tables.repeated_by_full, tables.repeated_by_selective, strict=True)
    for edge, sync_s, by_full, by_selective in edges:
        pair = (choices[edge.source], choices[edge.target])
        forward_s, backward_s = edge.forward_s[pair], edge.backward_s[pair]
        forward_wait_s = sync_s[0] * (forward_s > 0)
        sums[..., om.FORWARD] += forward_s
        sums[..., om.BACKWARD] += backward_s
        waits_s[..., 0] += forward_wait_s
        waits_s[..., 1] += sync_s[1] * (backward_s > 0)
        if by_full:
            sums[..., om.FULL_RECOMPUTE] += forward_s
            waits_s[..., 2] += forward_wait_s
        if by_selective:
            selective_s += forward_s
            waits_s[..., 3] += forward_wait_s
    return _EdgeSums(waits_s=waits_s, selective_s=selective_s)


def _sum_storages(
    choices: NDArray[np.integer], parameter_metrics: Sequence[tuple[Floats, NDArray[np.integer]]]
) -> Floats:
    """(objectives, boundary placements, NUM_PARAMETER_METRICS) of the chosen storages."""
    stored = np.zeros((*choices.shape[1:], pm.NUM_PARAMETER_METRICS))
    objective = np.arange(choices.shape[1])[:, None]
    for at, (metrics, chosen) in enumerate(parameter_metrics):
        strategy = choices[FIRST_OP_NODE + at]
        for use in range(len(metrics)):
            stored += metrics[use][strategy, chosen[use][objective, strategy]]
    return stored


def _assemble(tables: BlockTables, objectives: Sequence[PricedObjective], block: _BlockSums) -> Floats:
    """The totals of each objective's recomputation."""
    full, selective = (np.array([[one.mode == mode] for one in objectives]) for mode in ("full", "selective"))
    sums, stored, waits_s, launch_s = block.sums, block.stored, block.edges.waits_s, tables.launch_s
    selective_forward_s = sums[..., om.SELECTIVE_FORWARD]
    recompute_s = np.where(
        full,
        sums[..., om.FULL_RECOMPUTE],
        np.where(selective, selective_forward_s + block.edges.selective_s, 0.0),
    )
    recompute_host_s = np.where(
        full, launch_s.full_s + waits_s[..., 2], np.where(selective, launch_s.selective_s + waits_s[..., 3], 0.0)
    )
    saved, freed = sums[..., om.SAVED], sums[..., om.SELECTIVE_FREED]
    totals = np.zeros((*block.workspace.shape, NUM_TOTALS))
    totals[..., FORWARD] = _phase_seconds(
        tables,
        sums[..., om.FORWARD] + selective_forward_s,
        launch_s.forward_s + waits_s[..., 0],
        stored[..., pm.GATHER_FORWARD_S],
    )
    totals[..., BACKWARD] = _phase_seconds(
        tables,
        sums[..., om.BACKWARD] + stored[..., pm.ACCUMULATE_S] + recompute_s,
        launch_s.backward_s + waits_s[..., 1] + recompute_host_s,
        stored[..., pm.GATHER_BACKWARD_S],
    )
    totals[..., STEP_OVERLAPPABLE] = stored[..., pm.STEP_OVERLAPPABLE_S]
    totals[..., STEP_EXPOSED] = stored[..., pm.STEP_EXPOSED_S]
    totals[..., STATE] = stored[..., pm.STATE_BYTES]
    totals[..., NEW_GRADIENTS] = stored[..., pm.NEW_GRADIENT_BYTES]
    totals[..., SAVED] = np.where(
        full,
        sums[..., om.INPUT_SAVED],
        np.where(selective, saved + sums[..., om.SELECTIVE_ONLY_SAVED], saved + freed),
    )
    temporary = block.workspace + 2 * stored[..., pm.GATHERED_BYTES]
    totals[..., WORKSPACE] = temporary + np.where(full, saved + freed, np.where(selective, freed, 0.0))
    return totals


def _phase_seconds(tables: BlockTables, kernels_s: Floats, host_s: Floats, gathers_s: Floats) -> Floats:
    """Seconds of a forward or a backward whose parameter gathers overlap with what the device computes."""
    busy_s = (np.add if tables.blocking_launches else np.maximum)(kernels_s, host_s)
    return np.asarray(np.maximum(busy_s, gathers_s) + tables.overlap_contention * np.minimum(busy_s, gathers_s))
