"""Predicted against measured training runs, set by set.

python -m tests.benchmarks.accuracy FILE.jsonl [--only SET] [--csv OUT.csv] [--figure OUT.png]

error  e = predicted / measured - 1          MAPE = mean |e|, bias = mean e, median and p90 of |e|
rank   Spearman within groups of >= 4 rows of one model, GPU count and batch; regret = measured time of the run that
       the model calls fastest / that of the fastest, - 1
cover  share of runs inside their 90 % interval, width = mean (high - low) / 2 / predicted
base   MAPE of FLOPs / one utilisation, the median of the set's other models: what knowing nothing reaches
"""

import argparse
import csv
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autopar.cluster.cluster import Cluster
from autopar.cluster.cost_tables import load_cluster
from autopar.cluster.uncertainty import load_uncertainty
from autopar.core.errors import AutoparError
from autopar.core.layout import parse_layout
from autopar.graph.flops import model_flops
from autopar.graph.traced_model import TracedModel, trace_model
from autopar.manual.layer_times import block_times, layer_times
from autopar.manual.layout_pricer import LayoutPricer
from autopar.workload.model_file import load_workload
from tests.benchmarks.left_out import device_of, left_out
from tests.benchmarks.runs import GIB, Run, read_runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A run with what the model says of it; ``reference_s`` is its FLOPs at the peak of all its GPUs."""

    run: Run
    time_s: float
    low_s: float
    high_s: float
    memory_bytes: float
    tensor_bytes: float
    fits: bool
    reference_s: float

    @property
    def error(self) -> float:
        return self.time_s / (self.run.time_s or np.nan) - 1


class Pricers:
    """One traced model and one pricer per model and cluster, shared by all runs."""

    def __init__(self, adjust: Callable[[Cluster], Cluster] = lambda cluster: cluster) -> None:
        self._adjust = adjust
        self._graphs: dict[tuple[Any, ...], TracedModel] = {}
        self._pricers: dict[tuple[Any, ...], LayoutPricer] = {}

    def of(self, run: Run) -> LayoutPricer:
        model = (run.model_file, run.settings, run.dtype)
        if model not in self._graphs:
            workload = load_workload(run.model_file, **dict(run.settings))
            self._graphs[model] = trace_model(workload, dtype=run.dtype)
        key = (*model, run.cluster, run.overrides, run.gpus)
        if key not in self._pricers:
            self._pricers[key] = LayoutPricer(
                self._graphs[model],
                cluster=self._adjust(load_cluster(run.cluster, **dict(run.overrides))),
                gpus=run.gpus,
                global_batch=None,
                memory_gib=None,
                optimizer="adamw",
            )
        return self._pricers[key]

    def adjusted(self, adjust: Callable[[Cluster], Cluster]) -> "Pricers":
        """Pricers of other clusters that share what was traced."""
        other = Pricers(adjust)
        other._graphs = self._graphs
        return other


def outcome(run: Run, pricers: Pricers) -> Outcome:
    """Price one run."""
    pricer = pricers.of(run)
    priced = pricer.price(parse_layout(run.layout))
    time_s = priced.step_time_s
    if run.kind == "layer":
        time_s = sum(block_times(priced, "layers.0"))
    nodes = -(-run.gpus // pricer.cluster.devices_per_node)
    low, high = load_uncertainty().step_time_factors(pricer.cluster.device.name, nodes, priced.layout.attn)
    flops = model_flops(pricer.model.graph, run.gbs, pricer.model.profile.ops).total
    return Outcome(
        run=run,
        time_s=time_s,
        low_s=low * time_s,
        high_s=high * time_s,
        memory_bytes=priced.memory_bytes,
        tensor_bytes=priced.memory_bytes - priced.stages[0].stage_costs.pricing.fixed_bytes,
        fits=priced.fits,
        reference_s=flops / (run.gpus * pricer.cluster.device.peak(pricer.model.dtype)),
    )


def outcomes(runs: Iterable[Run], pricers: Pricers) -> tuple[list[Outcome], list[tuple[str, str]]]:
    """All runs priced, and (id, reason) of those refused."""
    found, refused = [], []
    for run in runs:
        try:
            found.append(outcome(run, pricers))
        except AutoparError as error:
            refused.append((run.id, str(error)))
    return found, refused


def baseline_errors(found: list[Outcome]) -> np.ndarray:
    """Errors of one utilisation, fitted on the set's other models (other rows, where there is one model only)."""
    errors = []
    for one in found:
        others = [o for o in found if o.run.model != one.run.model] or [o for o in found if o is not one] or [one]
        slowdown = np.median([(o.run.time_s or np.nan) / o.reference_s for o in others])
        errors.append(slowdown * one.reference_s / (one.run.time_s or np.nan) - 1)
    return np.array(errors)


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Rank correlation; ties share their mean rank."""
    ranks = [np.array([(v > x).sum() * 0 + (v < x).sum() + 0.5 * (v == x).sum() for x in v]) for v in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1]) if min(rank.std() for rank in ranks) > 0 else 0.0


def groups(found: list[Outcome]) -> list[list[Outcome]]:
    """Runs to choose between: at least four of one model, GPU count and batch."""
    by: dict[tuple[Any, ...], list[Outcome]] = defaultdict(list)
    for one in found:
        by[one.run.group].append(one)
    return [rows for rows in by.values() if len(rows) >= 4]


def regret(rows: list[Outcome]) -> float:
    picked = min(rows, key=lambda one: one.time_s)
    return (picked.run.time_s or np.nan) / min(one.run.time_s or np.nan for one in rows) - 1


def set_line(name: str, found: list[Outcome]) -> str:
    errors = np.array([one.error for one in found])
    sizes = np.abs(errors)
    ranked = groups(found)
    spear = [
        spearman(np.array([o.time_s for o in rows]), np.array([o.run.time_s for o in rows], float)) for rows in ranked
    ]
    regrets = [regret(rows) for rows in ranked]
    inside = [one.low_s <= (one.run.time_s or np.nan) <= one.high_s for one in found]
    width = np.mean([(one.high_s - one.low_s) / 2 / one.time_s for one in found])
    rank = (
        f"{len(ranked):3d} {np.mean(spear):5.2f} {100 * np.mean(regrets):6.1f} {100 * max(regrets):6.1f}"
        if ranked
        else f"{0:3d} {'-':>5} {'-':>6} {'-':>6}"
    )
    return (
        f"{name:26.26} {len(found):4d} {100 * sizes.mean():6.1f} {100 * np.median(sizes):6.1f} "
        f"{100 * np.quantile(sizes, 0.9):6.1f} {100 * errors.mean():+6.1f}  {rank}  "
        f"{100 * np.mean(inside):4.0f} {100 * width:5.1f}  {100 * np.abs(baseline_errors(found)).mean():5.1f}"
    )


HEADER = (
    f"{'set':26} {'n':>4} {'MAPE%':>6} {'med%':>6} {'p90%':>6} {'bias%':>6}  {'grp':>3} {'rho':>5} {'regr%':>6} "
    f"{'max%':>6}  {'cov%':>4} {'wid%':>5}  {'base%':>5}"
)


def layer_line(name: str, found: list[Outcome], pricers: Pricers) -> str | None:
    """The set again, each run with the layer time of another run of its (hidden, tp, mbs, ...): one measured layer time per
    shape, taken from the step time of the shape's run with the most layers on a device."""
    shapes: dict[tuple[Any, ...], list[Outcome]] = defaultdict(list)
    for one in found:
        layout = parse_layout(one.run.layout)
        width = tuple(item for item in one.run.settings if item[0] != "layers")
        shapes[
            one.run.cluster, width, layout.tp, layout.cp, layout.mbs, layout.recompute, layout.attn, layout.sp
        ].append(one)
    errors = []
    for rows in shapes.values():
        if len(rows) < 2:
            continue
        source = max(rows, key=lambda one: dict(one.run.settings)["layers"] / (parse_layout(one.run.layout).pp or 1))
        pricer = pricers.of(source.run)
        priced = pricer.price(parse_layout(source.run.layout))
        times = layer_times(priced)
        for _ in range(4):  # the step is linear in the layer's time but where stages change places
            seconds = pricer.price(parse_layout(source.run.layout), times).step_time_s
            bent = pricer.price(parse_layout(source.run.layout), (1.01 * times[0], 1.01 * times[1])).step_time_s
            factor = 1 + 0.01 * ((source.run.time_s or np.nan) - seconds) / (bent - seconds)
            times = (factor * times[0], factor * times[1])
        for one in rows:
            if one is not source:
                seconds = pricers.of(one.run).price(parse_layout(one.run.layout), times).step_time_s
                errors.append(seconds / (one.run.time_s or np.nan) - 1)
    if len(errors) < 8:
        return None
    found_errors = np.array(errors)
    return (
        f"{name:26.26} {len(errors):4d} runs: MAPE {100 * np.abs(found_errors).mean():.1f} %, "
        f"bias {100 * found_errors.mean():+.1f} %"
    )


