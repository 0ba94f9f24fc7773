"""The engine on another process's vLLM: weights go through shared memory, tokens over HTTP.

The server is whole, and not the trainer's: it may have other GPUs, and it writes responses while
the student trains (`submit` … `collect`).
"""

import secrets
from concurrent.futures import Future
from dataclasses import dataclass

from megatron_opd.model import export_hf
from megatron_opd.model.gpt import Stage
from megatron_opd.model.hf_map import manifest
from megatron_opd.model.weights import exported
from megatron_opd.parallel import Parallel
from megatron_opd.rollout.requests import Request, buckets, make_requests
from megatron_opd.rollout.sampling import Sampling
from megatron_opd.rollout.server import Server, ask_once
from megatron_opd.rollout.wire import Answer
from megatron_opd.types import Prompt, Rollout


@dataclass(frozen=True)
class Pending:
    """Responses that are being written, with the weights of this version."""

    requests: list[Request]
    version: int
    answers: Future[list[Answer]] | None  # None on the ranks that do not ask


class ServerEngine:
    """Generate with a vLLM server that is given the student's weights.

    Every rank calls every method. The first rank of each replica asks for the replica's responses;
    rank 0 sends the weights. Ids at or above `vocab_size` do not exist for the server's model.

    Raises:
        ValueError: of every method, on every rank: the server fails, or answers wrongly.
    """

    def __init__(
        self,
        model: Stage,
        parallel: Parallel,
        server: Server,
        *,
        vocab_size: int,
        bucket_bytes: int = 2**28,
    ):
        self.model, self.parallel, self.server = model, parallel, server
        self.vocab_size, self.bucket_bytes = vocab_size, bucket_bytes
        # versions of another run, or of this one before it was resumed, are other weights
        self.run, self.version = parallel.owner(lambda: secrets.token_hex(4)), 0
        self.pending = 0

    def sync(self) -> None:
        """Send the student's weights; the server writes nothing until it has them all."""
        assert not self.pending, "responses that nobody collected would be thrown away"
        self.version += 1
        shapes = manifest(exported(self.model, self.vocab_size))
        # collective: beyond this line no replica waits for responses
        self.parallel.main_only(lambda: self.server.check_weights(shapes))
        problem = self._send() if self.parallel.exports else None

        def tell() -> None:
            if problem is not None:
                raise problem

        self.parallel.main_only(tell)

    def _send(self) -> OSError | None:
        """Export over the ranks that it takes, and return what went wrong on rank 0.

        The other ranks wait in the export, so it is seen through even after an error.
        """
        problem = None
        stream = export_hf(self.model, self.parallel, vocab_size=self.vocab_size)
        if self.parallel.is_main:
            try:
                self.server.update(buckets(stream, self.bucket_bytes), self._name(self.version))
            except OSError as error:
                problem = error
        for _ in stream:
            pass
        return problem

    def _name(self, version: int) -> str:
        return f"{self.run}.{version}"

    def generate(
        self, prompts: list[Prompt], *, n: int, sampling: Sampling, seed: int
    ) -> list[Rollout]:
        """Return `n` rollouts per prompt in prompt order; `seed` names the draw (run, step)."""
        return self.collect(self.submit(prompts, n=n, sampling=sampling, seed=seed))

    def submit(self, prompts: list[Prompt], *, n: int, sampling: Sampling, seed: int) -> Pending:
        """Ask for what `generate` returns, and do not wait for it."""
        if sampling.top_ids and (sampling.top_p < 1 or 0 < sampling.top_k < sampling.top_ids):
            raise ValueError(
                f"rollout.top_p={sampling.top_p:g}, rollout.top_k={sampling.top_k}: vLLM cannot "
                f"tell the {sampling.top_ids} most likely ids of a distribution that it truncates; "
                "set top_p=1 and top_k=0, or another objective.support"
            )
        requests, answers = make_requests(prompts, n, seed), None
        if self.parallel.is_replica_first:
            answers = self.server.generate(
                requests, sampling, vocab_size=self.vocab_size, version=self._name(self.version)
            )
        self.pending += 1
        return Pending(requests, self.version, answers)

    def collect(self, pending: Pending) -> list[Rollout]:
        """Wait for the responses, and return them on every rank of the replica."""

        def wait() -> list[Answer]:
            assert pending.answers is not None
            return pending.answers.result()

        self.pending -= 1
        answers = ask_once(self.parallel, wait)
        return [
            Rollout(
                prompt=request.prompt,
                sample=request.sample,
                response_ids=answer.token_ids,
                logp=answer.logp,
                finish=answer.finish,
                top_ids=answer.top_ids_TK,
                top_logp=answer.top_logp_TK,
                version=pending.version,
            )
            for request, answer in zip(pending.requests, answers, strict=True)
        ]

    def close(self) -> None:
        """Forget what was asked."""
        self.server.close()
