"""Accuracy of the student on held-out prompts."""

from typing import Any

import torch
import torch.distributed as dist

from megatron_opd.parallel import Parallel
from megatron_opd.rollout import RolloutEngine, Sampling
from megatron_opd.types import Prompt, Reward


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
    """Return the mean reward and the mean response length in tokens; collective.

    Replicas share the prompts out. The draws depend on `seed` alone: every evaluation of a run
    rolls the same dice.
    """
    mine = prompts[parallel.dp_rank :: parallel.dp]
    rollouts = engine.generate(mine, n=n, sampling=sampling, seed=seed)
    texts = [tokenizer.decode(r.response_ids, skip_special_tokens=True) for r in rollouts]
    scores = [reward(text, r.prompt) for text, r in zip(texts, rollouts, strict=True)]
    tokens = [len(r.response_ids) for r in rollouts]
    sums = torch.tensor([sum(scores), sum(tokens), len(rollouts)], dtype=torch.float64)
    sums = sums.to(parallel.device)
    dist.all_reduce(sums, group=parallel.dp_group)
    score, length, count = sums.tolist()
    return {"eval/accuracy": score / count, "eval/response_tokens": length / count}
