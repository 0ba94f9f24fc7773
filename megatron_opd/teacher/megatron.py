"""The co-located teacher: its own depth and width, the student's ranks and vocabulary shards.

Or the student's own network: as it was at the start, or as it is (`live`).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from megatron_opd.loss import summarize
from megatron_opd.model import enter_head
from megatron_opd.model.pipeline import run_schedule
from megatron_opd.offload import Offloaded
from megatron_opd.parallel import Parallel
from megatron_opd.types import HiddenScores, Microbatch, Scores

Payload = Literal["hidden", "topk", "sampled"]
T = TypeVar("T")


class MegatronTeacher:
    """A Megatron model that hands over what `payload` says of every supervised token.

    No gradient enters it, so it may be the student itself, which then judges as it is at the
    moment; its hidden states are good until its weights change.

    hidden: its hidden states, while it keeps its own head, which the loss multiplies them with;
    `model` must then be built with the student's padded vocabulary, so that rank r's rows of both
    heads are the same tokens. Without `keeps_head` the loss has the rows from elsewhere, and those
    here go. topk, sampled: log-probabilities at `temperature`, computed here. With `offload`, all
    weights that the loss does not need live in pinned host memory between calls of `score`.
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
        keeps_head: bool = True,
    ):
        self.model, self.keeps_head = model, keeps_head
        self.parallel, self.payload = parallel, payload
        self.k, self.temperature, self.chunk_tokens = k, temperature, chunk_tokens
        self.head = model.head(vocab_size) if parallel.is_last_stage else None
        if self.head and payload == "hidden" and not keeps_head and not self._head_embeds():
            self.head.weight_VH.data = self.head.weight_VH.data.new_empty(0)
        self.away = Offloaded(self._between_uses()) if offload else None

    def _between_uses(self) -> list[Tensor]:
        """Return the weights that may leave: all but the head that hidden states come with."""
        needed = self.head and self.payload == "hidden" and self.keeps_head
        stays = self.head.weight_VH if self.head and needed else None
        return [p for p in self.model.parameters() if p is not stays]

    def _head_embeds(self) -> bool:
        """Say whether the head is the embedding table, rather than a copy or a table of its own."""
        return self.model.architecture.tied and self.parallel.pp == 1

    def close(self) -> None:
        """Do nothing: the weights go with the process."""

    @torch.no_grad()
    def score(self, microbatches: list[Microbatch]) -> list[Scores | None]:
        """Run forward only through the pipeline schedule and keep the supervised positions."""
        scores: list[Scores | None] = self.run(
            microbatches, lambda i, hidden_NH: self.judge(hidden_NH, microbatches[i])
        )
        return scores or [None] * len(microbatches)

    def run(self, microbatches: Sequence[Microbatch], keep: Callable[[int, Tensor], T]) -> list[T]:
        """Return what `keep(i, hidden_NH)` makes of each microbatch; [] before the last stage."""
        if not microbatches and not self.parallel.shares_experts:  # else another replica has some
            return []
        if self.away:
            self.away.fetch()
        self.model.eval()

        def last_stage(index: int, hidden: Tensor) -> T:
            hidden_TH = enter_head(hidden, self.parallel)
            return keep(index, hidden_TH.index_select(0, microbatches[index].source_N))

        kept = run_schedule(self.model, microbatches, last_stage, forward_only=True)
        if self.away:
            self.away.release()
        return kept

    def judge(self, hidden_NH: Tensor, microbatch: Microbatch) -> Scores:
        """Return what `payload` says of the supervised tokens; collective over tp."""
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
