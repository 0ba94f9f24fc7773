"""How much better a response, or a token, is than the others of its prompt: rewards → advantages.

Shape suffixes: M things that are compared · N supervised tokens of a microbatch.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import stdev
from typing import Literal

import torch
from torch import Tensor

from megatron_opd.types import Microbatch, Rollout

SOLVED = 0.5  # a reward above it is that of a right answer
EPS = 1e-6  # added to a deviation


def standardize(
    x_M: Tensor, group_M: Tensor, counts_M: Tensor, *, how: Literal["mean", "std"]
) -> Tensor:
    """Return x − mean, over (deviation + 1e-6) with how="std", of each one's group; in float64.

    The deviation is the unbiased one. A group of one has mean 0 and deviation 1. What does not
    count (`counts_M` is 0) has no part in mean and deviation.
    """
    x_M, counts_M = x_M.double(), counts_M.double()
    names, group_M = group_M.unique(return_inverse=True)

    def over_groups(values_M: Tensor) -> Tensor:
        return values_M.new_zeros(len(names)).index_add_(0, group_M, values_M)

    number = over_groups(counts_M)
    mean = torch.where(number > 1, over_groups(x_M * counts_M) / number, 0.0)
    centred_M = x_M - mean[group_M]
    if how == "mean":
        return centred_M
    variance = over_groups(centred_M.square() * counts_M) / (number - 1)
    deviation = torch.where(number > 1, variance, 1.0).sqrt()
    return centred_M / (deviation[group_M] + EPS)


def with_advantages(
    rollouts: Sequence[Rollout], *, how: Literal["mean", "std"] = "std"
) -> list[Rollout]:
    """Give every rollout A = (R − mean) / (deviation + 1e-6) over its prompt's (GRPO).

    `rollouts` are all that a prompt has. Responses that the engine drew are compared with each
    other, never with the dataset's.
    """
    places = _places((r.prompt.index, r.prompt.copy, r.drawn) for r in rollouts)
    rewards_M = torch.tensor([r.reward for r in rollouts], dtype=torch.float64)
    advantage_M = standardize(rewards_M, torch.tensor(places), torch.ones(len(places)), how=how)
    return [replace(r, advantage=a) for r, a in zip(rollouts, advantage_M.tolist(), strict=True)]


def of_tokens(
    microbatches: Sequence[Microbatch],
    teacher_logp: Sequence[Tensor],
    *,
    how: Literal["mean", "std"],
) -> list[Microbatch]:
    """Give every token the reward r = log q(y) − log μ(y), compared over all of its prompt's.

    (r − mean) / (deviation + 1e-6) over the supervised, drawn tokens of the responses to one
    prompt, in whatever microbatches they are (token_grpo); [N] each. μ is the engine that drew.
    Collective over context-parallel ranks.
    """
    reward_M = torch.cat(
        [
            batch.gathered(q_N - batch.rollout_logp_N)
            for q_N, batch in zip(teacher_logp, microbatches, strict=True)
        ]
    )
    counts_M = torch.cat([_counted(batch.whole) for batch in microbatches])
    group_M = torch.cat([_group(batch.whole) for batch in microbatches])
    advantage_M = standardize(reward_M, group_M, counts_M, how=how) * counts_M
    parts = advantage_M.float().split([len(batch.whole.target_N) for batch in microbatches])
    return [
        replace(batch, advantage_N=batch.own(a_N))
        for batch, a_N in zip(microbatches, parts, strict=True)
    ]


def _counted(batch: Microbatch) -> Tensor:
    return batch.mask_N if batch.drawn_N is None else batch.mask_N * batch.drawn_N


def _group(batch: Microbatch) -> Tensor:
    assert batch.group_N is not None, "packed without prompts"
    return batch.group_N


def summary(rollouts: Sequence[Rollout]) -> dict[str, tuple[float, int]]:
    """Return (total, count) of what a step's rewards were: mean, spread, prompts without any.

    Solved by all responses, or by none, a prompt teaches GRPO nothing. The deviation is the mean
    over prompts with several responses.
    """
    groups: dict[int, list[float]] = {}
    places = _places((r.prompt.index, r.prompt.copy) for r in rollouts)
    for place, rollout in zip(places, rollouts, strict=True):
        if rollout.reward is not None:
            groups.setdefault(place, []).append(rollout.reward)
    several = [group for group in groups.values() if len(group) > 1]
    count = sum(map(len, groups.values()))
    return {
        "reward/mean": (sum(map(sum, groups.values())), count),
        "reward/std": (sum(map(stdev, several)), len(several)),
        "reward/solved_all_fraction": (_number(groups.values(), all), len(groups)),
        "reward/solved_none_fraction": (
            len(groups) - _number(groups.values(), any),
            len(groups),
        ),
    }


def _number(groups: Iterable[list[float]], which: Callable[[Iterable], bool]) -> int:
    return sum(which(reward > SOLVED for reward in group) for group in groups)


def _places(keys: Iterable) -> list[int]:
    """Number what is alike by its first appearance."""
    numbers: dict = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]
