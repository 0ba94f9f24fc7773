"""Tiny models and rollouts that several tests share."""

import numpy as np
import torch

from megatron_opd.types import Prompt, Rollout

ROWS = 50  # of the vocabulary tables in config.json
VOCAB = 45  # of the tokenizer: the rest is never sampled and never counted

QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "initializer_range": 0.1,  # large enough that distributions are far from uniform
}


def qwen3(**changes) -> dict:
    """Return the tiny Qwen3 configuration with some keys changed."""
    return {**QWEN3, **changes}


def qwen3_moe(**changes) -> dict:
    """Return the tiny network with experts in every layer."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return qwen3(model_type="qwen3_moe", norm_topk_prob=True, **{**experts, **changes})


def make_prompts(lengths, seed: int = 0) -> list[Prompt]:
    """Return random prompts of the given lengths."""
    draw = torch.Generator().manual_seed(seed)
    return [
        Prompt(
            index=index,
            token_ids=tuple(torch.randint(0, VOCAB, (length,), generator=draw).tolist()),
            text="",
        )
        for index, length in enumerate(lengths)
    ]


def make_rollouts(shapes, seed: int = 0, top: int = 0) -> list[Rollout]:
    """Return random rollouts of the given (prompt, response) lengths, with `top` ids a token."""
    draw = torch.Generator().manual_seed(seed + 1)
    prompts = make_prompts([prompt for prompt, _ in shapes], seed)
    return [
        Rollout(
            prompt=prompt,
            sample=0,
            response_ids=tuple(torch.randint(0, VOCAB, (length,), generator=draw).tolist()),
            logp=tuple((-torch.rand(length, generator=draw)).tolist()),
            finish="stop",
            top_ids=_top_ids(length, top, draw) if top else None,
        )
        for prompt, (_, length) in zip(prompts, shapes, strict=True)
    ]


def _top_ids(length: int, k: int, draw: torch.Generator) -> np.ndarray:
    """Return k different ids for every token."""
    shuffled = torch.rand(length, VOCAB, generator=draw).argsort(-1)
    return shuffled[:, :k].int().numpy()
