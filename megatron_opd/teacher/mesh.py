"""A teacher on a mesh of its own: its tp, pp and ep, on the ranks of the student.

Shape suffixes: T packed tokens · N supervised tokens · W numbers of an answer to one token ·
K most likely ids · H hidden size of the teacher.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_opd import zigzag
from megatron_opd.parallel import Parallel
from megatron_opd.teacher.megatron import MegatronTeacher
from megatron_opd.teacher.relayout import Deal, Item, Meshes, Size, exchange
from megatron_opd.types import (
    Head,
    HiddenScores,
    Microbatch,
    SampledScores,
    Scores,
    TopKScores,
)


class MeshTeacher:
    """Let `inner`, on its own mesh, judge the microbatches of `student`, the mesh that asks.

    What travels is what `inner.payload` says of every supervised token: a hidden state in the
    teacher's dtype, k ids in int32 and log-probabilities in fp32, or one fp32. `head`: the
    teacher's rows of the *student's* vocabulary shards, which the loss multiplies hidden states
    with (last stage of the student, payload hidden; elsewhere None).
    """

    def __init__(self, inner: MegatronTeacher, student: Parallel, head: Head | None):
        self.inner, self.student, self.head = inner, student, head
        self.meshes = Meshes(student, inner.parallel)
        self.bytes_sent = 0  # to other ranks, by this one, since somebody looked

    def close(self) -> None:
        """Do nothing: the weights go with the process."""

    @torch.no_grad()
    def score(self, microbatches: list[Microbatch]) -> list[Scores | None]:
        """Return one judgement per microbatch on the student's last stage, None on the others.

        Collective over all ranks; replicas may have other numbers of microbatches, or none.
        """
        whole = [batch.whole for batch in microbatches]
        deal = self.meshes.deal(self.student.agree(lambda: [self._size(b) for b in whole]))
        judged = self._fetch(deal, whole)
        kept = self._judge(deal, judged)
        answers = self._return(deal, kept)
        return [self._scores(answers[i]) if i in answers else None for i in range(len(whole))]

    def _size(self, batch: Microbatch) -> Size:
        owners = _owners(batch, self.student.cp)
        counts = owners.bincount(minlength=self.student.cp).tolist()
        return Size(len(batch.token_T), len(batch.cu_seqlens), tuple(counts))

    def _fetch(self, deal: Deal, own: Sequence[Microbatch]) -> list[Microbatch]:
        """Bring the microbatches that this rank's replica of the teacher is to judge."""
        flat = [self._flatten(batch) for batch in own]
        sends = [(flat[item.index], target) for item, target in deal.ids_out()]
        arriving = {item: (self._empty(item), source) for item, source in deal.ids_in()}
        self.bytes_sent += exchange(sends, list(arriving.values()))
        found = [
            arriving[item][0] if item in arriving else flat[item.index] for item in deal.judged
        ]
        return [
            self._unflatten(item, numbers) for item, numbers in zip(deal.judged, found, strict=True)
        ]

    @property
    def _wants_targets(self) -> bool:
        return self.inner.payload == "sampled"

    def _flatten(self, batch: Microbatch) -> Tensor:
        """Return what the teacher must know, int32: tokens, bounds, sources, perhaps targets.

        Sources of one context-parallel rank come before those of the next: so does the answer.
        """
        order = _owners(batch, self.student.cp).argsort(stable=True)
        parts = [batch.token_T, batch.cu_seqlens, batch.source_N[order]]
        parts += [batch.target_N[order]] if self._wants_targets else []
        return torch.cat([part.int() for part in parts])

    def _empty(self, item: Item) -> Tensor:
        """Return room for what `_flatten` makes of an item."""
        size = item.size
        numbers = size.tokens + size.bounds + sum(size.sources) * (1 + self._wants_targets)
        return torch.empty(numbers, dtype=torch.int32, device=self.student.device)

    def _unflatten(self, item: Item, flat: Tensor) -> Microbatch:
        tokens, bounds, supervised = item.size.tokens, item.size.bounds, sum(item.size.sources)
        token_T, cu_seqlens, source_N, target_N = flat.tensor_split(
            [tokens, tokens + bounds, tokens + bounds + supervised]
        )
        return _readable(token_T, cu_seqlens, source_N, target_N, self._multiple)

    @property
    def _multiple(self) -> int:
        own = self.inner.parallel
        return own.tp if own.sequence_parallel else 1

    def _judge(self, deal: Deal, judged: Sequence[Microbatch]) -> dict[Item, "_Rows"]:
        """Return what is to be kept or sent of each judgement (the teacher's last stage)."""
        needed, kept = self._needed(deal), {}

        def keep(index: int, hidden_NH: Tensor) -> None:
            item, scores = deal.judged[index], self.inner.judge(hidden_NH, judged[index])
            kept[item] = _Rows(_as_rows(scores), needed[item])

        with self.inner.parallel.current():
            self.inner.run(judged, keep)
        return kept

    def _needed(self, deal: Deal) -> dict[Item, list[slice]]:
        """Return which rows of its answers this rank will send, or keep."""
        needed: dict[Item, list[slice]] = {item: [] for item in deal.judged}
        for item, rows, _ in deal.answers_out():
            needed[item].append(rows)
        for item, rows, source in self._arriving(deal):
            if source == self.student.rank:
                needed[item].append(rows)
        return needed

    def _arriving(self, deal: Deal) -> list[tuple[Item, slice, int]]:
        return list(deal.answers_in()) if self.student.is_last_stage else []

    def _return(self, deal: Deal, kept: dict[Item, "_Rows"]) -> dict[int, Tensor]:
        """Bring the answers to this rank's microbatches, by their index: their own rows."""
        sends = [(kept[item].at(rows), target) for item, rows, target in deal.answers_out()]
        answers, receives = {}, []
        for item, rows, source in self._arriving(deal):
            if source == self.student.rank:
                answers[item.index] = kept[item].at(rows)
                continue
            mine = item.rows(self.student.cp_rank)
            room_NW = answers.setdefault(item.index, self._room(mine.stop - mine.start))
            receives.append((room_NW[rows.start - mine.start : rows.stop - mine.start], source))
        self.bytes_sent += exchange(sends, receives)
        return answers

    def _room(self, rows: int) -> Tensor:
        """Return memory for an answer to so many tokens, as `_as_rows` writes it."""
        config = self.inner.model.config
        width, dtype = {
            "hidden": (config.hidden_size, config.params_dtype),
            "topk": (2 * self.inner.k, torch.int32),
            "sampled": (1, torch.float32),
        }[self.inner.payload]
        return torch.empty(rows, width, dtype=dtype, device=self.student.device)

    def _scores(self, rows_NW: Tensor) -> Scores:
        """Undo `_as_rows`."""
        if self.inner.payload == "hidden":
            assert self.head is not None
            return HiddenScores(rows_NW, self.head)
        if self.inner.payload == "sampled":
            return SampledScores(rows_NW[:, 0], self.inner.temperature)
        ids_NK, logp_NK = rows_NW.chunk(2, dim=1)
        return TopKScores(ids_NK.long(), logp_NK.view(torch.float32), self.inner.temperature)


