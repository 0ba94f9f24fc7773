"""What can be said of each token: by the rollout, and by both models over the whole vocabulary.

Everything is computed at the first look and kept as long as the view: who looks pays. What sums
over the vocabulary is a collective, so all ranks of a group must look at the same things.

Shape suffixes: N tokens of the view · V this rank's columns · K = k.
"""

from functools import cached_property

import torch
from torch import Tensor

from megatron_opd.loss.shard import Ranks, VocabShard, wide
from megatron_opd.loss.supports import among
from megatron_opd.types import Microbatch, SampledScores, TopKScores


class View:
    """N supervised tokens of a microbatch. Logarithms are natural, at the loss's temperatures.

    `teacher` is its shard, or `given` what it sent instead; both None without a teacher.
    """

    def __init__(
        self,
        batch: Microbatch,
        rows: slice | Tensor,
        student: VocabShard,
        teacher: VocabShard | None,
        ranks: Ranks,
        *,
        k: int,
        rollout_ratio: float | None = 1.0,
        given: TopKScores | SampledScores | None = None,
    ):
        self.student, self.teacher, self.ranks, self.k = student, teacher, ranks, k
        self.rollout_ratio = rollout_ratio  # student's temperature / the rollout's
        self.rows, self.given = rows, given
        self.target_N, self.mask_N = batch.target_N[rows], batch.mask_N[rows]
        self.position_N, self.sequence_N = batch.position_N[rows], batch.sequence_N[rows]
        self.rollout_logp_N = batch.rollout_logp_N[rows]
        self._batch = batch

    @cached_property
    def drawn_N(self) -> Tensor:
        """1 where the engine drew the token."""
        drawn_N = self._batch.drawn_N
        return torch.ones_like(self.mask_N) if drawn_N is None else drawn_N[self.rows]

    @property
    def drawn_mask_N(self) -> Tensor:
        """1 where a supervised token was drawn by the engine."""
        return self.mask_N * self.drawn_N

    @property
    def reward_N(self) -> Tensor:
        """What the token's response is worth."""
        assert self._batch.reward_N is not None, "nobody scored the responses"
        return self._batch.reward_N[self.rows]

    @property
    def advantage_N(self) -> Tensor:
        """How much more than the others of its prompt; or the token's own, by group_normalize."""
        assert self._batch.advantage_N is not None, "nobody scored the responses"
        return self._batch.advantage_N[self.rows]

    @property
    def models(self) -> tuple[VocabShard, ...]:
        """Return the shards there are: the student's, the teacher's."""
        return (self.student,) if self.teacher is None else (self.student, self.teacher)

    @cached_property
    def _logsumexp(self) -> list[Tensor]:
        return list(self.ranks.logsumexp(torch.stack([m.logsumexp() for m in self.models])))

    @cached_property
    def _target_logp(self) -> list[Tensor]:
        lse = self._logsumexp  # first: it makes the dense logits that `at` then reads
        z = torch.stack([m.at(self.target_N[:, None])[:, 0] for m in self.models])
        return [z_N - lse_N for z_N, lse_N in zip(self.ranks.logsumexp(z), lse, strict=True)]

    @property
    def student_logp_N(self) -> Tensor:
        """log p(y)."""
        return self._target_logp[0]

    @property
    def teacher_logp_N(self) -> Tensor:
        """log q(y)."""
        if isinstance(self.given, SampledScores):
            return self.given.logp_N[self.rows].to(wide(self.student.hidden_CH))
        return self._target_logp[1]

    @cached_property
    def _entropies(self) -> list[Tensor]:
        def entropy(z_NV: Tensor, lse_N: Tensor) -> Tensor:
            logp_NV = z_NV - lse_N[:, None]
            return -(logp_NV.exp() * logp_NV).sum(-1)

        pairs = zip(self.models, self._logsumexp, strict=True)
        return list(self.ranks.sum(torch.stack([m.by_rows(entropy, m.z_CV, x) for m, x in pairs])))

    @property
    def student_entropy_N(self) -> Tensor:
        """−Σ p log p in nats."""
        return self._entropies[0]

    @property
    def teacher_entropy_N(self) -> Tensor:
        """−Σ q log q in nats."""
        return self._entropies[1]

    @property
    def aligned(self) -> bool:
        """Whether both models have the same columns on every rank: then they can be compared."""
        rows = {len(m.projector.head.weight_VH) for m in self.models}
        return self.ranks.size == 1 or len(rows) == 1

    @cached_property
    def _divergences(self) -> Tensor:
        def both(s_NV: Tensor, t_NV: Tensor, s_lse_N: Tensor, t_lse_N: Tensor) -> Tensor:
            s_NV, t_NV = s_NV - s_lse_N[:, None], t_NV - t_lse_N[:, None]
            d_NV = s_NV - t_NV
            reverse_N, forward_N = (s_NV.exp() * d_NV).sum(-1), -(t_NV.exp() * d_NV).sum(-1)
            return torch.stack([reverse_N, forward_N], dim=-1)

        assert self.teacher is not None
        z = self.student.z_CV, self.teacher.z_CV
        return self.ranks.sum(self.student.by_rows(both, *z, *self._logsumexp)).T

    @property
    def reverse_kl_N(self) -> Tensor:
        """KL(p‖q); wants aligned models."""
        return self._divergences[0]

    @property
    def forward_kl_N(self) -> Tensor:
        """KL(q‖p); wants aligned models."""
        return self._divergences[1]

    @cached_property
    def top_ids(self) -> list[Tensor]:
        """Each model's k most likely ids, best first, [N, K] each."""
        if isinstance(self.given, TopKScores):
            return [*self.ranks.top(self.student, k=self.k), self.given.ids_NK[self.rows]]
        return self.ranks.top(*self.models, k=self.k)

    @cached_property
    def on_top(self) -> Tensor:
        """[m, n]: model m's log-probabilities on model n's top k, [2, 2, N, K]."""
        ids_NL = torch.cat(self.top_ids, dim=-1)
        z = self.ranks.logsumexp(torch.stack([m.at(ids_NL) for m in self.models]))
        logp = z - torch.stack(self._logsumexp).unsqueeze(-1)
        return torch.stack(logp.split(self.k, dim=-1), dim=1)

    @property
    def shared_NK(self) -> Tensor:
        """Which of the student's top k are in the teacher's."""
        return among(*self.top_ids)

    @property
    def overlap_N(self) -> Tensor:
        """|S^p ∩ S^q| / k of the two top-k sets (Eq. 6)."""
        shared_NK = self.shared_NK
        return shared_NK.sum(-1, dtype=wide(self.student.hidden_CH)) / shared_NK.shape[-1]

    @cached_property
    def topk_kl_N(self) -> Tensor:
        """KL(p̄‖q̄), both renormalised on the student's top k (Eq. 5)."""
        s_NK, t_NK = self.on_top[:, 0].log_softmax(-1)
        return (s_NK.exp() * (s_NK - t_NK)).sum(-1)

    @property
    def topk_forward_kl_N(self) -> Tensor:
        """KL(q̄‖p̄) there."""
        s_NK, t_NK = self.on_top[:, 0].log_softmax(-1)
        return (t_NK.exp() * (t_NK - s_NK)).sum(-1)

    @cached_property
    def log_ratio_N(self) -> Tensor:
        """Δ = log π(y) − log μ(y): the student's word against the rollout engine's.

        π is the student at the rollout's temperature, which is its own divided by the ratio. The
        teacher is not asked: a correction alone must not multiply its head. A token that nobody
        drew has no μ to differ from: 0.
        """
        ratio = self.rollout_ratio
        assert ratio is not None, "nothing was drawn"
        lse_N = self.student.logsumexp(ratio)  # first: it makes the dense logits that `at` reads
        z_N = self.student.at(self.target_N[:, None])[:, 0] * ratio
        z_N, lse_N = self.ranks.logsumexp(torch.stack([z_N, lse_N]))
        return torch.where(self.drawn_N != 0, z_N - lse_N - self.rollout_logp_N, 0.0)
