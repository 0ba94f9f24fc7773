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
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.utils import set_model_to_sequence_parallel
from torch import Tensor

from megatron_opd.model import Stage
from megatron_opd.parallel import Parallel
from megatron_opd.rollout.requests import Request, answered, make_requests
from megatron_opd.rollout.sampling import Sampling, draw, most_likely, uniform
from megatron_opd.types import Prompt, Rollout


class MegatronEngine:
    """Generate with `model` itself over its tensor- and pipeline-parallel ranks.

    Every rank of a replica calls `generate` with the same prompts and gets the same rollouts; where
    the training forward shares sequences out (cp), its copies of the model share requests out. A
    request's randomness is its own (see `sampling`), so batching does not change its tokens beyond
    the rounding of the matrix products.
    """

    def __init__(self, model: Stage, parallel: Parallel, *, vocab_size: int, batch_size: int):
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
        """Return `n` rollouts per prompt in prompt order; `seed` names the draw (run, step).

        Collective over all replicas where they compute each other's experts.
        """
        requests, cp = make_requests(prompts, n, seed), self.parallel.cp
        with self._inference_mode():
            mine = self._write(requests[self.parallel.cp_rank :: cp], sampling)
        if cp == 1:
            return mine
        parts: list[Any] = [None] * cp
        dist.all_gather_object(parts, mine, group=self.parallel.cp_group)
        return [parts[i % cp][i // cp] for i in range(len(requests))]

    @contextmanager
    def _inference_mode(self) -> Iterator[None]:
        """Lend the training model: eval mode, and whole sequences on every rank."""
        training, sharded = self.model.training, self.model.config.sequence_parallel
        rotary = [m for m in self.model.modules() if isinstance(m, RotaryEmbedding)]
        groups = [module.cp_group for module in rotary]
        self.model.eval()
        for module in rotary:
            module.cp_group = None
        for chunk in self.model:
            set_model_to_sequence_parallel(chunk, False)
        try:
            yield
        finally:
            for chunk in self.model:
                set_model_to_sequence_parallel(chunk, sharded)
            for module, group in zip(rotary, groups, strict=True):
                module.cp_group = group
            self.model.train(training)

    def _write(self, requests: list[Request], sampling: Sampling) -> list[Rollout]:
        """Write all responses of one copy of the model, batch by batch."""
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt.token_ids))
        done: dict[int, Rollout] = {}
        for start in range(0, self._most(len(order)), self.batch_size):
            batch = order[start : start + self.batch_size]
            rollouts = self._decode([requests[i] for i in batch], sampling)
            done.update(zip(batch, rollouts, strict=True))
        return [done[i] for i in range(len(requests))]

    def _decode(self, requests: list[Request], sampling: Sampling) -> list[Rollout]:
        """Write all responses of one batch; of none, stand by while others write theirs."""
        batch = _Batch(requests, sampling, self.parallel.device) if requests else None
        while self._most(batch is not None and not batch.done):
            for _ in range(self.check_every):
                if batch is not None and not batch.done:
                    logits_BV = self._next_logits(batch.next_tokens(), batch.context)
                    batch.write(*self._draw(logits_BV, batch))
                elif self.parallel.shares_experts:
                    self._stand_by()
            if batch is not None:
                batch.retire()
        return batch.rollouts() if batch is not None else []

    def _most(self, number: int) -> int:
        """Return the largest number of all copies that must run in step; else this one's."""
        if not self.parallel.shares_experts:
            return number
        found = torch.tensor(number, device=self.parallel.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def _stand_by(self) -> None:
        """Run forward over nothing of interest: this rank's experts are wanted by others."""
        nothing_BP = torch.zeros((1, 1), dtype=torch.long, device=self.parallel.device)
        self._next_logits(nothing_BP, StaticInferenceContext(1, 1))

    def _next_logits(self, token_BP: Tensor, context: StaticInferenceContext) -> Tensor | None:
        """Feed tokens; return the next token's logits on the last stage's first rank."""
        fed, count = context.sequence_len_offset, token_BP.size(1)
        position_BP = torch.arange(fed, fed + count, device=token_BP.device).expand_as(token_BP)
        hidden_PBH = None
        for chunk in self.model.chunks:
            if not chunk.pre_process:
                chunk.set_input_tensor(self._receive(token_BP))
            hidden_PBH = chunk(
                token_BP,
                position_BP,
                None,
                inference_context=context,
                runtime_gather_output=True,
            )
            if not chunk.post_process:
                hidden_PBH = hidden_PBH.contiguous()
                dist.send(hidden_PBH, self._stage(+1), group=self.parallel.pp_group)
        context.sequence_len_offset += count
        context.enable_decode_mode()
        assert hidden_PBH is not None
        return self._gather(hidden_PBH[-1]) if self.parallel.is_last_stage else None

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
        """Return a neighbour in the pipeline: the last stage's chunks go on at the first."""
        stage = (self.parallel.pp_rank + offset) % self.parallel.pp
        return dist.get_global_rank(self.parallel.pp_group, stage)

    def _gather(self, hidden_BH: Tensor) -> Tensor | None:
        """Multiply by the vocabulary shards and join them on the stage's first rank."""
        head = self.model.head(self.vocab_size)
        logits_BV = hidden_BH @ head.weight_VH.T
        if self.parallel.tp > 1:
            first = self.parallel.tp_rank == 0
            shards = [torch.empty_like(logits_BV) for _ in range(self.parallel.tp)]
            root, group = self.parallel.copy_head_rank, self.parallel.tp_group
            dist.gather(logits_BV, shards if first else None, root, group=group)
            if not first:
                return None
            logits_BV = torch.cat(shards, dim=-1)
        return logits_BV[:, : self.vocab_size]

    def _draw(self, logits_BV: Tensor | None, batch: "_Batch") -> tuple[Tensor, Tensor]:
        """Draw on one rank and tell the others: they must never disagree on a token.

        Returns ids and log-probabilities, [B, 1 + K]: of the token drawn, of the most likely ones.
        They travel together: float64 holds them all.
        """
        B, K = len(batch.rows), batch.sampling.top_ids
        told = torch.zeros((2, B, 1 + K), dtype=torch.float64, device=batch.device)
        if logits_BV is not None:
            u_B = uniform(batch.seed_B[batch.rows], batch.position)
            id_B, logp_BV = draw(logits_BV, u_B, batch.sampling)
            ids_BK = torch.cat([id_B[:, None], most_likely(logits_BV, K)], dim=-1)
            told[0], told[1] = ids_BK, logp_BV.gather(1, ids_BK)
        if self.parallel.tp * self.parallel.pp > 1:
            dist.broadcast(told, self.parallel.copy_head_rank, group=self.parallel.copy_group)
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
        self.context = StaticInferenceContext(B, L)
        self.position = self.shortest  # of the next token
        self.done = False

    def next_tokens(self) -> Tensor:
        """Return what comes between the cache and the next token."""
        return self.token_BL[self.rows, self.context.sequence_len_offset : self.position]

    def write(self, ids_bK: Tensor, logp_bK: Tensor) -> None:
        """Put the drawn tokens into the rows that are past their prompt and alive."""
        rows, id_b, position = self.rows, ids_bK[:, 0], self.position
        writes_b = (position >= self.prompt_B[rows]) & (position < self.end_B[rows])
        kept_b = self.token_BL[rows, position]
        self.token_BL[rows, position] = torch.where(writes_b, id_b, kept_b)
        # what is not of a response is never looked at
        self.ids_BLK[rows, position] = ids_bK.int()
        self.logp_BLK[rows, position] = logp_bK
        stops_b = writes_b & torch.isin(id_b, self.stop_S)
        self.stopped_B[rows] |= stops_b
        self.end_B[rows] = torch.where(stops_b, position + 1, self.end_B[rows])
        self.position += 1
        self.done = self.position == self.length

    def retire(self) -> None:
        """Look whether all are done; drop finished rows from the cache once they are half of it."""
        alive_b = self.end_B[self.rows] > self.position
        alive = int(alive_b.sum())
        if 0 < alive <= len(self.rows) // 2:
            keep = alive_b.nonzero()[:, 0]
            self.rows = self.rows[keep]
            cache = self.context.key_value_memory_dict
            for layer, (key, value) in cache.items():
                cache[layer] = (key[:, keep].contiguous(), value[:, keep].contiguous())
            self.context.max_batch_size = alive
        self.done = alive == 0

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
