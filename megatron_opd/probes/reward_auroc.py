"""Does the teacher's reward tell the student's right responses from its wrong ones?

    r̄(y) = (1/T) Σ_t [log q(y_t) − log p(y_t)]

The AUROC of r̄ is the probability that a right response has a higher r̄ than a wrong one: ½ says
nothing of correctness, 1 is a verifier. Rethinking OPD finds about 0.73 to 0.75 with its teachers.
`within` compares responses to the same prompt only: it does not profit from easy prompts.

Shape suffixes: R responses · T tokens of them all.
"""

import math
from typing import Any

import numpy as np

from megatron_opd.probes.pair import Pair
from megatron_opd.probes.statistics import Estimate, auroc, mean
from megatron_opd.told import Array, Told

FRACTIONS = (0.1, 0.25, 0.5, 0.75, 1.0)  # of the tokens of a response, from its start
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def probe(pair: Pair) -> dict[str, Any]:
    """Return the AUROC of the mean reward, by how much of a response is looked at."""
    told = pair.look(pair.write("student", pair.prompts, n=pair.config.rollout.n))
    return figures(told)


def figures(told: Told) -> dict[str, Any]:
    """Return accuracy, AUROC by prefix, and the distributions of r̄."""
    right_R, prompt_R = told.right_R, told.prompt_R
    score_R = mean_reward(told)
    return {
        "responses": len(right_R),
        "right": int(right_R.sum()),
        "accuracy": mean(right_R.astype(float), prompt_R),
        "truncated": float(1 - told.finished_R.mean()),
        "auroc": [
            {
                "fraction": fraction,
                **auroc(mean_reward(told, fraction), right_R, prompt_R)._asdict(),
            }
            for fraction in FRACTIONS
        ],
        "mean_reward": {
            name: _distribution(score_R[chosen_R])
            for name, chosen_R in (("right", right_R), ("wrong", ~right_R))
        },
        "each": [
            {
                "prompt": rollout.prompt.index,
                "sample": rollout.sample,
                "right": bool(right),
                "mean_reward": float(score),
                "tokens": len(rollout.response_ids),
            }
            for rollout, right, score in zip(told.rollouts, right_R, score_R, strict=True)
        ],
    }


def mean_reward(told: Told, fraction: float = 1.0) -> Array:
    """Return r̄ of the first ⌈fraction · T⌉ tokens of every response, in nats, [R]."""
    rewards = told.split(told.reward_T)
    return np.array([own[: math.ceil(fraction * len(own))].mean() for own in rewards])


def _distribution(score_R: Array) -> dict[str, Any] | None:
    if not len(score_R):
        return None
    quantiles = dict(zip(QUANTILES, np.quantile(score_R, QUANTILES).tolist(), strict=True))
    return {
        "mean": float(score_R.mean()),
        "deviation": float(score_R.std()),
        "quantiles": quantiles,
    }


def table(found: dict[str, Any]) -> list[str]:
    """Return the figures as lines."""
    right, responses = found["right"], found["responses"]
    lines = [f"{right} of {responses} responses are right; {found['truncated']:.1%} are truncated"]
    if right in (0, responses):
        which, other = ("right", "harder") if right else ("wrong", "easier")
        lines.append(
            f"AUROC: not defined where all responses are {which}; take {other} prompts, or see "
            "whether eval.reward reads the responses"
        )
    else:
        pairs = "   ".join(f"{f'{count} pairs':<22}" for count in found["auroc"][0]["pairs"])
        lines += [f"{'':<17}{'AUROC':<25}of the same prompt", f"tokens of each   {pairs}".rstrip()]
        for row in found["auroc"]:
            overall, within = (_shown(row[name]) for name in ("overall", "within"))
            lines.append(f"{row['fraction']:>14.0%}   {overall:<22} {within}")
    for name, own in found["mean_reward"].items():
        if own:
            lines.append(f"r̄ {name}: {own['mean']:+.3f} ± {own['deviation']:.3f} nats a token")
    return lines


def _shown(found: Estimate | None) -> str:
    if found is None:
        return "-  (no prompt has both)"
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"
