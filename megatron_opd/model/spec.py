"""Layer specs: Transformer Engine's where it fits, else Megatron's local one made device-neutral.

Two modules of the local spec are replaced: its norm refuses sequence parallelism without Apex, and
its attention knows no packing. Both are plain PyTorch here and run on CPU and CUDA alike.

Shape suffixes: L sequence · B batch · T packed tokens · A heads · D head size.
"""

import dataclasses
import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """RMSNorm whose weight carries `sequence_parallel`: Megatron sums its gradient over TP."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused):
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        weight = torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        self.weight: Any = nn.Parameter(weight)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class CausalAttention(MegatronModule):
    """Causal attention on torch SDPA: of a batch, of packed sequences, or against a KV cache."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **unused,
    ):
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal and attention_type == "self"
        assert config.kv_channels is not None
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
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
            return self._packed(query, key, value, packed_seq_params.cu_seqlens_q.tolist())
        out_BALD = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
        return out_BALD.permute(2, 0, 1, 3).flatten(2)

    def _packed(self, q_TAD: Tensor, k_TAD: Tensor, v_TAD: Tensor, bounds: list[int]) -> Tensor:
        """Attend within each sequence, one kernel call per sequence."""
        lengths = [end - start for start, end in itertools.pairwise(bounds)]
        # split, not slices: the backward of one slice would write a gradient of the whole pack
        splits = (x_TAD.transpose(0, 1)[None].split(lengths, 2) for x_TAD in (q_TAD, k_TAD, v_TAD))
        parts_BALD = [self._attend(*own) for own in zip(*splits, strict=True)]
        return torch.cat(parts_BALD, 2)[0].transpose(0, 1).flatten(1)

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


def block_spec(config: TransformerConfig, chunk: int | None = None) -> Any:
    """Return the decoder block's spec for this rank's pipeline stage, or a virtual chunk of it."""
    if config.transformer_impl == "transformer_engine":
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=chunk)
    local: TransformerBlockSubmodules = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization, vp_stage=chunk
    )
    layers = [_portable(layer) for layer in local.layer_specs or []]
    return dataclasses.replace(local, layer_specs=layers, layer_norm=RMSNorm)


def _portable(layer: ModuleSpec) -> ModuleSpec:
    """Put our norm and attention into one of Megatron's local layer specs."""
    parts: Any = layer.submodules
    attention = parts.self_attention
    qk_norm = IdentityOp if attention.submodules.q_layernorm is IdentityOp else RMSNorm
    inner = dataclasses.replace(
        attention.submodules,
        core_attention=CausalAttention,
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    parts = dataclasses.replace(
        parts,
        input_layernorm=RMSNorm,
        pre_mlp_layernorm=RMSNorm,
        self_attention=dataclasses.replace(attention, submodules=inner),
    )
    return dataclasses.replace(layer, submodules=parts)
