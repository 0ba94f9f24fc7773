"""Rollouts → balanced, packed microbatches.

A sequence is prompt + response without the last response token: nothing comes after it, so its
hidden state would predict nothing. Every response token is a target once; the position before it is
its source. A microbatch has one teacher.

Shapes: T packed tokens · N targets, M of them measured · K ids · S sequences, of one microbatch.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from megatron_opd.types import Microbatch, Rollout


def needed_microbatches(rollouts: Sequence[Rollout], microbatch_tokens: int) -> int:
    """Return the fewest microbatches of at most `microbatch_tokens` that `pack` fits these in.

    For rollouts of one teacher, every number from this to that of the rollouts does too: until each
    microbatch holds one sequence, there is one to split. So replicas can agree on a maximum.

    Raises:
        ValueError: no rollouts; an empty response; a sequence longer than a microbatch.
    """
    return sum(
        _fewest(_lengths(own, microbatch_tokens), microbatch_tokens)
        for own in by_teacher(rollouts).values()
    )


def pack(
    rollouts: Sequence[Rollout],
    *,
    microbatch_tokens: int,
    count: int | None = None,
    cost: Callable[[Rollout], float] | None = None,
    multiple: int = 1,
    cp: int = 1,
    measure_fraction: float = 1.0,
    seed: int = 0,
) -> list[Microbatch]:
    """Distribute rollouts over `count` microbatches of about equal cost, or tokens without `cost`.

    `count` (default: the fewest) is for rollouts of one teacher. The microbatches of one teacher
    follow those of another, in alphabetical order. Where the teacher reads another prompt, a
    sequence has the tokens of the longer of both.

    T is filled up to a multiple of `multiple` with one more sequence that no source points into.
    For `cp` context-parallel ranks, whose share of T is filled up so, each sequence gets a multiple
    of 2 · cp tokens before: nothing that counts comes after its filling. For these alone T may pass
    `microbatch_tokens`. Each supervised token is measured with
    probability `measure_fraction`, by a draw that depends on `seed` (of the step), its prompt,
    sample and position alone.

    Raises:
        ValueError: as `needed_microbatches`; `count` is below it or above the sequences there are.
    """
    groups = by_teacher(rollouts)
    assert count is None or len(groups) == 1, "each teacher's rollouts have a count of their own"
    return [
        _build([own[i] for i in members], (multiple, cp), measure_fraction, seed)
        for own in groups.values()
        for members in _bins(own, microbatch_tokens, count, cost)
    ]


def by_teacher(rollouts: Sequence[Rollout]) -> dict[str, list[Rollout]]:
    """Return the rollouts that each teacher judges, by its name in alphabetical order.

    Raises:
        ValueError: there are no rollouts.
    """
    if not rollouts:
        raise ValueError("rollouts: got none, expected at least one to train on")
    groups: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.prompt.teacher, []).append(rollout)
    return dict(sorted(groups.items()))


def _bins(
    rollouts: Sequence[Rollout],
    limit: int,
    count: int | None,
    cost: Callable[[Rollout], float] | None,
) -> list[list[int]]:
    """Return which rollouts of a teacher share a microbatch."""
    lengths = _lengths(rollouts, limit)
    needed = _fewest(lengths, limit)
    count = needed if count is None else count
    if not needed <= count <= len(rollouts):
        raise ValueError(
            f"count: got {count} microbatches, expected {needed} to {len(rollouts)} for "
            f"{len(rollouts)} sequences, {sum(lengths)} tokens"
        )
    costs = lengths if cost is None else [cost(rollout) for rollout in rollouts]
    # where the balance of costs leaves no room for the last, that of tokens does
    return _balance(costs, count, lengths, limit) or _balance(lengths, count)


def packed_tokens(rollout: Rollout) -> int:
    """Return the tokens that a rollout takes in a forward, after the longer of both prompts."""
    prompt = max(len(rollout.prompt.token_ids), len(rollout.prompt.teacher_token_ids or ()))
    return prompt + len(rollout.response_ids) - 1


def _lengths(rollouts: Sequence[Rollout], limit: int) -> list[int]:
    """Tokens that each rollout takes in a forward, after checking that it can be packed."""
    lengths = []
    for rollout in rollouts:
        prompt, response = len(rollout.prompt.token_ids), len(rollout.response_ids)
        name = f"rollout of prompt {rollout.prompt.index}, sample {rollout.sample}"
        if not prompt or not response or len(rollout.logp) != response:
            raise ValueError(
                f"{name}: got {prompt} prompt tokens, {response} response tokens, "
                f"{len(rollout.logp)} log-probabilities; expected at least one token each, and a "
                "log-probability for every response token"
            )
        lengths.append(packed_tokens(rollout))
        if lengths[-1] > limit:
            raise ValueError(
                f"{name}: {lengths[-1]} tokens do not fit train.microbatch_tokens={limit}; raise "
                "it, or lower rollout.max_tokens"
            )
    return lengths


def _fewest(lengths: list[int], limit: int) -> int:
    def heaviest(count: int) -> int:
        return max(sum(lengths[i] for i in members) for members in _balance(lengths, count))

    start = -(-sum(lengths) // limit)
    return next(count for count in range(start, len(lengths) + 1) if heaviest(count) <= limit)


def _balance(
    costs: Sequence[float], count: int, lengths: Sequence[int] = (), limit: int = 0
) -> list[list[int]]:
    """Put the dearest first, each into the cheapest bin; members of a bin keep their order.

    The dearest bin never gets dearer with more bins (at any time the loads of `count` bins
    dominate, sorted, the upper `count` of `count + 1`), which is what lets a replica use more.

    With `lengths`, into the cheapest bin that has room under `limit`; [] where none has.
    """
    bins: list[list[int]] = [[] for _ in range(count)]
    loads, room = [(0.0, index) for index in range(count)], [limit] * count
    lengths = lengths or [0] * len(costs)
    for member in sorted(range(len(costs)), key=lambda i: -costs[i]):
        full = []
        while loads and room[loads[0][1]] < lengths[member]:
            full.append(heapq.heappop(loads))
        if not loads:
            return []
        load, index = loads[0]
        heapq.heapreplace(loads, (load + costs[member], index))
        bins[index].append(member)
        room[index] -= lengths[member]
        for entry in full:
            heapq.heappush(loads, entry)
    return [sorted(members) for members in bins]


def _context(rollouts: list[Rollout], multiples: tuple[int, int]) -> Microbatch | None:
    """Pack the same responses after what their teacher reads, where that is something else."""
    read = [r.prompt.teacher_token_ids for r in rollouts]
    if all(ids is None for ids in read):
        return None
    exchanged = []
    for rollout, ids in zip(rollouts, read, strict=True):
        tokens = rollout.prompt.token_ids if ids is None else ids
        prompt = replace(rollout.prompt, token_ids=tokens, teacher_token_ids=None)
        exchanged.append(replace(rollout, prompt=prompt, top_ids=None, top_logp=None))
    return _build(exchanged, multiples, 0.0, 0)


def _build(
    rollouts: list[Rollout], multiples: tuple[int, int], fraction: float, seed: int
) -> Microbatch:
    prompt_S = np.array([len(r.prompt.token_ids) for r in rollouts])
    response_S = np.array([len(r.response_ids) for r in rollouts])
    length_S, tokens = prompt_S + response_S - 1, [_joined(r) for r in rollouts]
    of_sequence, of_pack = _filled_up_to(*multiples)
    length_S += -length_S % of_sequence
    tokens = [np.pad(ids, (0, n - len(ids))) for ids, n in zip(tokens, length_S, strict=True)]
    fill = -int(length_S.sum()) % of_pack
    if fill:
        tokens.append(np.zeros(fill, np.int64))
        length_S = np.append(length_S, fill)
    start_S = length_S.cumsum() - length_S
    last_prompt_S = start_S[: len(rollouts)] + prompt_S - 1
    position_N = _count_up(response_S)
    mask_S = np.array([not r.masked for r in rollouts], np.float32)
    measured_N = np.concatenate([_measured(r, fraction, seed) for r in rollouts])
    target_N = np.concatenate([np.array(r.response_ids, np.int64) for r in rollouts])
    logp_N = np.concatenate([np.array(r.logp, np.float32) for r in rollouts])
    scored = all(r.reward is not None for r in rollouts)
    return Microbatch(
        token_T=torch.from_numpy(np.concatenate(tokens)),
        position_T=torch.from_numpy(_count_up(length_S)),
        cu_seqlens=torch.from_numpy(np.append(0, length_S.cumsum()).astype(np.int32)),
        max_seqlen=int(length_S.max()),
        source_N=torch.from_numpy(np.repeat(last_prompt_S, response_S) + position_N),
        target_N=torch.from_numpy(target_N),
        mask_N=torch.from_numpy(np.repeat(mask_S, response_S)),
        rollout_logp_N=torch.from_numpy(logp_N),
        position_N=torch.from_numpy(position_N),
        sequence_N=torch.from_numpy(np.repeat(np.arange(len(rollouts)), response_S)),
        measured_M=torch.from_numpy(np.flatnonzero(measured_N)),
        rollout_ids_NK=_top_ids(rollouts),
        drawn_N=_each(rollouts, response_S, "drawn", unless=all(r.drawn for r in rollouts)),
        reward_N=_each(rollouts, response_S, "reward", unless=not scored),
        advantage_N=_each(rollouts, response_S, "advantage", unless=not scored),
        group_N=torch.from_numpy(np.repeat([_group(r) for r in rollouts], response_S)),
        teacher=rollouts[0].prompt.teacher,
        context=_context(rollouts, multiples),
    )


def _filled_up_to(multiple: int, cp: int) -> tuple[int, int]:
    """Return of what a sequence, and of what a pack, has a multiple of tokens."""
    return (2 * cp, cp * math.lcm(2, multiple)) if cp > 1 else (1, multiple)


def _each(
    rollouts: list[Rollout], response_S: np.ndarray, name: str, *, unless: bool
) -> torch.Tensor | None:
    """Return what is known of each rollout at each of its tokens."""
    if unless:
        return None
    value_S = np.array([getattr(r, name) for r in rollouts], np.float32)
    return torch.from_numpy(np.repeat(value_S, response_S))


def _group(rollout: Rollout) -> int:
    """Return one number for prompt and copy; 2^20 copies are more than a step has prompts."""
    return rollout.prompt.index << 20 | rollout.prompt.copy


def _joined(rollout: Rollout) -> np.ndarray:
    return np.array(rollout.prompt.token_ids + rollout.response_ids[:-1], np.int64)


def _count_up(length_S: np.ndarray) -> np.ndarray:
    """Return 0 … length-1 for every length, one after the other."""
    return np.arange(length_S.sum()) - np.repeat(length_S.cumsum() - length_S, length_S)


def _measured(rollout: Rollout, fraction: float, seed: int) -> np.ndarray:
    """Say of each response token whether it is measured; a generator of the rollout's own draws."""
    if rollout.masked:
        return np.zeros(len(rollout.response_ids), bool)
    draw = np.random.default_rng((seed, rollout.prompt.index, rollout.sample))
    return draw.random(len(rollout.response_ids)) < fraction


def _top_ids(rollouts: list[Rollout]) -> torch.Tensor | None:
    ids = [r.top_ids for r in rollouts if r.top_ids is not None]
    if len(ids) < len(rollouts):
        return None
    return torch.from_numpy(np.concatenate(ids).astype(np.int64))
