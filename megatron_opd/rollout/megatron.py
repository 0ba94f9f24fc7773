"""The embedded engine: the training model writes its own responses, with a KV cache.

Requests are sorted by prompt length and decoded in batches. A batch shares one cache position:
the shortest prompt is prefilled for all, and longer prompts go on reading their own tokens where
shorter ones already sample. No padding, no attention mask, and every position is the one that the
training forward will see.

Shape suffixes: B requests of a batch · P tokens fed at once · L cache length · H hidden · V vocab ·
K most likely ids that are asked for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.utils import set_model_to_sequence_parallel
from torch import Tensor

from megatron_opd.parallel import Parallel
from megatron_opd.rollout.requests import Request, answered, make_requests
from megatron_opd.rollout.sampling import Sampling, draw, most_likely, uniform
from megatron_opd.types import Prompt, Rollout


class MegatronEngine:
    """Generate with `model` itself over its tensor- and pipeline-parallel ranks.

    Every rank of a replica calls `generate` with the same prompts and gets the same rollouts. A
    request's randomness is its own (see `sampling`), so batching does not change its tokens beyond
    the rounding of the matrix products.
    """

    def __init__(self, model: Any, parallel: Parallel, *, vocab_size: int, batch_size: int):
        self.model, self.parallel = model, parallel
        self.vocab_size, self.batch_size = vocab_size, batch_size
        # each look at "has everyone stopped?" waits for the GPU; on a CPU it is free
        self.check_every = 1 if parallel.device.type == "cpu" else 16

    def sync(self) -> None:
        """Do nothing: the engine's weights are the student's."""

    def close(self) -> None:
        """Do nothing: the student is the job's."""

    @torch.no_grad()
    def generate(
        self, prompts: list[Prompt], *, n: int, sampling: Sampling, seed: int
    ) -> list[Rollout]:
        """Return `n` rollouts per prompt in prompt order; `seed` names the draw (run, step)."""
        requests = make_requests(prompts, n, seed)
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt.token_ids))
        done: dict[int, Rollout] = {}
        with self._inference_mode():
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                rollouts = self._decode([requests[i] for i in batch], sampling)
                done.update(zip(batch, rollouts, strict=True))
        return [done[i] for i in range(len(requests))]

    @contextmanager
    def _inference_mode(self) -> Iterator[None]:
        """Lend the training model: eval mode, and no sequence parallelism for one-token inputs."""
        training, sharded = self.model.training, self.model.config.sequence_parallel
        self.model.eval()
        set_model_to_sequence_parallel(self.model[0], False)
        try:
            yield
        finally:
            set_model_to_sequence_parallel(self.model[0], sharded)
            self.model.train(training)

    def _decode(self, requests: list[Request], sampling: Sampling) -> list[Rollout]:
        """Write all responses of one batch."""
        batch = _Batch(requests, sampling, self.parallel.device)
        context = StaticInferenceContext(len(requests), batch.length)
        fed = 0
        for position in range(batch.shortest, batch.length):
            token_BP = batch.token_BL[:, fed:position]
            logits_BV = self._next_logits(token_BP[batch.rows], fed, context)
            fed = position
            batch.write(position, *self._draw(logits_BV, batch, position))
            if position % self.check_every == 0 and batch.retire(context):
                break
        return batch.rollouts()

    def _next_logits(
        self, token_BP: Tensor, fed: int, context: StaticInferenceContext
    ) -> Tensor | None:
        """Feed tokens; return the next token's logits on the last stage's first rank."""
        position_BP = torch.arange(fed, fed + token_BP.size(1), device=token_BP.device)
        if not self.parallel.is_first_stage:
            self.model[0].set_input_tensor(self._receive(token_BP))
        hidden_PBH = self.model[0](
            token_BP,
            position_BP.expand_as(token_BP),
            None,
            inference_context=context,
            runtime_gather_output=True,
        )
        context.sequence_len_offset += token_BP.size(1)
        context.enable_decode_mode()
        if self.parallel.is_last_stage:
            return self._gather(hidden_PBH[-1])
        dist.send(hidden_PBH.contiguous(), self._stage(+1), group=self.parallel.pp_group)
        return None

    def _receive(self, token_BP: Tensor) -> Tensor:
        config = self.model.config
        hidden_PBH = torch.empty(
            (token_BP.size(1), token_BP.size(0), config.hidden_size),
            dtype=config.params_dtype,
            device=token_BP.device,
        )
        dist.recv(hidden_PBH, self._stage(-1), group=self.parallel.pp_group)
        return hidden_PBH

    def _stage(self, offset: int) -> int:
        return dist.get_global_rank(self.parallel.pp_group, self.parallel.pp_rank + offset)

    def _gather(self, hidden_BH: Tensor) -> Tensor | None:
        """Multiply by the vocabulary shards and join them on the stage's first rank."""
        head = self.model.head(self.vocab_size)
        logits_BV = hidden_BH @ head.weight_VH.T
        if self.parallel.tp > 1:
            first = self.parallel.tp_rank == 0
            shards = [torch.empty_like(logits_BV) for _ in range(self.parallel.tp)]
            root, group = self.parallel.head_rank, self.parallel.tp_group
            dist.gather(logits_BV, shards if first else None, root, group=group)
            if not first:
                return None
            logits_BV = torch.cat(shards, dim=-1)
        return logits_BV[:, : self.vocab_size]

    def _draw(
        self, logits_BV: Tensor | None, batch: "_Batch", position: int
    ) -> tuple[Tensor, Tensor]:
        """Draw on one rank and tell the replica: ranks must never disagree on a token.

        Returns ids and log-probabilities, [B, 1 + K]: of the token drawn, of the most likely ones.
        They travel together: float64 holds them all.
        """
        B, K = len(batch.rows), batch.sampling.top_ids
        told = torch.zeros((2, B, 1 + K), dtype=torch.float64, device=batch.device)
        if logits_BV is not None:
            u_B = uniform(batch.seed_B[batch.rows], position)
            id_B, logp_BV = draw(logits_BV, u_B, batch.sampling)
            ids_BK = torch.cat([id_B[:, None], most_likely(logits_BV, K)], dim=-1)
            told[0], told[1] = ids_BK, logp_BV.gather(1, ids_BK)
        if self.parallel.tp * self.parallel.pp > 1:
            dist.broadcast(told, self.parallel.head_rank, group=self.parallel.replica_group)
        return told[0].long(), told[1].float()


