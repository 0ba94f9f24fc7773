"""Layouts and packed input that the model tests share."""

import math
from itertools import accumulate

import torch

from megatron_opd import parallel as mesh
from megatron_opd.types import Microbatch

LAYOUTS = [(1, 1, False), (2, 1, False), (2, 1, True), (1, 2, False), (2, 2, True)]
COMBINED = (2, 2, True)
MIXTURE_LAYOUTS = {  # under tensor parallelism, Megatron trains experts with sequences cut alone
    "PP2×VPP2": dict(pp=2, vpp=2),
    "EP2": dict(dp=2, ep=2),
    "TP2+SP": dict(tp=2, sequence_parallel=True),
    "TP2×EP2+SP": dict(tp=2, ep=2, etp=1, sequence_parallel=True),
    "TP2×PP2×EP2+SP": dict(tp=2, pp=2, ep=2, etp=1, sequence_parallel=True),
}
LENGTHS = [7, 1, 12, 4]


def join(layout) -> mesh.Parallel:
    """Initialise the mesh of (tp, pp, sequence_parallel), or of its axes by name, on this rank."""
    if isinstance(layout, dict):
        return mesh.initialize(**{axis: size for axis, size in layout.items() if axis != "dp"})
    tp, pp, sequence_parallel = layout
    return mesh.initialize(tp, pp, sequence_parallel=sequence_parallel)


def layouts_of(family: str) -> list:
    """Return all layouts for a few families, and for the others one rank and everything at once."""
    if family in ("qwen3_moe", "deepseek_v3"):
        return [LAYOUTS[0], *MIXTURE_LAYOUTS.values()]
    if "moe" in family or family in ("mixtral", "deepseek_v2"):
        return [LAYOUTS[0], MIXTURE_LAYOUTS["TP2×PP2×EP2+SP"]]
    return LAYOUTS if family in ("llama", "qwen2_tied") else [LAYOUTS[0], COMBINED]


def world(layout) -> int:
    if isinstance(layout, dict):
        return math.prod(layout.get(axis, 1) for axis in ("tp", "pp", "cp", "dp"))
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
