"""What the solutions of a block cost, summed over its ops, parameters and moves, (rows, boundary placements, totals):

FORWARD, BACKWARD    seconds per micro-batch: compute and moves, or the host that launches them, and ZeRO-3 gathers
                     behind one block's compute
STEP                 seconds once per step that the last backward may hide (reductions)
STEP_EXPOSED         seconds once per step (optimizer)
STATE                bytes whatever is in flight: parameters, gradients, optimizer state
SAVED                bytes per micro-batch in flight
WORKSPACE            bytes that pass
LATE                 bytes of gradients that a backward makes
"""

import numpy as np
from numpy.typing import NDArray

from autopar.cost import parameter_storage as pm
from autopar.intra import op_metrics as om
from autopar.intra.block_tables import BlockTables
from autopar.intra.priced_objectives import PricedObjective

Floats = NDArray[np.float64]
FORWARD, BACKWARD, STEP_OVERLAPPABLE, STEP_EXPOSED, STATE, SAVED, WORKSPACE, NEW_GRADIENTS = range(8)
NUM_TOTALS = 8


def memory_bytes(totals: Floats, in_flight: float | Floats) -> Floats:
    """Bytes with ``in_flight`` micro-batches held, all but the fixed share: at the start of a backward, or at its end,
    when its saved tensors are gone and its gradients there."""
    late = np.maximum(totals[..., NEW_GRADIENTS] - totals[..., SAVED], 0.0)
    return np.asarray(totals[..., STATE] + in_flight * totals[..., SAVED] + late + totals[..., WORKSPACE])


def sum_totals(
    tables: BlockTables,
    objectives: tuple[PricedObjective, ...],
    choices: NDArray[np.integer],
    parameter_metrics: list[tuple[Floats, NDArray[np.integer]]],
    regathered: dict[int, NDArray[np.bool_]],
) -> Floats:
    shape = choices.shape[1:]
    sums = np.zeros((*shape, om.NUM_OP_METRICS))
    workspace = np.zeros(shape)
    for node, metrics in enumerate(tables.node_metrics):
        picked = metrics[choices[node]]
        np.maximum(workspace, picked[..., om.WORKSPACE], out=workspace)
        sums += picked
    # Costs charge a tensor to the first op that keeps it; solutions may keep it in two placements (`copies`).
    for at, tensors in enumerate(tables.op_saved_bytes):
        sums[..., [om.SAVED, om.SELECTIVE_FREED]] -= tensors[choices[2 + at]]
    for at, flags in regathered.items():
        one, (source, target) = tables.regathers[at], tables.edges[at][:2]
        chosen_s = np.where(one.is_forced, 0.0, one.optional_s)[choices[source], choices[target]]  # always: in the edge
        sums[..., om.BACKWARD] += np.where(flags, chosen_s, 0.0)
        for reader in one.saving_nodes:
            passing = tables.node_metrics[reader][choices[reader], om.WORKSPACE] + one.gathered_bytes[choices[target]]
            np.maximum(workspace, np.where(flags, passing, 0.0), out=workspace)
    again = {at: flags.reshape(-1) for at, flags in regathered.items()}
    kept = tables.saved_memory.saved_and_freed_bytes(choices.reshape(len(choices), -1), again)
    sums[..., [om.SAVED, om.SELECTIVE_FREED]] += kept.reshape(*shape, 2)
    # a cell without a solution is arbitrary here, infinite at most, and set to inf by the caller
    # seconds that ranks wait for each other, forward and backward, and forward again in full and selective recomputation
    waits = np.zeros((*shape, 4))
    moved_selectively_s = np.zeros(shape)
    edges = zip(tables.edges, tables.sync_s, tables.repeated_by_full, tables.repeated_by_selective, strict=True)
    for (source, target, forward, backward), sync_s, moved_again, moved_selectively in edges:
        pair = (choices[source], choices[target])
        for way, metric, table in ((0, om.FORWARD, forward), (1, om.BACKWARD, backward)):
            time_s = table[pair]
            sums[..., metric] += time_s
            waits[..., way] += sync_s[way] * (time_s > 0)
            if moved_again and way == 0:
                sums[..., om.FULL_RECOMPUTE] += time_s
                waits[..., 2] += sync_s[0] * (time_s > 0)
            if moved_selectively and way == 0:
                moved_selectively_s += time_s
                waits[..., 3] += sync_s[0] * (time_s > 0)
    held = np.zeros((*shape, pm.NUM_PARAMETER_METRICS))
    row_at = np.arange(shape[0])[:, None]
    for at, (metrics, chosen) in enumerate(parameter_metrics):
        strategy = choices[2 + at]
        for use in range(len(metrics)):
            held += metrics[use][strategy, chosen[use][row_at, strategy]]
    full, selective = (np.array([[row.mode == mode] for row in objectives]) for mode in ("full", "selective"))
    f, c, b = (sums[..., m] for m in (om.FORWARD, om.SELECTIVE_FORWARD, om.BACKWARD))
    saved, core, boundary = (sums[..., m] for m in (om.SAVED, om.SELECTIVE_FREED, om.INPUT_SAVED))
    again_s = np.where(full, sums[..., om.FULL_RECOMPUTE], np.where(selective, c + moved_selectively_s, 0.0))
    forward_host_s, core_host_s, backward_host_s, again_host_s = tables.launch_s
    forward_host = forward_host_s + waits[..., 0]
    backward_host = backward_host_s + waits[..., 1]
    core_host = np.where(selective, core_host_s + waits[..., 3], 0.0)
    backward_host = backward_host + np.where(full, again_host_s + waits[..., 2], core_host)
    totals = np.zeros((*shape, NUM_TOTALS))
    both = np.add if tables.blocking_launches else np.maximum
    for total, busy, gather in (
        (FORWARD, both(f + c, forward_host), held[..., pm.GATHER_FORWARD_S]),
        (BACKWARD, both(b + held[..., pm.ACCUMULATE_S] + again_s, backward_host), held[..., pm.GATHER_BACKWARD_S]),
    ):
        totals[..., total] = np.maximum(busy, gather) + tables.overlap_contention * np.minimum(busy, gather)
    totals[..., STEP_OVERLAPPABLE] = held[..., pm.STEP_OVERLAPPABLE_S]
    totals[..., STEP_EXPOSED] = held[..., pm.STEP_EXPOSED_S]
    totals[..., STATE] = held[..., pm.STATE_BYTES]
    totals[..., NEW_GRADIENTS] = held[..., pm.NEW_GRADIENT_BYTES]
    totals[..., SAVED] = np.where(
        full, boundary, np.where(selective, saved + sums[..., om.SELECTIVE_ONLY_SAVED], saved + core)
    )
    passing = workspace + 2 * held[..., pm.GATHERED_BYTES]
    totals[..., WORKSPACE] = passing + np.where(full, saved + core, np.where(selective, core, 0.0))
    return totals