def memory_lines(found: list[Outcome]) -> list[str]:
    """Published peaks, and whether what ran fits and what did not does not."""
    lines = []
    by: dict[str, list[float]] = defaultdict(list)
    for one in found:
        if one.run.memory_bytes:
            # what nvidia-smi shows includes context and communication buffers, what allocators count does not
            said = one.memory_bytes if "nvidia-smi" in one.run.memory_kind else one.tensor_bytes
            by[one.run.set].append(said / one.run.memory_bytes - 1)
    for name, values in by.items():
        errors = np.array(values)
        lines.append(
            f"{name:26.26} {len(errors):4d} peaks: mean |error| {100 * np.abs(errors).mean():.1f} %, "
            f"bias {100 * errors.mean():+.1f} %"
        )
    for one in found:
        if one.fits != one.run.ran:
            lines.append(
                f"  {one.run.id}: {'ran' if one.run.ran else 'ran out of memory'}, predicted "
                f"{one.memory_bytes / GIB:.2f} GiB ({one.run.layout})"
            )
    return lines


def left_out_lines(timed: list[Outcome], pricers: Pricers) -> list[str]:
    """Per set the error as shipped, with the run's model left out of every fit, and with the whole set left out; how many runs
    are in intervals made of the other groups' left-out errors; and every fitted constant."""
    runs = [one.run for one in timed]

    def price(chosen: Sequence[Run], adjust: Callable[[Cluster], Cluster]) -> np.ndarray:
        moved = pricers.adjusted(adjust)
        return np.array([outcome(run, moved).time_s for run in chosen])

    found = left_out(runs, np.array([one.time_s for one in timed]), price)
    lines = [f"{'left out':26} {'n':>4} {'none':>6} {'model':>6} {'bias':>6} {'set':>6} {'bias':>6}   MAPE %"]
    for name in dict.fromkeys(run.set for run in runs):
        rows = np.array([run.set == name for run in runs])
        shipped = np.array([one.error for one in timed])[rows]
        cells = [100 * np.abs(shipped).mean()]
        for errors in (found.model[rows], found.set[rows]):
            cells += [100 * np.abs(errors).mean(), 100 * errors.mean()]
        lines.append(
            f"{name:26.26} {rows.sum():4d} {cells[0]:6.1f} {cells[1]:6.1f} {cells[2]:+6.1f} {cells[3]:6.1f} {cells[4]:+6.1f}"
        )
    lines += ["", f"{'fitted constant':24} {'device':12} {'shipped':>9} {'known':>9} {'fitted':>9}"]
    lines += [f"{key:24} {device:12} {a:9.3g} {b:9.3g} {c:9.3g}" for key, device, a, b, c in found.fitted]
    return [*lines, "", *interval_lines(runs, found.model)]


