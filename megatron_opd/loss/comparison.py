"""Student against target on the tokens of a chunk: D, and its gradient where logits still exist.

Two roads. Over a set S of ids, both models give their logits at S; C × K numbers decide D and its
gradient; a normaliser, where D wants one, comes from the logits outside of S. Over the whole
vocabulary every rank compares its own columns.

Shape suffixes: C tokens of a chunk · V this rank's columns · K ids · M models.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_opd.loss import candidates, supports
from megatron_opd.loss.candidates import Clip, Measure
from megatron_opd.loss.dynamics import Tally
from megatron_opd.loss.fused import HeadGradient, Terms
from megatron_opd.loss.shard import Projector, Ranks, VocabShard
from megatron_opd.loss.view import View
from megatron_opd.types import Microbatch, SampledScores, TopKScores

if TYPE_CHECKING:
    from megatron_opd.loss.objective import Objective


@dataclass(frozen=True)
class Models:
    """Who is asked: heads on hidden states, or what a frozen model sent instead."""

    ranks: Ranks
    dtype: torch.dtype  # of softmax arithmetic
    student: Projector
    teacher: Projector | TopKScores | SampledScores | None
    base: Projector | TopKScores | SampledScores | None


@dataclass(frozen=True)
class Comparison:
    """The objective `o` on one microbatch, chunk by chunk."""

    o: "Objective"
    batch: Microbatch
    models: Models
    gradient: HeadGradient | None  # None: only values are wanted
    tally: Tally

    def learn(self, view: View, rows: slice, scale_C: Tensor, cost_C: Tensor | None) -> Tensor:
        """Return D of a chunk and add its gradient; overwrites the logits."""
        baseline_C = self._baseline(view)
        if self.o.choose is None:
            return self._over_vocabulary(view, rows, scale_C, baseline_C)
        if self.o.support == "sampled":
            seen, ids_CK, z_CK = self.sampled(view, rows)
        else:
            seen, ids_CK, z_CK = self._on_set(view, rows)
        pg = self.o.policy_gradient
        if pg is None:
            value_C, c_CK = candidates.divergence(self.o.slope, seen)
        else:
            cost_CK = pg.costs(*seen[:2]) if cost_C is None else cost_C[:, None]
            cost_CK = cost_CK - baseline_C[:, None]
            if self.o.outcome_weight:
                cost_CK = cost_CK - self.o.outcome_weight * view.advantage_N[:, None]
            if self.o.clip is None:
                value_C, c_CK = pg.coefficients(seen, cost_CK)
            else:
                value_C, c_CK = self._clipped(self.o.clip, seen, view, cost_CK[:, 0])
        if self.gradient is not None:
            gradient_CK, outside_C, over_C = candidates.logit_gradient(seen, c_CK)
            terms = Terms(ids_CK, gradient_CK, z_CK, outside_C, over_C)
            self.gradient.add(rows, view.student, terms, scale_C)
        return value_C

    def _baseline(self, view: View) -> Tensor:
        if self.o.baseline == "kl":
            return view.reverse_kl_N
        if self.o.baseline == "topk_kl":
            return view.topk_kl_N
        return torch.zeros_like(view.mask_N, dtype=self.models.dtype)

    def _clipped(
        self, clip: Clip, seen: Measure, view: View, cost_C: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return PPO's surrogate and c of the drawn tokens, and count where it is flat."""
        # both temperatures are one: log p of the loss is that of the policy which drew
        ratio_C = (seen.s_CK[:, 0] - view.rollout_logp_N).exp()
        value_C, c_C, flat_C = clip.coefficients(ratio_C, cost_C)
        measured = {f"policy/clipped_fraction{self.o.suffix}": flat_C.to(self.models.dtype)}
        self.tally.tokens(measured, view.drawn_mask_N, view.position_N)
        return value_C, c_C[:, None]

    def _on_set(self, view: View, rows: slice) -> tuple[Measure, Tensor, Tensor]:
        """Return what both models say on S, its ids, and the student's logits there."""
        o = self.o
        ids_CK, valid_CK = self._choose(view, rows)
        empty_C = (~valid_CK.any(-1)).to(self.models.dtype)
        measured = {f"distill/support_empty{o.suffix}": empty_C}
        self.tally.tokens(measured, view.mask_N, view.position_N)
        shards = [*view.models, *self._base_shards(rows)]
        if o.over_vocabulary:
            self._mix(shards)
            read = [self._at_and_rest(shard, ids_CK, valid_CK) for shard in shards[:2]]
        else:
            read = [shard.at(ids_CK) for shard in shards]
        said = list(self.models.ranks.logsumexp(torch.stack(read)))
        if isinstance(self.models.teacher, TopKScores):
            said.append(self._given(self.models.teacher, rows))
        if o.over_vocabulary:
            (z_CK, rest_C), (t_CK, t_rest_C) = ((x[:, :-1], x[:, -1]) for x in said[:2])
            seen = candidates.on_vocabulary(z_CK, t_CK, valid_CK, rest_C, t_rest_C, o.tail)
        else:
            z_CK, t_CK = said[0], self._mixed(*said)
            seen = candidates.on_support(z_CK, t_CK, valid_CK)
        return seen, ids_CK, z_CK

    def sampled(self, view: View, rows: slice) -> tuple[Measure, Tensor, Tensor]:
        """Return log p(y) and log of the target at y, y, and the student's logit there."""
        ids_C1 = view.target_N[:, None]
        valid_C1 = torch.ones_like(ids_C1, dtype=torch.bool)
        shards = [*view.models, *self._base_shards(rows)]
        read = torch.stack([self._at_and_rest(shard, ids_C1, valid_C1) for shard in shards])
        z_MC2 = self.models.ranks.logsumexp(read)
        over_MC = z_MC2.logsumexp(-1)
        student_C1, *others = list(z_MC2[..., :1] - over_MC[..., None])
        said = [
            model.logp_N[rows, None].to(self.models.dtype)
            if isinstance(model, SampledScores)
            else others.pop(0)
            for model in (self.models.teacher, self.models.base)
            if model is not None
        ]
        target_C1 = self._mixed(student_C1, *said) if said else student_C1
        seen = Measure(student_C1, target_C1, valid_C1, over_C=over_MC[0])
        return seen, ids_C1, z_MC2[0, :, :1]

    def _choose(self, view: View, rows: slice) -> tuple[Tensor, Tensor]:
        """Return the ids of S and which of them count."""
        o, found = self.o, {"target_C": view.target_N}
        if self.batch.rollout_ids_NK is not None:
            found["rollout_ids_CK"] = self.batch.rollout_ids_NK[rows]
        models = {"student_ids_CK": view.student, "teacher_ids_CK": view.teacher}
        wanted = {name: shard for name, shard in models.items() if name in o.wants and shard}
        if wanted:
            found |= zip(wanted, self.models.ranks.top(*wanted.values(), k=o.k), strict=True)
        if isinstance(self.models.teacher, TopKScores):
            found["teacher_ids_CK"] = self.models.teacher.ids_NK[rows]
        assert o.choose is not None
        chosen = o.choose(**{name: found[name] for name in o.wants})
        return supports.append(*chosen, view.target_N) if o.append_sampled else chosen

    def _at_and_rest(self, shard: VocabShard, ids_CK: Tensor, valid_CK: Tensor) -> Tensor:
        """Return z at S, and log Σ exp z outside of S as one more column; removes S."""
        _ = shard.z_CV
        z_CK = shard.at(ids_CK)
        shard.remove(ids_CK, valid_CK)
        return torch.cat([z_CK, shard.logsumexp()[:, None]], dim=-1)

    def _given(self, teacher: TopKScores, rows: slice) -> Tensor:
        """Return log q of the teacher's top k as it was sent, and of the rest where it is wanted.

        What rounding leaves of a tail is unknown: it is taken as one unit in the last place.
        """
        logp_CK = teacher.logp_NK[rows].to(self.models.dtype)
        if not self.o.over_vocabulary:
            return logp_CK
        lowest = torch.finfo(teacher.logp_NK.dtype).eps
        mass_C1 = logp_CK.double().logsumexp(-1, keepdim=True).clamp(max=-lowest)
        return torch.cat([logp_CK, candidates.log1mexp(mass_C1).to(self.models.dtype)], dim=-1)

    def _base_shards(self, rows: slice) -> list[VocabShard]:
        base = self.models.base
        return [base.shard(rows)] if isinstance(base, Projector) else []

    def _mixed(self, s: Tensor, t: Tensor, b: Tensor | None = None) -> Tensor:
        """Return the target λ·t + (1−λ)·b + β·s."""
        o = self.o
        if b is not None:
            t = t * o.extrapolation + b * (1 - o.extrapolation)
        return t + s * o.veto if o.veto else t

    def _mix(self, shards: list[VocabShard]) -> None:
        """Make the target of the teacher's logits, in place."""
        if len(shards) < 2 or not (self.o.needs_base or self.o.veto):
            return
        student, teacher = shards[0].z_CV, shards[1].z_CV
        if self.o.needs_base:
            teacher.lerp_(shards[2].z_CV, 1 - self.o.extrapolation)
        if self.o.veto:
            teacher.add_(student, alpha=self.o.veto)

    def _over_vocabulary(
        self, view: View, rows: slice, scale_C: Tensor, baseline_C: Tensor
    ) -> Tensor:
        """Return D over all entries and add its gradient, every rank for its own columns."""
        student, teacher = shards = view.models
        self._mix([*shards, *self._base_shards(rows)])
        s_lse_C, t_lse_C = self.models.ranks.logsumexp(torch.stack([m.logsumexp() for m in shards]))

        def sums(z_CV: Tensor, t_CV: Tensor, s_lse_C: Tensor, t_lse_C: Tensor, b_C: Tensor):
            terms = self._integrand(z_CV - s_lse_C[:, None], t_CV - t_lse_C[:, None], b_C[:, None])
            return torch.stack([term_CV.sum(-1) for term_CV in terms], dim=-1)

        # on one rank a row's sums are known when its gradient wants them: one pass instead of two
        trains = self.gradient is not None and student.width > 0
        at_once = trains and self.models.ranks.size == 1 and not self.o.center_on_support
        if at_once:
            value_C, mass_C = torch.empty_like(s_lse_C), torch.empty_like(s_lse_C)
        else:
            local = student.by_rows(sums, student.z_CV, teacher.z_CV, s_lse_C, t_lse_C, baseline_C)
            value_C, mass_C = self.models.ranks.sum(local).unbind(-1)
        if self.o.center_on_support:
            ones = self.o.reward_weight == "none" and not self.o.reward_weight_normalize
            total = self.models.student.head.vocab_size if ones else 1  # of the weights
            baseline_C, value_C, mass_C = value_C / total, value_C * 0, mass_C * 0
        if self.gradient is None or not trains:
            return value_C

        def gradient(z_CV: Tensor, block: slice) -> Tensor:
            scale_CV = self.models.student.slope(z_CV) * scale_C[block, None]
            s_CV = z_CV.sub_(s_lse_C[block, None])
            t_CV = teacher.z_CV[block].to(self.models.dtype) - t_lse_C[block, None]
            value_CV, c_CV = self._integrand(s_CV, t_CV, baseline_C[block, None])
            if at_once:
                value_C[block], mass_C[block] = value_CV.sum(-1), c_CV.sum(-1)
            return torch.addcmul(c_CV, s_CV.exp_(), mass_C[block, None], value=-1, out=z_CV).mul_(
                scale_CV
            )

        self.gradient.add_dense(rows, student, gradient)
        return value_C

    def _integrand(self, s_CV: Tensor, t_CV: Tensor, b_C1: Tensor) -> tuple[Tensor, Tensor]:
        """Return what D is the sum of, and c."""
        pg = self.o.policy_gradient
        if pg is None:
            return self.o.slope(s_CV, t_CV)
        weight_CV = {"student_p": s_CV.exp, "teacher_p": t_CV.exp}.get(pg.weight)
        if weight_CV is None:
            share = 1 / self.models.student.head.vocab_size if pg.normalize_weight else 1.0
            c_CV = pg.costs(s_CV, t_CV, b_C1) * share
        else:
            c_CV = weight_CV() * pg.costs(s_CV, t_CV, b_C1)
        return c_CV, c_CV
