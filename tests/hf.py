"""Tiny Hugging Face checkpoints with nothing left at its default: every mistake must show."""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

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
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 2,
}
_DEEPSEEK = {
    "rms_norm_eps": 1e-6,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "moe_intermediate_size": 24,
    "num_key_value_heads": None,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
}
_GROUPS = {"n_shared_experts": 1, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7}
FAMILIES = {
    "llama": ("Llama", {"rope_parameters": _LLAMA3}),
    "llama_linear": ("Llama", {"rope_parameters": _LINEAR}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "qwen3_tied": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"head_dim": 12, "sliding_window": None}),
    "gemma": ("Gemma", {"head_dim": 12}),
    "qwen3_yarn": ("Qwen3", {"head_dim": 16, "rope_parameters": _YARN}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 12, "norm_topk_prob": True, **_EXPERTS}),
    "qwen2_moe": ("Qwen2Moe", {"shared_expert_intermediate_size": 20, **_EXPERTS}),
    "deepseek_v2": ("DeepseekV2", {"q_lora_rank": None, "n_shared_experts": 2, **_DEEPSEEK}),
    "deepseek_v3": ("DeepseekV3", {"q_lora_rank": 10, **_GROUPS, **_DEEPSEEK}),
}


def hf_config(family: str, **changes):
    """Return a tiny `transformers` configuration."""
    name, special = FAMILIES[family]
    return getattr(transformers, f"{name}Config")(**{**_SHAPE, **special, **changes})


def hf_model(family: str, *, dtype=torch.float32, seed: int = 0, std: float = 0.15, **changes):
    """Return a `transformers` model with random weights, norms and biases included."""
    name, config = FAMILIES[family][0], hf_config(family, **changes)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else std * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=draw))
    return model.to(dtype)


def write_checkpoint(folder: Path, family: str, *, shard_size: str = "5GB", **how) -> Path:
    """Save a tiny model and stand-ins for its companions; return the folder."""
    hf_model(family, **how).save_pretrained(folder, max_shard_size=shard_size)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def by_file_name(model, folder: Path) -> dict[str, torch.Tensor]:
    """Return a model's parameters as its files name them: experts one by one."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


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