def interval_lines(runs: list[Run], errors: np.ndarray) -> list[str]:
    """Intervals of measured / predicted with the model left out: what ``cost_tables/uncertainty.json`` has."""
    classes: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for run, error in zip(runs, errors, strict=True):
        device = device_of(run)
        several = run.gpus > dict(run.overrides).get("devices_per_node", 8)
        key = (("V100" if device.startswith("V100") else ""), "several" if several else "one")
        classes[*key, "any" if key[0] or several else parse_layout(run.layout).attn].append(1 / (1 + error))
    return [
        f"interval {device or 'any':5} {nodes:8} {attn:6} n {len(ratios):3d}: "
        f"{shortest(ratios)[0]:.3f} .. {shortest(ratios)[1]:.3f}"
        for (device, nodes, attn), ratios in classes.items()
    ]


def shortest(ratios: Sequence[float]) -> tuple[float, float]:
    """The shortest interval that covers 90 % of the runs and one to come: ceil(0.9 (n + 1)) of n.

    >>> shortest([0.9, 1.0, 1.01, 1.02, 1.03, 1.04, 1.05, 1.06, 1.07, 1.3])
    (0.9, 1.3)
    """
    num_covered = min(math.ceil(0.9 * (len(ratios) + 1)), len(ratios))
    ordered = sorted(ratios)
    return min(
        ((ordered[at], ordered[at + num_covered - 1]) for at in range(len(ordered) - num_covered + 1)),
        key=lambda ends: ends[1] - ends[0],
    )


def write_csv(path: Path, found: list[Outcome]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "set", "gpus", "layout", "measured_s", "predicted_s", "error", "memory_gib", "peak_gib"])
        for one in found:
            run = one.run
            peak = "" if run.memory_bytes is None else f"{run.memory_bytes / GIB:.2f}"
            error = "" if run.time_s is None else f"{one.error:+.4f}"
            row = [run.id, run.set, run.gpus, run.layout, run.time_s, f"{one.time_s:.6g}", error]
            writer.writerow([*row, f"{one.memory_bytes / GIB:.2f}", peak])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", help="a set, or the beginning of an id")
    parser.add_argument("--csv", type=Path)
    parser.add_argument(
        "--left-out", action="store_true", help="fit every constant without the group predicted; 10 passes"
    )
    parser.add_argument("--figure", type=Path, help="draw predicted against measured (needs matplotlib)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    runs, skipped = read_runs(options.file)
    if options.only:
        runs = [run for run in runs if run.id.startswith(options.only)]
    pricers = Pricers()
    found, refused = outcomes(runs, pricers)
    for name, reason in [*skipped, *refused]:
        print(f"skipped {name}: {reason}")
    print(HEADER)
    timed = [one for one in found if one.run.time_s is not None]
    for name in dict.fromkeys(one.run.set for one in timed):
        print(set_line(name, [one for one in timed if one.run.set == name]))
    lines = [
        layer_line(n, [o for o in timed if o.run.set == n], pricers) for n in dict.fromkeys(o.run.set for o in timed)
    ]
    print("\n".join(["", "with one measured layer time per shape", *(line for line in lines if line)]))
    print("\n".join(["", "memory", *memory_lines(found)]))
    if options.left_out:
        print("\n".join(["", *left_out_lines(timed, pricers)]))
    print(f"\n{len(found)} runs in {time.perf_counter() - started:.0f} s")
    if options.csv:
        write_csv(options.csv, found)
    if options.figure:
        from tests.benchmarks.figure import draw

        draw(options.figure, timed)


if __name__ == "__main__":
    main()
