"""What is drawn together, and under which words.

The figures are those of "Rethinking On-Policy Distillation" (2604.13016) where they name one.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Panel:
    """Axes: what they show, in which unit, and the metrics drawn there with their legend.

    A metric that ends in * stands for all that begin so; the rest of the name joins the legend.
    """

    title: str
    unit: str
    curves: dict[str, str]
    log: bool = False
    limits: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True)
class Figure:
    """Panels of one picture; `of`: whether it is drawn of one run, of several, or of any number."""

    name: str
    title: str
    panels: tuple[Panel, ...]
    of: Literal["one", "several", "any"] = "any"


SHARE = (-0.02, 1.02)
ACCURACY = Panel("Accuracy on held-out prompts", "accuracy", {"eval/accuracy": ""}, limits=SHARE)
ENTROPY = Panel(
    "Entropy", "nats per token", {"student/entropy": "student", "teacher/entropy": "teacher"}
)
OVERLAP = Panel("Overlap ratio (Eq. 6)", "fraction of the top k", {"distill/overlap_ratio": ""})
ADVANTAGE = Panel(
    "Overlap-token advantage (Eq. 7)", "nats per entry", {"distill/overlap_advantage": ""}
)

OVERVIEW = Figure(
    "overview",
    "Overview",
    (
        ACCURACY,
        Panel(
            "Reverse KL(student ‖ teacher)",
            "nats per token",
            {
                "distill/reverse_kl": "whole vocabulary",
                "distill/support_kl": "top k, renormalised",
            },
        ),
        Panel(
            "Overlap of the two top-k sets",
            "fraction",
            {
                "distill/overlap_ratio": "ids in both",
                "distill/overlap_mass_student": "student's mass",
                "distill/overlap_mass_teacher": "teacher's mass",
            },
        ),
        ENTROPY,
    ),
    of="one",
)

FIGURES = (
    OVERVIEW,
    Figure("comparison", "Comparison (Figs. 7, 16)", (ACCURACY, OVERLAP, ADVANTAGE), of="several"),
    Figure(
        "dynamics",
        "Dynamics (Fig. 6)",
        (
            OVERLAP,
            ADVANTAGE,
            Panel("Entropy gap (Eq. 8)", "nats per token", {"distill/entropy_gap": ""}),
            Panel(
                "Overlap mass (Eqs. 9, 10)",
                "probability",
                {
                    "distill/overlap_mass_student": "student's",
                    "distill/overlap_mass_teacher": "teacher's",
                },
            ),
        ),
    ),
    Figure(
        "training",
        "Stability (Figs. 12, 18)",
        (
            Panel("Gradient norm before clipping", "norm", {"optim/grad_norm": ""}, log=True),
            Panel("Response length", "tokens", {"rollout/response_tokens": ""}),
            Panel(
                "Responses cut at the limit",
                "fraction",
                {"rollout/truncated_fraction": ""},
                limits=(0, None),
            ),
            ENTROPY,
            Panel("Objective", "loss", {"loss/objective": ""}),
            Panel("Reverse KL(student ‖ teacher)", "nats per token", {"distill/reverse_kl": ""}),
        ),
    ),
    Figure(
        "extremes",
        "Extreme advantages (Fig. 19)",
        (
            Panel("p − q at the extreme advantage", "probability", {"distill/extreme_gap": ""}),
            Panel(
                "Where the overlap's reward is highest",
                "probability",
                {"distill/max_reward_p": "student p", "distill/max_reward_q": "teacher q"},
            ),
            Panel(
                "Where it is lowest",
                "probability",
                {"distill/min_reward_p": "student p", "distill/min_reward_q": "teacher q"},
            ),
            Panel(
                "The overlap's extreme rewards",
                "nats per entry",
                {"distill/max_reward": "highest", "distill/min_reward": "lowest"},
            ),
            Panel(
                "Mean reward of entries in the top k of",
                "nats per entry",
                {
                    "distill/overlap_reward": "both",
                    "distill/student_only_reward": "student only",
                    "distill/teacher_only_reward": "teacher only",
                },
            ),
        ),
    ),
    Figure(
        "reward",
        "Rewards and evaluation",
        (
            Panel("Reward of the responses", "reward", {"reward/mean": ""}),
            Panel(
                "Prompts by their responses",
                "fraction of prompts",
                {
                    "reward/solved_all_fraction": "all solved",
                    "reward/solved_none_fraction": "none solved",
                },
                limits=SHARE,
            ),
            Panel(
                "Several samples a problem",
                "fraction",
                {"eval/pass@*": "pass@", "eval/maj@*": "maj@"},
                limits=SHARE,
            ),
            Panel("Accuracy by file", "fraction", {"eval/accuracy@*": ""}, limits=SHARE),
        ),
    ),
    Figure(
        "engine",
        "Engine against trainer, and speed",
        (
            Panel("Mismatch, k3 of KL(μ‖π)", "nats", {"policy/mismatch_kl": ""}, log=True),
            Panel("Largest |log π − log μ|", "nats", {"policy/mismatch_max": ""}, log=True),
            Panel(
                "Tokens acted on",
                "fraction",
                {
                    "policy/corrected_fraction": "corrected",
                    "policy/clipped_fraction": "clipped",
                    "policy/topk_mismatch": "top k differs",
                },
            ),
            Panel("Speed", "tokens per second", {"perf/tokens_per_s": ""}),
        ),
    ),
)


@dataclass(frozen=True)
class Map:
    """One metric by position and step; maps of one `scale` share their colours."""

    metric: str
    title: str
    unit: str
    scale: str


@dataclass(frozen=True)
class Maps:
    """Maps of one picture."""

    name: str
    title: str
    maps: tuple[Map, ...]


HEATMAPS = (
    Maps(
        "entropy_by_position",
        "Entropy by position (Figs. 13, 23)",
        (
            Map("student/entropy", "student's entropy", "nats", "entropy"),
            Map("teacher/entropy", "teacher's entropy", "nats", "entropy"),
            Map("distill/entropy_gap", "entropy gap", "nats", "gap"),
        ),
    ),
    Maps(
        "overlap_by_position",
        "Overlap and reverse KL by position",
        (
            Map("distill/overlap_ratio", "overlap ratio", "fraction", "overlap"),
            Map("distill/reverse_kl", "reverse KL", "nats", "kl"),
        ),
    ),
)

# of these the page shows the first and the last value; of all others on demand
SUMMARY = (
    "eval/accuracy",
    "reward/mean",
    "loss/objective",
    "distill/reverse_kl",
    "distill/support_kl",
    "distill/overlap_ratio",
    "distill/overlap_mass_student",
    "distill/overlap_mass_teacher",
    "distill/overlap_advantage",
    "distill/entropy_gap",
    "student/entropy",
    "teacher/entropy",
    "optim/grad_norm",
    "rollout/response_tokens",
    "rollout/truncated_fraction",
    "policy/mismatch_kl",
    "perf/tokens_per_s",
    "time/step_s",
)
