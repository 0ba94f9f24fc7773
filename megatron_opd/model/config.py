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

from megatron_opd.model import rope
from megatron_opd.model.families import (
    ACTIVATIONS,
    FAMILIES,
    ONLY,
    REFUSED,
    ExpertNames,
    Family,
    Mixture,
)

HFConfig = Mapping[str, Any] | str | Path  # the parsed file, the file, or the folder it is in
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Experts:
    """The routed experts of a model, and how tokens get to them."""

    count: int
    per_token: int
    ffn: int  # of each
    shared_ffn: int  # of the expert that every token goes to; 0: none
    shared_gate: bool  # its output is scaled by a sigmoid of its own
    normalized: bool  # the weights of a token's experts add up to one
    sigmoid: bool  # scores are sigmoids, and a bias corrects them to choose experts
    fp32: bool  # the router's product
    scale: float  # of the weights
    groups: int | None  # a token's experts are in groups_per_token of these
    groups_per_token: int | None
    layers: tuple[bool, ...]  # which decoder layers have experts: the others are dense
    names: ExpertNames


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: keys and values are projected up from a common vector."""

    q_rank: int | None  # of a vector that queries are projected up from; None: directly
    kv_rank: int
    plain: int  # of a head's query and key, what is not rotated …
    rotated: int  # … and what is; all heads have the same rotated key
    value: int  # size of a head's value


@dataclass(frozen=True)
class Architecture:
    """What a `config.json` says about the network."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int  # of queries and keys
    ffn: int  # of the dense layers
    vocab_rows: int  # rows of the embedding table in the checkpoint
    max_positions: int
    norm_eps: float
    init_std: float
    tied: bool  # the output projection is the embedding table
    qkv_bias: bool
    qk_norm: bool
    activation: str  # silu or gelu_tanh, of the gated mlp
    zero_centered: bool  # norms multiply by 1 + weight
    scaled_embeddings: bool  # by √hidden
    experts: Experts | None  # None: a dense model
    predictors: int  # layers after these that predict further tokens: not used
    latent: Latent | None  # None: plain attention, perhaps with fewer key-value heads
    rope: Mapping[str, Any]  # rope_type, rope_theta and the parameters of the type
    dtype: torch.dtype | None  # None: the file does not say

    def cache_elements(self, tp: int = 1) -> int:
        """Return how many numbers the keys and values of one token are, on one of `tp` ranks."""
        value = self.latent.value if self.latent else self.head_dim
        return self.layers * max(1, self.kv_heads // tp) * (self.head_dim + value)

    def inv_freq(self) -> Tensor:
        """Return the rotary inverse frequencies, fp32 `[d / 2]` for the d rotated of a head."""
        return rope.inv_freq(self.rope, self.latent.rotated if self.latent else self.head_dim)

    def attention_scale(self) -> float | None:
        """Return what queries times keys are multiplied by; None: 1/√head_dim.

        (Of latent attention, where yarn's factor is for the rotated part alone, Megatron sees to
        it.)
        """
        if self.rope["rope_type"] != "yarn" or self.latent:
            return None
        return rope.yarn_factor(self.rope) ** 2 / math.sqrt(self.head_dim)


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
    family = _family(config, file)
    _refuse_sliding_window(config, family, file)
    heads, hidden = _need(config, "num_attention_heads", file), _need(config, "hidden_size", file)
    latent = _latent(config, file) if family.latent else None
    head_dim = config.get("head_dim") or family.head_dim or hidden // heads
    return Architecture(
        layers=_need(config, "num_hidden_layers", file),
        hidden=hidden,
        heads=heads,
        kv_heads=heads if latent else config.get("num_key_value_heads") or heads,
        head_dim=latent.plain + latent.rotated if latent else head_dim,
        ffn=_need(config, "intermediate_size", file),
        vocab_rows=_need(config, "vocab_size", file),
        max_positions=_need(config, "max_position_embeddings", file),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        init_std=config.get("initializer_range", 0.02),
        tied=config.get("tie_word_embeddings", family.tied),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        activation=family.activation,
        zero_centered=family.zero_centered,
        scaled_embeddings=family.scaled_embeddings,
        experts=_experts(config, family.mixture, file) if family.mixture else None,
        latent=latent,
        predictors=config.get("num_nextn_predict_layers") or 0,
        rope=rope.read(config, family, file),
        dtype=_dtype(config, file),
    )


def _family(config: Mapping[str, Any], file: str) -> Family:
    """Return the family, after a look at the keys that it knows only one value of."""
    name = config.get("model_type") or ""
    family = FAMILIES.get(name)
    if family is None:
        lacking = REFUSED.get(name)
        why = f" (Megatron's layers have no {lacking})" if lacking else ""
        known = ", ".join(FAMILIES)
        raise ValueError(
            f"{file}: model_type={config.get('model_type')!r}{why}, expected one of {known}"
        )
    for key, only in {**ONLY, **family.only}.items():
        if (config.get(key, only) or None) != (only or None):  # absent, null, 0 and false are one
            raise ValueError(f"{file}: {key}={config[key]!r} is not supported, expected {only!r}")
    spelled = [word for word, meant in ACTIVATIONS.items() if meant == family.activation]
    asked = config.get("hidden_activation") or config.get("hidden_act", spelled[0])
    if asked not in spelled:
        raise ValueError(f"{file}: hidden_act={asked!r} is not supported, expected {spelled[0]!r}")
    return family


def _latent(config: Mapping[str, Any], file: str) -> Latent:
    return Latent(
        q_rank=config.get("q_lora_rank"),
        kv_rank=_need(config, "kv_lora_rank", file),
        plain=_need(config, "qk_nope_head_dim", file),
        rotated=_need(config, "qk_rope_head_dim", file),
        value=_need(config, "v_head_dim", file),
    )


def _experts(config: Mapping[str, Any], mixture: Mixture, file: str) -> Experts:
    key = next((name for name in mixture.count if config.get(name)), mixture.count[0])
    ffn, per_token = (_need(config, key, file) for key in (mixture.ffn, "num_experts_per_tok"))
    shared = config.get("shared_expert_intermediate_size") or 0
    normalized, (groups, chosen) = mixture.normalized, _groups(config, mixture, per_token, file)
    return Experts(
        count=_need(config, key, file),
        per_token=per_token,
        ffn=ffn,
        shared_ffn=shared or ffn * (config.get("n_shared_experts") or 0),
        shared_gate=mixture.shared_gate,
        normalized=config.get("norm_topk_prob", False) if normalized is None else normalized,
        sigmoid=mixture.sigmoid,
        fp32=mixture.fp32,
        scale=config.get("routed_scaling_factor") or 1.0,
        groups=groups,
        groups_per_token=chosen,
        layers=tuple(_sparse(config, layer) for layer in range(config["num_hidden_layers"])),
        names=mixture.names,
    )


def _sparse(config: Mapping[str, Any], layer: int) -> bool:
    """Say whether a layer has experts."""
    if layer < (config.get("first_k_dense_replace") or 0):
        return False
    step, dense = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or ()
    return (layer + 1) % step == 0 and layer not in dense


def _groups(
    config: Mapping[str, Any], mixture: Mixture, per_token: int, file: str
) -> tuple[int | None, int | None]:
    """Return how many groups there are, and how many of them a token's experts are chosen from."""
    groups, chosen = config.get("n_group") or 1, config.get("topk_group") or 1
    if groups == 1 or not mixture.sigmoid:
        return None, None
    if per_token != 2 * chosen:
        raise ValueError(
            f"{file}: topk_group={chosen} is not supported, expected num_experts_per_tok / 2 = "
            f"{per_token / 2:g}: Megatron rates a group by its best num_experts_per_tok / "
            "topk_group experts, the model by its best 2"
        )
    return groups, chosen


def _need(config: Mapping[str, Any], key: str, where: str) -> Any:
    if config.get(key) is None:
        raise ValueError(f"{where}: {key} is missing")
    return config[key]


def _refuse_sliding_window(config: Mapping[str, Any], family: Family, file: str) -> None:
    """Refuse a window that some layer uses; Qwen2 files carry a size that is switched off."""
    types = set(config.get("layer_types") or ())
    if types - {"full_attention"}:
        raise ValueError(f"{file}: layer_types={sorted(types)}, expected only full_attention")
    if family.switched:
        windowed = _need(config, "num_hidden_layers", file) - config.get("max_window_layers", 28)
        if not types and config.get("use_sliding_window") and windowed > 0:
            raise ValueError(f"{file}: use_sliding_window=True is not supported, expected False")
        return
    window = config.get("sliding_window", family.window)
    positions = _need(config, "max_position_embeddings", file)
    if window and window < positions:
        raise ValueError(
            f"{file}: sliding_window={window} is not supported, expected null or at least "
            f"max_position_embeddings={positions}"
        )


def _dtype(config: Mapping[str, Any], file: str) -> torch.dtype | None:
    name = config.get("dtype") or config.get("torch_dtype")
    if name is not None and name not in DTYPES:
        raise ValueError(f"{file}: dtype={name!r}, expected one of {', '.join(DTYPES)}")
    return None if name is None else DTYPES[name]


def check_layout(
    hf: HFConfig,
    tp: int,
    pp: int,
    *,
    vpp: int = 1,
    ep: int = 1,
    etp: int | None = None,
    sequence_parallel: bool = True,
    key: str = "parallel",
) -> None:
    """Check that the network divides over the ranks of a layout; needs no process group.

    `key` is the section of the config that has the axes.
    `etp` is the tensor-parallel size inside an expert; None: `tp`. `sequence_parallel` matters to
    models that are trained. What a model without experts does with ep and etp is nothing.

    Raises:
        ValueError: heads, key-value heads, ffn, layers or experts do not divide, or experts are to
            be trained under tensor parallelism without sequence parallelism.
    """
    arch = architecture(hf)
    experts, layers = arch.experts, "pp" if vpp == 1 else "pp × vpp"
    if experts and tp > 1 and not sequence_parallel:
        raise ValueError(
            f"{key}: sequence_parallel=false with tp={tp} and the experts of {_path(hf)}, "
            "expected true: Megatron trains experts under tensor parallelism with it alone"
        )
    divided = [
        ("num_attention_heads", arch.heads, "tp", tp),
        ("num_key_value_heads", arch.kv_heads, "tp", tp),
        ("intermediate_size", arch.ffn, "tp", tp),
        ("num_hidden_layers", arch.layers, layers, pp * vpp),
    ]
    if experts:
        divided += [
            ("the number of experts", experts.count, "ep", ep),
            ("the experts' intermediate size", experts.ffn, "etp", etp or tp),
            ("the shared expert's intermediate size", experts.shared_ffn, "tp", tp),
        ]
    for what, size, axis, ranks in divided:
        if ranks < 1 or size % ranks:
            raise ValueError(
                f"{key}: {axis}={ranks} does not divide {what}={size} of {_path(hf)}; "
                f"expected a divisor of {size}"
            )


def padded_vocab(rows: int, tp: int) -> int:
    """Round `rows` up to a multiple of 128 × tp, as Megatron does."""
    return math.ceil(rows / (128 * tp)) * 128 * tp
