"""A Hugging Face `config.json` → `Architecture`: the network in one spelling for every family.

What a configuration asks for and this program does not do is an error that names it: weights that
load into a slightly different network would be the worst of both.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HFConfig = Mapping[str, Any] | str | Path  # the parsed file, the file, or the folder it is in
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class _Family:
    qkv_bias: bool
    qk_norm: bool
    head_dim: int | None = None  # None: hidden_size / num_attention_heads


_FAMILIES = {
    "llama": _Family(qkv_bias=False, qk_norm=False),
    "qwen2": _Family(qkv_bias=True, qk_norm=False),
    "qwen3": _Family(qkv_bias=False, qk_norm=True, head_dim=128),
}
# keys that would change the network, and the only value it is built for
_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


@dataclass(frozen=True)
class Architecture:
    """What a `config.json` says about the network."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab_rows: int  # rows of the embedding table in the checkpoint
    max_positions: int
    norm_eps: float
    init_std: float
    tied: bool  # the output projection is the embedding table
    qkv_bias: bool
    qk_norm: bool
    rope: Mapping[str, Any]  # rope_type, rope_theta and the parameters of the type
    dtype: torch.dtype | None  # None: the file does not say

    def cache_elements(self, tp: int = 1) -> int:
        """Return how many numbers the keys and values of one token are, on one of `tp` ranks."""
        return 2 * self.layers * max(1, self.kv_heads // tp) * self.head_dim

    def inv_freq(self) -> Tensor:
        """Return the rotary inverse frequencies, fp32 `[head_dim / 2]`.

        default: θ^(-2i/d). linear: that / factor. llama3 (Llama 3.1): wavelengths above
        original / low_freq_factor are divided by factor, those below original / high_freq_factor
        are kept, and the ones between are interpolated.
        """
        power = torch.arange(0, self.head_dim, 2).float() / self.head_dim
        trained = 1.0 / (self.rope["rope_theta"] ** power)
        if self.rope["rope_type"] == "default":
            return trained
        slow = trained / self.rope["factor"]
        if self.rope["rope_type"] == "linear":
            return slow
        low, high = self.rope["low_freq_factor"], self.rope["high_freq_factor"]
        turns = self.rope["original_max_position_embeddings"] * trained / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)  # 0: slow, 1: as trained
        return (1 - keep) * slow + keep * trained


def read_config(hf: HFConfig) -> dict[str, Any]:
    """Return the parsed `config.json`.

    Raises:
        ValueError: the file is missing or is not a JSON object.
    """
    if isinstance(hf, Mapping):
        return dict(hf)
    return read_json(_path(hf), "a Hugging Face config.json")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Return the JSON object in a file that is expected to be `what`.

    Raises:
        ValueError: the file is missing or is not a JSON object.
    """
    try:
        parsed = json.loads(path.read_text())
    except (OSError, ValueError) as problem:
        raise ValueError(f"{path}: expected {what}, got: {problem}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(parsed).__name__}")
    return parsed


def _path(hf: HFConfig) -> Path:
    """Return the file, or what to call it in an error when there is only its content."""
    if isinstance(hf, Mapping):
        return Path("config.json")
    return Path(hf) / "config.json" if Path(hf).is_dir() else Path(hf)


def architecture(hf: HFConfig) -> Architecture:
    """Read a Hugging Face configuration, in the layout before or since transformers 5.

    Raises:
        ValueError: a key is missing or asks for something not supported; names file and key.
    """
    config, file = read_config(hf), str(_path(hf))
    family = _FAMILIES.get(config.get("model_type", ""))
    if family is None:
        got, known = config.get("model_type"), ", ".join(_FAMILIES)
        raise ValueError(f"{file}: model_type={got!r}, expected one of {known}")
    for key, only in _ONLY.items():
        if (config.get(key, only) or None) != (only or None):  # absent, null, 0 and false are one
            raise ValueError(f"{file}: {key}={config[key]!r} is not supported, expected {only!r}")
    _refuse_sliding_window(config, file)
    heads, hidden = _need(config, "num_attention_heads", file), _need(config, "hidden_size", file)
    return Architecture(
        layers=_need(config, "num_hidden_layers", file),
        hidden=hidden,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or family.head_dim or hidden // heads,
        ffn=_need(config, "intermediate_size", file),
        vocab_rows=_need(config, "vocab_size", file),
        max_positions=_need(config, "max_position_embeddings", file),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        init_std=config.get("initializer_range", 0.02),
        tied=config.get("tie_word_embeddings", False),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        rope=_rope(config, file),
        dtype=_dtype(config, file),
    )


def _need(config: Mapping[str, Any], key: str, where: str) -> Any:
    if config.get(key) is None:
        raise ValueError(f"{where}: {key} is missing")
    return config[key]


def _refuse_sliding_window(config: Mapping[str, Any], file: str) -> None:
    """Refuse a window that some layer uses; Qwen2 files carry a size that is switched off."""
    types = set(config.get("layer_types") or ())
    if types - {"full_attention"}:
        raise ValueError(f"{file}: layer_types={sorted(types)}, expected only full_attention")
    windowed = _need(config, "num_hidden_layers", file) - config.get("max_window_layers", 28)
    if not types and config.get("use_sliding_window") and windowed > 0:
        raise ValueError(f"{file}: use_sliding_window=True is not supported, expected False")


def _rope(config: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Merge `rope_theta` + `rope_scaling`, or `rope_parameters` since transformers 5."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    kind = rope["rope_type"]
    if kind not in _ROPE_KEYS:
        raise ValueError(f"{file}: rope_type={kind!r}, expected one of {', '.join(_ROPE_KEYS)}")
    partial = rope.get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise ValueError(f"{file}: partial_rotary_factor={partial} is not supported, expected 1.0")
    for key in _ROPE_KEYS[kind]:
        _need(rope, key, f"{file}: rope_type={kind}")
    return rope


def _dtype(config: Mapping[str, Any], file: str) -> torch.dtype | None:
    name = config.get("dtype") or config.get("torch_dtype")
    if name is not None and name not in DTYPES:
        raise ValueError(f"{file}: dtype={name!r}, expected one of {', '.join(DTYPES)}")
    return None if name is None else DTYPES[name]


def check_layout(hf: HFConfig, tp: int, pp: int) -> None:
    """Check that the network divides over tp × pp ranks; needs no process group.

    Raises:
        ValueError: heads, key-value heads, ffn or layers do not divide.
    """
    arch = architecture(hf)
    for key, size, axis, ranks in (
        ("num_attention_heads", arch.heads, "tp", tp),
        ("num_key_value_heads", arch.kv_heads, "tp", tp),
        ("intermediate_size", arch.ffn, "tp", tp),
        ("num_hidden_layers", arch.layers, "pp", pp),
    ):
        if ranks < 1 or size % ranks:
            raise ValueError(
                f"parallel: {axis}={ranks} does not divide {key}={size} of {_path(hf)}; "
                f"expected a divisor of {size}"
            )


def padded_vocab(rows: int, tp: int) -> int:
    """Round `rows` up to a multiple of 128 × tp, as Megatron does."""
    return math.ceil(rows / (128 * tp)) * 128 * tp
