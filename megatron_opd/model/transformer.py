"""`Architecture` + layout + the user's `megatron:` section → Megatron's `TransformerConfig`."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from megatron_opd import platform
from megatron_opd.model.config import Architecture, Experts, Latent
from megatron_opd.model.overrides import check_overrides

Implementation = Literal["transformer_engine", "local"]


def implementation(
    dtype: torch.dtype, head_dim: int, *, transformer_engine: bool
) -> Implementation:
    """Decide whose layers a model gets: Transformer Engine's, or the portable ones ("local").

    Transformer Engine attends to packed sequences only with its flash and fused kernels, and those
    take 16-bit numbers and heads of a multiple of 8.
    """
    fits = dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0
    return "transformer_engine" if transformer_engine and fits else "local"


def transformer_config(
    arch: Architecture,
    megatron: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    tp: int = 1,
    pp: int = 1,
    vpp: int = 1,
    cp: int = 1,
    ep: int = 1,
    etp: int | None = None,
    sequence_parallel: bool = False,
) -> TransformerConfig:
    """Return Megatron's configuration of `arch`; needs no process group.

    `megatron` sets further fields of `TransformerConfig`: see `check_overrides`.

    Raises:
        ValueError: a field that may not be set, or a value that Megatron refuses.
    """
    layers = implementation(
        dtype, arch.head_dim, transformer_engine=platform.has_transformer_engine()
    )
    fused = layers == "transformer_engine"
    ours = {
        **_network(arch),
        **_numbers(dtype),
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp if vpp > 1 else None,
        "context_parallel_size": cp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp or tp,
        "sequence_parallel": sequence_parallel,
        "transformer_impl": layers,  # what the layer spec and the packed forward go by
    }
    chosen = check_overrides(
        megatron, ours, transformer_engine=fused, experts=arch.experts is not None
    )
    # unfused, the rotary embedding reads sequence boundaries on the host, twice in every layer
    default: dict[str, Any] = {"apply_rope_fusion": fused}
    if arch.experts:
        default |= {
            "moe_grouped_gemm": fused,
            "moe_permute_fusion": fused,
            "moe_router_dtype": "fp32" if arch.experts.fp32 else None,
        }
    if vpp > 1 and pp == 2:
        # both neighbours are one rank: batched, its sends are matched with the wrong receives, and
        # gradients are silently wrong
        default |= {"batch_p2p_comm": False}
        if chosen.get("batch_p2p_comm"):
            raise ValueError(
                "megatron.batch_p2p_comm=True: with parallel.pp=2 and parallel.vpp > 1 Megatron "
                "then takes one message for another, and gradients are wrong; remove it"
            )
    try:
        kind = MLATransformerConfig if arch.latent else TransformerConfig
        return kind(**{**ours, **default, **chosen})
    except (ValueError, TypeError, AssertionError) as problem:
        told = " ".join(str(problem).split())
        raise ValueError(f"megatron: refused by TransformerConfig: {told}") from None


def _network(arch: Architecture) -> dict[str, Any]:
    return {
        "num_layers": arch.layers,
        "hidden_size": arch.hidden,
        "num_attention_heads": arch.heads,
        "num_query_groups": arch.kv_heads,
        "kv_channels": arch.head_dim,
        "ffn_hidden_size": arch.ffn,
        "normalization": "RMSNorm",
        "layernorm_epsilon": arch.norm_eps,
        "layernorm_zero_centered_gamma": arch.zero_centered,
        "qk_layernorm": arch.qk_norm,
        "softmax_scale": arch.attention_scale(),
        "add_bias_linear": False,
        "add_qkv_bias": arch.qkv_bias,
        "gated_linear_unit": True,
        "activation_func": _ACTIVATIONS[arch.activation],
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        **(_experts(arch.experts) if arch.experts else {}),
        **(_latent(arch, arch.latent) if arch.latent else {}),
    }


def _latent(arch: Architecture, latent: Latent) -> dict[str, Any]:
    rope, yarn = arch.rope, {}
    if rope["rope_type"] == "yarn":
        both = rope.get("mscale") and rope.get("mscale_all_dim")  # one alone counts for nothing
        yarn = {
            "rotary_scaling_factor": rope["factor"],
            "original_max_position_embeddings": rope["original_max_position_embeddings"],
            "beta_fast": rope.get("beta_fast") or 32,
            "beta_slow": rope.get("beta_slow") or 1,
            "mscale": rope["mscale"] if both else 1.0,
            "mscale_all_dim": rope.get("mscale_all_dim") or 0.0,
        }
    return {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "q_lora_rank": latent.q_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_head_dim": latent.plain,
        "qk_pos_emb_head_dim": latent.rotated,
        "v_head_dim": latent.value,
        "rope_type": "yarn" if yarn else "rope",
        "rotary_base": rope["rope_theta"],
        "rotary_scaling_factor": 1.0,
        **yarn,
    }


def _experts(experts: Experts) -> dict[str, Any]:
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn,
        "moe_router_topk": experts.per_token,
        "moe_router_pre_softmax": not experts.normalized,
        "moe_router_score_function": "sigmoid" if experts.sigmoid else "softmax",
        "moe_router_enable_expert_bias": experts.sigmoid,
        "moe_router_bias_update_rate": 0.0,  # pretraining balances the experts with it
        "moe_router_num_groups": experts.groups,
        "moe_router_group_topk": experts.groups_per_token,
        "moe_router_topk_scaling_factor": experts.scale,
        "moe_shared_expert_intermediate_size": experts.shared_ffn or None,
        "moe_shared_expert_gate": experts.shared_gate,
        "moe_layer_freq": 1 if all(experts.layers) else [int(sparse) for sparse in experts.layers],
    }


def _numbers(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "init_method": _leave,
        "output_layer_init_method": _leave,
        "embedding_init_method": _leave,
        "calculate_per_token_loss": True,
        "variable_seq_lengths": True,  # packed microbatches differ in length
        "moe_token_dispatcher_type": "alltoall",  # variable_seq_lengths wants it, dense or not
        "cuda_graph_scope": None,  # the default of 0.16.1 is deprecated there
    }


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS = {"silu": F.silu, "gelu_tanh": _gelu_tanh}


def _leave(weight: Tensor) -> Tensor:
    """Initialise nothing. `perform_initialization=False` would, but then Megatron also forgets to
    mark which parameters are tensor-parallel, and the gradient norm counts them wrongly."""
    return weight
