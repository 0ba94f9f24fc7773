"""Where the time of a step goes, and how outcomes depend on the one setting that differs."""

from collections.abc import Sequence
from math import ceil, fsum

from matplotlib.figure import Figure as Picture

from megatron_opd.plots.lines import COLORS, WIDTH, Look, head
from megatron_opd.plots.records import Run, differences


def draw_phases(runs: Sequence[Run]) -> Picture | None:
    """Draw the mean seconds of each phase of a step, one bar a run; None without times."""
    means = {run.name: _phases(run) for run in runs}
    phases = list(dict.fromkeys(phase for found in means.values() for phase in found))
    if not phases:
        return None
    picture = Picture(figsize=(WIDTH, 1.1 + 0.45 * len(runs)), layout="constrained")
    ax = picture.add_subplot()
    left = [0.0] * len(runs)
    for number, phase in enumerate(phases):
        widths = [means[run.name].get(phase, 0.0) for run in runs]
        color = COLORS[number % len(COLORS)]
        ax.barh([run.name for run in runs], widths, left=left, color=color, label=phase)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    ax.invert_yaxis()
    ax.set_xlabel("seconds of a step, mean")
    ax.grid(axis="x", alpha=0.25)
    ax.set_axisbelow(True)
    picture.suptitle("Time")
    picture.legend(loc="outside lower center", ncols=len(phases), frameon=False)
    return picture


def _phases(run: Run) -> dict[str, float]:
    """Return the mean seconds of each phase; what none of them had is `other`."""
    steps, total = run.series("time/step_s")
    if not steps:
        return {}
    names = sorted(n for n in run.metrics if n.startswith("time/") and n != "time/step_s")
    found = {
        name.removeprefix("time/").removesuffix("_s"): fsum(run.series(name)[1]) / len(steps)
        for name in names
    }
    rest = fsum(total) / len(steps) - fsum(found.values())
    return found | ({"other": rest} if rest > 0.01 * fsum(found.values()) else {})


# of these the last values are drawn against the setting that differs
OUTCOMES = {
    "eval/accuracy": "accuracy",
    "distill/overlap_ratio": "overlap ratio",
    "distill/entropy_gap": "entropy gap [nats]",
    "optim/grad_norm": "gradient norm",
    "rollout/response_tokens": "response length [tokens]",
    "rollout/truncated_fraction": "cut at the limit",
}


def draw_sweep(runs: Sequence[Run]) -> Picture | None:
    """Draw what runs ended with against the one number in which their configs differ (Fig. 11).

    An end is the mean of the last tenth of the values. None unless three runs or more differ in one
    number; their seeds may differ, too.
    """
    swept = _swept(runs)
    outcomes = [name for name in OUTCOMES if all(run.series(name)[0] for run in runs)]
    if swept is None or not outcomes:
        return None
    key, values = swept
    picture = Picture(figsize=(WIDTH, 2.9 * ceil(len(outcomes) / 3) + 0.6), layout="constrained")
    for number, name in enumerate(outcomes, 1):
        ax = picture.add_subplot(ceil(len(outcomes) / 3), min(len(outcomes), 3), number)
        ends = [_end(run.series(name)[1]) for run in runs]
        for index, point in enumerate(zip(values, ends, strict=True)):
            ax.plot(*point, "o", color=COLORS[index])
        ax.set(xlabel=key, ylabel=OUTCOMES[name], xticks=sorted(set(values)))
        if min(values) > 0 and max(values) > 8 * min(values):
            ax.set_xscale("log")
            ax.set_xticks(sorted(set(values)), [f"{value:g}" for value in sorted(set(values))])
            ax.minorticks_off()
        ax.grid(alpha=0.25)
    head(picture, f"By {key}, at the end", Look(runs))
    return picture


def _swept(runs: Sequence[Run]) -> tuple[str, list[float]] | None:
    """Return the key of the one number that differs, and its value in each run."""
    differing = {key: values for key, values in differences(runs).items() if key != "seed"}
    if len(runs) < 3 or len(differing) != 1 or not all(run.config for run in runs):
        return None
    ((key, values),) = differing.items()
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return (key, values) if numbers else None


def _end(values: Sequence[float]) -> float:
    last = values[-max(1, len(values) // 10) :]
    return fsum(last) / len(last)
