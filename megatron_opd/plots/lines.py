"""Curves over steps: one panel a quantity, several runs side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from megatron_opd.plots.panels import OVERVIEW, Figure, Panel
from megatron_opd.plots.records import Records, Run, differences

# the colours of Okabe and Ito that are dark enough on white: told apart by colour-blind eyes too
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
DASHES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))
OF_TOP_K = ("distill/overlap", "distill/support", "distill/extreme", "distill/max_reward")
WIDTH, HEIGHT, DPI = 11.0, 3.0, 120  # inches of a picture, and of a row of panels
FONTS: dict[Any, float] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "legend.fontsize": 8.5,
    "figure.titlesize": 12,
}


@dataclass(frozen=True)
class Look:
    """How curves are told apart.

    Of several runs, `alike` ones (seeds) have one colour a curve and fade in turn; others have one
    colour a run, and dashes for the curves.
    """

    runs: Sequence[Run]
    alike: bool = False
    smooth: int = 1  # steps over which the mean is drawn

    @property
    def by_run(self) -> bool:
        return len(self.runs) > 1 and not self.alike

    def line(self, run: int, curve: int) -> dict:
        """Return the style of one curve of one run."""
        if self.by_run:
            return {"color": COLORS[run], "linestyle": DASHES[curve % len(DASHES)]}
        return {"color": COLORS[curve % len(COLORS)], "alpha": 1 / (1 + 0.5 * run)}


def expand(panel: Panel, runs: Sequence[Run]) -> dict[str, str]:
    """Return the curves of a panel of which some run has values, with their legends."""
    known = sorted({name for run in runs for name in run.metrics}, key=_natural)
    found = {}
    for metric, legend in panel.curves.items():
        if metric.endswith("*"):
            stem = metric[:-1]
            found |= {n: legend + n[len(stem) :] for n in known if n.startswith(stem)}
        elif metric in known:
            found[metric] = legend
    return found


def _natural(name: str) -> tuple[str, int]:
    """Order pass@16 after pass@2."""
    stem, _, number = name.rpartition("@")
    return (stem, int(number)) if number.isdecimal() else (name, 0)


def plot_dynamics(
    runs: Mapping[str, Records], picture: str | Path, *, teacher_accuracy: Sequence[float] = ()
) -> None:
    """Draw accuracy, reverse KL, overlap and entropies of runs alike, such as seeds, into a file.

    The ending of `picture` says which format: .png, .pdf or .svg.
    """
    look = Look([Run(name, records) for name, records in runs.items()], alike=True)
    with rc_context(FONTS):
        drawn = _grid(len(OVERVIEW.panels))
        for ax, panel in zip(drawn.axes, OVERVIEW.panels, strict=True):
            _panel(ax, panel, look)
        for level in teacher_accuracy:
            line = drawn.axes[0].axhline(level, color="0.4", linestyle="--", linewidth=1)
            _legend(drawn.axes[0], [_key(look, 0), line], ["student", "teacher"])
        drawn.savefig(picture, dpi=DPI)


def draw_lines(figure: Figure, look: Look) -> Picture | None:
    """Draw the panels of which some run has values; None where there are none."""
    panels = [panel for panel in figure.panels if expand(panel, look.runs)]
    if not panels:
        return None
    picture = _grid(len(panels))
    for ax, panel in zip(picture.axes, panels, strict=True):
        _panel(ax, panel, look)
    sets = any(name.startswith(OF_TOP_K) for panel in panels for name in panel.curves)
    differ = "objective.k" in differences(look.runs)
    head(picture, figure.title + ("; objective.k differs" if sets and differ else ""), look)
    return picture


def head(picture: Picture, title: str, look: Look) -> None:
    """Write the title of a picture, and under it which colour is which run."""
    if not look.by_run:
        picture.suptitle(f"{title}: {look.runs[0].name}")
        return
    picture.suptitle(title)
    handles = [Line2D([], [], color=COLORS[i], linewidth=2) for i in range(len(look.runs))]
    names = [run.name for run in look.runs]
    columns = max(1, 110 // (max(map(len, names)) + 8))  # as many as fit
    picture.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)


def _grid(panels: int) -> Picture:
    """Return a picture with as many axes, two or three a row."""
    columns = 2 if panels in (2, 4) else min(panels, 3)
    rows = ceil(panels / columns)
    picture = Picture(figsize=(WIDTH, HEIGHT * rows + 0.6), layout="constrained")
    for number in range(panels):
        picture.add_subplot(rows, columns, number + 1)
    return picture


def _panel(ax: Axes, panel: Panel, look: Look) -> None:
    """Draw every curve of every run."""
    ax.set(xlabel="step", ylabel=panel.unit)
    ax.grid(alpha=0.25)
    curves, lowest = expand(panel, look.runs), np.inf
    for number, metric in enumerate(curves):
        for index, run in enumerate(look.runs):
            steps, values = run.series(metric)
            if steps:
                _curve(ax, steps, values, look.smooth, look.line(index, number))
                lowest = min(lowest, *values)
    if panel.log and 0 < lowest < np.inf:
        _logarithmic(ax)
    ax.set_ylim(*panel.limits)
    names = [name for name in curves.values() if name]
    keys = [_key(look, number) for number in range(len(curves))]
    ax.set_title(panel.title, loc="left")
    if names:
        _legend(ax, keys, names)


def _logarithmic(ax: Axes) -> None:
    """Count decades, and 2 and 5 of each where there are few."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter("{x:g}")


def _curve(ax: Axes, steps: list[int], values: list[float], smooth: int, style: dict) -> None:
    """Draw a curve; one that is smoothed over its pale original."""
    few = {"marker": "o", "markersize": 3} if len(steps) < 30 else {}
    if smooth > 1:
        ax.plot(steps, values, linewidth=0.8, **{**style, "alpha": 0.25})
        values = running_mean(steps, values, smooth)
    ax.plot(steps, values, linewidth=1.4, **few, **style)


def _key(look: Look, curve: int) -> Line2D:
    style = {**look.line(0, curve), **({"color": "0.3"} if look.by_run else {})}
    return Line2D([], [], linewidth=1.6, **style)


def _legend(ax: Axes, keys: Sequence, names: Sequence[str]) -> None:
    """Put a legend between title and axes, where no curve is."""
    rows = ceil(len(names) / 3)
    ax.set_title(ax.get_title(loc="left"), loc="left", pad=6 + 14 * rows)
    ax.legend(
        keys,
        names,
        loc="lower left",
        bbox_to_anchor=(0, 1.02),
        borderpad=0,
        ncols=ceil(len(names) / rows),
        frameon=False,
        borderaxespad=0,
        columnspacing=1.2,
        handlelength=2.2,
    )


def running_mean(steps: Sequence[int], values: Sequence[float], width: int) -> list[float]:
    """Return the mean of the values within `width` steps around each; at the ends of fewer.

    What is logged more seldom than that is left as it is.
    """
    at, known = np.asarray(steps), np.asarray(values, dtype=float)
    return [
        float(np.nanmean(known[np.abs(at - step) <= (width - 1) / 2]))
        if np.isfinite(value)
        else value
        for step, value in zip(steps, values, strict=True)
    ]
