"""Metrics by position in the response, over training.

Shape suffixes: P buckets of positions · S steps.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure as Picture

from megatron_opd.plots.lines import WIDTH
from megatron_opd.plots.panels import Map, Maps
from megatron_opd.plots.records import Grid, Run

EMPTY = "0.88"  # grey of what has no token


def draw_heatmaps(figure: Maps, runs: Sequence[Run]) -> Picture | None:
    """Draw one row a metric and one column a run, in the same colours; None without any data.

    More than three runs change places with the metrics: rows are then runs.
    """
    maps = [m for m in figure.maps if any(run.by_position(m.metric) for run in runs)]
    shown = [run for run in runs if any(run.by_position(m.metric) for m in maps)]
    if not maps:
        return None
    upright = len(shown) <= 3
    shape = (len(maps), len(shown)) if upright else (len(shown), len(maps))
    width = max(WIDTH * min(shape[1], 2) / 2, 6.5) if shape[1] < 3 else WIDTH
    picture = Picture(figsize=(width, 2.3 * shape[0] + 0.6), layout="constrained")
    axes = picture.subplots(*shape, squeeze=False, sharex=True, sharey=True)
    placed = axes if upright else axes.T  # [map, run]
    for row, m in zip(placed, maps, strict=True):
        norm = _norm([other for other in maps if other.scale == m.scale], shown)
        for ax, run in zip(row, shown, strict=True):
            _heatmap(ax, run.by_position(m.metric), norm)
            ax.set_title(f"{m.title} · {run.name}", loc="left")
        mesh = next(ax.collections[0] for ax in row if ax.collections)
        side = "right" if upright else "bottom"
        label = f"{m.title} [{m.unit}]"
        picture.colorbar(mesh, ax=list(row), label=label, extend="max", location=side)
    for ax in axes[-1]:
        ax.set_xlabel("step")
    for ax in axes[:, 0]:
        ax.set_ylabel("position [tokens]")
    picture.suptitle(f"{figure.title}; grey: no token there")
    return picture


def _norm(maps: Sequence[Map], runs: Sequence[Run]) -> Normalize:
    """Return one scale of colours for some metrics of all runs; nats begin at 0.

    One cell of a hundred may be over its top: the last buckets have few tokens, and extreme means.
    """
    grids = [grid for m in maps for run in runs if (grid := run.by_position(m.metric))]
    values = np.concatenate([grid.values_PS.ravel() for grid in grids])
    lowest = 0.0 if maps[0].unit == "nats" else float(np.nanmin(values))
    return Normalize(lowest, float(np.nanpercentile(values, 99)))


def _heatmap(ax: Axes, grid: Grid | None, norm: Normalize) -> None:
    """Draw one grid; a cell reaches half-way to the next measured step."""
    if grid is None:
        ax.text(0.5, 0.5, "not logged", ha="center", va="center", transform=ax.transAxes)
        return
    steps = np.array(grid.steps, dtype=float)
    between = (steps[1:] + steps[:-1]) / 2 if len(steps) > 1 else np.array([])
    first = between[0] - steps[0] if len(between) else 0.5
    last = steps[-1] - between[-1] if len(between) else 0.5
    edges_S = np.concatenate([[steps[0] - first], between, [steps[-1] + last]])
    edges_P = [*grid.firsts, 2 * grid.firsts[-1] - grid.firsts[-2]]
    ax.set_facecolor(EMPTY)
    values_PS = np.ma.masked_invalid(grid.values_PS)
    ax.pcolormesh(edges_S, edges_P, values_PS, cmap=colormaps["viridis"], norm=norm)
