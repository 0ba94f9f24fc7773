"""Watch the record of each step, and warn once of each thing that goes wrong.

Rules are functions of what was recorded until now; a median of some records, never a single one,
is compared with a median of earlier ones (but for a spike of the gradient, which is one). Numbers
of records are judgement: shorter than the 200 steps in which the paper's runs succeed or fail.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from megatron_opd import signs

RECENT, START = 5, 10  # records whose median is "now", and "at first"
WINDOW = 50  # measurements over which an overlap falls, and records of a running median
PATIENCE = 100  # measurements after which an overlap should have risen
FALL, RISE = 0.05, 0.01  # of an overlap or a mass: more is falling, less is standing still
SPIKE = 10.0  # times the running median of the gradient norm
WAVE, WAVE_NATS = 1.5, 0.1  # growth of the late entropies over the early ones', and at least
JUMP = 0.2  # of the share of truncated responses
GROWTH, GROWTH_NATS = 10.0, 1e-3  # of the mismatch, and from where on it matters

_BUCKET = re.compile(r"student/entropy@(\d+)")
_TEACHER = re.compile(r"teacher/entropy(?:@([A-Za-z].*))?")  # of all teachers, or of one by name


@dataclass
class History:
    """Every watched metric until now: values, and the step of the last one."""

    vocab_size: int
    k: int
    values: dict[str, list[float]] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)
    step: int = 0

    def add(self, step: int, record: Mapping[str, float]) -> None:
        """Keep what the rules look at.

        Responses of older weights differ from the student because it has learned since: their
        mismatch says nothing of the engine.
        """
        self.step = step
        if record.get("rollout/staleness_steps"):
            record = {k: v for k, v in record.items() if k != "policy/mismatch_kl"}
        for name, value in record.items():
            if name in WATCHED or _BUCKET.fullmatch(name) or _TEACHER.fullmatch(name):
                self.values.setdefault(name, []).append(value)
                self.last[name] = step

    def of(self, name: str, fewest: int) -> list[float]:
        """Return the values of a metric if this step has one, and there are enough; else none."""
        values = self.values.get(name, [])
        return values if self.last.get(name) == self.step and len(values) >= fewest else []


def teacher_knows_nothing(history: History) -> str | None:
    """Find a teacher that prefers hardly any token: random weights, or none, look like this."""
    for name in list(history.values):
        teacher, values = _TEACHER.fullmatch(name), history.of(name, 1)
        if teacher and values and signs.prefers_nothing(values[-1], history.vocab_size):
            key = f"teachers.{teacher[1]}" if teacher[1] else "teacher"
            return (
                f"{key}: its entropy is {values[-1]:.2f} nats of at most "
                f"{math.log(history.vocab_size):.2f}, so it prefers hardly any token; are the "
                f"weights in {key}.path trained, and is the prompt in its format?"
            )
    return None


def overlap(history: History) -> str | None:
    """Find an overlap that falls over a window, or stays low where good runs have risen."""
    if signs.ratio_counts(history.k, history.vocab_size):
        return _overlap(history, "distill/overlap_ratio", signs.OVERLAP_DONE)
    masses = ("distill/overlap_mass_student", "distill/overlap_mass_teacher")
    lines = (_overlap(history, name, signs.MASS_LOW) for name in masses)
    return next((line for line in lines if line), None)


def _overlap(history: History, name: str, enough: float) -> str | None:
    window = history.of(name, WINDOW)[-WINDOW:]
    if not window:
        return None
    before, now = median(window[:START]), median(window[-START:])
    if now < before - FALL:
        return (
            f"{name} fell from {before:.2f} to {now:.2f} in {WINDOW} measurements: student and "
            "teacher part; lower optimizer.lr, or shorten rollout.max_tokens"
        )
    longer = history.of(name, PATIENCE)[-PATIENCE:]
    if longer and now < min(enough, median(longer[:START]) + RISE):
        return (
            f"{name} stands at {now:.2f} since {PATIENCE} measurements, where good runs rise: the "
            "two may think too differently; a cold start on the teacher's responses helps"
        )
    return None


def suffix_entropy(history: History) -> str | None:
    """Find entropies that rise late in the responses and not early: instability starts there."""
    found = (_BUCKET.fullmatch(name) for name in history.values)
    starts = sorted(int(match[1]) for match in found if match)
    series = [(start, history.of(f"student/entropy@{start}", START + WINDOW)) for start in starts]
    series = [(start, values) for start, values in series if values]
    if len(series) < 3:
        return None
    growth = [_growth(values) for _, values in series]
    third = len(series) // 3
    late, early = median(growth[-third:]), median(growth[:third])
    start, values = series[-third]
    rise = median(values[-RECENT:]) - median(values[:START])
    if late < WAVE * max(early, 1.0) or rise < WAVE_NATS:
        return None
    return (
        f"student/entropy grew to {late:.1f} times its start beyond token {start} of the responses "
        f"(to {early:.1f} times at their beginning): long responses destabilise from the end; "
        f"lower rollout.max_tokens towards {start}"
    )


def _growth(values: list[float]) -> float:
    return median(values[-RECENT:]) / max(median(values[:START]), 1e-6)


def gradient_spike(history: History) -> str | None:
    """Find a gradient norm far above the running median."""
    values = history.of("optim/grad_norm", WINDOW // 2)
    usual = median(values[-WINDOW - 1 : -1]) if values else 0.0
    if not values or values[-1] <= SPIKE * usual or not usual:
        return None
    return (
        f"optim/grad_norm: {values[-1]:.3g} is {values[-1] / usual:.0f} times its running median; "
        "if more follow, lower optimizer.lr or rollout.max_tokens"
    )


def truncation_jump(history: History) -> str | None:
    """Find a share of truncated responses that rose at once: they no longer end."""
    values = history.of("rollout/truncated_fraction", WINDOW // 2)
    if not values:
        return None
    before, now = median(values[-WINDOW // 2 : -RECENT]), median(values[-RECENT:])
    if now < before + JUMP:
        return None
    return (
        f"rollout/truncated_fraction rose from {before:.0%} to {now:.0%}: responses run on to "
        "rollout.max_tokens; look for repetition (run.save_rollouts_every), and check "
        "rollout.stop_token_ids"
    )


def mismatch(history: History) -> str | None:
    """Find an engine whose log-probabilities leave the trainer's."""
    values = history.of("policy/mismatch_kl", RECENT)
    if not values:
        return None
    before, now = median(values[:START]), median(values[-RECENT:])
    grows = len(values) >= START + RECENT and now > max(GROWTH * before, GROWTH_NATS)
    if now < signs.MISMATCH_FAILING and not grows:
        return None
    return (
        f"policy/mismatch_kl is {now:.1e} nats, {before:.1e} at first: engine and trainer "
        "disagree; set rollout.correction=tis, and check the engine's dtype"
    )


