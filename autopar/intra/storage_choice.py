"""Where the parameters that an op reads are stored: for each objective and strategy, the cheapest storage of each.

In a block's choice problem parameters are leaves, each of one op, so their storage is chosen apart and its cost is added
to the op's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopar.cost import parameter_storage as pm
from autopar.cost.execution_model import ExecutionModel
from autopar.cost.redistribution_time import MeshLinks
from autopar.intra.parameter_uses import LocalParameter, ParameterUse

Floats = NDArray[np.float64]
StorageFilter = Callable[[int, pm.ParameterStorage], bool]
"""Whether a parameter (value id) may have a storage."""
_Storages = tuple[tuple[pm.ParameterStorage, ...], Floats]
"""Storages, and (storages, NUM_PARAMETER_METRICS) what each costs."""
_STORED_REPLICATED = pm.ParameterStorage(stage=0, axes=())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StorageRules:
    """Which storages are allowed. ``has_data_axis``: mesh axis 0 has several ranks. ``stored_elsewhere`` are
    parameters (value ids) that another block of the stage stores. ``zero_stage`` fixes the ZeRO stage over all axes
    with a partial gradient."""

    has_data_axis: bool
    stored_elsewhere: frozenset[int] = frozenset()
    zero_stage: int | None = None
    storage_filter: StorageFilter | None = None

    def allows(self, value: int, storage: pm.ParameterStorage, axes: tuple[int, ...]) -> bool:
        """Whether a parameter (value id) whose gradient is partial over ``axes`` may have a storage."""
        if self.zero_stage is not None:
            is_stage = storage.stage == (self.zero_stage if axes else 0)
            if not is_stage or not (storage.axes == axes or storage.stage == 0):
                return False
        return self.storage_filter is None or self.storage_filter(value, storage)


class StorageMetricsCache:
    """Metrics of every storage of a parameter on one mesh, cached by (elements, item size, axes)."""

    def __init__(self, mesh_links: MeshLinks, execution: ExecutionModel) -> None:
        self.mesh_links, self.execution = mesh_links, execution
        self._cache: dict[tuple[int, int, tuple[int, ...]], _Storages] = {}

    def metrics_of(self, elements: int, itemsize: int, axes: tuple[int, ...]) -> _Storages:
        """The storages of a parameter whose gradient is partial over ``axes``, and (storages, NUM_PARAMETER_METRICS)
        what each costs."""
        key = (elements, itemsize, axes)
        if key not in self._cache:
            choices = pm.storage_choices(axes)
            metrics = np.stack(
                [
                    pm.storage_metrics(choice, axes, elements, itemsize, self.mesh_links, self.execution)
                    for choice in choices
                ]
            )
            self._cache[key] = (choices, metrics)
        return self._cache[key]


class OpStorages(NamedTuple):
    """Of the parameter uses of an op: ``options[use * strategies + strategy]`` are the storages allowed there, and
    ``chosen`` (uses, objectives, strategies) the position of the cheapest among them."""

    options: tuple[tuple[pm.ParameterStorage, ...], ...]
    chosen: NDArray[np.integer]


class StorageChoice(NamedTuple):
    """``costs`` (objectives, strategies) of the cheapest storages of all uses of an op, which these are, and the
    ``metrics`` (uses, strategies, storages, NUM_PARAMETER_METRICS) of all, inf where there are fewer storages."""

    costs: Floats
    storages: OpStorages
    metrics: Floats


def choose_storages(
    uses: Sequence[ParameterUse],
    cache: StorageMetricsCache,
    weights: Floats,
    rules: StorageRules,
    *,
    repeated_uses: frozenset[int],
    num_strategies: int,
) -> StorageChoice:
    """The cheapest storages of an op's parameters. ``weights`` is (objectives, NUM_PARAMETER_METRICS);
    ``repeated_uses`` are the uses (numbers) of parameters that the block has stored already."""
    costs = np.zeros((len(weights), num_strategies))
    chosen = np.zeros((len(uses), len(weights), num_strategies), int)
    allowed = [
        [_allowed_storages(use, local, cache, rules, is_stored=number in repeated_uses) for local in use.per_strategy]
        for number, use in enumerate(uses)
    ]
    width = max([1, *(len(options) for by_strategy in allowed for options, _ in by_strategy)])
    table = np.zeros((len(uses), num_strategies, width, pm.NUM_PARAMETER_METRICS))
    for use, by_strategy in enumerate(allowed):
        for strategy, (options, metrics) in enumerate(by_strategy):
            table[use, strategy, : len(options)] = metrics
            table[use, strategy, len(options) :] = np.inf
        priced = np.where(
            np.isfinite(table[use, :, :, 0]),
            np.einsum("rm,som->rso", weights, np.nan_to_num(table[use], posinf=0)),
            np.inf,
        )
        chosen[use] = priced.argmin(axis=2)
        costs += priced.min(axis=2)
    all_options = tuple(options for by_strategy in allowed for options, _ in by_strategy)
    return StorageChoice(costs, OpStorages(all_options, chosen), table)


def _allowed_storages(
    use: ParameterUse, local: LocalParameter, cache: StorageMetricsCache, rules: StorageRules, *, is_stored: bool
) -> _Storages:
    """The storages of one use under one strategy: one, without optimizer state, for a buffer, a frozen parameter and
    one that is stored already."""
    value = use.value
    is_stored = is_stored or value.id in rules.stored_elsewhere
    if value.kind == "buffer" or not value.requires_grad or is_stored:
        metrics = np.zeros((1, pm.NUM_PARAMETER_METRICS))
        metrics[0, pm.STATE_BYTES] = 0.0 if is_stored else local.elements * value.itemsize
        return (_STORED_REPLICATED,), metrics
    axes = tuple(axis for axis in local.gradient_axes if axis or rules.has_data_axis)
    options, metrics = cache.metrics_of(local.elements, value.itemsize, axes)
    indices = [at for at, storage in enumerate(options) if rules.allows(value.id, storage, axes)]
    return tuple(options[at] for at in indices), metrics[indices]
