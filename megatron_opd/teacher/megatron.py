"""The co-located teacher: its own depth and width, the student's ranks and vocabulary shards."""

from typing import Any

import torch
from torch import Tensor

from megatron_opd.model import enter_head
from megatron_opd.model.pipeline import run_schedule
from megatron_opd.parallel import Parallel
from megatron_opd.types import HiddenScores, Microbatch


class MegatronTeacher:
    """A frozen Megatron model that hands over hidden states and keeps its own head.

    `model` must be built with the student's padded vocabulary, so that rank r's rows of both heads
    are the same tokens. With `offload`, all weights but the head live in pinned host memory between
    calls of `score`; the head stays, because the loss multiplies by it.
    """

    def __init__(self, model: Any, parallel: Parallel, *, vocab_size: int, offload: bool = False):
        self.model = model.eval().requires_grad_(False)
        self.parallel = parallel
        self.head = model.head(vocab_size) if parallel.is_last_stage else None
        self.body = _Offloaded(self._body()) if offload else None

    def _body(self) -> list[Tensor]:
        head = None if self.head is None else self.head.weight_VH
        return [p for p in self.model.parameters() if p is not head]

    @torch.no_grad()
    def score(self, microbatches: list[Microbatch]) -> list[HiddenScores | None]:
        """Run forward only through the pipeline schedule and keep the supervised positions."""
        if self.body:
            self.body.fetch()

        def keep(index: int, hidden: Tensor) -> HiddenScores:
            hidden_TH = enter_head(hidden, self.parallel)
            hidden_NH = hidden_TH.index_select(0, microbatches[index].source_N)
            assert self.head is not None
            return HiddenScores(hidden_NH, self.head)

        scores = run_schedule(self.model, microbatches, keep, forward_only=True)
        if self.body:
            self.body.release()
        return scores or [None] * len(microbatches)


class _Offloaded:
    """Frozen tensors with a pinned host copy: released is a dropped pointer, not a transfer."""

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
