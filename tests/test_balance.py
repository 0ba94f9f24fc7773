"""Every rollout is trained on once, where the least work waits, and the step is the same step."""

from dataclasses import replace
from functools import cache
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.balance import assign, exchange, rounds, share_out
from megatron_opd.loss import Objective
from megatron_opd.model import export_hf
from megatron_opd.packing import pack
from megatron_opd.step import train_step
from tests.distributed import run_ranks
from tests.layouts import Layout, pack_here
from tests.tiny import make_rollouts, qwen3_moe
from tests.training import ROLLOUTS, Setup, assert_same, judgements, make

LIMIT = 40
SHAPES = [(3, 30), (7, 2), (4, 9), (2, 1), (6, 6), (5, 28), (9, 3), (1, 4)]
costs = st.integers(1, 10**6).map(float) | st.just(7.0)
share_lists = st.lists(st.lists(costs, min_size=1, max_size=12), min_size=1, max_size=9)


def work(rollout):
    """A cost that grows faster than the length."""
    length = len(rollout.prompt.token_ids) + len(rollout.response_ids) - 1
    return length + length**2 / 16


def loads_of(shares, places):
    found = [0.0] * len(shares)
    for own, chosen in zip(shares, places, strict=True):
        for cost, place in zip(own, chosen, strict=True):
            found[place] += cost
    return found


@settings(deadline=None)
@given(share_lists)
def test_the_highest_cost_is_within_the_bound_and_every_replica_has_some(shares):
    places = assign(shares)
    assert [len(chosen) for chosen in places] == [len(own) for own in shares]
    loads, replicas = loads_of(shares, places), len(shares)
    dearest, mean = max(map(max, shares)), sum(loads) / replicas
    assert min(loads) > 0
    assert max(loads) <= mean + (1 - 1 / replicas) * dearest + 1e-9 * mean
    # longest first: without its cheapest unit, which came last, nobody has more than another
    for replica, load in enumerate(loads):
        pairs = zip(chain(*shares), chain(*places), strict=True)
        assert load - min(cost for cost, at in pairs if at == replica) <= min(loads)


def test_costs_of_a_heavy_tail_become_equal():
    draw = torch.Generator().manual_seed(0)
    lengths = (torch.randn(8, 256, generator=draw) + 7).exp().clamp(max=16384)
    shares = (lengths + lengths**2 / 16384).tolist()

    def highest(loads):
        return max(loads) / (sum(loads) / 8)

    assert highest([sum(own) for own in shares]) > 1.1
    assert highest(loads_of(shares, assign(shares))) < 1.001


def dealt(parallel, shapes=SHAPES, **how):
    """Rollouts as replicas generate them: four samples of two prompts, a prompt in turn."""
    rollouts = make_rollouts(shapes, top=8)
    first = [rollouts[i - i % 4].prompt for i in range(len(rollouts))]
    return [
        replace(r, prompt=replace(p, index=i // 4, **how), sample=i % 4)
        for i, (r, p) in enumerate(zip(rollouts, first, strict=True))
        if i // 4 % parallel.dp == parallel.dp_rank
    ]


def contents(rollout):
    return rollout, rollout.top_ids.tolist()


def _shared(rank, layout, whole):
    parallel = layout.join()
    mine = dealt(parallel, SHAPES * 4)
    kept, balance = share_out(mine, work, parallel, whole_prompts=whole)
    again, _ = share_out(mine, work, parallel, whole_prompts=whole)
    assert [contents(r) for r in again] == [contents(r) for r in kept]
    assert parallel.dp > 1 or all(a is b for a, b in zip(mine, kept, strict=True))
    return parallel.dp_rank, [contents(r) for r in mine], [contents(r) for r in kept], balance


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(dp=4), Layout(tp=2, dp=2), Layout(pp=2, dp=2), Layout(cp=2, dp=2)],
    ids=str,
)
def test_rollouts_move_whole_and_arrive_once_on_all_ranks_of_a_replica(layout, whole):
    ranks = run_ranks(_shared, layout.world, layout, whole)
    replicas = {dp_rank: (had, has) for dp_rank, had, has, _ in ranks}
    for dp_rank, _, has, balance in ranks:
        assert has == replicas[dp_rank][1] and balance == ranks[0][3]
    before = [one for had, _ in replicas.values() for one in had]
    after = [one for _, has in replicas.values() for one in has]
    key = lambda one: (one[0].prompt.index, one[0].sample)  # noqa: E731
    assert sorted(after, key=key) == sorted(before, key=key) and len(before) == 32
    loads = [sum(work(rollout) for rollout, _ in has) for _, has in replicas.values()]
    assert balance == pytest.approx(sum(loads) / len(loads) / max(loads))
    if whole:
        homes = [{r.prompt.index for r, _ in has} for _, has in replicas.values()]
        assert sum(map(len, homes)) == 8
    elif len(loads) > 1:
        assert balance > 0.97 and before != after


def _exchanged(rank):
    """Ranks 0 and 1 swap, 2 keeps its own and hears nothing, 3 has nothing and hears nothing."""
    parallel, rollouts = Layout(dp=4).join(), make_rollouts(SHAPES)
    parts = [[[], rollouts[:3]], [rollouts[3:4], []], [], []][rank] or [[], []]
    parts = [*parts, [], []]
    if rank == 2:
        parts[2] = rollouts[4:]
    return exchange(parts, parallel.dp_group, parallel.device)


