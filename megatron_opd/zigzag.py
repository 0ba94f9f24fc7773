"""Context parallelism: which tokens of a pack each of some ranks has.

Every sequence is cut into 2 · size chunks; rank r has the r-th and the r-th from the end. Causal
attention then costs all ranks the same.

Shape suffixes: S sequences · T packed tokens · N supervised tokens · M measured ones.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_opd.types import Microbatch, Part


def places(bounds: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the rank that has each token of the whole pack, and its place there, [T] each.

    `bounds` are the whole pack's cu_seqlens, [S + 1]; sequences are multiples of 2 · size long.
    """
    bounds = bounds.long()
    length_S, total = bounds.diff(), int(bounds[-1])
    start_T = torch.repeat_interleave(bounds[:-1], length_S, output_size=total)
    step_T = torch.repeat_interleave(length_S // (2 * size), length_S, output_size=total)
    offset_T = torch.arange(total, device=bounds.device) - start_T
    chunk_T = offset_T // step_T
    early_T = chunk_T < size
    rank_T = torch.where(early_T, chunk_T, 2 * size - 1 - chunk_T)
    own_T = offset_T % step_T + torch.where(early_T, 0, step_T)
    return rank_T, start_T // size + own_T


def part_of(whole: Microbatch, *, size: int, rank: int, group: Any = None) -> Microbatch:
    """Return a rank's part of a microbatch: its tokens, and the targets that they predict.

    `cu_seqlens` and `max_seqlen` stay those of the whole; every sequence is a multiple of 2 · size
    long (`pack` sees to it).
    """
    if size == 1:
        return whole
    rank_T, place_T = places(whole.cu_seqlens, size)
    kept_T = rank_T == rank
    kept_N = kept_T[whole.source_N]
    index_N = kept_N.nonzero().flatten()
    own_N: dict[str, Any] = {
        name: value[index_N]
        for name, value in vars(whole).items()
        if name.endswith(("_N", "_NK")) and value is not None
    }
    own_N["source_N"] = place_T[own_N["source_N"]]
    measured_M = whole.measured_M[kept_N[whole.measured_M]]
    context = whole.context and part_of(whole.context, size=size, rank=rank, group=group)
    return replace(
        whole,
        **own_N,
        token_T=whole.token_T[kept_T],
        position_T=whole.position_T[kept_T],
        measured_M=kept_N.cumsum(0)[measured_M] - 1,
        context=context,
        part=Part(whole, index_N, group, leads=rank == 0),
    )
