"""Predicted against measured step times, both on log axes, one colour a set."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.benchmarks.accuracy import Outcome


def draw(path: Path, found: "list[Outcome]") -> None:
    """Write a PNG; the band is 10 % to either side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 6.0), dpi=130)
    for name in dict.fromkeys(one.run.set for one in found):
        rows = [one for one in found if one.run.set == name]
        mape = 100 * sum(abs(one.error) for one in rows) / len(rows)
        axes.scatter(
            [one.run.time_s for one in rows],
            [one.time_s for one in rows],
            s=12,
            alpha=0.7,
            label=f"{name} ({len(rows)}): {mape:.1f} %",
        )
    ends = [min(one.run.time_s or 1 for one in found) / 1.5, max(one.run.time_s or 1 for one in found) * 1.5]
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.fill_between(ends, [0.9 * end for end in ends], [1.1 * end for end in ends], color="grey", alpha=0.2)
    axes.set(xscale="log", yscale="log", xlabel="measured step, s", ylabel="predicted step, s", xlim=ends, ylim=ends)
    axes.legend(fontsize=7, loc="upper left", title="mean |error|", title_fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
