"""What is measured in the pass that computes the loss: student, teacher, and how far apart.

Names are `group/name`; the equations are those of "Rethinking On-Policy Distillation" (2604.13016).
Everything is per token here, [C]; averages are taken over the global step.

Shape suffixes: M models (0 the student, 1 the teacher) · C tokens of a chunk · K = k.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_opd.loss.shard import VocabShard, local_entropy, wide

STUDENT = ("student/nll", "student/entropy")
POLICY = ("policy/mismatch_kl",)
TEACHER = (
    "teacher/nll",
    "teacher/entropy",
    "distill/entropy_gap",
    "distill/reverse_kl",
    "distill/support_kl",
    "distill/overlap_ratio",
    "distill/overlap_advantage",
    "distill/overlap_empty",
    "distill/overlap_mass_student",
    "distill/overlap_mass_teacher",
    "distill/top1_agreement",
)


@dataclass(frozen=True)
class Sight:
    """What every rank knows of both models on C tokens: a few log-probabilities out of V."""

    target_MC: Tensor  # of the response's token
    top_MCK: Tensor  # ids of each model's k most probable entries; K = 0 without a teacher
    logp_MMCK: Tensor  # [m, n]: model m's log-probabilities on model n's top k


def look(shard: VocabShard, target_C: Tensor, k: int) -> Sight:
    """Gather the log-probabilities of the targets and of both top-k sets (none with one model)."""
    models = len(shard.logp_MCV)
    top_MCK = shard.top(k) if models > 1 else target_C.new_empty(models, len(target_C), 0)
    ids_CL = torch.cat([target_C.unsqueeze(-1), *top_MCK], dim=-1)
    target_MC1, *on_top = shard.at(ids_CL).split([1, *[top_MCK.shape[-1]] * models], dim=-1)
    return Sight(target_MC1.squeeze(-1), top_MCK, torch.stack(on_top, dim=1))


def student(shard: VocabShard, sight: Sight) -> dict[str, Tensor]:
    """Measure a student that has no teacher."""
    return {"student/nll": -sight.target_MC[0], "student/entropy": shard.entropy()[0]}


def distill(shard: VocabShard, sight: Sight) -> dict[str, Tensor]:
    """Measure student and teacher: sums over the vocabulary, then Eqs. 5–10 on the top-k sets."""
    student_CV, teacher_CV = shard.logp_MCV
    local_kl_C = student_CV.exp().mul_(student_CV - teacher_CV).sum(-1)
    entropy_s, entropy_t, kl_C = shard.sum(*local_entropy(shard.logp_MCV), local_kl_C)
    return {
        "student/nll": -sight.target_MC[0],
        "student/entropy": entropy_s,
        "teacher/nll": -sight.target_MC[1],
        "teacher/entropy": entropy_t,
        "distill/entropy_gap": (entropy_s - entropy_t).abs(),  # Eq. 8
        "distill/reverse_kl": kl_C,
        **_on_support(sight),
    }


def _on_support(sight: Sight) -> dict[str, Tensor]:
    logp_CK, logq_CK = sight.logp_MMCK[:, 0]  # on the student's top k
    ids_CK, teacher_ids_CK = sight.top_MCK
    shared_CK = (ids_CK.unsqueeze(-1) == teacher_ids_CK.unsqueeze(-2)).any(-1)
    shared_C = shared_CK.sum(-1, dtype=logp_CK.dtype)
    d_CK = logp_CK.log_softmax(-1) - logq_CK.log_softmax(-1)
    return {
        "distill/support_kl": (logp_CK.softmax(-1) * d_CK).sum(-1),  # Eq. 5
        "distill/overlap_ratio": shared_C / ids_CK.shape[-1],  # Eq. 6
        "distill/overlap_advantage": _advantage(logp_CK, logq_CK, shared_CK),  # Eq. 7
        "distill/overlap_empty": (shared_C == 0).to(logp_CK.dtype),
        "distill/overlap_mass_student": torch.where(shared_CK, logp_CK.exp(), 0).sum(-1),  # Eq. 9
        "distill/overlap_mass_teacher": torch.where(shared_CK, logq_CK.exp(), 0).sum(-1),  # Eq. 10
        "distill/top1_agreement": (ids_CK[:, 0] == teacher_ids_CK[:, 0]).to(logp_CK.dtype),
    }


def _advantage(logp_CK: Tensor, logq_CK: Tensor, shared_CK: Tensor) -> Tensor:
    """Return Eq. 7, Σ_I p̄ (log q̄ − log p̄) / |I|, both renormalised on I; 0 where I is empty."""
    logp_CK, logq_CK = (
        x - x.masked_fill(~shared_CK, -torch.inf).logsumexp(-1, keepdim=True)
        for x in (logp_CK, logq_CK)
    )
    term_CK = torch.where(shared_CK, logp_CK.exp() * (logq_CK - logp_CK), 0)
    return term_CK.sum(-1) / shared_CK.sum(-1).clamp(min=1)


def log_ratio(shard: VocabShard, sight: Sight, rollout_logp_C: Tensor, ratio: float) -> Tensor:
    """Return Δ = log π(y) − log μ(y): the student's word against the rollout engine's, [C].

    π is the student at the rollout's temperature, which is its own divided by `ratio`.
    """
    logp_C = sight.target_MC[0]
    if ratio != 1.0:
        logp_C = logp_C * ratio - shard.logsumexp(shard.logp_MCV[0] * ratio)
    return logp_C - rollout_logp_C


def mismatch_kl(delta_C: Tensor) -> Tensor:
    """Return the k3 estimate of KL(μ‖π) from tokens drawn by μ, e^Δ − 1 − Δ ≥ 0."""
    return delta_C.expm1() - delta_C


class Tally:
    """Σ w_t·m_t and max m_t by name, added up chunk by chunk on the device."""

    def __init__(self, means: tuple[str, ...], maxima: tuple[str, ...], hidden_NH: Tensor):
        zero = hidden_NH.new_zeros((), dtype=wide(hidden_NH))
        self.sums = {name: zero.clone() for name in ("tokens", *means)}
        self.maxima = {name: zero.clone() for name in maxima}

    def add(self, weight_C: Tensor, means: dict[str, Tensor], maxima: dict[str, Tensor]) -> None:
        """Add C tokens; a token of weight 0 has no part in a maximum."""
        means = {"tokens": torch.ones_like(weight_C), **means}
        for name, total in self.sums.items():
            total += (weight_C * means[name]).sum()
        for name, highest in self.maxima.items():
            taking_part_C = torch.where(weight_C != 0, maxima[name], 0)
            torch.maximum(highest, taking_part_C.amax(), out=highest)
