"""The cost tables of a block on one mesh: seconds and bytes for every choice of every node and every pair of choices,
before time is weighed against memory.

The mesh is (data axis, inner axes ...). How each op is sharded on the data axis is given (`data_axis`). On each inner
axis every op chooses an option freely; a *strategy* of an op is an option per inner axis. `table_builder` makes the
tables.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopar.choice.elimination import Eliminator
from autopar.choice.mini_buckets import MiniBuckets
from autopar.intra.block_space import BlockSpace
from autopar.intra.edge_tables import EdgeTable
from autopar.intra.parameter_uses import ParameterUse
from autopar.intra.regather import EdgeRegather
from autopar.intra.saved_memory import SavedMemoryCounter
from autopar.rules.axis_options import AxisOption
from autopar.rules.placement_pair import PlacementPair

Floats = NDArray[np.float64]


class LaunchSeconds(NamedTuple):
    """Seconds that the host takes to launch the kernels of a block: its forward, what selective recomputation repeats of
    it, its backward, and what full recomputation repeats."""

    forward_s: float
    selective_s: float
    backward_s: float
    full_s: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockTables:
    """The tables of a block at ``local_batch`` samples on each of ``data_ranks`` ranks. Op indices are positions in ``space.ops``,
    edge indices positions in ``edges``: the tensor edges of ``space`` first, in their order."""

    space: BlockSpace
    local_batch: int
    data_ranks: int
    strategies: tuple[tuple[tuple[AxisOption, ...], ...], ...]
    """By op: its strategies, each an option per inner axis."""
    boundary_roles: tuple[tuple[str, ...], ...]
    """The choices of the input and output nodes: how activations enter and leave the block, as one of ``BOUNDARY_ROLES``
    (by batch, by sequence or replicated) per inner axis."""
    boundary_pairs: dict[int, tuple[tuple[PlacementPair, ...], ...]]
    """Block input or output (value id) -> its pairs on the inner axes under each of ``boundary_roles``."""
    shared_placements: tuple[tuple[tuple[PlacementPair, ...], ...], ...]
    """By shared node: the choices of its value's pairs on the inner axes."""
    node_metrics: tuple[Floats, ...]
    """By node: (choices, NUM_OP_METRICS)."""
    op_saved_bytes: tuple[Floats, ...]
    """By op: (strategies, 2) bytes of tensors that SAVED and SELECTIVE_FREED charge; ``saved_memory`` counts what a
    solution really saves instead."""
    saved_memory: SavedMemoryCounter
    internal_collective_s: tuple[Floats, ...]
    """By op: (strategies, 2) seconds of FORWARD or SELECTIVE_FORWARD, and of BACKWARD, that its own collectives take."""
    edges: tuple[EdgeTable, ...]
    """The tensor edges, then those between ops that must take a parameter in the same placement."""
    edge_saved_bytes: dict[int, Floats]
    """Edge index -> bytes that each pair adds to SAVED."""
    regathers: dict[int, EdgeRegather]
    """Edge index -> what the backward may regather."""
    repeated_by_full: tuple[bool, ...]
    """By edge: whether full recomputation redistributes its tensor once more."""
    repeated_by_selective: tuple[bool, ...]
    """By edge: whether selective recomputation does."""
    sync_s: tuple[tuple[float, float], ...]
    """By edge: seconds that ranks wait for the slowest host where it redistributes, forward and backward."""
    parameter_uses: tuple[tuple[ParameterUse, ...], ...]
    """By op: its uses of parameters and buffers."""
    repeated_parameter_uses: frozenset[tuple[int, int]]
    """(op index, position in its ``parameter_uses``) of parameters that an earlier use in the block stores, in the same placement."""
    launch_s: LaunchSeconds
    overlap_contention: float
    """What communication that overlaps with compute adds, as a share of the shorter of the two; 1: nothing overlaps."""
    blocking_launches: bool
    """Whether kernel launches add to the device's compute time instead of overlapping with it (CUDA_LAUNCH_BLOCKING=1)."""
    eliminator: Eliminator | MiniBuckets
    """Solves problems over ``edges`` for every choice of the input and output nodes."""
