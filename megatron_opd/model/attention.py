"""Causal attention on torch SDPA, on CPU and CUDA alike: Megatron's local one knows no packing.

Under context parallelism each rank has its queries only, and keys and values are gathered.

Shape suffixes: L sequence · B batch · T packed tokens · A heads · D head size.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_opd.zigzag import places


@dataclass
class Packed(PackedSeqParams):
    """Megatron's description of a pack, and how to put the ranks' parts together."""

    order_T: Tensor | None = (
        None  # where each token of the whole is in the parts, one after another
    )


def packed(bounds: Tensor, longest: int, cp: int, device: torch.device) -> Packed:
    """Describe a pack by its boundaries, [S + 1], over all `cp` context-parallel ranks."""
    order_T = None
    if cp > 1:
        rank_T, place_T = places(bounds, cp)
        order_T = (rank_T * (len(rank_T) // cp) + place_T).to(device)
    return Packed(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        order_T=order_T,
    )


class CausalAttention(MegatronModule):
    """Causal attention on torch SDPA: of a batch, of packed sequences, or against a KV cache."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **unused,
    ):
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal and attention_type == "self"
        assert config.kv_channels is not None
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Packed | None = None,
    ) -> Tensor:
        """Attend causally; the last query sees the last key, so that a cache may come before it.

        Args:
            query: `[L, B, A, D]`, or `[T, A, D]` when packed; key and value may have fewer heads.
            attn_mask_type: not used: Megatron says `no_mask` once a cache is in use, which is
                causal for the one new token it thinks of; this is causal for any number.
        Returns:
            `[L, B, A × D]`, or `[T, A × D]` when packed.
        """
        assert attention_mask is None and attention_bias is None, "sequences are packed, not padded"
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        out_BALD = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
        return out_BALD.permute(2, 0, 1, 3).flatten(2)

    def _packed(self, q_TAD: Tensor, k_TAD: Tensor, v_TAD: Tensor, pack: Packed) -> Tensor:
        """Attend within each sequence, one kernel call per sequence, or per chunk of it."""
        lengths = [end - start for start, end in itertools.pairwise(pack.cu_seqlens_q.tolist())]
        own = lengths
        if pack.order_T is not None:
            own = [length // self.cp_group.size() for length in lengths]
            k_TAD, v_TAD = self._whole(k_TAD, v_TAD, pack.order_T)
        # split, not slices: the backward of one slice would write a gradient of the whole pack
        splits = (
            x_TAD.transpose(0, 1)[None].split(sizes, 2)
            for x_TAD, sizes in ((q_TAD, own), (k_TAD, lengths), (v_TAD, lengths))
        )
        attend = self._attend_chunks if pack.order_T is not None else self._attend_all
        parts_BALD = [part for qkv in zip(*splits, strict=True) for part in attend(*qkv)]
        return torch.cat(parts_BALD, 2)[0].transpose(0, 1).flatten(1)

    def _whole(self, k_TAD: Tensor, v_TAD: Tensor, order_T: Tensor) -> list[Tensor]:
        """Gather keys and values at once, and put them in order; the backward sums their shares."""
        parts = [x_TAD.flatten(1) for x_TAD in (k_TAD, v_TAD)]
        gathered = gather_from_sequence_parallel_region(torch.cat(parts, 1), group=self.cp_group)
        both = gathered.index_select(0, order_T).split([x.size(1) for x in parts], 1)
        return [x.unflatten(1, y.shape[1:]) for x, y in zip(both, (k_TAD, v_TAD), strict=True)]

    def _attend_all(self, q_BALD: Tensor, k_BALD: Tensor, v_BALD: Tensor) -> Iterator[Tensor]:
        yield self._attend(q_BALD, k_BALD, v_BALD)

    def _attend_chunks(self, q_BALD: Tensor, k_BALD: Tensor, v_BALD: Tensor) -> Iterator[Tensor]:
        """Attend from the two chunks of a sequence that are here to all that comes before them."""
        size, rank = self.cp_group.size(), self.cp_group.rank()
        step = k_BALD.size(2) // (2 * size)
        chunks = rank, 2 * size - 1 - rank
        for part_BALD, chunk in zip(q_BALD.split(step, 2), chunks, strict=True):
            seen = (chunk + 1) * step
            yield self._attend(part_BALD, k_BALD[:, :, :seen], v_BALD[:, :, :seen])

    def _attend(self, q_BALD: Tensor, k_BALD: Tensor, v_BALD: Tensor) -> Tensor:
        new, total, mask = q_BALD.size(2), k_BALD.size(2), None
        if 1 < new < total:  # a chunk after a cache: is_causal would align the first ones
            at = torch.arange(total, device=q_BALD.device)
            mask = at <= at[total - new :, None]
        return F.scaled_dot_product_attention(
            q_BALD,
            k_BALD,
            v_BALD,
            attn_mask=mask,
            is_causal=new == total,
            scale=self.scale,
            enable_gqa=q_BALD.size(1) != k_BALD.size(1),
        )
