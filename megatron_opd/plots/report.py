"""All pictures of some runs, as files and on one page."""

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure as Picture

from megatron_opd.plots.bars import draw_phases, draw_sweep
from megatron_opd.plots.heatmaps import draw_heatmaps
from megatron_opd.plots.lines import COLORS, DPI, FONTS, Look, draw_lines, expand
from megatron_opd.plots.page import html_page
from megatron_opd.plots.panels import FIGURES, HEATMAPS, Figure
from megatron_opd.plots.records import Run

FORMATS = ("png", "pdf", "svg")


def write_report(
    runs: Sequence[Run],
    folder: str | Path,
    *,
    formats: Sequence[str] = ("png",),
    smooth: int = 1,
) -> tuple[list[Path], list[str]]:
    """Write one file a picture and format, and index.html; return the files and what is left out.

    What no run has logged is not drawn, but named. `smooth`: steps over which the mean is drawn.

    Raises:
        ValueError: more runs than colours, an unknown format, or a mean of nothing.
    """
    if len(runs) > len(COLORS):
        raise ValueError(f"got {len(runs)} runs, expected at most {len(COLORS)}: one colour each")
    if unknown := [name for name in formats if name not in FORMATS]:
        raise ValueError(f"--formats: got '{unknown[0]}', expected some of {', '.join(FORMATS)}")
    if smooth < 1:
        raise ValueError(f"--smooth: got {smooth}, expected 1 or more steps")
    look, folder = Look(runs, smooth=smooth), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with rc_context(FONTS):
        pictures = draw_all(look)
        images = {name: _png(picture) for name, picture in pictures.items()}
        files = [folder / f"{name}.{ending}" for name in pictures for ending in formats]
        for file in files:
            if file.suffix == ".png":
                file.write_bytes(images[file.stem])
            else:
                pictures[file.stem].savefig(file)
    missing = left_out(look)
    page = folder / "index.html"
    page.write_text(html_page(runs, images, missing, smooth=smooth))
    return [*files, page], missing


def _png(picture: Picture) -> bytes:
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def draw_all(look: Look) -> dict[str, Picture]:
    """Return every picture that has something in it, by name."""
    drawn: dict[str, Picture | None] = {f.name: draw_lines(f, look) for f in _figures(look)}
    drawn |= {figure.name: draw_heatmaps(figure, look.runs) for figure in HEATMAPS}
    drawn["sweep"] = draw_sweep(look.runs)
    drawn["phases"] = draw_phases(look.runs)
    return {name: picture for name, picture in drawn.items() if picture is not None}


def _figures(look: Look) -> list[Figure]:
    wanted = ("any", "several" if len(look.runs) > 1 else "one")
    return [figure for figure in FIGURES if figure.of in wanted]


def left_out(look: Look) -> list[str]:
    """Say which panels are missing, or lack a run, because nothing was logged."""
    lines = []
    for panel in (panel for figure in _figures(look) for panel in figure.panels):
        lacking = [run.name for run in look.runs if not expand(panel, [run])]
        lines += _line(panel.title, look, lacking, ", ".join(panel.curves))
    for figure in HEATMAPS:
        metrics = [m.metric for m in figure.maps]
        lacking = [r.name for r in look.runs if not any(r.by_position(m) for m in metrics)]
        lines += _line(figure.title, look, lacking, "in two buckets of metrics.position_bucket")
    return list(dict.fromkeys(lines))


def _line(title: str, look: Look, lacking: Sequence[str], what: str) -> list[str]:
    if not lacking:
        return []
    by = f" by {', '.join(lacking)}" if len(lacking) < len(look.runs) else ""
    return [f"{title}: not logged{by} ({what})"]
