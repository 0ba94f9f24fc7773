"""How often a model is right on held-out prompts, and how sure that is.

Several responses to one problem are not independent: what varies is the problem. Every number is a
mean over problems, and every interval is of that mean.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from megatron_opd.advantage import SOLVED
from megatron_opd.answers import boxed
from megatron_opd.parallel import Parallel
from megatron_opd.reward import ballot, scored
from megatron_opd.rollout import RolloutEngine, Sampling
from megatron_opd.types import Prompt, Reward, Rollout


@dataclass(frozen=True)
class Graded:
    """One problem, and what became of its n responses, in the order they were drawn."""

    index: int  # of the prompt
    source: str
    scores: tuple[float, ...]
    voted: float  # the score of what most of them answer
    tokens: tuple[int, ...]  # of each response
    truncated: tuple[bool, ...]
    boxed: tuple[bool, ...]  # there is a `\boxed{}`

    @property
    def accuracy(self) -> float:
        """Mean reward."""
        return sum(self.scores) / len(self.scores)

    @property
    def right(self) -> int:
        """Responses that are right: those of more than half the reward."""
        return sum(score > SOLVED for score in self.scores)


def text_of(response_ids: Sequence[int], tokenizer: Any) -> str:
    """Return a response as text; special tokens, as the one at the end, are no part of it."""
    return tokenizer.decode(response_ids, skip_special_tokens=True)


def texts(rollouts: Sequence[Rollout], tokenizer: Any) -> list[str]:
    """Return the responses as text."""
    return [text_of(rollout.response_ids, tokenizer) for rollout in rollouts]


def is_right(reward: Reward, text: str, prompt: Prompt) -> bool:
    """Say whether a response is right: of more than half the reward.

    Raises:
        ValueError: the reward is not a finite number.
    """
    return scored(reward, text, prompt) > SOLVED


def grade(rollouts: Sequence[Rollout], reward: Reward, tokenizer: Any) -> list[Graded]:
    """Score rollouts that come prompt by prompt.

    Raises:
        ValueError: a reward is not a finite number.
    """
    read, same = ballot(reward)
    graded = []
    for index, group in groupby(rollouts, key=lambda rollout: rollout.prompt.index):
        of_one = list(group)
        prompt, said = of_one[0].prompt, texts(of_one, tokenizer)
        scores = tuple(scored(reward, text, prompt) for text in said)
        graded.append(
            Graded(
                index=index,
                source=prompt.source,
                scores=scores,
                voted=majority([read(text) for text in said], scores, same),
                tokens=tuple(len(r.response_ids) for r in of_one),
                truncated=tuple(r.finish == "length" for r in of_one),
                boxed=tuple(boxed(text) is not None for text in said),
            )
        )
    return graded


def pass_at(n: int, right: int, k: int) -> float:
    """Return the chance that of k responses, drawn from n without putting back, one is right.

    1 − C(n − c, k) / C(n, k), the unbiased estimate of pass@k from c right ones of n (Chen et al.,
    2107.03374, eq. 1).
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(
    answers: Sequence[str | None], scores: Sequence[float], same: Callable[[str, str], bool]
) -> float:
    """Return the score of the answer that most responses give; of equals, of the first.

    A response without an answer does not vote; where nobody does, the first one's score counts.
    Answers of different scores are different ones, which spares most comparisons.
    """
    camps: list[list[int]] = []
    for index, answer in enumerate(answers):
        if answer is None:
            continue
        for camp in camps:
            leader = answers[camp[0]]
            if scores[camp[0]] == scores[index] and leader is not None and same(leader, answer):
                camp.append(index)
                break
        else:
            camps.append([index])
    return scores[max(camps, key=len)[0]] if camps else scores[0]


