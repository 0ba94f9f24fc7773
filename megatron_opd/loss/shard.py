"""The vocabulary spread over ranks: one model's logits on this rank's columns, and what ranks add.

Shape suffixes: C tokens of a chunk · V this rank's columns, padding cut off · H hidden · K ids.
"""

import math
from collections.abc import Iterator
from functools import cached_property

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_opd.types import Head

LOGITS_BYTES = {"cpu": 3 * 2**24, "cuda": 2**29}  # of one model that exist at once on a rank
SPARSE_TOKENS = {"cpu": 512, "cuda": 8192}  # of a chunk where only K logits a token are made
FEWEST_TOKENS = 32  # of a chunk, times bytes of a weight: reading the head must not cost the most
COLUMNS = 128  # whose maximum is looked at first: a multiple of a vector register
ARITHMETIC = {"cpu": 2**18, "cuda": 2**24}  # entries that wide arithmetic works on at once


class Projector:
    """A model's hidden states and head: logits z = head(h) / temperature, where they are wanted.

    Holds one buffer that every chunk writes anew: at most one `VocabShard` has dense logits.
    """

    def __init__(self, hidden_NH: Tensor, head: Head, temperature: float):
        self.hidden_NH, self.head, self.temperature = hidden_NH.detach(), head, temperature
        rank = 0 if head.group is None else dist.get_rank(head.group)
        self.start = rank * len(head.weight_VH)
        self.width = min(max(head.vocab_size - self.start, 0), len(head.weight_VH))
        self.weight_VH = head.weight_VH.detach()[: self.width]
        self.bias_V = None if head.bias_V is None else head.bias_V.detach()[: self.width]
        self.buffer_CV: Tensor | None = None

    def shard(self, rows: slice | Tensor) -> "VocabShard":
        """Return the shard of some tokens."""
        return VocabShard(self, self.hidden_NH[rows])

    def project(self, hidden_CH: Tensor) -> Tensor:
        """Return z on all columns of this rank, [C, V], in the model's dtype."""
        tokens = len(hidden_CH)
        if self.buffer_CV is None or len(self.buffer_CV) < tokens:
            self.buffer_CV = hidden_CH.new_empty(tokens, self.width)
        z_CV = torch.mm(hidden_CH, self.weight_VH.T, out=self.buffer_CV[:tokens])
        if self.bias_V is not None:
            z_CV.add_(self.bias_V)
        return self.cap_(z_CV)

    def dots(self, hidden_CH: Tensor, column_CK: Tensor) -> Tensor:
        """Return z at K columns per token, [C, K] wide: K dot products instead of V."""
        z_CK = hidden_CH.new_empty(column_CK.shape, dtype=wide(hidden_CH))
        per_token = column_CK.shape[-1] * hidden_CH.shape[-1]
        for rows in blocks(len(hidden_CH), per_token, hidden_CH.device):
            weight_CKH = F.embedding(column_CK[rows], self.weight_VH).to(z_CK.dtype)
            hidden_C1H = hidden_CH[rows, None].to(z_CK.dtype)
            # row times matrix: a CPU's library is three times slower at matrix times column
            torch.bmm(hidden_C1H, weight_CKH.mT, out=z_CK[rows, None])
        if self.bias_V is not None:
            z_CK.add_(self.bias_V[column_CK])
        return self.cap_(z_CK)

    def cap_(self, z: Tensor) -> Tensor:
        """Apply soft-cap and temperature in place."""
        if self.head.softcap is not None:
            z.div_(self.head.softcap).tanh_().mul_(self.head.softcap)
        return z if self.temperature == 1.0 else z.div_(self.temperature)

    def slope(self, z: Tensor) -> Tensor | float:
        """Return ∂z/∂(h·w) where z is what soft-cap and temperature made of it."""
        if self.head.softcap is None:
            return 1 / self.temperature
        tanh = z * (self.temperature / self.head.softcap)
        return (1 - tanh.square()).masked_fill_(z.isinf(), 0.0) / self.temperature


