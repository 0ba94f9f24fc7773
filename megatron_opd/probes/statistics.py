"""Figures with intervals: means, AUROC. Prompts are drawn again, not responses.

Responses to one prompt are alike, so that formulas for independent responses (Hanley–McNeil's for
the AUROC, say) give intervals that are too narrow.

Shape suffixes: N responses · P right ones · Q wrong ones · G prompts · R resamples.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from megatron_opd.told import Array

RESAMPLES = 1000
FEWEST = 8  # prompts that a figure of some of the tokens needs


class Estimate(NamedTuple):
    """A figure and its 95 % interval: what prompts drawn again would have made of it."""

    value: float
    low: float
    high: float


class Auroc(NamedTuple):
    """How well a score tells right from wrong responses; None where there are no pairs."""

    overall: Estimate | None  # a right one against a wrong one of any prompt
    within: Estimate | None  # against a wrong one of its own prompt
    pairs: tuple[int, int]  # of each


def estimate(groups: int, statistic: Callable[[Array], Array], seed: int = 0) -> Estimate | None:
    """Return `statistic` and its percentile bootstrap interval; None where it is not defined.

    `statistic(weight_RG)` gets how often each of `groups` prompts counts and returns one value per
    row, NaN where there is none.
    """
    draw = np.random.default_rng(seed)
    again_RG = draw.multinomial(groups, np.full(groups, 1 / groups), size=RESAMPLES)
    with np.errstate(invalid="ignore", divide="ignore"):
        value_R = statistic(np.vstack([np.ones(groups), again_RG]))
    if not np.isfinite(value_R[0]):
        return None
    low, high = np.nanpercentile(value_R[1:], [2.5, 97.5])
    return Estimate(float(value_R[0]), float(low), float(high))


def mean(value_N: Array, prompt_N: Array) -> Estimate | None:
    """Return the mean over responses."""
    _, group_N = np.unique(prompt_N, return_inverse=True)
    total_G, count_G = np.bincount(group_N, weights=value_N), np.bincount(group_N)
    return estimate(len(count_G), lambda weight_RG: weight_RG @ total_G / (weight_RG @ count_G))


def auroc(score_N: Array, right_N: Array, prompt_N: Array) -> Auroc:
    """Return the probability that a right response scores higher than a wrong one; ties are ½.

    Mann–Whitney's U over the number of pairs.
    """
    group_NG = members(prompt_N)
    wins_GG = _wins(score_N, right_N, group_NG)
    right_G, wrong_G = right_N @ group_NG, (~right_N) @ group_NG

    def overall(weight_RG: Array) -> Array:
        pairs_R = (weight_RG @ right_G) * (weight_RG @ wrong_G)
        return forms(weight_RG, wins_GG) / pairs_R

    def within(weight_RG: Array) -> Array:
        return weight_RG @ wins_GG.diagonal() / (weight_RG @ (right_G * wrong_G))

    pairs = int(right_G.sum() * wrong_G.sum()), int((right_G * wrong_G).sum())
    return Auroc(estimate(len(right_G), overall), estimate(len(right_G), within), pairs)


def forms(weight_RG: Array, matrix_GG: Array) -> Array:
    """Return wᵀMw of every row, [R]."""
    return np.einsum("rg,rg->r", weight_RG @ matrix_GG, weight_RG)


def members(prompt_N: Array) -> Array:
    """Return which response belongs to which prompt, [N, G], of 0.0 and 1.0."""
    _, group_N = np.unique(prompt_N, return_inverse=True)
    return np.eye(group_N.max() + 1)[group_N]


def _wins(score_N: Array, right_N: Array, group_NG: Array) -> Array:
    """Return how often a right response of prompt g beats a wrong one of prompt h, [G, G]."""
    score_P1, score_1Q = score_N[right_N, None], score_N[None, ~right_N]
    wins_PQ = (score_P1 > score_1Q) + 0.5 * (score_P1 == score_1Q)
    return group_NG[right_N].T @ wins_PQ @ group_NG[~right_N]
