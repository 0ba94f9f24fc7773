import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.packing import _balance, by_teacher, needed_microbatches, pack
from megatron_opd.types import Prompt, Rollout

LIMIT = 64


def make_rollouts(sizes):
    """Rollouts of the given (prompt, response) lengths in which every token id is unique."""
    rollouts, fresh = [], 1
    for index, (prompt, response) in enumerate(sizes):
        ids = tuple(range(fresh, fresh + prompt + response))
        fresh += prompt + response
        logp = tuple(-float(i) for i in ids[prompt:])  # names the token it belongs to
        question = Prompt(index=index, token_ids=ids[:prompt], text="")
        rollouts.append(Rollout(question, 0, ids[prompt:], logp, "stop"))
    return rollouts


size_lists = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 40)), min_size=1, max_size=24
).filter(lambda sizes: all(p + r - 1 <= LIMIT for p, r in sizes))


@settings(deadline=None)
@given(size_lists, st.data())
def test_every_response_token_is_supervised_once_by_its_predecessor(sizes, data):
    rollouts = make_rollouts(sizes)
    needed = needed_microbatches(rollouts, LIMIT)
    count = data.draw(st.integers(needed, len(rollouts)))
    multiple = data.draw(st.sampled_from([1, 2, 4]))
    packed = pack(rollouts, microbatch_tokens=LIMIT, count=count, multiple=multiple)
    assert len(packed) == count
    supervised = {}
    for mb in packed:
        # ids are unique and consecutive: the predecessor of a token is the id before it
        assert torch.equal(mb.token_T[mb.source_N] + 1, mb.target_N)
        assert torch.equal(mb.rollout_logp_N, -mb.target_N.float())
        assert torch.equal(mb.mask_N, torch.ones(len(mb.target_N)))
        for token in mb.target_N.tolist():
            assert token not in supervised
            supervised[token] = True
    assert sorted(supervised) == sorted(i for r in rollouts for i in r.response_ids)


@settings(deadline=None)
@given(size_lists, st.sampled_from([1, 2, 8]))
def test_sequences_are_whole_and_positions_restart(sizes, multiple):
    rollouts = make_rollouts(sizes)
    inputs = {r.prompt.token_ids + r.response_ids[:-1] for r in rollouts}
    for mb in pack(rollouts, microbatch_tokens=LIMIT, multiple=multiple):
        bounds = mb.cu_seqlens.tolist()
        assert bounds[0] == 0 and bounds[-1] == len(mb.token_T) == len(mb.position_T)
        assert len(mb.token_T) % multiple == 0
        assert len(mb.token_T) < LIMIT + multiple
        assert mb.max_seqlen == int(mb.cu_seqlens.diff().max())
        for begin, end in itertools.pairwise(bounds):
            assert mb.position_T[begin:end].tolist() == list(range(end - begin))
            tokens = tuple(mb.token_T[begin:end].tolist())
            if tokens in inputs:
                inputs.remove(tokens)
            else:  # the fill: last, short, nothing but the id 0, and never a source
                assert end == bounds[-1] and len(tokens) < multiple and set(tokens) == {0}
                assert (mb.source_N < begin).all()
    assert not inputs


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=30))
def test_loads_are_balanced_and_more_bins_are_never_heavier(lengths):
    heaviest = []
    for count in range(1, len(lengths) + 1):
        loads = [sum(lengths[i] for i in members) for members in _balance(lengths, count)]
        assert min(loads) > 0
        # the lightest-bin rule: no bin is ahead of another by more than one sequence
        assert max(loads) - min(loads) <= max(lengths)
        heaviest.append(max(loads))
    assert heaviest == sorted(heaviest, reverse=True)


