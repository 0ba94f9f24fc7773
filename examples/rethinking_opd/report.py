"""A figure as a table and as a picture, from the metrics of its runs."""

import json
from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from examples.rethinking_opd.figures import FIGURES, Figure
from examples.rethinking_opd.lab import Lab, Records
from examples.rethinking_opd.skills import from_the_left

# what every distillation is asked at its beginning and at its end
DYNAMICS = {
    "reverse KL": "distill/reverse_kl",
    "overlap": "distill/overlap_ratio",
    "overlap mass": "distill/overlap_mass_student",
    "entropy gap": "distill/entropy_gap",
}
LEAST_GAP = 0.03  # of which a share means something: 256 answers are that exact
EDGE = 5  # steps over which the beginning and the end are means
Values = dict[str, tuple[float, ...]]  # column → what goes into a cell: from, to; or one number


def report(name: str, labs: list[Lab], root: Path) -> str:
    """Train what a figure needs; return its table, and write it and the picture into `root`."""
    figure = FIGURES[name]
    seeds = ", ".join(str(lab.seed) for lab in labs)
    lines = [f"### {figure.title} ({figure.paper}), seeds {seeds}", "", *table(figure, labs)]
    text = "\n".join(lines)
    (root / f"{name}.md").write_text(text + "\n")
    draw(figure, labs, root / f"{name}.png")
    return f"{text}\n\n{root / name}.md, .png"


def table(figure: Figure, labs: list[Lab]) -> list[str]:
    """Return one line an arm: accuracies on every file, then the dynamics; means over seeds."""
    rows = {
        label: [dict(cells(lab, run, figure)) for lab in labs] for label, run in figure.arms.items()
    }
    fullest_first = sorted((row for seeds in rows.values() for row in seeds), key=len, reverse=True)
    columns = list(dict.fromkeys(column for row in fullest_first for column in row))
    lines = [f"| arm | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for label, seeds in rows.items():
        shown = [_cell(column, [of_seed.get(column) for of_seed in seeds]) for column in columns]
        lines.append(f"| {label} | {' | '.join(shown)} |")
    return lines


def cells(lab: Lab, name: str, figure: Figure) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Yield (column, values) of one run: accuracy before and after, the teacher's, the dynamics."""
    records, run = lab.records(name), lab.runs[name]
    for file in figure.files:
        what = "" if len(figure.files) == 1 else f"{file}: "
        course = accuracies(records, file)
        if not run.teacher:
            yield f"{what}accuracy", course[-1:]
            continue
        before, after = course[0], course[-1]
        teacher = accuracies(lab.records(run.teacher), file)[-1]
        yield f"{what}accuracy", (before, after)
        yield f"{what}teacher", (teacher,)
        if teacher - before > LEAST_GAP:
            yield f"{what}gap recovered", ((after - before) / (teacher - before),)
    if run.teacher:
        yield from dynamics(records)
    if run.teacher and figure.order:
        yield "from the left", (_from_the_left(lab.run(name)),)


def dynamics(records: Records) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Yield (column, what it was at the beginning of a distillation and at its end)."""
    for title, metric in DYNAMICS.items():
        values = [record[metric] for record in records if metric in record]
        edges = values[:EDGE], values[-EDGE:]
        yield title, tuple(sum(part) / len(part) for part in edges)


def _from_the_left(folder: Path) -> float:
    """Return the share of a run's last saved responses that work from the left."""
    last = max((folder / "rollouts").iterdir()).read_text().splitlines()
    rows = [json.loads(line) for line in last]
    return sum(from_the_left(row["prompt"], row["response"]) for row in rows) / len(rows)


def accuracies(records: Records, file: str = "") -> tuple[float, ...]:
    """Return the accuracies on a held-out file, one for every evaluation; "": on all of them."""
    alone = "eval/accuracy"
    return tuple(r.get(f"{alone}@{file}", r[alone]) for r in records if alone in r)


def _cell(column: str, seeds: list[tuple[float, ...] | None]) -> str:
    """Return the means over seeds; behind accuracies and recoveries, the extremes at the end."""
    given = [values for values in seeds if values is not None]
    if not given:
        return "–"
    style = ".0%" if "recovered" in column else ".1%" if _percent(column) else ".2f"
    means = [sum(values) / len(values) for values in zip(*given, strict=True)]
    text = " → ".join(f"{mean:{style}}" for mean in means)
    last = [values[-1] for values in given]
    if len(given) == 1 or not _percent(column):
        return text
    return f"{text} ({min(last):{style}} to {max(last):{style}})"


def _percent(column: str) -> bool:
    return column.endswith(("accuracy", "teacher", "recovered", "left"))


def draw(figure: Figure, labs: list[Lab], picture: Path) -> None:
    """Draw accuracy on every file, and two of the dynamics: a colour an arm, a line a seed."""
    dynamics = {title: DYNAMICS[title] for title in ("reverse KL", "overlap mass")}
    files = {f"accuracy, {file}": file for file in figure.files}
    shape = {"figsize": (3.6 * (len(files) + 2) + 1.8, 3), "layout": "constrained"}
    plot, axes = plt.subplots(1, len(files) + 2, **shape)
    arms = {label: run for label, run in figure.arms.items() if labs[0].runs[run].teacher}
    for ax, title in zip(axes, [*files, *dynamics], strict=True):
        ax.set(title=title, xlabel="step")
        ax.grid(alpha=0.25)
        for number, (label, run) in enumerate(arms.items()):
            for seed, lab in enumerate(labs):
                points = _curve(lab.records(run), files.get(title), dynamics.get(title))
                ax.plot(*points, color=f"C{number}", lw=1.3, label=None if seed else label)
    axes[len(files)].set_yscale("log")
    handles, labels = axes[0].get_legend_handles_labels()
    plot.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    plot.suptitle(f"{figure.title} ({figure.paper})")
    plot.savefig(picture, dpi=80)
    plt.close(plot)


def _curve(records: Records, file: str | None, metric: str | None) -> tuple[list, list]:
    if file is not None:
        steps = [r["step"] for r in records if "eval/accuracy" in r]
        return steps, list(accuracies(records, file))
    points = [(r["step"], r[metric]) for r in records if metric in r]
    return [step for step, _ in points], [value for _, value in points]
