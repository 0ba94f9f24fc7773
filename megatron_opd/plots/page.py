"""One self-contained page: pictures, last values, and how the configs differ."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from megatron_opd.plots.lines import COLORS
from megatron_opd.plots.panels import SUMMARY
from megatron_opd.plots.records import Run, differences

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 1320px; margin: 1.5em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
img { max-width: 100%; height: auto; display: block; margin: 1.2em 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; font-family: ui-monospace, monospace;
                                 font-size: .9em; }
.first { color: #666; } .swatch { display: inline-block; width: .8em; height: .8em;
                                  margin-right: .4em; }
"""


def html_page(
    runs: Sequence[Run], images: Mapping[str, bytes], missing: Sequence[str], *, smooth: int = 1
) -> str:
    """Return the page as text; the PNGs are inside of it, and nothing comes from elsewhere."""
    title = " · ".join(run.name for run in runs)
    parts = [
        f"<h1>{escape(title)}</h1>",
        "<h2>Runs</h2>",
        _runs(runs),
        *_differences(runs),
        "<h2>Last values</h2>",
        _values(runs, [name for name in SUMMARY if any(name in run.metrics for run in runs)]),
        *_others(runs),
        "<h2>Curves</h2>",
        *([f"<p>Means over {smooth} steps, on the pale originals.</p>"] if smooth > 1 else []),
        *(_image(name, png) for name, png in images.items()),
        *_list("Left out, because it was not logged", missing),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def describe(config: Mapping[str, Any]) -> str:
    """Say in one line what a run did, from its config."""
    if not config:
        return "no config.yaml"
    teacher = config.get("teacher.path")
    names = [config.get("student.path"), *([teacher] if teacher else [])]
    keys = ("support", "k", "divergence", "form")
    said = [config.get(f"objective.{key}") for key in keys]
    words = [f"k={word}" if isinstance(word, int) else str(word) for word in said if word]
    rate = config.get("optimizer.lr")
    return f"{' ← '.join(map(str, names))}; {', '.join(words)}; lr {rate}"


def _runs(runs: Sequence[Run]) -> str:
    rows = []
    for index, run in enumerate(runs):
        mark = f'<span class="swatch" style="background: {COLORS[index]}"></span>'
        name = (mark if len(runs) > 1 else "") + f"<b>{escape(run.name)}</b>"
        steps = run.records[-1]["step"]
        rows.append(f"<li>{name}: {steps} steps; {escape(describe(run.config))}</li>")
    return f"<ul>{''.join(rows)}</ul>"


def _differences(runs: Sequence[Run]) -> list[str]:
    """Return the config keys that differ; a word of care where they make metrics differ."""
    if len(runs) < 2:
        return []
    table = differences(runs)
    lines = ["<h2>Where the configs differ</h2>"]
    rows = [[key, *(_text(value) for value in values)] for key, values in table.items()]
    lines.append(_table([run.name for run in runs], rows) if rows else "<p>Nowhere.</p>")
    if "objective.k" in table:
        lines.append(
            "<p>objective.k differs: overlap, its masses and advantages, and the top-k divergences "
            "are of sets of different sizes.</p>"
        )
    return lines


def _values(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Return the first and the last value of each metric in each run."""
    rows = []
    for name in names:
        cells = [escape(name)]
        for run in runs:
            values = run.series(name)[1]
            first = f'<span class="first">{_number(values[0])} → </span>' if values else "–"
            cells.append(first + (_number(values[-1]) if values else ""))
        rows.append(cells)
    return _table([f"{run.name}: first → last" for run in runs], rows)


def _others(runs: Sequence[Run]) -> list[str]:
    names = sorted({name for run in runs for name in run.metrics} - set(SUMMARY))
    if not names:
        return []
    return [f"<details><summary>All others</summary>{_values(runs, names)}</details>"]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; its cells are HTML, its heads are not."""
    top = "".join(f"<th>{escape(head)}</th>" for head in ("", *heads))
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
    return f'<div class="wide"><table><tr>{top}</tr>\n{body}</table></div>'


def _list(title: str, lines: Sequence[str]) -> list[str]:
    if not lines:
        return []
    return [f"<h2>{title}</h2><ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"]


def _text(value: Any) -> str:
    return escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _image(name: str, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    return f'<img id="{name}" alt="{name.replace("_", " ")}" src="data:image/png;base64,{data}">'