def interval(values: Sequence[float]) -> float:
    """Return half the width of the 95 % confidence interval of a mean over problems.

    1.96 · s / √P with the sample standard deviation s of the P values: normal, so it says nothing
    where all are equal (0), and one problem has none (0).
    """
    return 1.96 * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def summarize(graded: Sequence[Graded]) -> dict[str, float]:
    """Return the metrics of problems that each have n responses, and the intervals of some.

    accuracy is avg@n; pass@k for k = 2, 4, … up to n, and for n; maj@n; `X±` is `interval` of X.
    """
    n = len(graded[0].scores)
    ks = sorted({2**i for i in range(1, n.bit_length())} | {n}) if n > 1 else []
    per_problem = {"accuracy": [g.accuracy for g in graded]}
    per_problem |= {f"pass@{k}": [pass_at(n, g.right, k) for g in graded] for k in ks}
    if n > 1:
        per_problem[f"maj@{n}"] = [g.voted for g in graded]
    summary = {"problems": float(len(graded)), "n": float(n)}
    for name, values in per_problem.items():
        summary |= {name: float(np.mean(values)), f"{name}±": interval(values)}
    return summary | {
        "response_tokens": float(np.mean([g.tokens for g in graded])),
        "truncated_fraction": float(np.mean([g.truncated for g in graded])),
        "boxed_fraction": float(np.mean([g.boxed for g in graded])),
    }


def by_source(graded: Sequence[Graded]) -> dict[str, list[Graded]]:
    """Return the problems of each data source, in the order they first come."""
    found: dict[str, list[Graded]] = {}
    for one in graded:
        found.setdefault(one.source, []).append(one)
    return found


def evaluate(
    engine: RolloutEngine,
    prompts: list[Prompt],
    reward: Reward,
    *,
    n: int,
    sampling: Sampling,
    seed: int,
    tokenizer: Any,
    parallel: Parallel,
) -> dict[str, float]:
    """Return a run's metrics of its held-out prompts, the same on every rank; collective.

    Replicas share the prompts out. The draws depend on `seed` alone: every evaluation of a run
    rolls the same dice. Several data sources have an accuracy of their own each.
    """
    mine = prompts[parallel.dp_rank :: parallel.dp]
    rollouts = engine.generate(mine, n=n, sampling=sampling, seed=seed)
    speaks = parallel.is_replica_first  # the others know no more
    told = parallel.agree(lambda: grade(rollouts, reward, tokenizer) if speaks else [])
    graded = sorted((g for replica in told for g in replica), key=lambda g: g.index)
    summary, sources = summarize(graded), by_source(graded)
    names = ["accuracy", "response_tokens", "truncated_fraction"]
    names += [f"pass@{n}", f"maj@{n}"] if n > 1 else []
    record = {f"eval/{name}": summary[name] for name in names}
    if len(sources) > 1:
        for name, part in sources.items():
            record[f"eval/accuracy@{name}"] = summarize(part)["accuracy"]
    return record


@dataclass(frozen=True)
class Recovery:
    """How much of the way from a baseline to a teacher a student has gone, with what is certain."""

    rate: float  # (student − baseline) / (teacher − baseline)
    low: float  # 95 % interval of the rate
    high: float
    gap: float  # teacher − baseline
    gap_interval: float  # half the width of its 95 % interval

    @property
    def caution(self) -> str | None:
        """A line that says why the rate is not to be trusted; None: it is."""
        gap = f"the teacher's lead over the baseline is {self.gap:+.3f} ± {self.gap_interval:.3f}"
        if self.gap <= 0:
            return f"{gap}: there is no gap to recover, and the rate means nothing"
        if self.gap <= self.gap_interval:
            return f"{gap}: inside the noise, and so is the rate; ask more problems, or more often"
        return None


def recovery(
    student: Sequence[float], baseline: Sequence[float], teacher: Sequence[float]
) -> Recovery:
    """Return the gap recovery rate of three models' accuracies on the same problems.

    (Acc_after − Acc_before) / (Acc_teacher − Acc_before), of the means. The interval is a bootstrap
    over problems (2,000 draws from a fixed seed), in pairs: a hard problem is hard for all three.
    """
    after, before, best = (np.asarray(x, dtype=float) for x in (student, baseline, teacher))
    gains, gaps = after - before, best - before
    rows = np.random.default_rng(0).integers(len(gains), size=(2000, len(gains)))
    with np.errstate(divide="ignore", invalid="ignore"):
        rates = gains[rows].mean(1) / gaps[rows].mean(1)
        rate = float(gains.mean() / gaps.mean())
    rates = rates[np.isfinite(rates)]
    low, high = np.quantile(rates, [0.025, 0.975]) if len(rates) else (math.nan, math.nan)
    return Recovery(rate, float(low), float(high), float(gaps.mean()), interval(gaps.tolist()))
