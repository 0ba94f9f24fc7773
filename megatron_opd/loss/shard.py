"""The vocabulary spread over ranks: who owns which column, and what the ranks tell each other.

Shape suffixes: M models (0 the student, 1 the teacher) · C tokens of a chunk · V this rank's
columns, padding cut off · K ids.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class VocabShard:
    """Log-probabilities of M models for C tokens, log p = z − log Σ exp z: this rank's columns.

    Rank r of `group` owns columns r·V_local … (r+1)·V_local of the padded vocabulary. Columns at or
    above `vocab_size` are padding and belong to nobody: they are cut off, so no value of theirs can
    enter a sum, and a rank may be left with no column at all. Takes over `logits_MCV` [M, C,
    V_local] and normalises it in place.

    Construction, `logsumexp`, `at`, `top`, `sum` and `entropy` are one collective each, called by
    all ranks of the group, and return the same on all of them.
    """

    def __init__(self, logits_MCV: Tensor, vocab_size: int, group=None):
        self.group, self.vocab_size = group, vocab_size
        self.ranks = 1 if group is None else dist.get_world_size(group)
        local = logits_MCV.shape[-1]
        self.start = 0 if group is None else dist.get_rank(group) * local
        self.width = min(max(vocab_size - self.start, 0), local)
        self.logp_MCV = logits_MCV[..., : self.width]
        self.logp_MCV.sub_(self.logsumexp(self.logp_MCV).unsqueeze(-1))

    def logsumexp(self, x_CV: Tensor) -> Tensor:
        """Return log Σ exp x over the whole vocabulary, [..., C]."""
        return self._gather(x_CV.logsumexp(-1)).logsumexp(0)

    def at(self, ids_CK: Tensor) -> Tensor:
        """Return every model's log-probability of the given ids, [M, C, K].

        An id outside the vocabulary gets NaN: looking would synchronise the device, and a
        log-probability of nothing must not pass for a number.
        """
        logp_MCK = self.logp_MCV.new_zeros(self.logp_MCV.shape[0], *ids_CK.shape)
        if self.width:
            column_CK, owned_CK = self.own(ids_CK)
            index_MCK = column_CK.expand_as(logp_MCK)
            logp_MCK = self.logp_MCV.gather(-1, index_MCK).masked_fill_(~owned_CK, 0.0)
        outside_CK = (ids_CK < 0) | (ids_CK >= self.vocab_size)
        return self._all_reduce(logp_MCK).masked_fill_(outside_CK, math.nan)

    def own(self, ids_CK: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's column of each id and whether it has one (else column 0). Local."""
        column_CK = ids_CK - self.start
        owned_CK = (column_CK >= 0) & (column_CK < self.width)
        return column_CK.masked_fill(~owned_CK, 0), owned_CK

    def top(self, k: int) -> Tensor:
        """Return the ids of each model's k most probable entries, best first, [M, C, k] int64.

        The lowest id goes first among equals (bf16 logits tie all the time), so the ids are the
        same for any number of ranks. Wants k ≤ vocab_size.
        """
        value_MCK, column_MCK = _first_of_sorted(self.logp_MCV, k)
        missing = (0, k - value_MCK.shape[-1])  # a rank may own fewer than k columns
        value_MCK = F.pad(value_MCK, missing, value=-math.inf)
        # ids travel beside the values, as numbers: fp32 holds every integer below 2^24 = 16.8 M
        ids_MCK = F.pad(column_MCK + self.start, missing).to(value_MCK.dtype)
        candidates = self._gather(torch.stack([value_MCK, ids_MCK]))  # [R, 2, M, C, k]
        value, ids = candidates.movedim(0, -2).flatten(-2)  # ranks in order, so ids among equals
        best_MCK = value.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        return ids.gather(-1, best_MCK).long()

    def sum(self, *local_C: Tensor) -> Tensor:
        """Return the ranks' sums, added: [n, ..., C] for n local sums over columns."""
        return self._all_reduce(torch.stack(local_C))

    def entropy(self) -> Tensor:
        """Return −Σ p log p of each model in nats, [M, C]."""
        return self.sum(*local_entropy(self.logp_MCV))

    def _gather(self, x: Tensor) -> Tensor:
        if self.ranks == 1:
            return x[None]
        parts = [torch.empty_like(x) for _ in range(self.ranks)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.stack(parts)

    def _all_reduce(self, x: Tensor) -> Tensor:
        if self.ranks > 1:
            dist.all_reduce(x, group=self.group)
        return x


def wide(x: Tensor) -> torch.dtype:
    """Return the dtype softmax arithmetic on `x` is done in: fp32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def local_entropy(logp_MCV: Tensor) -> Tensor:
    """Return this rank's part of −Σ p log p, [M, C]."""
    return logp_MCV.exp().mul_(logp_MCV).sum(-1).neg_()


def _first_of_sorted(x_CV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return values and columns of the first k of a stable descending sort, sorting few of them.

    Cut a row into blocks of columns. An entry outside the k blocks of highest maximum (the leftmost
    among equals) has k entries before it, one in each: only k blocks need sorting.
    """
    width = x_CV.shape[-1]
    block = max(1, math.isqrt(width // k))  # both sorts see about sqrt(width · k) entries
    whole = width // block * block
    maxima = x_CV[..., :whole].unflatten(-1, (width // block, block)).amax(-1)
    if whole < width:
        maxima = torch.cat([maxima, x_CV[..., whole:].amax(-1, keepdim=True)], -1)
    blocks = maxima.sort(dim=-1, descending=True, stable=True).indices[..., :k].sort(-1).values
    column = (blocks[..., None] * block + torch.arange(block, device=x_CV.device)).flatten(-2)
    value = x_CV.gather(-1, column.clamp(max=width - 1)).masked_fill_(column >= width, -math.inf)
    value, order = value.sort(dim=-1, descending=True, stable=True)
    return value[..., :k], column.gather(-1, order[..., :k])
