"""Objective = support × divergence: Σ_t w_t · D(student ‖ teacher; support)_t, and its gradient.

Shape suffixes: N supervised tokens · C tokens of a chunk · V this rank's columns · H hidden size ·
K support size · M models (0 the student, 1 the teacher).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_opd.loss import dynamics
from megatron_opd.loss.dynamics import Tally
from megatron_opd.loss.fused import HeadGradient, Model, Terms, chunk_logits, wide
from megatron_opd.loss.shard import VocabShard
from megatron_opd.types import Head, HiddenScores, Microbatch

# Divergences. s = log p and t = log q are log-probabilities of student and teacher; returned are
# what D is the sum of, and c: the gradient of D is Σ c·∇log p (see fused.Terms). c is given up to
# a multiple of p, which −p·Σc takes away again.


def reverse_kl(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p‖q) = Σ p·d with d = log p − log q; c = p·d."""
    c = s.exp().mul_(s - t)
    return c, c


def sampled_reverse_kl(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p‖q) from one draw y ~ p: d(y); c = −A with the advantage A = log q(y) − log p(y)."""
    return s - t, s - t


def cross_entropy(s: Tensor) -> tuple[Tensor, Tensor]:
    """−log p(y) of a given token, without a teacher; c = −1."""
    return -s, -torch.ones_like(s)


OVER_A_SET: dict[str, Callable] = {"reverse_kl": reverse_kl}
OF_ONE_DRAW: dict[str, Callable] = {
    "reverse_kl": sampled_reverse_kl,
    "cross_entropy": cross_entropy,
}

# Supports. Each turns a divergence into the terms of C tokens.


def sampled(divergence: str, shard: VocabShard, sight: dynamics.Sight, target_C: Tensor) -> Terms:
    """S = {y}, the response's token."""
    value_C, c_C = OF_ONE_DRAW[divergence](*sight.target_MC)
    return Terms(value_C, c_C.unsqueeze(-1), target_C.unsqueeze(-1), mass_C=c_C)


def student_topk(
    divergence: str, shard: VocabShard, sight: dynamics.Sight, target_C: Tensor
) -> Terms:
    """S = the student's top k, both models renormalised on it (Eq. 5).

    log p̄ = log p − log p(S) turns c into c − p̄·Σc, whose sum is zero: for KL(p̄‖q̄), p̄·(d − Σp̄d).
    """
    s_CK, t_CK = sight.logp_MMCK[:, 0].log_softmax(-1)
    value_CK, c_CK = OVER_A_SET[divergence](s_CK, t_CK)
    centred_CK = c_CK - s_CK.exp() * c_CK.sum(-1, keepdim=True)
    return Terms(value_CK.sum(-1), centred_CK, sight.top_MCK[0])


def full(divergence: str, shard: VocabShard, sight: dynamics.Sight, target_C: Tensor) -> Terms:
    """S = the vocabulary, every rank its own columns."""
    value_CV, c_CV = OVER_A_SET[divergence](*shard.logp_MCV)
    value_C, mass_C = shard.sum(value_CV.sum(-1), c_CV.sum(-1))
    return Terms(value_C, c_CV, mass_C=mass_C)


SUPPORTS: dict[str, tuple[Callable[..., Terms], dict[str, Callable]]] = {
    "sampled": (sampled, OF_ONE_DRAW),
    "student_topk": (student_topk, OVER_A_SET),
    "full": (full, OVER_A_SET),
}


class Loss(NamedTuple):
    """What a microbatch contributes to the step. Everything stays on the device."""

    loss: Tensor  # Σ w_t·D_t, carrying the gradient
    sums: dict[str, Tensor]  # Σ w_t·m_t by metric, and tokens = Σ w_t; fp32, detached
    maxima: dict[str, Tensor]  # by metric, over tokens with w_t ≠ 0; fp32, detached


