"""Rotary position embeddings: what config.json says of them, and their frequencies."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_opd.model.families import Family

Rope = Mapping[str, Any]  # rope_type, rope_theta and the parameters of the type
_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


def read(config: Mapping[str, Any], family: Family, file: str) -> dict[str, Any]:
    """Merge `rope_theta` + `rope_scaling`, or `rope_parameters` since transformers 5.

    Raises:
        ValueError: a type or a parameter that is not supported, or one that is missing.
    """
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", family.theta))
    rope.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    kind, known = rope["rope_type"], ("default", "yarn") if family.latent else tuple(_NEEDED)
    if kind not in known:
        raise ValueError(f"{file}: rope_type={kind!r}, expected one of {', '.join(known)}")
    for key in _NEEDED[kind]:
        if rope.get(key) is None:
            raise ValueError(f"{file}: rope_type={kind}: {key} is missing")
    only: dict[str, Any] = {"partial_rotary_factor": 1.0}
    only["attn_factor"] = None  # vLLM reads it, transformers does not
    if family.latent:
        only["attention_factor"] = None
    for key, value in only.items():
        if rope.get(key, value) != value:
            raise ValueError(f"{file}: {key}={rope[key]} is not supported, expected {value}")
    return rope


def inv_freq(rope: Rope, dim: int) -> Tensor:
    """Return the inverse frequencies, fp32 `[dim / 2]`.

    default: θ^(-2i/d). linear: that / factor. llama3 (Llama 3.1): wavelengths above
    original / low_freq_factor are divided by factor, those below original / high_freq_factor are
    kept, and the ones between are interpolated. yarn (arXiv:2309.00071): frequencies of fewer turns
    than beta_slow are divided, of more than beta_fast kept, between them by their number.
    """
    trained = 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim))
    if rope["rope_type"] == "default":
        return trained
    slow = trained / rope["factor"]
    if rope["rope_type"] == "linear":
        return slow
    kept = _llama3(rope, trained) if rope["rope_type"] == "llama3" else _yarn(rope, dim)
    return (1 - kept) * slow + kept * trained


def _llama3(rope: Rope, trained: Tensor) -> Tensor:
    """Return 1 where a frequency stays as trained, 0 where it is slowed down."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * trained / (2 * math.pi)
    return ((turns - low) / (high - low)).clamp(0.0, 1.0)


def _yarn(rope: Rope, dim: int) -> Tensor:
    """Return the same as `_llama3`."""
    positions, per_log = rope["original_max_position_embeddings"], math.log(rope["rope_theta"])
    first, last = (
        dim * math.log(positions / (turns * 2 * math.pi)) / (2 * per_log)
        for turns in (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
    )
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    ramp = (torch.arange(dim // 2).float() - first) / (last - first or 0.001)
    return 1 - ramp.clamp(0.0, 1.0)


def yarn_factor(rope: Rope) -> float:
    """Return what yarn multiplies rotated queries, and keys, by: 0.1 ln factor + 1 if nothing else.

    That is what the file's attention_factor says, or mscale and mscale_all_dim together.
    """
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    first, second = rope.get("mscale"), rope.get("mscale_all_dim")
    if first and second:
        return _grown(rope, first) / _grown(rope, second)
    return _grown(rope, 1.0)


def _grown(rope: Rope, by: float) -> float:
    return 1.0 if rope["factor"] <= 1 else 0.1 * by * math.log(rope["factor"]) + 1.0
