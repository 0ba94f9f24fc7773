"""What is measured of student and teacher: how sure, and how far apart. Per token, [N].

Names are `group/name`; the equations are those of "Rethinking On-Policy Distillation" (2604.13016).
Shape suffixes: N tokens of a view · K = k · B buckets of positions.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_opd.loss.candidates import log_softmax
from megatron_opd.loss.supports import among
from megatron_opd.loss.view import View
from megatron_opd.loss.weights import inside
from megatron_opd.types import SampledScores


def student(view: View) -> dict[str, Tensor]:
    """Measure the student alone."""
    return {"student/nll": -view.student_logp_N, "student/entropy": view.student_entropy_N}


def teacher(view: View) -> dict[str, Tensor]:
    """Measure the teacher, and student and teacher over the vocabulary and on their top-k sets."""
    divergences = {}
    if view.aligned:
        divergences["distill/reverse_kl"] = view.reverse_kl_N
        divergences["distill/forward_kl"] = view.forward_kl_N
    return {
        "teacher/nll": -view.teacher_logp_N,
        "teacher/entropy": view.teacher_entropy_N,
        "distill/entropy_gap": (view.student_entropy_N - view.teacher_entropy_N).abs(),  # Eq. 8
        **divergences,
        "distill/support_kl": view.topk_kl_N,  # Eq. 5
        "distill/support_forward_kl": view.topk_forward_kl_N,
        **_of_ids(view),
        **_on_top(view),
    }


def given(view: View) -> dict[str, Tensor]:
    """Measure a teacher of which only the top k, or only the sampled token, is known."""
    if isinstance(view.given, SampledScores):
        return {"teacher/nll": -view.teacher_logp_N}
    return _of_ids(view)


def _of_ids(view: View) -> dict[str, Tensor]:
    """Measure what the two top-k sets say without their probabilities."""
    ids_NK, teacher_ids_NK = view.top_ids
    overlap_N = view.overlap_N
    return {
        "distill/overlap_ratio": overlap_N,  # Eq. 6
        "distill/top1_agreement": (ids_NK[:, 0] == teacher_ids_NK[:, 0]).to(overlap_N.dtype),
    }


def _on_top(view: View) -> dict[str, Tensor]:
    s_NK, t_NK = view.on_top[:, 0]  # on the student's top k
    shared_NK = view.shared_NK
    p_NK, q_NK = s_NK.exp(), t_NK.exp()
    return {
        "distill/overlap_advantage": _advantage(s_NK, t_NK, shared_NK),  # Eq. 7
        "distill/overlap_empty": (~shared_NK.any(-1)).to(s_NK.dtype),
        "distill/overlap_mass_student": torch.where(shared_NK, p_NK, 0).sum(-1),  # Eq. 9
        "distill/overlap_mass_teacher": torch.where(shared_NK, q_NK, 0).sum(-1),  # Eq. 10
        "distill/tail_mass_student": 1 - p_NK.sum(-1),
        "distill/tail_mass_teacher": 1 - q_NK.sum(-1),
        "distill/extreme_gap": _extreme_gap(s_NK, t_NK),
    }


def _advantage(s_NK: Tensor, t_NK: Tensor, shared_NK: Tensor) -> Tensor:
    """Return Eq. 7, Σ_I p̄ (log q̄ − log p̄) / |I|, both renormalised on I; 0 where I is empty."""
    s_NK, t_NK = (log_softmax(x_NK, shared_NK) for x_NK in (s_NK, t_NK))
    term_NK = torch.where(shared_NK, s_NK.exp() * (t_NK - s_NK), 0)
    return term_NK.sum(-1) / shared_NK.sum(-1).clamp(min=1)


def _extreme_gap(s_NK: Tensor, t_NK: Tensor) -> Tensor:
    """Return p − q at the one of the student's top k whose weighted advantage p̄·d is extreme."""
    advantage_NK = s_NK.softmax(-1) * (s_NK - t_NK)
    extreme_N1 = advantage_NK.abs().argmax(-1, keepdim=True)
    return (s_NK.exp() - t_NK.exp()).gather(-1, extreme_N1)[:, 0]