class VocabShard:
    """C tokens of one model on this rank's columns.

    Columns at or above `vocab_size` are padding and belong to nobody: they are cut off, so no value
    of theirs can enter a sum, and a rank may be left with no column at all. Everything here is
    local; what must be added over ranks, `Ranks` adds.
    """

    def __init__(self, projector: Projector, hidden_CH: Tensor):
        self.projector, self.hidden_CH = projector, hidden_CH
        self.start, self.width = projector.start, projector.width
        self.dense = False  # whether z_CV exists

    @cached_property
    def z_CV(self) -> Tensor:
        """Logits on all columns; made at the first look."""
        self.dense = True
        return self.projector.project(self.hidden_CH)

    def own(self, ids_CK: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's column of each id and whether it has one (else column 0)."""
        column_CK = ids_CK - self.start
        owned_CK = (column_CK >= 0) & (column_CK < self.width)
        return column_CK.masked_fill(~owned_CK, 0), owned_CK

    def at(self, ids_CK: Tensor) -> Tensor:
        """Return z at the ids this rank owns, −inf at the others, [C, K] wide.

        K dot products a token where no dense logits exist. An id outside the vocabulary is nobody's
        and stays −inf on every rank: it must not pass for a number.
        """
        if not self.width:
            return self.hidden_CH.new_full(ids_CK.shape, -math.inf, dtype=wide(self.hidden_CH))
        column_CK, owned_CK = self.own(ids_CK)
        if self.dense:
            z_CK = self.z_CV.gather(-1, column_CK).to(wide(self.hidden_CH))
        else:
            z_CK = self.projector.dots(self.hidden_CH, column_CK)
        return z_CK.masked_fill_(~owned_CK, -math.inf)

    def logsumexp(self, scale: float = 1.0) -> Tensor:
        """Return log Σ exp(z·scale) over this rank's columns, [C]."""
        return self.by_rows(
            lambda z_CV: (z_CV if scale == 1.0 else z_CV * scale).logsumexp(-1), self.z_CV
        )

    def remove(self, ids_CK: Tensor, valid_CK: Tensor) -> None:
        """Set z to −inf at some ids: what is left is the complement."""
        if not self.width:
            return
        column_CK, owned_CK = self.own(ids_CK)
        away_CK = owned_CK & valid_CK
        # every other id is given a place that is written anyway: equal writes have no order
        place_C1 = column_CK.gather(-1, away_CK.int().argmax(-1, keepdim=True))
        kept_C1 = self.z_CV.gather(-1, place_C1).masked_fill_(away_CK.any(-1, True), -math.inf)
        column_CK = torch.where(away_CK, column_CK, place_C1)
        row_C1 = torch.arange(len(column_CK), device=column_CK.device)[:, None]
        # scatter_ would copy all of z, were it bf16 on a CPU
        self.z_CV.index_put_((row_C1, column_CK), kept_C1.expand_as(column_CK))

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """Return this rank's k highest logits and their ids, padded with −inf, [C, k]."""
        looked_at = 4 * min(self.width, k * COLUMNS)  # some of it in 8 bytes an entry
        rows = blocks(len(self.z_CV), looked_at, self.z_CV.device)
        found = zip(*(_first_of_sorted(self.z_CV[block], k) for block in rows), strict=True)
        value_CK, column_CK = (torch.cat(parts) for parts in found)
        missing = (0, k - value_CK.shape[-1])  # a rank may own fewer than k columns
        value_CK = F.pad(value_CK.to(wide(self.hidden_CH)), missing, value=-math.inf)
        return value_CK, F.pad(column_CK + self.start, missing)

    def by_rows(self, f, *tensors: Tensor) -> Tensor:
        """Apply `f` to blocks of rows, in wide arithmetic, and join what it returns."""
        dtype, rows = wide(self.hidden_CH), len(tensors[0])
        joined = None
        for block in blocks(rows, self.width, tensors[0].device):
            part = f(*(tensor[block].to(dtype) for tensor in tensors))
            if joined is None:  # one memory for all: small results in between the large ones that
                joined = part.new_empty(rows, *part.shape[1:])  # come and go would hold theirs open
            joined[block] = part
        assert joined is not None, "no tokens"
        return joined


class Ranks:
    """The tensor-parallel group of a head. Each method is one collective, or none on one rank."""

    def __init__(self, group):
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)

    def logsumexp(self, x: Tensor) -> Tensor:
        """Return log Σ exp x over ranks: the value, where one has it and the others −inf."""
        return x if self.size == 1 else self._gather(x).logsumexp(0)

    def sum(self, x: Tensor) -> Tensor:
        """Return Σ x over ranks; `x` is overwritten."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def top(self, *shards: VocabShard, k: int) -> list[Tensor]:
        """Return the ids of each shard's k highest logits, best first, [C, k] int64 each.

        The lowest id goes first among equals (bf16 logits tie all the time), so the ids are the
        same for any number of ranks. Wants k ≤ vocab_size.
        """
        value_MCK, ids_MCK = (torch.stack(x) for x in zip(*(s.top(k) for s in shards), strict=True))
        if self.size > 1:
            # ids travel as numbers beside the values: fp32 holds every integer below 2^24 = 16.8 M
            both = self._gather(torch.stack([value_MCK, ids_MCK.to(value_MCK.dtype)]))
            value, ids = both.movedim(0, -2).flatten(-2)  # ranks in order, so ids among equals
            best_MCK = value.sort(dim=-1, descending=True, stable=True).indices[..., :k]
            ids_MCK = ids.gather(-1, best_MCK).long()
        return list(ids_MCK)

    def _gather(self, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.stack(parts)


def chunk_tokens(columns: int, itemsize: int, device: str, *, dense_gradient: bool) -> int:
    """Return how many tokens' logits may exist at once, of `columns` on a rank.

    Fewer do where no gradient of all logits is to be multiplied out: a chunk then reads the head
    once instead of three times.
    """
    memory = LOGITS_BYTES[device] if dense_gradient else LOGITS_BYTES[device] * 2 // 5
    return max(FEWEST_TOKENS * itemsize, memory // (columns * itemsize))


def blocks(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Yield slices of rows whose entries stay in a cache (CPU), or in a bounded memory (GPU)."""
    step = max(1, ARITHMETIC[device.type] // max(width, 1))
    for start in range(0, rows, step):
        yield slice(start, start + step)


def wide(x: Tensor) -> torch.dtype:
    """Return the dtype softmax arithmetic on `x` is done in: fp32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def _first_of_sorted(x_CV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return values and columns of the first k of a stable descending sort, without sorting.

    Cut a row into blocks of columns. An entry outside the k blocks of highest maximum (the leftmost
    among equals) has k entries before it, one in each: only k blocks need a second look.
    """
    width, k = x_CV.shape[-1], min(k, x_CV.shape[-1])
    if width >= 2 * COLUMNS * k:
        whole = width // COLUMNS * COLUMNS
        maxima = x_CV[:, :whole].unflatten(-1, (-1, COLUMNS)).amax(-1)
        if whole < width:
            maxima = torch.cat([maxima, x_CV[:, whole:].amax(-1, keepdim=True)], -1)
        best = _leading(maxima, k)
        column = (best[..., None] * COLUMNS + torch.arange(COLUMNS, device=x_CV.device)).flatten(-2)
        value = x_CV.gather(-1, column.clamp(max=width - 1))
        value.masked_fill_(column >= width, -math.inf)
        among = _leading(value, k)
        column, value = column.gather(-1, among), value.gather(-1, among)
    else:
        column = _leading(x_CV, k)
        value = x_CV.gather(-1, column)
    value, order = value.sort(dim=-1, descending=True, stable=True)
    return value, column.gather(-1, order)


def _leading(x_CV: Tensor, k: int) -> Tensor:
    """Return the columns, ascending, of the k highest entries, the leftmost among equals."""
    kth_C1 = x_CV.topk(k).values[:, -1:]
    above_CV, tied_CV = x_CV > kth_C1, x_CV == kth_C1
    room_C1 = k - above_CV.sum(-1, keepdim=True)
    kept_CV = above_CV | (tied_CV & (tied_CV.cumsum(-1, dtype=torch.int32) <= room_C1))
    leftness_V = torch.arange(x_CV.shape[-1], 0, -1, device=x_CV.device, dtype=torch.int32)
    return torch.where(kept_CV, leftness_V, 0).topk(k).indices
