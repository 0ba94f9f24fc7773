"""Accuracy of the student on held-out prompts, answered by the rollout engine."""

from typing import Any

import torch
import torch.distributed as dist

from megatron_opd import config as cfg
from megatron_opd.parallel import Parallel
from megatron_opd.rollout import RolloutEngine, Sampling, request_seed
from megatron_opd.types import Prompt, Reward


def evaluate(
    engine: RolloutEngine,
    prompts: list[Prompt],
    section: cfg.Eval,
    reward: Reward,
    *,
    tokenizer: Any,
    sampling: Sampling,
    parallel: Parallel,
    seed: int,
) -> dict[str, float]:
    """Return the mean reward and the mean response length in tokens; collective.

    Replicas share the prompts out; the draws depend on `seed` alone, so every evaluation of a run
    rolls the same dice.
    """
    mine = prompts[parallel.dp_rank :: parallel.dp]
    rollouts = engine.generate(mine, n=section.n, sampling=sampling, seed=request_seed(seed, 0))
    texts = [tokenizer.decode(r.response_ids, skip_special_tokens=True) for r in rollouts]
    total = torch.zeros(3, dtype=torch.float64, device=parallel.device)
    for rollout, text in zip(rollouts, texts, strict=True):
        scored = (reward(text, rollout.prompt), len(rollout.response_ids), 1.0)
        total += torch.tensor(scored, dtype=torch.float64, device=parallel.device)
    dist.all_reduce(total, group=parallel.dp_group)
    accuracy, tokens, count = total.tolist()
    return {"eval/accuracy": accuracy / count, "eval/response_tokens": tokens / count}
