"""What an engine is asked for, and what it gets of the student when it is not the student."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from megatron_opd.rollout.sampling import request_seed
from megatron_opd.types import Prompt


@dataclass(frozen=True)
class Request:
    """One response to be written."""

    prompt: Prompt
    sample: int  # 0 … n-1 within the prompt's group
    seed: int  # of all its randomness


def make_requests(prompts: list[Prompt], n: int, seed: int) -> list[Request]:
    """Return `n` requests per prompt, in prompt order; `seed` names the draw (run, step)."""
    return [
        Request(prompt, sample, request_seed(seed, prompt.index, sample))
        for prompt in prompts
        for sample in range(n)
    ]


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
