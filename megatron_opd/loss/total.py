"""Sums of objectives: distillation and reward, two divergences, cross entropy and a teacher.

L = Σ_j weight_j · L_j, every one divided by the same number of tokens, or of sequences
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from megatron_opd.loss import fits
from megatron_opd.loss.engine import Loss
from megatron_opd.loss.objective import Objective
from megatron_opd.types import Head, Microbatch, Scores


@dataclass(frozen=True)
class Total:
    """Several objectives on the same hidden states; to call as one, and asked for as one.

    A term costs what it costs alone: those that want every logit make the logits again. Metrics
    beyond the losses are taken once, by the first term that asks a teacher; of each term there is
    `loss/NAME`, without its weight, and of the sum `loss/total`.

    Raises:
        ValueError: two terms have a name, or what they want of a step cannot be had at once.
    """

    terms: tuple[Objective, ...]  # the first is the objective section

    def __post_init__(self):
        for wrong, line in fits.disagreements(self):
            if wrong:
                raise ValueError(line)

    def __call__(
        self,
        hidden_NH: Tensor,
        head: Head,
        batch: Microbatch,
        teacher: Scores | None = None,
        base: Scores | None = None,
    ) -> Loss:
        """Judge hidden states as every term does, [N, H]; see `Objective`."""
        unmeasured = replace(batch, measured_M=batch.measured_M[:0])
        losses = [
            term(
                hidden_NH,
                head,
                batch if term is self.lead else unmeasured,
                teacher if term.needs_teacher else None,
                base if term.needs_base else None,
            )
            for term in self.terms
        ]
        total = sum((one.loss for one in losses[1:]), losses[0].loss)
        count, means, maxima = losses[0].count, {}, {}
        for one in losses:
            means |= one.means
            maxima |= one.maxima
        if len(losses) > 1:
            means["loss/total"] = total.detach().clone(), count
        return Loss(total, count, means, maxima)

    def count(self, batch: Microbatch) -> Tensor:
        """Return `Loss.count` of a microbatch, without judging it."""
        return self.terms[0].count(batch)

    @property
    def lead(self) -> Objective:
        """Return the term whose k and temperatures count where a step has only one."""
        return next((term for term in self.terms if term.needs_teacher), self.terms[0])

    @property
    def k(self) -> int:
        return self.lead.k

    @property
    def teacher_temperature(self) -> float:
        return self.lead.teacher_temperature

    @property
    def chunk_tokens(self) -> int | None:
        """Return the most tokens whose logits exist at once; None: a term has a fixed memory."""
        given = [term.chunk_tokens for term in self.terms if term.chunk_tokens is not None]
        return max(given) if len(given) == len(self.terms) else None

    @property
    def wants(self) -> tuple[str, ...]:
        return tuple({name: None for term in self.terms for name in term.wants})

    @property
    def over_vocabulary(self) -> bool:
        return any(term.over_vocabulary for term in self.terms)

    @property
    def needs_teacher(self) -> bool:
        return any(term.needs_teacher for term in self.terms)

    @property
    def needs_base(self) -> bool:
        return any(term.needs_base for term in self.terms)

    @property
    def needs_reward(self) -> bool:
        return any(term.needs_reward for term in self.terms)

    @property
    def needs_drawn(self) -> bool:
        return any(term.needs_drawn for term in self.terms)

    @property
    def group_normalize(self) -> Literal["none", "mean", "std"]:
        """Return how the rewards of drawn tokens are compared, which at most one term asks for."""
        for term in self.terms:
            if term.group_normalize != "none":
                return term.group_normalize
        return "none"

    def needs_hidden(self, *, topk: bool) -> Iterator[str]:
        """Yield why the teacher's top k, or its word on the sampled token, does not do."""
        for term in self.terms:
            if not term.needs_teacher:
                continue
            yield from map(term.told, term.needs_hidden(topk=topk))
            for name in ("teacher_temperature", *(["k"] if topk else [])):
                mine, theirs = getattr(term, name), getattr(self, name)
                if mine != theirs:
                    line = f"objective.{name}={mine:g}, where it answers once for all terms, with "
                    yield term.told(line) + f"{theirs:g}; send hidden states"
