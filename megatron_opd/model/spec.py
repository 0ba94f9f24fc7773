"""Layer specs: Transformer Engine's where it fits, else Megatron's local one made device-neutral.

Two modules of the local spec are replaced: its norm refuses sequence parallelism without Apex, and
its attention knows no packing. Both are plain PyTorch here and run on CPU and CUDA alike.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_opd.model.attention import CausalAttention
from megatron_opd.model.latent import LatentAttention
from megatron_opd.model.router import Router


class RMSNorm(nn.Module):
    """RMSNorm whose weight carries `sequence_parallel`: Megatron sums its gradient over TP.

    With `layernorm_zero_centered_gamma` it multiplies by 1 + weight, in fp32, as Gemma does.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused):
        super().__init__()
        self.eps, self.zero_centered = eps, config.layernorm_zero_centered_gamma
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        weight = torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        self.weight: Any = nn.Parameter(weight)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        if self.zero_centered:
            gamma = 1 + self.weight.float()
            return F.rms_norm(x.float(), gamma.shape, gamma, self.eps).type_as(x)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def block_spec(config: TransformerConfig, chunk: int | None = None) -> Any:
    """Return the decoder block's spec for this rank's pipeline stage, or a virtual chunk of it."""
    fused = config.transformer_impl == "transformer_engine"
    block: TransformerBlockSubmodules = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=fused,
        normalization=config.normalization,
        vp_stage=chunk,
    )
    layers = [_routed(layer) for layer in block.layer_specs or []]
    if fused:
        return dataclasses.replace(block, layer_specs=layers)
    portable = [_portable(layer) for layer in layers]
    return dataclasses.replace(block, layer_specs=portable, layer_norm=RMSNorm)


def _portable(layer: ModuleSpec) -> ModuleSpec:
    """Put our norm and attention into one of Megatron's local layer specs."""
    parts: Any = layer.submodules
    attention = parts.self_attention
    latent = attention.module is MLASelfAttention
    own: dict[str, Any] = {"core_attention": CausalAttention}
    for norm in ("q_layernorm", "kv_layernorm" if latent else "k_layernorm"):
        identity = getattr(attention.submodules, norm) is IdentityOp
        own[norm] = IdentityOp if identity else RMSNorm
    parts = dataclasses.replace(
        parts,
        input_layernorm=RMSNorm,
        pre_mlp_layernorm=RMSNorm,
        self_attention=dataclasses.replace(
            attention,
            module=LatentAttention if latent else attention.module,
            submodules=dataclasses.replace(attention.submodules, **own),
        ),
        sharded_state_dict_keys_map=_stored_names(latent, parts.mlp.module is MoELayer),
    )
    return dataclasses.replace(layer, submodules=parts)


def _routed(layer: ModuleSpec) -> ModuleSpec:
    """Put our router into a layer that has experts."""
    parts: Any = layer.submodules
    if parts.mlp.module is not MoELayer:
        return layer
    experts = dataclasses.replace(parts.mlp.submodules, router=Router)
    mlp = dataclasses.replace(parts.mlp, submodules=experts)
    return dataclasses.replace(layer, submodules=dataclasses.replace(parts, mlp=mlp))


def _stored_names(latent: bool, sparse: bool) -> dict[str, str]:
    """Return what checkpoints call the norms: as Transformer Engine does, which fuses some."""
    names = {}
    if latent:
        for x in ("q", "kv"):
            fused = f"self_attention.linear_{x}_up_proj.layer_norm_"
            names[f"self_attention.{x}_layernorm."] = fused
    else:
        names["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    if not sparse:
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return names