@settings(deadline=None)
@given(size_lists)
def test_fewest_microbatches_fit_and_one_less_does_not(sizes):
    rollouts = make_rollouts(sizes)
    needed = needed_microbatches(rollouts, LIMIT)
    packed = pack(rollouts, microbatch_tokens=LIMIT)
    assert len(packed) == needed
    assert all(len(mb.token_T) <= LIMIT for mb in packed)
    with pytest.raises(ValueError, match=r"count: got .* expected"):
        pack(rollouts, microbatch_tokens=LIMIT, count=needed - 1)
    with pytest.raises(ValueError, match=r"count: got"):
        pack(rollouts, microbatch_tokens=LIMIT, count=len(rollouts) + 1)


@settings(deadline=None)
@given(size_lists, st.randoms())
def test_the_order_of_rollouts_changes_no_supervision(sizes, random):
    def supervised(rollouts):
        packed = pack(rollouts, microbatch_tokens=LIMIT)
        return sorted(int(t) for mb in packed for t in mb.target_N)

    rollouts = make_rollouts(sizes)
    shuffled = random.sample(rollouts, len(rollouts))
    assert supervised(rollouts) == supervised(shuffled)


@settings(deadline=None)
@given(size_lists, st.data())
def test_targets_know_their_response_and_whether_it_is_supervised(sizes, data):
    masked = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    rollouts = [
        replace(
            rollout,
            masked=mask,
            top_ids=np.array(rollout.response_ids, np.int32)[:, None] + np.arange(3, dtype="i4"),
        )
        for rollout, mask in zip(make_rollouts(sizes), masked, strict=True)
    ]
    home = {token: r for r in rollouts for token in r.response_ids}
    for mb in pack(rollouts, microbatch_tokens=LIMIT):
        owners = [home[token] for token in mb.target_N.tolist()]
        positions = [r.response_ids.index(t) for r, t in zip(owners, mb.target_N, strict=True)]
        assert mb.position_N.tolist() == positions
        assert mb.mask_N.tolist() == [not r.masked for r in owners]
        assert torch.equal(mb.rollout_ids_NK, mb.target_N[:, None] + torch.arange(3))
        assert mb.sequence_N.diff().ge(0).all()
        numbers = {(int(s), r.prompt.index) for s, r in zip(mb.sequence_N, owners, strict=True)}
        assert len(numbers) == mb.sequence_N[-1] + 1 == len({r.prompt.index for r in owners})


@settings(deadline=None)
@given(size_lists, st.data())
def test_a_microbatch_has_one_teacher(sizes, data):
    names = data.draw(st.lists(st.sampled_from("abc"), min_size=len(sizes), max_size=len(sizes)))
    rollouts = [
        replace(r, prompt=replace(r.prompt, teacher=name))
        for r, name in zip(make_rollouts(sizes), names, strict=True)
    ]
    packed = pack(rollouts, microbatch_tokens=LIMIT)
    assert [mb.teacher for mb in packed] == sorted(mb.teacher for mb in packed)
    trained = [(token, mb.teacher) for mb in packed for token in mb.target_N.tolist()]
    assert sorted(trained) == sorted(
        (i, r.prompt.teacher) for r in rollouts for i in r.response_ids
    )
    groups = by_teacher(rollouts)
    assert list(groups) == sorted(set(names))
    alone = [mb for own in groups.values() for mb in pack(own, microbatch_tokens=LIMIT)]
    assert [mb.target_N.tolist() for mb in packed] == [mb.target_N.tolist() for mb in alone]
    assert needed_microbatches(rollouts, LIMIT) == len(packed)


def squared(rollout):
    """A cost that is not tokens."""
    return float(len(rollout.prompt.token_ids) + len(rollout.response_ids) - 1) ** 2


@settings(deadline=None)
@given(size_lists, st.data())
def test_microbatches_of_equal_cost_are_no_more_and_fit(sizes, data):
    rollouts = make_rollouts(sizes)
    needed = needed_microbatches(rollouts, LIMIT)
    count = data.draw(st.integers(needed, len(rollouts)))
    packed = pack(rollouts, microbatch_tokens=LIMIT, count=count, cost=squared)
    assert len(packed) == count
    assert all(0 < len(mb.token_T) <= LIMIT for mb in packed)
    trained = sorted(token for mb in packed for token in mb.target_N.tolist())
    assert trained == sorted(i for r in rollouts for i in r.response_ids)