RULES: tuple[Callable[[History], str | None], ...] = (
    teacher_knows_nothing,
    overlap,
    suffix_entropy,
    gradient_spike,
    truncation_jump,
    mismatch,
)
WATCHED = {
    "distill/overlap_ratio",
    "distill/overlap_mass_student",
    "distill/overlap_mass_teacher",
    "optim/grad_norm",
    "rollout/truncated_fraction",
    "policy/mismatch_kl",
}


class Watch:
    """The rules over one run. `k` is that of the measured top-k sets."""

    def __init__(self, *, vocab_size: int, k: int):
        self.history = History(vocab_size, k)
        self.silent: set[Callable[[History], str | None]] = set()  # rules that have spoken

    def see(self, step: int, record: Mapping[str, float]) -> list[str]:
        """Take in the record of a step; return a line for every rule that it breaks first."""
        self.history.add(step, record)
        lines = []
        for rule in RULES:
            line = None if rule in self.silent else rule(self.history)
            if line is not None:
                self.silent.add(rule)
                lines.append(line)
        return lines

    def recall(self, file: Path) -> None:
        """Take in the records of a metrics.jsonl: a resumed run stands where it stood, and has
        warned of what is in them."""
        for line in file.read_text().splitlines():
            record = json.loads(line)
            self.see(record.pop("step"), record)