class _Batch:
    """The state of requests that are decoded together. `rows` are those still in the cache."""

    def __init__(self, requests: list[Request], sampling: Sampling, device: torch.device):
        self.requests, self.sampling, self.device = requests, sampling, device
        lengths = [len(request.prompt.token_ids) for request in requests]
        self.shortest, self.length = min(lengths), max(lengths) + sampling.max_tokens
        B, L = len(requests), self.length
        token_BL = torch.zeros((B, L), dtype=torch.long)
        for row, request in enumerate(requests):
            token_BL[row, : lengths[row]] = torch.tensor(request.prompt.token_ids)
        self.token_BL = token_BL.to(device)
        K = 1 + sampling.top_ids  # the token that was drawn, and the most likely ones
        self.ids_BLK = torch.zeros((B, L, K), dtype=torch.int32, device=device)
        self.logp_BLK = torch.zeros((B, L, K), device=device)
        self.prompt_B = torch.tensor(lengths, device=device)
        self.end_B = self.prompt_B + sampling.max_tokens  # moves forward when a stop id is drawn
        self.stopped_B = torch.zeros(B, dtype=torch.bool, device=device)
        self.seed_B = torch.tensor([request.seed for request in requests], device=device)
        self.stop_S = torch.tensor(sampling.stop_ids, dtype=torch.long, device=device)
        self.rows = torch.arange(B, device=device)

    def write(self, position: int, ids_bK: Tensor, logp_bK: Tensor) -> None:
        """Put the drawn tokens at `position` of the rows that are past their prompt and alive."""
        rows, id_b = self.rows, ids_bK[:, 0]
        writes_b = (position >= self.prompt_B[rows]) & (position < self.end_B[rows])
        kept_b = self.token_BL[rows, position]
        self.token_BL[rows, position] = torch.where(writes_b, id_b, kept_b)
        # what is not of a response is never looked at
        self.ids_BLK[rows, position] = ids_bK.int()
        self.logp_BLK[rows, position] = logp_bK
        stops_b = writes_b & torch.isin(id_b, self.stop_S)
        self.stopped_B[rows] |= stops_b
        self.end_B[rows] = torch.where(stops_b, position + 1, self.end_B[rows])
        self.position = position

    def retire(self, context: StaticInferenceContext) -> bool:
        """Say whether all are done; drop finished rows from the cache once they are half of it."""
        alive_b = self.end_B[self.rows] > self.position + 1
        alive = int(alive_b.sum())
        if 0 < alive <= len(self.rows) // 2:
            keep = alive_b.nonzero()[:, 0]
            self.rows = self.rows[keep]
            cache = context.key_value_memory_dict
            for layer, (key, value) in cache.items():
                cache[layer] = (key[:, keep].contiguous(), value[:, keep].contiguous())
            context.max_batch_size = alive
        return alive == 0

    def rollouts(self) -> list[Rollout]:
        """Cut each row to its response."""
        ids_BLK, logp_BLK = self.ids_BLK.cpu().numpy(), self.logp_BLK.cpu().numpy()
        starts, ends, stopped = (x.tolist() for x in (self.prompt_B, self.end_B, self.stopped_B))
        return [
            answered(
                request,
                ids_BLK[row, starts[row] : ends[row]],
                logp_BLK[row, starts[row] : ends[row]],
                "stop" if stopped[row] else "length",
            )
            for row, request in enumerate(self.requests)
        ]
