"""The gradient of the output projection, added up while logits are made, judged and forgotten.

A chunk's gradient is computed right after its value, while its logits exist. What is left at the
end is the gradient of the hidden states and of the head: nothing has a size of N × V.

Shape suffixes: N supervised tokens · C tokens of a chunk · V this rank's columns · H hidden size ·
K ids.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_opd.loss.shard import Projector, VocabShard, blocks, wide
from megatron_opd.types import Head


class Terms(NamedTuple):
    """The gradient of D in the student's logits z of C tokens, given on a set S of ids:

        ∂D/∂z_j = gradient_j for j ∈ S, and outside · exp(z_j − over) elsewhere

    Every objective over a set is a choice of these. In the form of detached coefficients c on
    log p over S, gradient_j = c_j − p_j·Σc and outside = −Σc with p = exp(z − over). Where D does
    not depend on the normaliser, as a divergence renormalised on S, Σc = 0: outside is None, and K
    logits have a gradient.
    """

    ids_CK: Tensor
    gradient_CK: Tensor  # 0 where an id is not in S
    z_CK: Tensor  # the student's logits there
    outside_C: Tensor | None = None  # wants S removed from the shard's logits
    over_C: Tensor | None = None


class HeadGradient:
    """The gradient of Σ_t a_t·D_t for hidden states and head, added up over chunks of tokens.

    `hidden_NH` is this rank's share, from its own rows of the vocabulary: whoever hands the hidden
    states over enters the head through a mapping whose backward sums over the group.
    `weight_VH` is complete; chunks are added in fp32. Padding rows stay zero.
    """

    def __init__(self, student: Projector):
        head, self.student = student.head, student
        self.hidden_NH = torch.zeros_like(student.hidden_NH)
        self.for_autograd = head.gradient_VH is None
        self.weight_VH = (
            torch.zeros_like(head.weight_VH, dtype=wide(head.weight_VH))
            if head.gradient_VH is None
            else head.gradient_VH
        )
        self.bias_V = None
        if head.bias_V is not None:
            self.bias_V = torch.zeros_like(head.bias_V, dtype=wide(head.bias_V))

    def add(self, rows: slice, shard: VocabShard, terms: Terms, scale_C: Tensor) -> None:
        """Add a chunk, given the factor a_t of each of its tokens."""
        if not shard.width:
            return  # a rank of padding alone has nothing to give
        column_CK, owned_CK = shard.own(terms.ids_CK)
        slope_CK = self.student.slope(terms.z_CK)
        own_CK = (terms.gradient_CK * slope_CK * scale_C[:, None]).masked_fill(~owned_CK, 0.0)
        if terms.outside_C is None or terms.over_C is None:
            # zeros for the ids of other ranks, but not all on one row: a GPU would add in turn
            spread_C1 = torch.arange(len(column_CK), device=column_CK.device)[:, None] % shard.width
            self._add_sparse(rows, torch.where(owned_CK, column_CK, spread_C1), own_CK)
            return
        outside_C, over_C = terms.outside_C * scale_C, terms.over_C

        def gradient(z_CV: Tensor, block: slice) -> Tensor:
            slope_CV = self.student.slope(z_CV)
            p_CV = z_CV.sub_(over_C[block, None]).exp_()
            p_CV.mul_(outside_C[block, None]).mul_(slope_CV)
            return p_CV.scatter_add_(-1, column_CK[block], own_CK[block])

        self.add_dense(rows, shard, gradient)

    def add_dense(
        self, rows: slice, shard: VocabShard, gradient: Callable[[Tensor, slice], Tensor]
    ) -> None:
        """Add a chunk with a gradient on every column, which overwrites the shard's logits.

        `gradient(z_CV, block)` gets the logits of a block of rows in wide arithmetic, overwrites
        them with the gradient in what head(h) was before soft-cap and temperature, and returns it.
        """
        z_CV, dtype = shard.z_CV, wide(shard.hidden_CH)
        for block in blocks(len(z_CV), shard.width, z_CV.device):
            wide_CV = gradient(z_CV[block].to(dtype), block)
            if dtype != z_CV.dtype:  # else it was worked on in place
                z_CV[block] = wide_CV
        self.hidden_NH[rows] = z_CV @ self.student.weight_VH
        if self.bias_V is not None:
            self.bias_V[: shard.width] += z_CV.sum(0, dtype=dtype)
        self._add_weight(z_CV, shard.hidden_CH)

    def _add_weight(self, gradient_CV: Tensor, hidden_CH: Tensor) -> None:
        own_VH = self.weight_VH[: gradient_CV.shape[-1]]
        if own_VH.dtype == hidden_CH.dtype:
            own_VH.addmm_(gradient_CV.T, hidden_CH)
            return
        for part in blocks(len(own_VH), own_VH.shape[-1], own_VH.device):
            # rounded per chunk, added in fp32, without a product of the size of the head
            own_VH[part] += gradient_CV[:, part].T @ hidden_CH

    def _add_sparse(self, rows: slice, column_CK: Tensor, gradient_CK: Tensor) -> None:
        """Add a gradient on K columns per token: K rows of the head, not V.

        On a GPU `index_add_` adds in no fixed order, unless deterministic algorithms are asked for.
        """
        weight_VH, hidden_CH = self.student.weight_VH, self.student.hidden_NH[rows]
        self.hidden_NH[rows] = F.embedding_bag(
            column_CK, weight_VH, mode="sum", per_sample_weights=gradient_CK.to(weight_VH.dtype)
        )
        wide_CH = hidden_CH.to(self.weight_VH.dtype)
        for column_C, gradient_C in zip(column_CK.T, gradient_CK.T, strict=True):
            self.weight_VH.index_add_(0, column_C, gradient_C.unsqueeze(-1) * wide_CH)
        if self.bias_V is not None:
            self.bias_V.index_add_(0, column_CK.flatten(), gradient_CK.flatten())

    def attach(self, loss: Tensor, hidden_NH: Tensor, head: Head) -> Tensor:
        """Return `loss` as a function of hidden states, weight and bias, for autograd."""
        weight, gradient = None, None
        if self.for_autograd:
            weight, gradient = head.weight_VH, self.weight_VH
        gradients = self.hidden_NH, gradient, self.bias_V
        return _KnownGradient.apply(loss, gradients, hidden_NH, weight, head.bias_V)


class _KnownGradient(torch.autograd.Function):
    """A scalar whose gradients were computed together with it; good for one backward.

    They are scaled in place, so that no second tensor of the head's size exists; autograd refuses
    a second backward, because what it saved has changed.
    """

    @staticmethod
    def forward(ctx, value, gradients, *inputs):
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        scaled = (
            None if gradient is None or dtype is None else gradient.mul_(upstream).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return None, None, *scaled
