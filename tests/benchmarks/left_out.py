"""Errors of runs that nothing was fitted on: each fitted constant refitted without the group that is predicted.

    ln T(theta) = ln T(0) + J theta         theta: log of each constant over its shipped value, J by finite differences
    fit         min  sum w (r - J theta)^2 + sum ((theta - theta_0) / sigma)^2,   r = ln measured - ln T(0)

theta_0 and sigma are what is known of a constant from elsewhere (``CONSTANTS``), not from these runs. A group has the weight of
one run whatever its size, and residuals beyond 10 % count linearly (Huber). Groups that are left out:

    model   a model on a cluster of one set is predicted from all other runs        a new model, known software and machine
    set     a whole set is predicted from the other sets                            a new paper
"""

import functools
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any
from unittest.mock import patch

import msgspec
import numpy as np
from numpy.typing import NDArray

from autopar.cluster.cluster import Cluster
from autopar.cluster.cost_tables import load_cluster
from autopar.cluster.software import load_software
from tests.benchmarks.runs import Run

Floats = NDArray[np.float64]
STEP = 0.05  # of the finite differences
HUBER = 0.10
UNFITTED = ("bigscience",)  # ran with blocking launches, which no constant here stands for: predicted, never fitted


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """A number of ``cost_tables/`` that runs decide: where it stands, on which devices (by the beginning of their name, each
    a parameter of its own; "" is one for all), what is known without runs, and how well. ``layout``: what the layout of a
    run says that it matters for."""

    key: str
    table: str  # "device", "cluster" or "software"
    devices: tuple[str, ...]
    prior: dict[str, float]
    sigma: float
    known_from: str
    layout: str = ""

    def matters(self, run: Run) -> bool:
        """Whether the time of a run can depend on it."""
        return self.layout in run.layout and device_of(run).startswith(self.devices)


CONSTANTS = (
    Constant(key="sustained_fraction", table="device", devices=("A100-SXM-80", "A100-SXM-40", "H100"),
             prior={"": 0.95}, sigma=0.04, known_from="matmul tables are short runs: 0.9 to 1 under a power limit"),
    Constant(key="sustained_fraction", table="device", devices=("V100",), prior={"": 0.95}, sigma=0.1,
             known_from="as the others, on the curve of an A100 scaled by peak"),
    Constant(key="flash_speed", table="device", devices=("A100", "H100"), prior={"A100": 0.7, "H100": 0.4}, sigma=0.2,
             known_from="kernels of 2023 against the tables' newest", layout="attn=flash"),
    Constant(key="memory_efficiency", table="device", devices=("",), prior={"": 0.82}, sigma=0.05,
             known_from="streaming kernels reach 0.75-0.9 of the data sheet"),
    Constant(key="launch_s", table="device", devices=("",), prior={"": 30e-6}, sigma=0.2,
             known_from="PyTorch 2.0 eager: 35 ops in about 1.1 ms"),
    Constant(key="unaligned_matmul_speed", table="device", devices=("",), prior={"": 0.5}, sigma=0.3,
             known_from="an odd vocabulary halves the head's speed"),
    Constant(key="training_slowdown", table="cluster", devices=("",), prior={"": 1.15}, sigma=0.08,
             known_from="vTrain: NCCL up to 30 % slower inside training"),
    Constant(key="overlap_contention", table="cluster", devices=("",), prior={"": 0.5}, sigma=0.4,
             known_from="hidden collectives share memory and cores: 0 to 1"),
    Constant(key="collective_calls", table="software", devices=("",), prior={"": 0.65}, sigma=0.5,
             known_from="ranks wait for the slowest host: about a launch"),
    Constant(key="microbatch_calls", table="software", devices=("",), prior={"": 20.0}, sigma=0.5,
             known_from="loss, data and schedule of a micro-batch: some tens of calls"),
)  # fmt: skip


def parameters() -> list[tuple[Constant, str]]:
    """The fitted parameters, one per constant and device it speaks of."""
    return [(constant, device) for constant in CONSTANTS for device in constant.devices]


def scaled(constant: Constant, factor: float) -> Callable[[Cluster], Cluster]:
    """A cluster with the constant scaled on every device."""

    def adjust(cluster: Cluster) -> Cluster:
        table: Any = cluster.device if constant.table == "device" else cluster
        changed = msgspec.structs.replace(table, **{constant.key: getattr(table, constant.key) * factor})
        return msgspec.structs.replace(cluster, device=changed) if constant.table == "device" else changed

    return adjust if constant.table != "software" else lambda cluster: cluster


Price = Callable[[Sequence[Run], Callable[[Cluster], Cluster]], Floats]
"""Seconds of runs on clusters adjusted."""