def _as_rows(scores: Scores) -> Tensor:
    """Return a judgement as one tensor with a row for every token."""
    if isinstance(scores, HiddenScores):
        return scores.hidden_NH
    if isinstance(scores, SampledScores):
        return scores.logp_N.float()[:, None]
    return torch.cat([scores.ids_NK.int(), scores.logp_NK.float().view(torch.int32)], dim=1)


class _Rows:
    """The rows of a judgement that somebody needs; the memory of the others is free."""

    def __init__(self, whole_NW: Tensor, needed: Sequence[slice]):
        self.parts: list[tuple[slice, Tensor]] = []
        for rows in sorted(needed, key=lambda rows: rows.start - rows.stop):
            if not any(_within(rows, kept) for kept, _ in self.parts):
                part_NW = whole_NW[rows]
                everything = len(part_NW) == len(whole_NW)
                self.parts.append((rows, part_NW if everything else part_NW.clone()))

    def at(self, rows: slice) -> Tensor:
        """Return some of the rows that were needed."""
        kept, part_NW = next(one for one in self.parts if _within(rows, one[0]))
        return part_NW[rows.start - kept.start : rows.stop - kept.start]


def _within(rows: slice, others: slice) -> bool:
    return others.start <= rows.start and rows.stop <= others.stop


def _owners(batch: Microbatch, cp: int) -> Tensor:
    """Return which of `cp` ranks has each source of a whole microbatch, [N]."""
    if cp == 1:
        return torch.zeros_like(batch.source_N)
    return zigzag.places(batch.cu_seqlens, cp)[0][batch.source_N]


def _readable(
    token_T: Tensor, bounds: Tensor, source_N: Tensor, target_N: Tensor, multiple: int
) -> Microbatch:
    """Return a microbatch, filled up to a multiple of tokens with one more sequence.

    What only a loss looks at is not in it.
    """
    fill = -len(token_T) % multiple
    if fill:
        token_T = torch.cat([token_T, token_T.new_zeros(fill)])
        bounds = torch.cat([bounds, bounds[-1:] + fill])
    lengths, none = bounds.diff().long(), source_N.new_zeros(0)
    start_T = bounds[:-1].long().repeat_interleave(lengths)
    return Microbatch(
        token_T=token_T.long(),
        position_T=torch.arange(len(token_T), device=token_T.device) - start_T,
        cu_seqlens=bounds,
        max_seqlen=int(lengths.max()),
        source_N=source_N.long(),
        target_N=target_N.long(),
        mask_N=none,
        rollout_logp_N=none,
        position_N=none,
        sequence_N=none,
        measured_M=none,
    )
