"""The user's `megatron:` section: which fields of Megatron's `TransformerConfig` it may set.

Names, types and defaults are read from that class. What is listed here are fields that a run could
not honour: each is refused with its reason, because Megatron would take it in silence.
"""

import dataclasses
import difflib
import enum
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron.core.transformer.transformer_config import TransformerConfig

_OURS = "set from the model's config.json and the other sections"
_UNSUPPORTED = {
    "context parallelism is not supported": "*context_parallel* max_seqlen_per_dp_cp_rank "
    "cp_comm_type",
    "mixture-of-experts models are not supported": "*moe* expert_* ep_overlap_*",
    "virtual pipeline stages are not supported": "virtual_* microbatch_group_size_per_vp_stage "
    "overlap_p2p_comm*",
    "layers are divided evenly over the pipeline": "pipeline_model_parallel_layout "
    "num_layers_in_* account_for_*",
    "only code can set it": "timers *_func autocast_dtype _cpu_offloading_context",
    "it would change the network that config.json describes": "softmax_* window_* "
    "layernorm_zero_centered_gamma apply_residual_connection_post_layernorm fp32_residual_connection "
    "activation_func_* glu_linear_offset rotary_interleaved no_rope_freq mrope_section qk_l2_norm "
    "attention_output_gate multi_latent_attention experimental_attention_variant dsa_* linear_* "
    "mamba_* use_mamba_* is_hybrid_model heterogeneous_block_specs mtp_*",
    "quantised arithmetic is not supported": "fp8* fp4* *kitchen* quant_recipe tp_only_amax_red "
    "first_last_layers_bf16 num_layers_at_* disable_parameter_transpose_cache",
    "the weights come from the checkpoint or its initializer_range": "perform_initialization "
    "*init_method_std init_model_with_meta_device",
    "CUDA graphs need microbatches of one length": "*cuda_graph*",
    "it needs buffers that this program does not set up": "tp_comm_*",
    "nothing in this program reads it": "cross_entropy_* defer_embedding_wgrad_compute "
    "wgrad_deferral_limit delay_wgrad_compute qk_clip* log_max_attention_logit inference_* "
    "use_inference_optimized_layers symmetric_ar_type flash_decode mlp_chunks_for_prefill "
    "use_te_rng_tracker batch_invariant_mode enable_autocast barrier_with_L1_time test_mode "
    "config_logger_dir hetereogenous_dist_checkpoint pipeline_model_parallel_comm_backend "
    "async_tensor_model_parallel_allreduce disable_bf16_reduced_precision_matmul "
    "persist_layer_norm memory_efficient_layer_norm masked_softmax_fusion "
    "attention_softmax_in_fp32 use_fused_weighted_squared_relu "
    "num_microbatches_with_partial_activation_checkpoints",
}
_REFUSED = {name: why for why, names in _UNSUPPORTED.items() for name in names.split()}
_TRANSFORMER_ENGINE = (
    "apply_query_key_layer_scaling apply_rope_fusion attention_backend cpu_offloading* "
    "deterministic_mode fine_grained_activation_offloading fused_single_qkv_rope "
    "gradient_accumulation_fusion min_offloaded_tensor_size offload_modules use_te_activation_func"
).split()


def check_overrides(
    megatron: Mapping[str, Any], ours: Collection[str], *, transformer_engine: bool
) -> dict[str, Any]:
    """Return the section with enum members in place of their names.

    `ours` are the fields that this program sets; `transformer_engine` says whose layers the model
    has. A field may always be set to Megatron's default.

    Raises:
        ValueError: an unknown field, a value of another type, or a field that has no effect here,
            would change the network, or is set elsewhere.
    """
    fields = {field.name: field for field in dataclasses.fields(TransformerConfig)}
    kinds, checked = get_type_hints(TransformerConfig), {}
    for key, given in megatron.items():
        if key not in fields:
            close = difflib.get_close_matches(key, fields, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"megatron.{key}: not a field of TransformerConfig{hint}")
        if key in ours:
            raise ValueError(f"megatron.{key}={given!r}: {_OURS}; remove it")
        reason = _refusal(key, transformer_engine)
        try:
            value = checked[key] = _convert(given, kinds[key])
        except TypeError:
            told = f"{reason}; remove it" if reason else f"expected {_spell(kinds[key])}"
            raise ValueError(f"megatron.{key}: got {given!r}, {told}") from None
        if reason and value != fields[key].default:
            raise ValueError(f"megatron.{key}={given!r}: {reason}; remove it")
    return checked


def _refusal(key: str, transformer_engine: bool) -> str | None:
    """Return why a field may not be set, if so."""
    for pattern, reason in _REFUSED.items():
        if fnmatchcase(key, pattern):
            return reason
    if transformer_engine or not any(fnmatchcase(key, name) for name in _TRANSFORMER_ENGINE):
        return None
    return "only Transformer Engine's layers read it, and this model has the portable ones"


def _convert(value: Any, kind: Any) -> Any:
    """Return `value` as `kind`, an enum's member for its name; raise `TypeError` if it is none."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for option in inner:
            try:
                return _convert(value, option)
            except TypeError:
                continue
    elif origin is list and isinstance(value, list):
        return [_convert(item, inner[0]) for item in value]
    elif origin is Literal and value in inner:
        return value
    elif isinstance(kind, enum.EnumMeta) and isinstance(value, str) and value in kind.__members__:
        return kind[value]
    elif kind is float and type(value) in (int, float):
        return float(value)
    elif kind in (bool, int, str, NoneType) and type(value) is kind:
        return value
    raise TypeError


def _spell(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_spell(option) for option in inner)
    if origin is list:
        return f"a list of {_spell(inner[0])}"
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if isinstance(kind, enum.EnumMeta):
        return f"one of {', '.join(kind.__members__)}"
    return "null" if kind is NoneType else kind.__name__
