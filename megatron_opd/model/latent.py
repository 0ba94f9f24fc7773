"""Multi-head latent attention on Megatron's local modules, with gradients that hold under TP.

Shape suffixes: L sequence (L / tp under sequence parallelism) · B batch · H hidden · R rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor, nn

# without Transformer Engine that module says True all the same, and asks for its classes
multi_latent_attention.HAVE_TE = transformer_engine.HAVE_TE


class LatentAttention(MLASelfAttention):
    """Megatron's own, but every rank projects down to the whole latent vectors.

    The local spec cuts these projections over tensor-parallel ranks and gathers what comes out. The
    gather's backward keeps a rank's own share of the gradient, but all heads have one rotated key,
    and other ranks' heads have their shares of its gradient. Sequence parallelism sums a whole one.
    """

    def __init__(self, config: MLATransformerConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = Projection(config, config.q_lora_rank)
        down = config.kv_lora_rank + config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = Projection(config, down)


class Projection(nn.Module):
    """A linear layer that every rank has whole; Megatron sums its gradient over TP."""

    def __init__(self, config: MLATransformerConfig, rank: int):
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        shape, how = (rank, config.hidden_size), {"dtype": config.params_dtype, "device": device}
        self.weight: Any = nn.Parameter(torch.empty(shape, **how))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x_LBH: Tensor) -> tuple[Tensor, None]:
        """Return `[L, B, R]`, and no bias."""
        return F.linear(x_LBH, self.weight), None
