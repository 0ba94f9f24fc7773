"""A teacher behind a vLLM server: it sends log-probabilities of tokens, at temperature 1.

Shape suffixes: N supervised tokens of a microbatch · K most likely ids.
"""

from typing import Literal

import numpy as np
import torch

from megatron_opd.parallel import Parallel
from megatron_opd.rollout.server import Server, ask_once
from megatron_opd.rollout.wire import Passage, Scored
from megatron_opd.types import Microbatch, SampledScores, Scores, TopKScores


class ServerTeacher:
    """Score every sequence of every microbatch once, with the first rank of each replica asking.

    `version` names the weights that the server is to have; "default": those it was started with.
    """

    def __init__(
        self,
        server: Server,
        parallel: Parallel,
        *,
        vocab_size: int,
        payload: Literal["topk", "sampled"],
        k: int = 16,
        version: str = "default",
    ):
        self.server, self.parallel, self.vocab_size = server, parallel, vocab_size
        self.k, self.version = k if payload == "topk" else 0, version

    def score(self, microbatches: list[Microbatch]) -> list[Scores | None]:
        """Return one judgement per microbatch on the last pipeline stage, None on the others.

        Raises:
            ValueError: on every rank: the server fails, or answers wrongly.
        """
        passages = [_passages(batch.whole) for batch in microbatches]

        def ask() -> list[Scored]:
            together = [passage for of_batch in passages for passage in of_batch]
            how = {"vocab_size": self.vocab_size, "version": self.version}
            return self.server.score(together, self.k, **how)

        scored = iter(ask_once(self.parallel, ask))
        if not self.parallel.is_last_stage:
            return [None] * len(passages)
        return [
            self._join([next(scored) for _ in of_batch], batch)
            for of_batch, batch in zip(passages, microbatches, strict=True)
        ]

    def _join(self, scored: list[Scored], batch: Microbatch) -> Scores:
        """Put the scores of a microbatch's sequences one after the other, and keep this rank's."""

        def joined(name: str) -> torch.Tensor:
            values = np.concatenate([getattr(one, name) for one in scored])
            return batch.own(torch.from_numpy(values).to(self.parallel.device))

        if self.k:
            return TopKScores(joined("ids_TK"), joined("top_logp_TK"))
        return SampledScores(joined("logp_T"))

    def close(self) -> None:
        """Forget what was asked."""
        self.server.close()


def _passages(batch: Microbatch) -> list[Passage]:
    """Unpack the sequences, each with its last target, which the packing leaves out."""
    tokens, targets = batch.token_T.tolist(), batch.target_N.tolist()
    bounds, source_N = batch.cu_seqlens.tolist(), batch.source_N.tolist()
    responses = batch.sequence_N.bincount().tolist()
    passages, last = [], -1
    for sequence, length in enumerate(responses):
        begin, end = bounds[sequence], bounds[sequence + 1]
        last += length
        start = source_N[last] - begin + 2 - length  # the first target's place in the sequence
        passages.append(Passage((*tokens[begin:end], targets[last]), start))
    return passages
