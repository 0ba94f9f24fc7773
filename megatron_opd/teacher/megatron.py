"""The co-located teacher: its own depth and width, the student's ranks and vocabulary shards.

Or the student's own network: as it was at the start, or as it is (`live`).
"""

from typing import Any, Literal

import torch
from torch import Tensor

from megatron_opd.loss import summarize
from megatron_opd.model import enter_head
from megatron_opd.model.pipeline import run_schedule
from megatron_opd.parallel import Parallel
from megatron_opd.types import HiddenScores, Microbatch, Scores

Payload = Literal["hidden", "topk", "sampled"]


class MegatronTeacher:
    """A Megatron model that hands over what `payload` says of every supervised token.

    No gradient enters it, so it may be the student itself, which then judges as it is at the
    moment; its hidden states are good until its weights change.

    hidden: its hidden states, while it keeps its own head, which the loss multiplies them with;
    `model` must then be built with the student's padded vocabulary, so that rank r's rows of both
    heads are the same tokens. topk, sampled: log-probabilities at `temperature`, computed here.
    With `offload`, all weights that the loss does not need live in pinned host memory between calls
    of `score`.
    """

    def __init__(
        self,
        model: Any,
        parallel: Parallel,
        *,
        vocab_size: int,
        offload: bool = False,
        payload: Payload = "hidden",
        k: int = 16,
        temperature: float = 1.0,
        chunk_tokens: int | None = None,
    ):
        self.model = model
        self.parallel, self.payload = parallel, payload
        self.k, self.temperature, self.chunk_tokens = k, temperature, chunk_tokens
        self.head = model.head(vocab_size) if parallel.is_last_stage else None
        self.away = _Offloaded(self._between_uses()) if offload else None

    def _between_uses(self) -> list[Tensor]:
        """Return the weights that may leave: all but the head that hidden states come with."""
        stays = self.head.weight_VH if self.head and self.payload == "hidden" else None
        return [p for p in self.model.parameters() if p is not stays]

    def close(self) -> None:
        """Do nothing: the weights go with the process."""

    @torch.no_grad()
    def score(self, microbatches: list[Microbatch]) -> list[Scores | None]:
        """Run forward only through the pipeline schedule and keep the supervised positions."""
        if not microbatches:  # as another replica may have some, it is a question all the same
            return []
        if self.away:
            self.away.fetch()
        self.model.eval()

        def keep(index: int, hidden: Tensor) -> Scores:
            hidden_TH = enter_head(hidden, self.parallel)
            hidden_NH = hidden_TH.index_select(0, microbatches[index].source_N)
            return self._judge(hidden_NH, microbatches[index])

        scores = run_schedule(self.model, microbatches, keep, forward_only=True)
        if self.away:
            self.away.release()
        return scores or [None] * len(microbatches)

    def _judge(self, hidden_NH: Tensor, microbatch: Microbatch) -> Scores:
        assert self.head is not None
        if self.payload == "hidden":
            return HiddenScores(hidden_NH, self.head)
        return summarize(
            hidden_NH,
            self.head,
            microbatch,
            kind=self.payload,
            k=self.k,
            temperature=self.temperature,
            chunk_tokens=self.chunk_tokens,
        )


@torch.no_grad()
def copy_weights(source: Any, target: Any) -> None:
    """Give `target` the weights of `source`, a model of the same network at the same layout."""
    theirs = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        parameter.copy_(theirs.pop(name))
    assert not theirs, f"weights that the copy does not have: {list(theirs)}"


class _Offloaded:
    """Tensors with a pinned host copy: released is a dropped pointer, not a transfer."""

    def __init__(self, tensors: list[Tensor]):
        self.tensors = tensors
        self.device = tensors[0].device
        self.host = [tensor.data.cpu() for tensor in tensors]
        if self.device.type == "cuda":  # pinned, so that fetching overlaps
            self.host = [tensor.pin_memory() for tensor in self.host]
        self.release()

    def fetch(self) -> None:
        for tensor, host in zip(self.tensors, self.host, strict=True):
            tensor.data = host.to(self.device, non_blocking=True)

    def release(self) -> None:
        for tensor in self.tensors:
            tensor.data = tensor.data.new_empty(0)
