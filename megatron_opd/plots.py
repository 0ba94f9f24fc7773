"""Draw the dynamics of runs from their metrics.jsonl."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Records = list[dict[str, float]]

# title and axis label → the metrics drawn there, with their legend
PANELS: dict[tuple[str, str], dict[str, str]] = {
    ("Accuracy on held-out prompts", "accuracy"): {"eval/accuracy": "student"},
    ("Reverse KL(student ‖ teacher)", "nats per token"): {
        "distill/reverse_kl": "whole vocabulary",
        "distill/support_kl": "top-k, renormalised",
    },
    ("Overlap of the two top-k sets", "fraction"): {
        "distill/overlap_ratio": "ids in both",
        "distill/overlap_mass_student": "student's mass on them",
        "distill/overlap_mass_teacher": "teacher's mass on them",
    },
    ("Entropy", "nats per token"): {"student/entropy": "student", "teacher/entropy": "teacher"},
}


def read_metrics(folder: str | Path) -> Records:
    """Return the records of a run, in order of their steps.

    Raises:
        ValueError: the folder holds no metrics.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"'{folder}': no metrics.jsonl, expected the directory of a run")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    if not records:
        raise ValueError(f"'{path}': no records yet; wait for the first step")
    return records


def plot_dynamics(
    runs: Mapping[str, Records], picture: str | Path, *, teacher_accuracy: Sequence[float] = ()
) -> None:
    """Draw one panel a quantity and one line a run into the file `picture` (.png, .pdf, .svg)."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for ax, ((title, unit), curves) in zip(axes.flat, PANELS.items(), strict=True):
        ax.set(title=title, xlabel="step", ylabel=unit)
        ax.grid(alpha=0.25)
        for number, (metric, legend) in enumerate(curves.items()):
            _draw(ax, runs, metric, legend, color=f"C{number}")
    for number, accuracy in enumerate(teacher_accuracy):
        legend = None if number else "teacher"
        axes.flat[0].axhline(accuracy, color="C7", linestyle="--", linewidth=1, label=legend)
    for ax in axes.flat:
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False)
    axes.flat[0].set_ylim(-0.02, 1.02)
    figure.savefig(picture, dpi=130)
    plt.close(figure)


def _draw(ax: Axes, runs: Mapping[str, Records], metric: str, legend: str, *, color: str) -> None:
    """Draw one metric of every run; several runs share a colour and fade in turn."""
    few = sum(metric in record for records in runs.values() for record in records) < 40 * len(runs)
    for number, records in enumerate(runs.values()):
        points = [(r["step"], r[metric]) for r in records if metric in r]
        if points:
            steps, values = zip(*points, strict=True)
            ax.plot(
                steps,
                values,
                color=color,
                alpha=1 / (1 + 0.5 * number),
                label=None if number else legend,
                marker="o" if few else None,
                markersize=3,
                linewidth=1.4,
            )
