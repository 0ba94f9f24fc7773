"""One microbatch through an objective: logits are made, judged and forgotten, chunk by chunk.

Shape suffixes: N supervised tokens · M measured ones · C tokens of a chunk.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from megatron_opd.loss import dynamics
from megatron_opd.loss.candidates import PolicyGradient
from megatron_opd.loss.comparison import Comparison, Models
from megatron_opd.loss.dynamics import Tally
from megatron_opd.loss.fused import HeadGradient
from megatron_opd.loss.shard import SPARSE_TOKENS, Projector, Ranks, chunk_tokens, wide
from megatron_opd.loss.view import View
from megatron_opd.loss.weights import (
    FROM_THE_MODELS,
    Weight,
    per_sequence_sum,
    reward_to_go,
)
from megatron_opd.types import Head, HiddenScores, Microbatch, SampledScores, Scores, TopKScores

if TYPE_CHECKING:
    from megatron_opd.loss.objective import Objective


class Loss(NamedTuple):
    """What a microbatch contributes to the step. Everything stays on the device."""

    loss: Tensor  # Σ a_t·w_t·D_t, carrying the gradient
    count: Tensor  # int: tokens or sequences, by which the step divides the sum of losses
    means: dict[str, tuple[Tensor, Tensor]]  # metric → total and count, detached
    maxima: dict[str, Tensor]


def divisor(batch: Microbatch, aggregation: str) -> Tensor:
    """Return what divides the sum over a step: supervised tokens, or sequences that have one."""
    if aggregation == "token-mean":
        return batch.mask_N.sum().int()
    mask_N = batch.whole.mask_N
    length_N = per_sequence_sum(mask_N, batch.whole.sequence_N).clamp(min=1)
    count = (mask_N / length_N).sum().round().int()
    if batch.part is not None and not batch.part.leads:
        return torch.zeros_like(count)  # another part's rank counts them
    return count


class Pass:
    """The objective `o` on one microbatch."""

    def __init__(
        self,
        o: "Objective",
        hidden_NH: Tensor,
        head: Head,
        batch: Microbatch,
        teacher: Scores | None,
        base: Scores | None,
    ):
        self.o, self.hidden_NH, self.head, self.batch = o, hidden_NH, head, batch
        self.dtype = wide(hidden_NH)
        student = Projector(hidden_NH, head, o.student_temperature)
        self.models = Models(
            Ranks(head.group), self.dtype, student, self._asked(teacher), self._asked(base)
        )
        parameters = (hidden_NH, head.weight_VH, head.bias_V)
        trains = any(x is not None and x.requires_grad for x in parameters)
        self.gradient = HeadGradient(student) if trains and torch.is_grad_enabled() else None
        self.tally = Tally(o.position_bucket, o.max_tokens or 0)
        self.comparison = Comparison(o, batch, self.models, self.gradient, self.tally)

    def _asked(self, scores: Scores | None) -> Projector | TopKScores | SampledScores | None:
        if not isinstance(scores, HiddenScores):
            return scores
        return Projector(scores.hidden_NH, scores.head, self.o.teacher_temperature)

    @torch.no_grad()
    def _judge(self) -> tuple[Tensor, Tensor]:
        """Return Σ a·w·D and the count that goes with it; gradients and metrics add up in self."""
        factor_N, count = self._aggregate()
        if not len(self.batch.whole.target_N):
            return factor_N.sum(), count
        cost_N, total = self._costs_of_responses(), factor_N.new_zeros(())
        for weight in self.o.token_weights:
            if weight.whole:
                factor_N = factor_N * self._over_microbatch(weight)
        for rows in self._chunks():
            view = self._view(rows)
            scale_C = factor_N[rows]
            for weight in self.o.token_weights:
                if not weight.whole:
                    scale_C = scale_C * weight(view).to(self.dtype)
            if self.o.correction != "none":  # of every token: the ratio is known anyway
                acts = dynamics.correction(view, *self.o.trusted)
                self.tally.tokens(acts, view.drawn_mask_N, view.position_N)
            if self._dense_both:
                self._measure(self._measured(view, rows))
            cost_C = None if cost_N is None else cost_N[rows]
            value_C = self.comparison.learn(view, rows, scale_C * self.o.weight, cost_C)
            total = total + (scale_C * value_C).sum()
        if not self._dense_both:
            for index_M in self.batch.measured_M.split(self._dense_chunk):
                self._measure(self._view(index_M.to(self.hidden_NH.device, non_blocking=True)))
        return total, count

    def run(self) -> Loss:
        """Return the loss with its gradient, and the metrics."""
        total, count = self._judge()
        self.tally.mean(f"loss/{self.o.name}", total, count)
        loss = total * self.o.weight
        if self.gradient is not None:
            loss = self.gradient.attach(loss, self.hidden_NH, self.head)
        return Loss(loss, count, self.tally.means(), self.tally.maxima)

    # What a token counts

    def _aggregate(self) -> tuple[Tensor, Tensor]:
        """Return a_t of every token (0 where it is not supervised), and what divides the sum."""
        mask_N, o = self.batch.mask_N.to(self.dtype), self.o
        scale = o.student_temperature * o.teacher_temperature if o.temperature_squared else 1.0
        count = divisor(self.batch, o.aggregation)
        if o.aggregation == "token-mean":
            return mask_N * scale, count
        whole_N = self.batch.whole.mask_N.to(self.dtype)
        length_N = per_sequence_sum(whole_N, self.batch.whole.sequence_N).clamp(min=1)
        if o.aggregation == "seq-mean-token-mean":
            return mask_N / self.batch.own(length_N) * scale, count
        return mask_N * (scale / (o.fixed_length or 1)), count

    def _over_microbatch(self, weight: Weight) -> Tensor:
        """Call a weight of whole responses with what it wants, gathered from chunks and ranks."""
        known, asked = self._view(slice(None)), [n for n in weight.wants if n in FROM_THE_MODELS]
        values = {n: getattr(known, n) for n in weight.wants if n not in asked}
        if asked:
            seen_NA = self._of_chunks(
                lambda view: torch.stack([getattr(view, n).to(self.dtype) for n in asked], -1),
                len(asked),
            )
            values |= dict(zip(asked, seen_NA.unbind(-1), strict=True))
        whole = {name: self.batch.gathered(x_N) for name, x_N in values.items()}
        return self.batch.own(weight.of(**whole)).to(self.dtype)

    def _of_chunks(self, of: Callable[[View], Tensor], columns: int) -> Tensor:
        """Return what is said of each token, [N, columns]; a part may have none."""
        none = self.hidden_NH.new_zeros(0, columns, dtype=self.dtype)
        return torch.cat([none, *(of(self._view(rows)) for rows in self._chunks())])

    def _costs_of_responses(self) -> Tensor | None:
        """Return the costs of all tokens where one depends on others of its response, [N]."""
        o, pg, whole = self.o, self.o.policy_gradient, self.batch.whole
        grouped = o.group_normalize != "none"
        if pg is None or not (o.discount or o.baseline == "mean" or grouped):
            return None
        sequence_N, mask_N = whole.sequence_N, whole.mask_N.to(self.dtype)
        if grouped:
            assert self.batch.advantage_N is not None
            cost_N = -self.batch.advantage_N.to(self.dtype)
        else:
            cost_N = self._of_chunks(lambda view: self._costs(pg, view), 1)[:, 0]
        cost_N = mask_N * self.batch.gathered(cost_N)
        if o.discount:
            cost_N = reward_to_go(cost_N, sequence_N, o.discount)
        if o.baseline == "mean":
            length_N = per_sequence_sum(mask_N, sequence_N).clamp(min=1)
            cost_N = cost_N - per_sequence_sum(cost_N * mask_N, sequence_N) / length_N
        return self.batch.own(cost_N)

    def _costs(self, pg: PolicyGradient, view: View) -> Tensor:
        """Return what each drawn token of a chunk costs by itself, [C, 1]."""
        assert isinstance(view.rows, slice)
        seen, *_ = self.comparison.sampled(view, view.rows)
        return pg.costs(*seen[:2])[:, :1]

    # Chunks and what is looked at

    @property
    def _student_dense(self) -> bool:
        """Whether the loss needs every logit of the student."""
        return self.o.over_vocabulary or "student_ids_CK" in self.o.wants

    @property
    def _dense_both(self) -> bool:
        """Whether every logit of all models exists in a chunk: what metrics want to look at."""
        over = self.o.over_vocabulary or "teacher_ids_CK" in self.o.wants
        teacher = self.models.teacher
        return self._student_dense and over and (teacher is None or isinstance(teacher, Projector))

    @property
    def _dense_chunk(self) -> int:
        weight_VH = self.head.weight_VH
        return self.o.chunk_tokens or chunk_tokens(
            len(weight_VH),
            weight_VH.element_size(),
            weight_VH.device.type,
            dense_gradient=self.o.over_vocabulary,
        )

    def _chunks(self) -> Iterator[slice]:
        """Yield the rows of each chunk: more where no model's head is multiplied in full."""
        o, teacher, tokens = self.o, self.models.teacher, len(self.hidden_NH)
        teacher_dense = isinstance(teacher, Projector) and "teacher_ids_CK" in o.wants
        dense = self._student_dense or teacher_dense or o.looks
        sparse_chunk = o.chunk_tokens or SPARSE_TOKENS[self.hidden_NH.device.type]
        chunks = -(-tokens // (self._dense_chunk if dense else sparse_chunk))
        step = -(-tokens // max(chunks, 1))  # of about one size: a small last one costs as much
        for start in range(0, tokens, max(step, 1)):
            yield slice(start, start + step)

    def _view(self, rows: slice | Tensor) -> View:
        o, models, teacher = self.o, self.models, self.models.teacher
        drawn = o.rollout_temperature
        return View(
            self.batch,
            rows,
            models.student.shard(rows),
            teacher.shard(rows) if isinstance(teacher, Projector) else None,
            models.ranks,
            k=o.k,
            rollout_ratio=None if drawn is None else o.student_temperature / drawn,
            given=None if isinstance(teacher, Projector) else teacher,
        )

    def _measured(self, view: View, rows: slice) -> View:
        """Return the view of the measured tokens of a chunk, on the logits that it has."""
        first, last = torch.searchsorted(
            self.batch.measured_M, torch.tensor([rows.start, rows.stop])
        ).tolist()
        index_M = self.batch.measured_M[first:last].to(self.hidden_NH.device, non_blocking=True)
        measured = self._view(index_M)
        for of_all, of_some in zip(view.models, measured.models, strict=True):
            of_some.z_CV, of_some.dense = of_all.z_CV[index_M - rows.start], True
        return measured

    def _measure(self, view: View) -> None:
        """Add the metrics of a view's tokens."""
        if not len(view.target_N):
            return
        values, maxima = dynamics.student(view), {}
        if view.teacher is not None:
            values |= dynamics.teacher(view)
            for means, entries_N in dynamics.parts(view):
                self.tally.tokens(means, view.mask_N * entries_N, view.position_N)
        if view.given is not None:
            values |= dynamics.given(view)
        if self.o.rollout_temperature is not None:
            drawn, maxima = dynamics.policy(view)
            if self.batch.rollout_ids_NK is not None:
                drawn |= dynamics.topk_mismatch(view, self.batch.rollout_ids_NK[view.rows])
            self.tally.tokens(drawn, view.drawn_mask_N, view.position_N)
        self.tally.tokens(values, view.mask_N, view.position_N)
        self.tally.peaks(maxima, view.drawn_mask_N)