def test_costs_are_balanced_where_the_tokens_leave_room():
    rollouts = make_rollouts([(1, 32), (1, 8), (1, 8), (1, 8), (1, 8), (1, 16)])

    def lengths(limit, cost=None):
        packed = pack(rollouts, microbatch_tokens=limit, count=2, cost=cost)
        return [mb.cu_seqlens.diff().tolist() for mb in packed]

    assert lengths(64) == [[32, 8], [8, 8, 8, 16]]
    assert lengths(64, squared) == [[32], [8, 8, 8, 8, 16]]
    assert lengths(40, squared) == lengths(40)  # 48 tokens are too many for one


@settings(deadline=None)
@given(size_lists, st.data())
def test_the_teacher_reads_every_response_token_once_after_its_own_prompt(sizes, data):
    rollouts, read = make_rollouts(sizes), {}
    for index, rollout in enumerate(rollouts):
        room = LIMIT + 1 - len(rollout.response_ids)
        length = data.draw(st.integers(0, min(room, 30)))
        start = -1000 * (index + 1)
        ids = tuple(range(start, start + length)) or None  # None: what the student reads
        read[rollout.response_ids[0]] = ids or rollout.prompt.token_ids
        rollouts[index] = replace(rollout, prompt=replace(rollout.prompt, teacher_token_ids=ids))
    multiple = data.draw(st.sampled_from([1, 4]))
    for mb in pack(rollouts, microbatch_tokens=LIMIT, multiple=multiple):
        judged = mb.as_judged()
        for name in ("target_N", "position_N", "sequence_N", "mask_N"):
            assert torch.equal(getattr(judged, name), getattr(mb, name))
        assert len(judged.token_T) < LIMIT + multiple and len(judged.token_T) % multiple == 0
        before = judged.token_T[judged.source_N].tolist()
        for token, predecessor in zip(mb.target_N.tolist(), before, strict=True):
            assert predecessor == (read[token][-1] if token in read else token - 1)
        bounds, seen = judged.cu_seqlens.tolist(), judged.token_T.tolist()
        firsts = [i for i in mb.target_N.tolist() if i in read]
        for (begin, end), first in zip(itertools.pairwise(bounds), firsts, strict=False):
            prompt = read[first]
            assert seen[begin : begin + len(prompt)] == list(prompt)
            assert judged.position_T[begin:end].tolist() == list(range(end - begin))


def measured(rollouts, **how):
    """The tokens that metrics look at, whatever microbatch they are in."""
    packed = pack(rollouts, microbatch_tokens=LIMIT, **how)
    assert all(mb.measured_M.diff().gt(0).all() for mb in packed)
    return sorted(token for mb in packed for token in mb.target_N[mb.measured_M].tolist())


@settings(deadline=None)
@given(size_lists, st.data())
def test_the_measured_tokens_depend_on_no_packing(sizes, data):
    fraction, seed = data.draw(st.floats(0, 1)), data.draw(st.integers(0, 2**63 - 1))
    replicas = data.draw(st.integers(1, len(sizes)))
    rollouts = [
        replace(r, masked=data.draw(st.booleans()), sample=i % 3)
        for i, r in enumerate(make_rollouts(sizes))
    ]
    how = dict(measure_fraction=fraction, seed=seed)
    one = measured(rollouts, **how)
    shuffled = data.draw(st.permutations(rollouts))
    assert measured(shuffled, count=len(rollouts), multiple=2, **how) == one
    shared = [measured(rollouts[rank::replicas], **how) for rank in range(replicas)]
    assert sorted(token for part in shared for token in part) == one
    supervised = sorted(token for r in rollouts if not r.masked for token in r.response_ids)
    assert set(one) <= set(supervised)
    assert measured(rollouts, measure_fraction=1.0, seed=seed) == supervised
    assert measured(rollouts, measure_fraction=0.0, seed=seed) == []