@dataclass(frozen=True)
class Objective:
    """L = Σ_t w_t·D_t over supervised tokens, its exact gradient, and the distillation metrics.

    A sum: the number of tokens of the global step divides it later. Logits are divided by their
    temperature T; the gradient has its 1/T, the loss is not multiplied by T².

    Raises:
        ValueError: a combination that does not exist, or that cannot learn anything.
    """

    support: Literal["sampled", "student_topk", "full"] = "student_topk"
    divergence: Literal["reverse_kl", "cross_entropy"] = "reverse_kl"
    k: int = 16  # of the student_topk support, and of every metric over top-k sets
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0
    rollout_temperature: float | None = 1.0  # None: no engine drew the responses
    chunk_tokens: int = 1024  # tokens whose logits exist at the same time

    def __post_init__(self):
        if self.support not in SUPPORTS:
            raise ValueError(
                f"objective.support: got {self.support!r}, expected one of {', '.join(SUPPORTS)}"
            )
        divergences = SUPPORTS[self.support][1]
        if self.divergence not in divergences:
            raise ValueError(
                f"objective.divergence: got {self.divergence!r} with support={self.support}, "
                f"expected one of {', '.join(divergences)}; change either"
            )
        if self.support == "student_topk" and self.k == 1:
            raise ValueError(
                "objective.k: got 1, expected 2 or more: renormalised over one entry both models "
                "give it probability 1 and the gradient is zero; for one token a position set "
                "support=sampled"
            )
        for name in ("k", "chunk_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"objective.{name}: got {getattr(self, name)}, expected 1 or more")
        for name in ("student_temperature", "teacher_temperature", "rollout_temperature"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"objective.{name}: got {value}, expected more than 0")

    @property
    def needs_teacher(self) -> bool:
        return self.divergence != "cross_entropy"

    @property
    def mean_metrics(self) -> tuple[str, ...]:
        """Names in `Loss.sums` besides "tokens", by which they are to be divided."""
        policy = () if self.rollout_temperature is None else dynamics.POLICY
        teacher = dynamics.TEACHER if self.needs_teacher else ()
        return ("loss/objective", *dynamics.STUDENT, *policy, *teacher)

    @property
    def max_metrics(self) -> tuple[str, ...]:
        """Names in `Loss.maxima`."""
        return () if self.rollout_temperature is None else ("policy/mismatch_max",)

    def __call__(
        self,
        hidden_NH: Tensor,
        head: Head,
        batch: Microbatch,
        teacher: HiddenScores | None = None,
    ) -> Loss:
        """Judge the student's hidden states at the supervised tokens, [N, H].

        Called by every rank of `head.group` with the same tokens. The gradient is complete for
        `head.weight_VH`; for `hidden_NH` it is this rank's share, from its rows of the vocabulary,
        and the caller enters the head through a mapping whose backward sums the shares.

        Raises:
            ValueError: no teacher where one is needed, or one where none is; k > vocabulary.
        """
        self._check(head, hidden_NH, teacher)
        models = [Model(hidden_NH.detach(), head.weight_VH.detach(), self.student_temperature)]
        if teacher is not None:
            hidden, weight = teacher.hidden_NH.detach(), teacher.head.weight_VH.detach()
            models.append(Model(hidden, weight, self.teacher_temperature))
        trains = torch.is_grad_enabled() and (
            hidden_NH.requires_grad or head.weight_VH.requires_grad
        )
        tally = Tally(self.mean_metrics, self.max_metrics, hidden_NH)
        gradient = HeadGradient(models[0]) if trains else None
        with torch.no_grad():
            for start in range(0, len(hidden_NH), self.chunk_tokens):
                rows = slice(start, start + self.chunk_tokens)
                weight_C = batch.weight_N[rows].to(wide(hidden_NH))
                shard = VocabShard(chunk_logits(models, rows), head.vocab_size, head.group)
                terms, means, maxima = self._judge(
                    shard, batch.target_N[rows], batch.rollout_logp_N[rows]
                )
                tally.add(weight_C, means, maxima)
                if gradient:
                    gradient.add(rows, terms, shard, weight_C)
                del shard, terms  # their logits go before the next chunk's come
        loss = tally.sums["loss/objective"].clone()
        return Loss(
            gradient.attach(loss, hidden_NH, head.weight_VH) if gradient else loss,
            tally.sums,
            tally.maxima,
        )

    def _judge(
        self, shard: VocabShard, target_C: Tensor, rollout_logp_C: Tensor
    ) -> tuple[Terms, dict[str, Tensor], dict[str, Tensor]]:
        """Return what the loss is made of and every metric of C tokens."""
        sight = dynamics.look(shard, target_C, self.k)
        measure = dynamics.distill if self.needs_teacher else dynamics.student
        means, maxima = measure(shard, sight), {}
        if self.rollout_temperature is not None:
            ratio = self.student_temperature / self.rollout_temperature
            delta_C = dynamics.log_ratio(shard, sight, rollout_logp_C, ratio)
            means["policy/mismatch_kl"] = dynamics.mismatch_kl(delta_C)
            maxima["policy/mismatch_max"] = delta_C.abs()
        # last, because the terms of the whole vocabulary are as large as the logits
        terms = SUPPORTS[self.support][0](self.divergence, shard, sight, target_C)
        means["loss/objective"] = terms.value_C
        return terms, means, maxima

    def _check(self, head: Head, hidden_NH: Tensor, teacher: HiddenScores | None) -> None:
        if (teacher is not None) != self.needs_teacher:
            raise ValueError(
                f"teacher: got {'one' if teacher else 'none'}, but objective.divergence="
                f"{self.divergence} {'needs one' if self.needs_teacher else 'uses none'}"
            )
        if teacher is None:
            return
        if self.k > head.vocab_size:
            raise ValueError(
                f"objective.k: got {self.k}, expected at most the vocabulary's {head.vocab_size}"
            )
        rows, teacher_rows = len(head.weight_VH), len(teacher.head.weight_VH)
        assert rows == teacher_rows, f"student has {rows} head rows here, teacher {teacher_rows}"
        assert head.vocab_size == teacher.head.vocab_size
        assert len(hidden_NH) == len(teacher.hidden_NH)
