"""The output projection fused with the loss, chunk by chunk: logits are made, judged and forgotten.

A chunk's gradient is computed right after its value, while its logits exist. What is left at the
end is the gradient of the hidden states and of the head: nothing has a size of N × V.

Shape suffixes: N supervised tokens · C tokens of a chunk · V this rank's columns · H hidden size ·
K ids · M models.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_opd.loss.shard import VocabShard, wide


@dataclass(frozen=True)
class Model:
    """Hidden states of one model and what turns them into logits."""

    hidden_NH: Tensor
    weight_VH: Tensor
    temperature: float


@dataclass(frozen=True)
class Terms:
    """D of C tokens, its gradient written as detached coefficients on log p over a support S.

        ∇D = Σ_{v∈S} c_v ∇log p(v),  therefore  ∂D/∂z_j = c_j·1[j∈S] − p_j·Σ_{v∈S} c_v

    Every objective is a choice of S and c (and D, which is only reported).
    """

    value_C: Tensor
    coefficient_CK: Tensor  # c; its memory may be reused
    ids_CK: Tensor | None = None  # S; None: the vocabulary, c then has this rank's columns
    mass_C: Tensor | None = None  # Σ c over S and all ranks; None: zero, whatever the logits


def chunk_logits(models: Sequence[Model], rows: slice) -> Tensor:
    """Return z / T of every model on some tokens, [M, C, V_local].

    Products are in the model's own dtype, everything after them in fp32 (float64 for float64).
    """
    first = models[0]
    shape = len(models), len(first.hidden_NH[rows]), len(first.weight_VH)
    logits_MCV = first.hidden_NH.new_empty(shape, dtype=wide(first.hidden_NH))
    for logits_CV, model in zip(logits_MCV, models, strict=True):
        logits_CV.copy_(model.hidden_NH[rows] @ model.weight_VH.T)
        if model.temperature != 1.0:
            logits_CV.div_(model.temperature)
    return logits_MCV


class HeadGradient:
    """The gradient of Σ_t w_t·D_t for hidden states and head, added up over chunks of tokens.

    `hidden_NH` is this rank's share, from its own rows of the vocabulary: whoever hands the hidden
    states over enters the head through a mapping whose backward sums over the group.
    `weight_VH` is complete; chunks are added in fp32. Padding rows stay zero.
    """

    def __init__(self, student: Model):
        self.student = student
        self.hidden_NH = torch.zeros_like(student.hidden_NH)
        self.weight_VH = torch.zeros_like(student.weight_VH, dtype=wide(student.weight_VH))

    def add(self, rows: slice, terms: Terms, shard: VocabShard, weight_C: Tensor) -> None:
        """Add a chunk, given the factor w_t of each of its tokens."""
        if not shard.width:
            return  # a rank of padding alone has nothing to give
        scale_C1 = (weight_C / self.student.temperature).unsqueeze(-1)
        if terms.mass_C is None and terms.ids_CK is not None:
            self._add_sparse(rows, shard, terms.ids_CK, terms.coefficient_CK * scale_C1)
        else:
            self._add_dense(rows, shard, _logit_gradient(terms, shard, scale_C1))

    def attach(self, loss: Tensor, hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        """Return `loss` as a function of the two tensors, with this gradient, for autograd."""
        return _KnownGradient.apply(loss, hidden_NH, weight_VH, self.hidden_NH, self.weight_VH)

    def _add_dense(self, rows: slice, shard: VocabShard, gradient_CV: Tensor) -> None:
        hidden_CH, own = self.student.hidden_NH[rows], slice(shard.width)
        gradient_CV = gradient_CV.to(hidden_CH.dtype)
        self.hidden_NH[rows] = gradient_CV @ self.student.weight_VH[own]
        if self.weight_VH.dtype == hidden_CH.dtype:  # without a product of the size of the head
            self.weight_VH[own].addmm_(gradient_CV.T, hidden_CH)
        else:
            self.weight_VH[own] += gradient_CV.T @ hidden_CH

    def _add_sparse(
        self, rows: slice, shard: VocabShard, ids_CK: Tensor, gradient_CK: Tensor
    ) -> None:
        """Where Σc = 0 only the logits in S have a gradient: K rows of the head, not V.

        On a GPU `index_add_` adds in no fixed order, unless deterministic algorithms are asked for.
        """
        column_CK, owned_CK = shard.own(ids_CK)
        gradient_CK = gradient_CK.masked_fill(~owned_CK, 0.0)
        self.hidden_NH[rows] = F.embedding_bag(
            column_CK,
            self.student.weight_VH,
            mode="sum",
            per_sample_weights=gradient_CK.to(self.student.weight_VH.dtype),
        )
        hidden_CH = self.student.hidden_NH[rows].to(self.weight_VH.dtype)
        for column_C, gradient_C in zip(column_CK.T, gradient_CK.T, strict=True):
            self.weight_VH.index_add_(0, column_C, gradient_C.unsqueeze(-1) * hidden_CH)


def _logit_gradient(terms: Terms, shard: VocabShard, scale_C1: Tensor) -> Tensor:
    """Return ∂/∂z_j = c_j·1[j∈S] − p_j·Σ_{v∈S} c_v on this rank's columns, times a factor."""
    logp_CV = shard.logp_MCV[0]
    if terms.ids_CK is None:
        gradient_CV = terms.coefficient_CK.mul_(scale_C1)
    else:
        column_CK, owned_CK = shard.own(terms.ids_CK)
        own_CK = (terms.coefficient_CK * scale_C1).masked_fill(~owned_CK, 0.0)
        gradient_CV = torch.zeros_like(logp_CV).scatter_add_(-1, column_CK, own_CK)
    if terms.mass_C is not None:
        gradient_CV.addcmul_(logp_CV.exp(), terms.mass_C.unsqueeze(-1) * scale_C1, value=-1)
    return gradient_CV


class _KnownGradient(torch.autograd.Function):
    """A scalar whose gradients were computed together with it; good for one backward.

    They are scaled in place, so that no second tensor of the head's size exists; autograd refuses
    a second backward, because what it saved has changed.
    """

    @staticmethod
    def forward(ctx, value, hidden_NH, weight_VH, hidden_gradient_NH, weight_gradient_VH):
        ctx.save_for_backward(hidden_gradient_NH, weight_gradient_VH)
        ctx.weight_dtype = weight_VH.dtype
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        hidden_NH, weight_VH = ctx.saved_tensors
        hidden_NH.mul_(upstream)
        return None, hidden_NH, weight_VH.mul_(upstream).to(ctx.weight_dtype), None, None
