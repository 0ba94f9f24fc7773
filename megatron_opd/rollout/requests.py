"""What an engine is asked for, what it answers, and what it gets of a student that it is not.

Shape suffixes: T tokens of a response · K = 1 + the most likely ids that were asked for.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from megatron_opd.rollout.sampling import request_seed
from megatron_opd.types import Prompt, Rollout


@dataclass(frozen=True)
class Request:
    """One response to be written."""

    prompt: Prompt
    sample: int  # 0, 1, … within the prompt's group
    seed: int  # of all its randomness


def make_requests(prompts: list[Prompt], n: int, seed: int) -> list[Request]:
    """Return `n` requests per prompt, in prompt order; `seed` names the draw (run, step)."""
    return [
        Request(prompt, sample, request_seed(seed, prompt.index, sample))
        for prompt in prompts
        for sample in range(prompt.copy * n, prompt.copy * n + n)
    ]


def answered(
    request: Request,
    ids_TK: np.ndarray,
    logp_TK: np.ndarray,
    finish: Literal["stop", "length"],
    *,
    version: int = 0,
) -> Rollout:
    """Return the rollout of an answer: at each token the one that was drawn, then the likeliest."""
    listed = ids_TK.shape[1] > 1
    return Rollout(
        prompt=request.prompt,
        sample=request.sample,
        response_ids=tuple(ids_TK[:, 0].tolist()),
        logp=tuple(logp_TK[:, 0].tolist()),
        finish=finish,
        top_ids=ids_TK[:, 1:].copy() if listed else None,
        top_logp=logp_TK[:, 1:].copy() if listed else None,
        version=version,
    )


def buckets(
    tensors: Iterable[tuple[str, Tensor]], limit: int
) -> Iterator[list[tuple[str, Tensor]]]:
    """Yield named tensors in lists of at least `limit` bytes, but for the last one."""
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        bucket.append((name, tensor))
        size += tensor.nbytes
        if size >= limit:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