def test_the_measured_tokens_are_a_fair_sample_and_another_every_step():
    (rollout, other) = make_rollouts([(1, 60)] * 2)
    rollouts = [replace(r, sample=s) for r in (rollout, other) for s in range(40)]

    def chosen(seed):
        packed = pack(rollouts, microbatch_tokens=10_000, measure_fraction=0.25, seed=seed)[0]
        flags = torch.zeros(80, 60)
        flags.view(-1)[packed.measured_M] = 1
        return flags

    one, next_step = chosen(1), chosen(2)
    assert abs(one.mean() - 0.25) < 0.025  # 4,800 draws: 4 standard deviations
    for sample, another in ((one, next_step), (one[:40], one[40:]), (one[1:], one[:-1])):
        assert abs((sample * another).mean() - 0.0625) < 0.025  # independent of one another


def test_a_rollout_without_the_engines_ids_leaves_the_microbatch_without():
    one, other = make_rollouts([(2, 3), (1, 1)])
    one = replace(one, top_ids=np.zeros((3, 2), np.int32))
    assert pack([one, other], microbatch_tokens=LIMIT)[0].rollout_ids_NK is None


def test_dtypes_and_a_worked_example():
    mb = pack(make_rollouts([(2, 3), (1, 1)]), microbatch_tokens=8, multiple=4)[0]
    assert mb.token_T.tolist() == [1, 2, 3, 4, 6, 0, 0, 0]
    assert mb.position_T.tolist() == [0, 1, 2, 3, 0, 0, 1, 2]
    assert mb.cu_seqlens.tolist() == [0, 4, 5, 8] and mb.cu_seqlens.dtype == torch.int32
    assert mb.source_N.tolist() == [1, 2, 3, 4] and mb.source_N.dtype == torch.int64
    assert mb.target_N.tolist() == [3, 4, 5, 7] and mb.token_T.dtype == torch.int64
    assert mb.position_N.tolist() == [0, 1, 2, 0] and mb.position_N.dtype == torch.int64
    assert mb.sequence_N.tolist() == [0, 0, 0, 1] and mb.sequence_N.dtype == torch.int64
    assert mb.measured_M.tolist() == [0, 1, 2, 3] and mb.measured_M.dtype == torch.int64
    assert mb.rollout_logp_N.dtype == mb.mask_N.dtype == torch.float32
    assert (mb.max_seqlen, mb.rollout_ids_NK) == (4, None)


def test_a_step_of_real_size_packs_fast_and_evenly():
    rng = np.random.default_rng(0)
    sizes = zip(rng.integers(50, 1024, 256), rng.integers(100, 7168, 256), strict=True)
    rollouts = make_rollouts([(int(p), int(r)) for p, r in sizes])
    packed = pack(rollouts, microbatch_tokens=16384)
    loads = [len(mb.token_T) for mb in packed]
    lower_bound = -(-sum(loads) // 16384)
    assert len(packed) <= lower_bound + 3
    assert min(loads) > 0.9 * max(loads)


@pytest.mark.parametrize(
    ("sizes", "line"),
    [
        ([], "got none"),
        ([(3, 0)], "prompt 0, sample 0: got 3 prompt tokens, 0 response tokens"),
        ([(0, 3)], "got 0 prompt tokens"),
        ([(5, 5), (60, 6)], r"prompt 1, sample 0: 65 tokens do not fit .*microbatch_tokens=64"),
    ],
)
def test_what_cannot_be_packed_is_one_line(sizes, line):
    with pytest.raises(ValueError, match=line) as raised:
        pack(make_rollouts(sizes), microbatch_tokens=LIMIT)
    assert "\n" not in str(raised.value)


def test_a_response_without_its_log_probabilities_is_refused():
    rollout = Rollout(Prompt(0, (1,), ""), 0, (2, 3), (-1.0,), "stop")
    with pytest.raises(ValueError, match="2 response tokens, 1 log-prob"):
        needed_microbatches([rollout], LIMIT)