def test_an_exchange_with_nothing_for_some():
    rollouts, nothing = make_rollouts(SHAPES), [[], [], [], []]
    assert run_ranks(_exchanged, 4) == [
        [[], rollouts[3:4], [], []],
        [rollouts[:3], [], [], []],
        [[], [], rollouts[4:], []],
        nothing,
    ]


def _rounds(rank, layout, shares):
    """Return dp_rank, and the teacher of every microbatch."""
    parallel, every = layout.join(), make_rollouts(SHAPES)
    mine = [
        replace(every[i], prompt=replace(every[i].prompt, teacher=name))
        for i, name in shares[parallel.dp_rank]
    ]
    packed = [
        batch
        for own, count in rounds(mine, LIMIT, parallel)
        for batch in pack(own, microbatch_tokens=LIMIT, count=count, cost=work)
    ]
    assert sum(len(mb.target_N) for mb in packed) == sum(len(r.response_ids) for r in mine)
    return parallel.dp_rank, [mb.teacher for mb in packed]


APART = [  # two replicas' rollouts, and their teachers
    [(0, "a"), (5, "a"), (3, "b"), (6, "c")],
    [(1, "a"), (2, "a"), (7, "a"), (4, "b")],
]
ROUNDS = {  # layout → what each replica packs
    "DP2": (Layout(dp=2), APART, {0: "aabc", 1: "ab"}),
    "EP2": (Layout(dp=2, ep=2), APART, {0: "aabc", 1: "aab"}),
    "EP2 within": (Layout(tp=2, dp=2, ep=2, etp=1), APART, {0: "aabc", 1: "ab"}),
    "VPP2": (Layout(pp=2, vpp=2), [APART[1]], {0: "aab"}),
}


@pytest.mark.parametrize("name", ROUNDS)
def test_replicas_that_share_experts_go_in_step_and_others_need_not(name):
    layout, shares, expected = ROUNDS[name]
    for dp_rank, teachers in run_ranks(_rounds, layout.world, layout, shares):
        assert "".join(teachers) == expected[dp_rank]


def _train(rank, layout, setup, deal):
    """Take two steps; return metrics, weights and the number of microbatches of this replica."""
    parallel = layout.join()
    (student, teacher), at = make(setup, parallel), parallel.dp_rank
    mine = [ROLLOUTS[i] for i in deal[at]] if deal else list(ROLLOUTS[at :: parallel.dp])
    if deal is None:
        mine, _ = share_out(mine, work, parallel, whole_prompts=False)
    batches = []
    for own, count in rounds(mine, setup.tokens, parallel):
        how = dict(microbatch_tokens=setup.tokens, count=count, cost=work)
        batches += pack_here(own, parallel, measure_fraction=0.5, seed=4, **how)
    history = []
    for _ in range(setup.steps):
        judged = judgements(setup.objective, batches, parallel, teacher)
        history.append(train_step(student, batches, judged, setup.objective))
    history = [metrics.reduce(None, parallel.device) for metrics in history]
    weights = {name: tensor.clone() for name, tensor in export_hf(student.model, parallel)}
    return history, weights, (at, len(batches))


TOPK = Objective("student_topk", k=8, chunk_tokens=7)
DENSE, MIXTURE = Setup(TOPK, tokens=24), Setup(TOPK, tokens=24, network=qwen3_moe())
OVERLAP = replace(DENSE, ddp={"overlap_grad_reduce": True, "bucket_size": 2000})
UNLIKE = [[7, 3], [0, 1, 2, 4, 5, 6]]  # of the rollouts: one microbatch, and three
STEPS = {
    "DP2 as dealt": (Layout(dp=2), DENSE, [[0, 2, 4, 6], [1, 3, 5, 7]], {0: 2, 1: 2}),
    "DP2": (Layout(dp=2), DENSE, None, {0: 2, 1: 2}),
    "DP4": (Layout(dp=4), DENSE, None, {0: 1, 1: 1, 2: 1, 3: 1}),
    "TP2×DP2+SP": (Layout(tp=2, dp=2, sp=True), DENSE, None, {0: 2, 1: 2}),
    "DP2 unlike": (Layout(dp=2), DENSE, UNLIKE, {0: 1, 1: 3}),
    "DP2 unlike, overlap": (Layout(dp=2), OVERLAP, UNLIKE, {0: 1, 1: 3}),
    "PP2×DP2 unlike": (Layout(pp=2, dp=2), OVERLAP, UNLIKE, {0: 1, 1: 3}),
    "CP2×DP2 unlike": (Layout(cp=2, dp=2), DENSE, UNLIKE, {0: 1, 1: 3}),
    "PP2·VPP2×DP2 unlike": (Layout(pp=2, vpp=2, dp=2), DENSE, UNLIKE, {0: 2, 1: 4}),
    "DP2 unlike, experts": (Layout(dp=2), MIXTURE, UNLIKE, {0: 1, 1: 3}),
    "EP2 unlike": (Layout(ep=2, dp=2), MIXTURE, UNLIKE, {0: 2, 1: 3}),
}


@cache
def one_process(mixture):
    (found,) = run_ranks(_train, 1, Layout(), MIXTURE if mixture else DENSE, [range(8)])
    return found


@pytest.mark.parametrize("name", STEPS)
def test_weights_do_not_depend_on_who_trains_on_what_in_how_many_microbatches(name):
    layout, setup, deal, counts = STEPS[name]
    ranks = run_ranks(_train, layout.world, layout, setup, deal)
    assert dict(found for *_, found in ranks) == counts
    for history, weights, _ in ranks:
        assert_same(one_process(setup is MIXTURE), (history, weights), atol=1e-6)
