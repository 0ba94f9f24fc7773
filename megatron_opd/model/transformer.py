"""`Architecture` + layout + the user's `megatron:` section → Megatron's `TransformerConfig`."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_opd import platform
from megatron_opd.model.config import Architecture

_ABSENT = {
    "context_parallel_size": "context parallelism is not supported",
    "virtual_pipeline_model_parallel_size": "virtual pipeline stages are not supported",
    "expert_model_parallel_size": "mixture-of-experts models are not supported",
    "num_moe_experts": "mixture-of-experts models are not supported",
    "pipeline_model_parallel_layout": "layers are divided evenly over the pipeline",
    "num_layers_in_first_pipeline_stage": "layers are divided evenly over the pipeline",
    "num_layers_in_last_pipeline_stage": "layers are divided evenly over the pipeline",
}


def transformer_config(
    arch: Architecture,
    megatron: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    tp: int = 1,
    pp: int = 1,
    sequence_parallel: bool = False,
) -> TransformerConfig:
    """Return Megatron's configuration of `arch`; needs no process group.

    `megatron` sets further fields of `TransformerConfig`, checked against that class.

    Raises:
        ValueError: an unknown field, one that this program sets itself, or a value that Megatron
            refuses.
    """
    ours = {
        **_network(arch),
        **_numbers(dtype),
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "sequence_parallel": sequence_parallel,
    }
    _check(megatron, ours)
    # unfused, the rotary embedding reads sequence boundaries on the host, twice in every layer
    default = {"apply_rope_fusion": platform.has_transformer_engine()}
    try:
        return TransformerConfig(**{**ours, **default, **megatron})
    except (ValueError, TypeError, AssertionError) as problem:
        told = " ".join(str(problem).split())
        raise ValueError(f"megatron: refused by TransformerConfig: {told}") from None


def _check(megatron: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    for key, value in megatron.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"megatron.{key}: not a field of TransformerConfig{hint}")
        if key in _ABSENT or key in ours:
            reason = _ABSENT.get(key, "set from the model's config.json and the other sections")
            raise ValueError(f"megatron.{key}={value!r}: {reason}; remove it")


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
        "qk_layernorm": arch.qk_norm,
        "add_bias_linear": False,
        "add_qkv_bias": arch.qkv_bias,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
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
        "transformer_impl": "transformer_engine" if platform.has_transformer_engine() else "local",
    }


def _leave(weight: Tensor) -> Tensor:
    """Initialise nothing. `perform_initialization=False` would, but then Megatron also forgets to
    mark which parameters are tensor-parallel, and the gradient norm counts them wrongly."""
    return weight
