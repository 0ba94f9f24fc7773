"""The families of models, one row each: what a `model_type` means for the network.

A row says what config.json does not, or says under another name. What a key of the file says under
the same name in every family is read in `config`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ExpertNames:
    """Where checkpoints keep the experts of a layer, such as `block`.experts.N.`gate`.weight."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_experts"  # the expert of all tokens


@dataclass(frozen=True)
class Mixture:
    """How a family of mixture-of-experts models counts its experts and routes to them."""

    count: tuple[str, ...] = ("num_experts", "num_local_experts")  # one of these keys
    ffn: str = "moe_intermediate_size"  # this key
    normalized: bool | None = None  # the weights of a token's experts; None: norm_topk_prob says
    sigmoid: bool = False  # scores are sigmoids, and a bias corrects them to choose experts
    fp32: bool = False  # the router's product
    shared_gate: bool = False
    names: ExpertNames = ExpertNames()


@dataclass(frozen=True)
class Family:
    """What is alike in all models of a family, and what holds where config.json is silent."""

    activation: str = "silu"
    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    tied: bool = False
    theta: float = 10000.0
    switched: bool = True  # a sliding_window counts with use_sliding_window=true alone
    window: int | None = None
    zero_centered: bool = False  # norms multiply by 1 + weight
    scaled_embeddings: bool = False  # by √hidden_size
    latent: bool = False  # multi-head latent attention
    mixture: Mixture | None = None
    only: Mapping[str, Any] = field(default_factory=dict)  # like ONLY


_DEEPSEEK = {
    "moe_layer_freq": 1,
    "rms_norm_eps": 1e-6,  # of the latent vectors, transformers takes this whatever the file says
}
FAMILIES = {
    "llama": Family(),
    "mistral": Family(switched=False, window=4096),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True, head_dim=128),
    "gemma": Family(
        activation="gelu_tanh",
        head_dim=256,
        tied=True,
        zero_centered=True,
        scaled_embeddings=True,
    ),
    "mixtral": Family(
        theta=1e6,
        switched=False,
        mixture=Mixture(
            count=("num_local_experts",),
            ffn="intermediate_size",
            normalized=True,
            names=ExpertNames("block_sparse_moe", "w1", "w3", "w2"),
        ),
    ),
    "qwen2_moe": Family(
        qkv_bias=True,
        mixture=Mixture(shared_gate=True, names=ExpertNames(shared="shared_expert")),
        only={"qkv_bias": True, "use_sliding_window": False},
    ),
    "qwen3_moe": Family(qk_norm=True, mixture=Mixture(), only={"use_sliding_window": False}),
    "deepseek_v2": Family(
        latent=True,
        mixture=Mixture(count=("n_routed_experts",), normalized=False, fp32=True),
        only={
            **_DEEPSEEK,
            "norm_topk_prob": False,
            "scoring_func": "softmax",
            "topk_method": "greedy",  # Megatron rates a group by several experts, not by its best
        },
    ),
    "deepseek_v3": Family(
        latent=True,
        mixture=Mixture(count=("n_routed_experts",), normalized=True, fp32=True, sigmoid=True),
        only={
            **_DEEPSEEK,
            "norm_topk_prob": True,
            "rope_interleave": True,
            "scoring_func": "sigmoid",
        },
    ),
}
REFUSED = {  # relatives of these, and what Megatron's layers lack for them
    "gemma2": "norms after attention and mlp, and capped attention scores",
    "gemma3": "norms after attention and mlp, and two kinds of rotary embedding",
    "gemma3_text": "norms after attention and mlp, and two kinds of rotary embedding",
}
ACTIVATIONS = {  # by what config.json calls them
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu_tanh",  # in the only family here that has a gelu, it has always meant this
}
# keys that would change the network, and the only value it is built for
ONLY = {
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "router_jitter_noise": 0.0,
    "use_bidirectional_attention": None,
}
