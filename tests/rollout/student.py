"""What the student itself says of rollouts, by its packed training forward."""

import torch

from megatron_opd.model import enter_head, forward
from megatron_opd.packing import pack


@torch.no_grad()
def training_logits(model, parallel, rollouts, vocab_size):
    """Return the logits at every response token, [N, V], and the microbatch of all rollouts."""
    (batch,) = pack(rollouts, microbatch_tokens=10_000)
    hidden = enter_head(forward(model, batch), parallel)[batch.source_N]
    return (hidden @ model.head(vocab_size).weight_VH.T)[:, :vocab_size], batch
