"""The mark of tests that need the real vLLM."""

import importlib.util

import pytest

NEEDS_VLLM = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="needs vLLM: make vllm"
)
LATENT = {  # the heads that vLLM has latent attention for on a CPU
    "moe_intermediate_size": 64,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_group": 1,
    "topk_group": 1,
}
