"""The same log-probabilities by `transformers`, in fp32 on the host."""

from collections.abc import Sequence

import numpy as np
import psutil
import torch
from transformers import AutoModelForCausalLM

from megatron_opd.memory import count_parameters
from megatron_opd.types import Rollout


def too_large(path: str) -> str | None:
    """Say why the model does not fit the host's memory; None: it does."""
    needed, free = count_parameters(path) * 4, psutil.virtual_memory().available
    if needed <= free:
        return None
    return f"needs {needed / 2**30:.0f} GiB of host memory in fp32, {free / 2**30:.0f} are free"


@torch.no_grad()
def response_nll(path: str, rollouts: Sequence[Rollout], vocab_size: int) -> np.ndarray:
    """Return −log p of every response token, one response after the other."""
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, local_files_only=True
    ).eval()
    found = []
    for rollout in rollouts:
        ids = torch.tensor(rollout.prompt.token_ids + rollout.response_ids)
        first = len(rollout.prompt.token_ids)
        logp_TV = model(ids[None]).logits[0, first - 1 : -1, :vocab_size].log_softmax(-1)
        found.append(-logp_TV.gather(-1, ids[first:, None])[:, 0])
    return torch.cat(found).double().numpy()
