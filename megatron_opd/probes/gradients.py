"""Per-token gradients of a linear layer as pairs of vectors, without a backward per token.

A layer y = W·a that is used at many positions has the gradient Σ_s δ_s ⊗ a_s, with a_s its input
and δ_s = ∂L/∂y_s at position s. An outer product is known by its two vectors, and so are lengths
and angles:

    ⟨δ ⊗ a, δ' ⊗ a'⟩ = (δ·δ') (a·a')

so that the Gram matrix of gradients with W's size is the elementwise product of two small ones. One
backward gives δ_s at all positions, and the closed form of the loss gives the head's.

**Whose gradient it is.** δ_s ⊗ a_s is what of ∂L/∂W goes through position s. For the head and for
the last block's two writers, position s reaches no loss but its own: there it is the gradient of
the loss of token s. Below, later tokens have looked at position s, and their losses are in δ_s too.

Shape suffixes: N supervised tokens of a microbatch · n chosen ones · A inputs, D outputs of a layer
· V vocabulary · H hidden.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_opd.loss import Objective, Total
from megatron_opd.loss.engine import Pass
from megatron_opd.loss.fused import HeadGradient
from megatron_opd.loss.shard import Projector, VocabShard, blocks, wide
from megatron_opd.model import Stage
from megatron_opd.told import Array
from megatron_opd.types import Head, HiddenScores, Microbatch

WRITERS = {"attention": "self_attention.linear_proj", "mlp": "mlp.linear_fc2"}
"""What writes into the residual stream of a block: plain linear layers in every implementation,
where others may have a norm in front of the matrix."""


class Outer(NamedTuple):
    """Gradients δ ⊗ a of n tokens, in float64."""

    error_nD: Array  # δ
    input_nA: Array  # a

    @staticmethod
    def cat(parts: Sequence["Outer"]) -> "Outer":
        """Join the tokens of several microbatches."""
        return Outer(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def rows(self, chosen_n: Array) -> "Outer":
        """Return some of the tokens."""
        return Outer(*(x_nD[chosen_n] for x_nD in self))

    def gram(self, other: "Outer") -> Array:
        """Return ⟨g_t, g'_t'⟩ of all tokens and `other`'s, [n, m]."""
        return (self.error_nD @ other.error_nD.T) * (self.input_nA @ other.input_nA.T)

    def norms(self) -> Array:
        """Return the length of every gradient, [n]."""
        return np.prod([np.linalg.norm(x_nD, axis=1) for x_nD in self], axis=0)

    def unit(self) -> "Outer":
        """Return the gradients at length 1, and so are δ and a; none may be zero."""
        return Outer(*(x_nD / np.linalg.norm(x_nD, axis=1, keepdims=True) for x_nD in self))


def layers(model: Stage) -> dict[str, Any]:
    """Return the linear layers that are looked at beside the head, by name, first to last."""
    return {
        f"block {number} {name}": block.get_submodule(path)
        for number, block in enumerate(model.chunks[0].decoder.layers, 1)
        for name, path in WRITERS.items()
    }


def outer_products(
    model: Stage,
    batch: Microbatch,
    hidden: Callable[[], Tensor],
    loss: Callable[[Tensor], Tensor],
    chosen_n: Tensor,
) -> dict[str, Outer]:
    """Return δ and a of every layer at the chosen tokens.

    `hidden()` runs `model` forward to its states at the supervised tokens, [N, H]; `loss` makes the
    sum of all losses of them. One backward; no weight gets a gradient.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.enable_grad(), _watched(model, seen):
        loss(hidden()).backward()
    rows_n, found = batch.source_N[chosen_n], {}
    for name, (a, y) in seen.items():
        assert y.grad is not None
        found[name] = Outer(_host(y.grad[rows_n]), _host(a[rows_n]))
    return found


@contextmanager
def _watched(model: Stage, seen: dict[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Keep input and output of every layer, [T, ·], while the model runs; weights are frozen."""

    def watch(name: str):
        def keep(_, inputs: tuple, outputs: tuple) -> None:
            y = outputs[0]
            y.retain_grad()
            seen[name] = inputs[0].detach(), y

        return keep

    def begin(_, __, embedded: Tensor) -> Tensor:
        return embedded.detach().requires_grad_()  # frozen weights alone would leave no graph

    hooks = [model.chunks[0].embedding.register_forward_hook(begin)]
    hooks += [layer.register_forward_hook(watch(name)) for name, layer in layers(model).items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def head_products(
    objective: Objective | Total,
    hidden_NH: Tensor,
    head: Head,
    batch: Microbatch,
    teacher: HiddenScores,
    chosen_n: Tensor,
) -> Outer:
    """Return δ = ∂L/∂(head's output) and a = h at the chosen tokens."""
    hidden_NH = hidden_NH.detach().requires_grad_()
    error_nV = hidden_NH.new_zeros(len(chosen_n), head.vocab_size, dtype=wide(hidden_NH))
    for term in objective.terms:
        asked = teacher if term.needs_teacher else None
        judged = Pass(term, hidden_NH, head, batch, asked, None)
        kept = LogitGradient(judged.models.student, chosen_n, error_nV)
        judged.comparison, judged.gradient = replace(judged.comparison, gradient=kept), None
        judged.run()
    return Outer(_host(error_nV), _host(hidden_NH.detach()[chosen_n]))


class LogitGradient(HeadGradient):
    """What the loss gives its head gradient, kept for chosen tokens instead of multiplied."""

    def __init__(self, student: Projector, chosen_n: Tensor, error_nV: Tensor):
        self.student, self.chosen_n, self.error_nV = student, chosen_n, error_nV

    def add_dense(
        self, rows: slice, shard: VocabShard, gradient: Callable[[Tensor, slice], Tensor]
    ) -> None:
        """Add a chunk with a gradient on every column."""
        for block in blocks(len(shard.z_CV), shard.width, shard.z_CV.device):
            wide_CV = gradient(shard.z_CV[block].to(self.error_nV.dtype), block)
            mine_n, own_m = self._chosen(rows.start + block.start, len(wide_CV))
            self.error_nV[mine_n] += wide_CV[own_m]

    def _add_sparse(self, rows: slice, column_CK: Tensor, gradient_CK: Tensor) -> None:
        """Add a gradient on K columns per token."""
        mine_n, own_m = self._chosen(rows.start, len(column_CK))
        mine_nV = self.error_nV[mine_n]
        gradient_mK = gradient_CK[own_m].to(mine_nV.dtype)
        self.error_nV[mine_n] = mine_nV.scatter_add_(-1, column_CK[own_m], gradient_mK)

    def _chosen(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Return which chosen tokens are among `count` from `start`, and their rows there."""
        mine_n = (self.chosen_n >= start) & (self.chosen_n < start + count)
        return mine_n, self.chosen_n[mine_n] - start


def _host(x: Tensor) -> Array:
    return x.detach().flatten(1).double().cpu().numpy()