def parts(view: View) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Measure the parts of the two top-k sets as the authors' code does; yield (means, entries).

    A mean of a token counts as often as it has entries, [N]: rewards are of all entries alike, and
    what is said of the overlap is of the tokens that have one. The reward of an entry is
    r = p̄ (log q − log p), with p and q over the vocabulary and p̄ renormalised on the student's top
    k; on the union for what only the teacher has. (Eq. 7 renormalises all on the overlap.)
    """
    (s_NK, other_s_NK), (t_NK, other_t_NK) = view.on_top
    shared_NK, new_NK = view.shared_NK, ~among(*reversed(view.top_ids))
    new_s_NK = other_s_NK.masked_fill(~new_NK, -torch.inf)
    union_N = torch.logaddexp(s_NK.logsumexp(-1), new_s_NK.logsumexp(-1))
    reward_NK = s_NK.softmax(-1) * (t_NK - s_NK)
    other_reward_NK = (other_s_NK - union_N[:, None]).exp() * (other_t_NK - other_s_NK)
    for name, of_NK, part_NK in (
        ("overlap_reward", reward_NK, shared_NK),
        ("student_only_reward", reward_NK, ~shared_NK),
        ("teacher_only_reward", other_reward_NK, new_NK),
    ):
        entries_N = part_NK.sum(-1)
        mean_N = torch.where(part_NK, of_NK, 0).sum(-1) / entries_N.clamp(min=1)
        yield {f"distill/{name}": mean_N}, entries_N
    yield _of_overlap(torch.stack([reward_NK, s_NK.exp(), t_NK.exp()]), shared_NK)


def _of_overlap(seen_3NK: Tensor, shared_NK: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return its masses, and reward, p and q of its entries of highest and of lowest reward."""
    _, student_N, teacher_N = torch.where(shared_NK, seen_3NK, 0).sum(-1)
    means = {
        "distill/overlap_mass_student_nonempty": student_N,
        "distill/overlap_mass_teacher_nonempty": teacher_N,
    }
    for which, sign in (("max", 1), ("min", -1)):
        rank_NK = (sign * seen_3NK[0]).masked_fill(~shared_NK, -torch.inf)
        found_3N1 = seen_3NK.take_along_dim(rank_NK.argmax(-1)[None, :, None], dim=-1)
        names = (f"distill/{which}_reward{suffix}" for suffix in ("", "_p", "_q"))
        means |= zip(names, found_3N1[..., 0], strict=True)
    return means, shared_NK.any(-1)


def policy(view: View) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Measure trainer π against rollout engine μ by Δ = log π − log μ of the sampled tokens.

    The k3 estimate e^Δ − 1 − Δ of KL(μ‖π), and the largest |Δ|, in nats.
    """
    delta_N = view.log_ratio_N
    return {"policy/mismatch_kl": delta_N.expm1() - delta_N}, {"policy/mismatch_max": delta_N.abs()}


def correction(view: View, low: float, high: float) -> dict[str, Tensor]:
    """Measure where the correction acts: 1 where π/μ is outside of [low, high]."""
    outside_N = ~inside(view.log_ratio_N, low, high)
    return {"policy/corrected_fraction": outside_N.to(view.log_ratio_N.dtype)}


def topk_mismatch(view: View, rollout_ids_NK: Tensor) -> dict[str, Tensor]:
    """Measure which part of the engine's top k the trainer does not find in its own."""
    missing_NK = ~among(rollout_ids_NK[:, : view.k], view.top_ids[0])
    return {"policy/topk_mismatch": missing_NK.to(view.student_logp_N.dtype).mean(-1)}


class Tally:
    """Totals, counts and maxima by name, added up chunk by chunk on the device.

    With a `bucket` of positions, means are also kept for each of them, as `name@first-position`.
    """

    def __init__(self, bucket: int = 0, longest: int = 0):
        self.bucket, self.buckets = bucket, -(-longest // bucket) if bucket else 0
        self.totals: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.maxima: dict[str, Tensor] = {}

    def mean(self, name: str, total: Tensor, count: Tensor) -> None:
        """Add to a mean."""
        known = name in self.totals
        self.totals[name] = self.totals[name] + total if known else total
        self.counts[name] = self.counts[name] + count if known else count

    def tokens(self, values: dict[str, Tensor], mask_N: Tensor, position_N: Tensor) -> None:
        """Add one value per token to each mean; tokens with mask 0 have no part."""
        for name, value_N in values.items():
            masked_N = value_N * mask_N.to(value_N.dtype)
            self.mean(name, masked_N.sum(), mask_N.sum())
            if self.bucket:
                self._by_position(name, masked_N, mask_N, position_N // self.bucket)

    def _by_position(self, name: str, value_N: Tensor, mask_N: Tensor, bucket_N: Tensor) -> None:
        bucket_N = bucket_N.clamp(max=self.buckets - 1)
        totals_B, counts_B = (
            x_N.new_zeros(self.buckets).index_add_(0, bucket_N, x_N) for x_N in (value_N, mask_N)
        )
        for index, (total, count) in enumerate(zip(totals_B, counts_B, strict=True)):
            self.mean(f"{name}@{index * self.bucket}", total, count)

    def peaks(self, values: dict[str, Tensor], mask_N: Tensor) -> None:
        """Let the values of supervised tokens compete for each maximum."""
        for name, value_N in values.items():
            highest = torch.where(mask_N != 0, value_N, 0).amax()
            known = name in self.maxima
            self.maxima[name] = torch.maximum(self.maxima[name], highest) if known else highest

    def means(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return (total, count) of every mean."""
        return {name: (total, self.counts[name]) for name, total in self.totals.items()}
