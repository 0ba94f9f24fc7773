"""What a teacher sends instead of hidden states: log-probabilities of a few entries per token."""

import torch
from torch import Tensor

from megatron_opd.loss import shard
from megatron_opd.loss.shard import Projector, Ranks
from megatron_opd.types import Head, Microbatch, SampledScores, TopKScores


@torch.no_grad()
def summarize(
    hidden_NH: Tensor,
    head: Head,
    batch: Microbatch,
    *,
    kind: str,
    k: int,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> TopKScores | SampledScores:
    """Return what a teacher sends instead of hidden states: its top k, or the sampled token's.

    Collective over `head.group`, chunk by chunk.
    """
    projector, ranks = Projector(hidden_NH, head, temperature), Ranks(head.group)
    shape = len(head.weight_VH), head.weight_VH.element_size(), head.weight_VH.device.type
    step, found = chunk_tokens or shard.chunk_tokens(*shape, dense_gradient=False), []
    for start in range(0, len(hidden_NH), step):
        part = projector.shard(slice(start, start + step))
        target_C1 = batch.target_N[start : start + step, None]
        ids_CK = ranks.top(part, k=k)[0] if kind == "topk" else target_C1
        lse_C1 = part.logsumexp()[:, None]  # first: `at` then reads logits that exist
        read = ranks.logsumexp(torch.cat([part.at(ids_CK), lse_C1], dim=-1))
        found.append((ids_CK, read[:, :-1] - read[:, -1:]))
    ids_NK, logp_NK = (torch.cat(parts) for parts in zip(*found, strict=True))
    if kind == "topk":
        return TopKScores(ids_NK, logp_NK, temperature)
    return SampledScores(logp_NK[:, 0], temperature)