def jacobian(runs: Sequence[Run], base_s: Floats, price: Price) -> Floats:
    """(runs, parameters) derivatives of ln T."""

    def slope(constant: Constant) -> Floats:
        factor = np.exp(-STEP)  # downwards: efficiencies may not exceed one
        rows = np.array([constant.matters(run) for run in runs])
        chosen = [run for run, matters in zip(runs, rows, strict=True) if matters]
        moved = base_s.copy()
        if constant.table == "software":
            with patch(
                "autopar.cost.execution_model.load_software", lambda name, c=constant, f=factor: _software(name, c, f)
            ):
                moved[rows] = price(chosen, scaled(constant, factor))
        else:
            moved[rows] = price(chosen, scaled(constant, factor))
        return np.asarray(-np.log(moved / base_s) / STEP)

    slopes = side_by_side([functools.partial(slope, constant) for constant in CONSTANTS])
    columns = [
        found * [device_of(run).startswith(device) for run in runs]
        for constant, found in zip(CONSTANTS, slopes, strict=True)
        for device in constant.devices
    ]
    return np.stack(columns, axis=1)


def side_by_side(tasks: Sequence[Callable[[], Floats]], workers: int = 2) -> list[Floats]:
    """Results of tasks, shared among forked processes, which inherit all that this one has traced."""
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(workers)]

    def work(share: Sequence[Callable[[], Floats]], send: Connection) -> None:
        send.send([task() for task in share])

    started = [context.Process(target=work, args=(tasks[at::workers], send)) for at, (_, send) in enumerate(pipes)]
    for process in started:
        process.start()
    for _, send in pipes:
        send.close()  # so that a process that fails ends the wait for it
    shares = [receive.recv() for receive, _ in pipes]
    for process in started:
        process.join()
    return [shares[at % workers][at // workers] for at in range(len(tasks))]


def _software(name: str, constant: Constant, factor: float) -> Any:
    table = load_software(name)
    return msgspec.structs.replace(table, **{constant.key: getattr(table, constant.key) * factor})


def device_of(run: Run) -> str:
    """Name of a run's device."""
    return _device(run.cluster, run.overrides)


@functools.cache
def _device(cluster: str, overrides: tuple[tuple[str, Any], ...]) -> str:
    return load_cluster(cluster, **dict(overrides)).device.name


EXAMPLES = {"": "dgx-a100", "A100-SXM-80": "dgx-a100", "A100-SXM-40": "dgx-a100-40g", "V100": "p3.16xlarge", "H100": "dgx-h100",
            "A100": "dgx-a100"}  # fmt: skip


def shipped(constant: Constant, device: str) -> float:
    """The constant as ``cost_tables/`` has it."""
    if constant.table == "software":
        return float(getattr(load_software("megatron"), constant.key))
    cluster: Any = load_cluster(EXAMPLES[device])
    return float(getattr(cluster.device if constant.table == "device" else cluster, constant.key))


def priors() -> tuple[Floats, Floats]:
    """(theta_0, sigma) of the parameters."""
    found = [
        (np.log(constant.prior.get(device, constant.prior.get("", np.nan)) / shipped(constant, device)), constant.sigma)
        for constant, device in parameters()
    ]
    centre, sigma = np.array(found).T
    return centre, sigma


def fit(residual: Floats, slopes: Floats, weight: Floats, centre: Floats, sigma: Floats) -> Floats:
    """theta of the rows given, by iteratively reweighted least squares."""
    theta = centre.copy()
    for _ in range(20):
        left = np.abs(residual - slopes @ theta)
        robust = weight * np.minimum(1.0, HUBER / np.maximum(left, 1e-9)) / HUBER**2
        normal = slopes.T @ (robust[:, None] * slopes) + np.diag(sigma**-2.0)
        theta = np.linalg.solve(normal, slopes.T @ (robust * residual) + centre / sigma**2)
    return theta


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LeftOut:
    """predicted / measured - 1 of every run: its model left out of the fit, and its whole set; ``fitted`` are the constants
    (key, device, shipped, known without runs, fitted on all runs)."""

    model: Floats
    set: Floats
    fitted: tuple[tuple[str, str, float, float, float], ...]


def left_out(runs: Sequence[Run], base_s: Floats, price: Price) -> LeftOut:
    """By both kinds of groups; ``base_s`` are the seconds of ``runs`` as shipped."""
    slopes, (centre, sigma) = jacobian(runs, base_s, price), priors()
    residual = np.log([run.time_s or np.nan for run in runs]) - np.log(base_s)
    models = [str((run.set, run.settings, run.cluster)) for run in runs]
    sets = [run.set for run in runs]
    weight = np.array(
        [
            0.0 if run.set.startswith(UNFITTED) else 1.0 / models.count(key)
            for run, key in zip(runs, models, strict=True)
        ]
    )

    def errors(groups: Sequence[str]) -> Floats:
        found = np.zeros(len(runs))
        for key in dict.fromkeys(groups):
            is_left_out = np.array([group == key for group in groups])
            theta = fit(residual[~is_left_out], slopes[~is_left_out], weight[~is_left_out], centre, sigma)
            found[is_left_out] = np.exp(slopes[is_left_out] @ theta - residual[is_left_out]) - 1
        return found

    theta = fit(residual, slopes, weight, centre, sigma)
    fitted = tuple(
        (constant.key, device, now := shipped(constant, device), now * float(np.exp(known)), now * float(np.exp(best)))
        for (constant, device), known, best in zip(parameters(), centre, theta, strict=True)
    )
    return LeftOut(model=errors(models), set=errors(sets), fitted=fitted)
