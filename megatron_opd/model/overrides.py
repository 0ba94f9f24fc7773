"""The user's `megatron:` section: which fields of Megatron's `TransformerConfig` it may set.

Types and defaults are read from that class. What is passed on is listed here, because Megatron
takes in silence what this program would not honour: fields of features that it does not drive, of
layers that it does not build, and of other networks than the one that config.json describes.
"""

import dataclasses
import difflib
import enum
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron.core.transformer.transformer_config import TransformerConfig

_PASSED = (
    "batch_p2p_*",
    "bias_*_fusion",
    "clone_scatter_output_in_embedding",
    "deallocate_pipeline_outputs",
    "distribute_saved_activations",
    "moe_aux_loss_coeff",
    "moe_router_dtype",
    "moe_z_loss_coeff",
    "recompute_*",
)
_TRANSFORMER_ENGINE = (  # passed on too, but the portable layers do not read them
    "apply_query_key_layer_scaling",
    "apply_rope_fusion",
    "attention_backend",
    "cpu_offloading*",
    "deterministic_mode",
    "fused_single_qkv_rope",
    "moe_grouped_gemm",
    "moe_permute_fusion",
    "moe_router_fusion",
)
_REASONS = {  # for the fields that are asked for most; the others get a general one
    "*context_parallel*": "parallel.cp sets it",
    "expert_*": "parallel.ep and parallel.etp set it",
    "fp[48]*": "quantised arithmetic is not supported",
    "*cuda_graph*": "CUDA graphs need microbatches of one length",
    "virtual_*": "parallel.vpp sets it",
    "pipeline_model_parallel_layout": "layers are divided evenly over the pipeline",
    "num_layers_in_*": "layers are divided evenly over the pipeline",
    **dict.fromkeys(
        (
            "*residual_connection*",
            "activation_func_*",
            "attention_output_gate",
            "experimental_attention_variant",
            "glu_linear_offset",
            "layernorm_zero_centered_gamma",
            "linear_*",
            "mrope_section",
            "mtp_*",
            "multi_latent_attention",
            "no_rope_freq",
            "qk_l2_norm",
            "rotary_interleaved",
            "softmax_*",
            "window_*",
        ),
        "the network would no longer be the one of config.json",
    ),
}
_EXPERTS = "moe_*"  # read by models that have experts alone


def check_overrides(
    megatron: Mapping[str, Any],
    ours: Collection[str],
    *,
    transformer_engine: bool,
    experts: bool = False,
) -> dict[str, Any]:
    """Return the section with enum members in place of their names.

    `ours` are the fields that this program sets itself; `transformer_engine` says whose layers the
    model has, and `experts` whether some are mixtures of experts.

    Raises:
        ValueError: a field that is unknown, may not be set, or has no effect on these layers; a
            value of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(TransformerConfig)}
    kinds, checked = get_type_hints(TransformerConfig), {}
    for key, given in megatron.items():
        if key not in fields:
            close = difflib.get_close_matches(key, fields, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"megatron.{key}: not a field of TransformerConfig{hint}")
        reason = _refusal(key, ours)
        if reason:
            raise ValueError(f"megatron.{key}={given!r}: {reason}; remove it")
        try:
            checked[key] = _convert(given, kinds[key])
        except TypeError:
            expected = _spell(kinds[key])
            raise ValueError(f"megatron.{key}: got {given!r}, expected {expected}") from None
        if fnmatchcase(key, _EXPERTS) and not experts:
            raise ValueError(f"megatron.{key}={given!r}: the model has no experts; remove it")
        if fnmatchcase(key, "moe_*_coeff") and not _is_weight(checked[key]):
            raise ValueError(f"megatron.{key}: got {given!r}, expected a number of 0 or more")
        dropped = not transformer_engine and _matches(key, _TRANSFORMER_ENGINE)
        if dropped and checked[key] != fields[key].default:
            raise ValueError(
                f"megatron.{key}={given!r}: only Transformer Engine's layers read it, and this "
                "model gets the portable ones; remove it"
            )
    return checked


def _refusal(key: str, ours: Collection[str]) -> str | None:
    """Return why a field may not be set, if so."""
    for pattern, reason in _REASONS.items():
        if fnmatchcase(key, pattern):
            return reason
    if key in ours:
        return "set from the model's config.json and the other sections"
    if _matches(key, _PASSED + _TRANSFORMER_ENGINE):
        return None
    return f"not passed on; expected one of {', '.join(sorted(_PASSED + _TRANSFORMER_ENGINE))}"


def _matches(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _is_weight(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value >= 0)


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
