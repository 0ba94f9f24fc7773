"""One picture a probe, of what it found."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_opd.plots.lines import COLORS
from megatron_opd.probes.statistics import Estimate

RIGHT, WRONG = COLORS[2], COLORS[1]


def reward_auroc(found: Mapping[str, Any]) -> Figure:
    """Draw the distributions of r̄, and the AUROC by how much of a response is looked at."""
    figure, (left, right) = _panels(2)
    scores = {
        name: [one["mean_reward"] for one in found["each"] if one["right"] == (name == "right")]
        for name in ("right", "wrong")
    }
    everything = [score for own in scores.values() for score in own]
    span = min(everything), max(everything)
    for (name, own), color in zip(scores.items(), (RIGHT, WRONG), strict=True):
        if own:
            label = f"{name} ({len(own)})"
            left.hist(own, bins=40, range=span, color=color, alpha=0.6, label=label, density=True)
    left.set(title="Mean reward of a response", xlabel="r̄, nats a token", ylabel="density")
    for number, (name, label) in enumerate(
        {"overall": "all responses", "within": "same prompt"}.items()
    ):
        points = {row["fraction"]: row[name] for row in found["auroc"]}
        _curve(right, points, color=COLORS[number], label=label)
    right.axhline(0.5, color="0.6", linestyle="--", linewidth=1, label="chance")
    right.set(title="Right against wrong responses", ylabel="AUROC of r̄", ylim=(0, 1.03))
    right.set_xlabel("share of the tokens, from the start")
    return _finished(figure)


def continuation(found: Mapping[str, Any]) -> Figure:
    """Draw accuracy and advantage by the length of the student's prefix."""
    figure, (left, right) = _panels(2)
    rows = found["by_length"]
    for number, (name, label) in enumerate(
        {"teacher": "teacher goes on", "student": "student goes on"}.items()
    ):
        _curve(left, {r["length"]: r[name] for r in rows}, color=COLORS[number], label=label)
    left.set(title="Accuracy from the student's prefix", ylabel="accuracy", ylim=(-0.03, 1.03))
    _curve(right, {row["length"]: row["advantage"] for row in rows}, color=COLORS[2])
    right.axhline(0, color="0.6", linestyle="--", linewidth=1)
    right.set(title="What the teacher still adds", ylabel="difference of accuracies")
    for ax in (left, right):
        ax.set_xlabel("tokens of the student before")
    return _finished(figure)


def length(found: Mapping[str, Any]) -> Figure:
    """Draw what a limit leaves, and the teacher's signal by position."""
    figure, (left, middle, right) = _panels(3)
    limits, places = found["by_limit"], found["by_position"]
    for number, (name, label) in enumerate({"finished": "finished", "accuracy": "right"}.items()):
        _curve(left, {r["limit"]: r[name] for r in limits}, color=COLORS[number], label=label)
    beyond = {row["limit"]: row["tokens_beyond"] for row in limits}
    left.plot(
        *zip(*beyond.items(), strict=True), color="0.6", linestyle="--", label="tokens beyond"
    )
    left.set(title="Cut at a limit", xlabel="rollout.max_tokens", ylabel="share")
    for number, (name, label) in enumerate(
        {"reverse_kl": "KL(student ‖ teacher)", "entropy_gap": "entropy gap"}.items()
    ):
        _curve(middle, _by_position(places, name), color=COLORS[number], label=label)
    middle.set(title="Signal by position", xlabel="position, tokens", ylabel="nats a token")
    _curve(right, _by_position(places, "overlap"), color=COLORS[2])
    right.set(title="Overlap of the two top-k sets", xlabel="position, tokens", ylabel="share")
    return _finished(figure)


def coherence(found: Mapping[str, Any]) -> Figure:
    """Draw the mean cosine by layer and objective, by position and by set, with the nulls."""
    figure, (left, middle, right) = _panels(3)
    for number, (name, by_layer) in enumerate(found["by_objective"].items()):
        own = {layer: one["sets"]["all"] for layer, one in by_layer.items()}
        _curve(left, _cosines(own), color=COLORS[number], label=name)
        if name == "objective":
            _nulls(left, own)
    _slant(left)
    left.set(title="Gradients of two tokens, by layer", ylabel="mean cosine")
    sets = found["by_objective"]["objective"]["head"]["sets"]
    places = {_first(name): one for name, one in sets.items() if name.startswith("position")}
    others = {name: one for name, one in sets.items() if not name.startswith("position")}
    for ax, chosen, color in ((middle, places, COLORS[0]), (right, others, COLORS[2])):
        _curve(ax, _cosines(chosen), color=color, line=ax is middle)
        _nulls(ax, chosen)
        ax.set(ylabel="mean cosine, head")
    middle.set(title="By position", xlabel="first token of the bucket")
    right.set(title="By set of tokens")
    _slant(right)
    return _finished(figure)


def _panels(count: int) -> tuple[Figure, Sequence[Axes]]:
    figure, axes = plt.subplots(1, count, figsize=(5.2 * count, 4.2), layout="constrained")
    for ax in axes:
        ax.grid(alpha=0.25)
    return figure, axes


def _slant(ax: Axes) -> None:
    """Make room for names below an axis."""
    labels = ax.get_xticklabels()
    size = max(3.0, min(8.0, 160 / len(labels)))
    plt.setp(labels, rotation=35, ha="right", fontsize=size)


def _finished(figure: Figure) -> Figure:
    for ax in figure.axes:
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=9, loc="best")
    return figure


def _curve(
    ax: Axes,
    points: Mapping[Any, Estimate | None],
    *,
    color: str,
    label: str = "",
    line: bool = True,
) -> None:
    """Draw estimates with their intervals; what is not defined is left out."""
    known = {x: one for x, one in points.items() if one is not None}
    if not known:
        return
    value, low, high = zip(*known.values(), strict=True)
    spread = [
        [v - x for v, x in zip(value, low, strict=True)],
        [x - v for v, x in zip(value, high, strict=True)],
    ]
    style = "o-" if line else "o"
    ax.errorbar(
        list(known),
        value,
        yerr=[[max(x, 0.0) for x in side] for side in spread],
        fmt=style,
        color=color,
        label=label or None,
        capsize=3,
        markersize=4,
    )


def _nulls(ax: Axes, sets: Mapping[Any, Any]) -> None:
    """Draw the null models of a mean cosine as marks without an interval."""
    known = {x: one for x, one in sets.items() if one is not None}
    signs = [one.cosine_signs for one in known.values()]
    shuffled = [one.shuffled.cosine for one in known.values()]
    ax.plot(list(known), signs, "_", color="0.3", markersize=12, label="95 % of random signs below")
    ax.plot(list(known), shuffled, "x", color="0.5", markersize=6, label="δ and a shuffled")


def _cosines(sets: Mapping[Any, Any]) -> dict[Any, Estimate | None]:
    return {x: one.cosine for x, one in sets.items() if one is not None}


def _by_position(places: Sequence[Mapping[str, Any]], name: str) -> dict[int, Estimate | None]:
    return {place["from"]: place[name] for place in places}


def _first(name: str) -> int:
    """Return 8 of "position 8–15"."""
    return int(name.split()[1].split("–")[0])
