"""Which replica trains on which rollouts: about equal work, so that none waits for another.

Replicas meet when their gradients are added up, at the end of a step. Until then each takes as many
microbatches as its rollouts need; but replicas that share experts meet in every layer of each.

R replicas. A unit is a rollout, or all rollouts of one prompt. The dearest unit first, each to the
replica with the least work so far (longest processing time first, Graham 1969):

    highest ≤ mean + (1 − 1/R) · dearest unit, and highest ≤ (4/3 − 1/(3R)) · the best there is
"""

import heapq
import pickle
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_opd.packing import by_teacher, needed_microbatches
from megatron_opd.parallel import Parallel
from megatron_opd.types import Rollout


def share_out(
    rollouts: Sequence[Rollout],
    cost: Callable[[Rollout], float],
    parallel: Parallel,
    *,
    whole_prompts: bool,
) -> tuple[list[Rollout], float]:
    """Return what this replica trains on, and mean over highest cost of all replicas (1: equal).

    Collective over `dp_group`, with the same answer on all ranks of a replica. Costs are gathered;
    a rollout goes from the replica that has it to the one that trains on it, and to no other.
    `whole_prompts` keeps the responses to a prompt together.
    """
    units = _units(rollouts, whole_prompts)
    shares: list[Any] = [None] * parallel.dp
    own = [sum(map(cost, unit)) for unit in units]
    dist.all_gather_object(shares, own, group=parallel.dp_group)
    places = assign(shares)
    parts: list[list[Rollout]] = [[] for _ in shares]
    for unit, place in zip(units, places[parallel.dp_rank], strict=True):
        parts[place] += unit
    mine = [r for part in exchange(parts, parallel.dp_group, parallel.device) for r in part]
    loads = [0.0] * parallel.dp
    for costs, chosen in zip(shares, places, strict=True):
        for one, place in zip(costs, chosen, strict=True):
            loads[place] += one
    return mine, sum(loads) / len(loads) / max(loads)


def _units(rollouts: Sequence[Rollout], whole_prompts: bool) -> list[list[Rollout]]:
    """Return what moves as one: each rollout, or the rollouts of each prompt."""
    if not whole_prompts:
        return [[rollout] for rollout in rollouts]
    groups: dict[tuple[int, int], list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault((rollout.prompt.index, rollout.prompt.copy), []).append(rollout)
    return list(groups.values())


def assign(shares: Sequence[Sequence[float]]) -> list[list[int]]:
    """Return the replica that takes each unit; `shares[r]` are the costs of those that r has.

    Every replica gets one, as none comes without: so long as there are units, the replicas without
    one are those with the least work.
    """
    units = [(cost, r, i) for r, costs in enumerate(shares) for i, cost in enumerate(costs)]
    places = [[0] * len(costs) for costs in shares]
    loads = [(0.0, replica) for replica in range(len(shares))]
    for cost, source, index in sorted(units, key=lambda unit: (-unit[0], *unit[1:])):
        load, replica = loads[0]
        places[source][index] = replica
        heapq.heapreplace(loads, (load + cost, replica))
    return places


def exchange(
    parts: Sequence[list[Rollout]], group: Any, device: torch.device
) -> list[list[Rollout]]:
    """Send parts[r] to rank r of `group`; return what each rank has sent here, in their order.

    One all-to-all of bytes: nothing passes through a third rank, and what stays is not sent.
    """
    rank = dist.get_rank(group)
    sent = [b"" if r == rank else pickle.dumps(part) for r, part in enumerate(parts)]
    sizes = torch.tensor([len(part) for part in sent], device=device)
    incoming = torch.empty_like(sizes)
    dist.all_to_all_single(incoming, sizes, group=group)
    lengths = incoming.tolist()
    received = torch.empty(sum(lengths), dtype=torch.uint8, device=device)
    joined = torch.from_numpy(np.array(bytearray(b"".join(sent)))).to(device)
    dist.all_to_all_single(received, joined, lengths, sizes.tolist(), group=group)
    data = received.cpu().numpy().tobytes()
    bounds = pairwise(accumulate(lengths, initial=0))
    return [
        list(parts[rank]) if r == rank else pickle.loads(data[start:stop])
        for r, (start, stop) in enumerate(bounds)
    ]


def rounds(
    rollouts: Sequence[Rollout], microbatch_tokens: int, parallel: Parallel
) -> list[tuple[list[Rollout], int]]:
    """Return what to pack, for each teacher: its rollouts and a number of microbatches.

    The fewest, but where the schedule runs more, as many as it runs: as the replica with most where
    replicas share experts, and a multiple of `pp` where stages are virtual. So none of them is
    empty that need not be.
    """
    own = by_teacher(rollouts)
    counts = {name: needed_microbatches(of_one, microbatch_tokens) for name, of_one in own.items()}
    seen: list[Any] = [counts]
    if parallel.shares_experts:
        seen *= parallel.dp
        dist.all_gather_object(seen, counts, group=parallel.dp_group)
    step = parallel.pp if parallel.vpp > 1 else 1
    found = []
    for name, of_one in own.items():
        most = max(one.get(name, 0) for one in seen)
        found.append((of_one, min(-(-most // step) * step, len(of_one))))
    return found
