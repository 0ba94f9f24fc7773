"""Layouts and packed input that the model tests share."""

from itertools import accumulate

import torch

from megatron_opd import parallel as mesh
from megatron_opd.types import Microbatch

LAYOUTS = [(1, 1, False), (2, 1, False), (2, 1, True), (1, 2, False), (2, 2, True)]
LENGTHS = [7, 1, 12, 4]


def join(layout) -> mesh.Parallel:
    """Initialise the mesh of (tp, pp, sequence_parallel) on this rank."""
    tp, pp, sequence_parallel = layout
    return mesh.initialize(tp, pp, sequence_parallel=sequence_parallel)


def world(layout) -> int:
    return layout[0] * layout[1]


def sequences(vocab: int = 203) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocab, (length,), generator=draw) for length in LENGTHS]


def packed(sequences: list[torch.Tensor]) -> Microbatch:
    """Pack sequences with nothing supervised: only the forward is of interest."""
    lengths = [len(sequence) for sequence in sequences]
    none = torch.zeros(0)
    return Microbatch(
        token_T=torch.cat(sequences),
        position_T=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32),
        max_seqlen=max(lengths),
        source_N=none.long(),
        target_N=none.long(),
        mask_N=none,
        rollout_logp_N=none,
        position_N=none.long(),
        sequence_N=none.long(),
        measured_M=none.long(),
    )
