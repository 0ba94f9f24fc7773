"""Megatron's router of tokens to experts, with auxiliary losses that hold at every layout."""

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, z_loss_func
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn


class Router(TopKRouter):
    """Megatron's router, whose auxiliary losses are means over all tokens of a step.

    An auxiliary loss of a microbatch is multiplied by its tokens, and in the end by 1 / what the
    step's own loss is divided by: tokens or sequences that are supervised, not all tokens that were
    routed. `per_token` makes up for that. Megatron takes the two for one, and the tokens of one
    tensor-parallel rank for all, so that its auxiliary gradients depend on the layout.
    """

    per_token: float = 1.0

    def attach_and_log_load_balancing_loss(
        self,
        activation: Tensor,
        aux_loss_coeff: float,
        aux_loss: Tensor,
        aux_loss_name: str,
        reduce_group: Any,
        reduce_group_has_dp: bool = False,
        valid_token_count: int | None = None,
    ) -> Tensor:
        """Let the backward of `activation` start that of this rank's part of `aux_loss`."""
        assert valid_token_count is not None
        tokens = valid_token_count * reduce_group.size()
        return MoEAuxLossAutoScaler.apply(activation, aux_loss * tokens * self.per_token)

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Let the backward of the logits `[T, E]` start that of coefficient · mean (log Σ exp)²."""
        coefficient = self.config.moe_z_loss_coeff
        if not coefficient or not self.training or not torch.is_grad_enabled():
            return logits
        mean = z_loss_func(logits, coefficient)
        return MoEAuxLossAutoScaler.apply(logits, mean * logits.size(0) * self.per_token)


def set_auxiliary_weight(model: nn.Module, per_token: float) -> None:
    """Set what the routers' auxiliary losses are multiplied by, for each token that is routed."""
    for module in model.modules():
        if isinstance(module, Router):
            module.per_token = per_token
