"""Tiny Hugging Face checkpoints with nothing left at its default: every mistake must show."""

import json
from pathlib import Path

import torch
import transformers

_SHAPE = {
    "vocab_size": 203,  # pads to 256 rows at tp 1 and 2
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 6.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 200,
}  # keeps one frequency, interpolates one and slows two
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
FAMILIES = {
    "llama": ("Llama", {"rope_parameters": _LLAMA3}),
    "llama_linear": ("Llama", {"rope_parameters": _LINEAR}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "qwen3_tied": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
}


def hf_model(family: str, *, dtype=torch.float32, seed: int = 0, **changes):
    """Return a `transformers` model with random weights, norms and biases included."""
    name, special = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**_SHAPE, **special, **changes})
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.15 * noise)
    return model.to(dtype)


def write_checkpoint(folder: Path, family: str, *, shard_size: str = "5GB", **how) -> Path:
    """Save a tiny model and stand-ins for its companions; return the folder."""
    hf_model(family, **how).save_pretrained(folder, max_shard_size=shard_size)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def to_old_layout(config: dict) -> dict:
    """Rewrite a configuration as transformers 4 did: rope_theta + rope_scaling, torch_dtype."""
    old = {**config, "torch_dtype": config["dtype"]}
    rope = dict(old.pop("rope_parameters"))
    old.pop("dtype")
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    return old


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())
