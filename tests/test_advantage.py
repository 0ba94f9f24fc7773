"""Advantages by hand: GRPO, Dr.GRPO, token_grpo; and that packing and order are no matter."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.advantage import of_tokens, standardize, summary, with_advantages
from megatron_opd.loss.weights import reward_to_go
from megatron_opd.packing import pack
from megatron_opd.types import Prompt, Rollout

EPS = 1e-6


def rollout(prompt, sample=0, reward=None, logp=(-1.0,), **fields):
    ids = tuple(range(len(logp)))
    asked = Prompt(prompt, (1, 2), "", copy=fields.pop("copy", 0))
    return Rollout(asked, sample, ids, logp, "stop", reward=reward, **fields)


def advantages(rewards, how="std"):
    group = [rollout(3, i, x) for i, x in enumerate(rewards)]
    return [r.advantage for r in with_advantages(group, how=how)]


def test_grpo_by_hand():
    """Rewards 1, 0, 0, 1: mean 1/2, unbiased deviation √(4·¼ / 3) = 1/√3."""
    half = 0.5 / (1 / math.sqrt(3) + EPS)
    assert advantages([1, 0, 0, 1]) == pytest.approx([half, -half, -half, half], rel=1e-12)
    assert advantages([1, 0, 0, 1], "mean") == [0.5, -0.5, -0.5, 0.5]  # Dr.GRPO
    two = 1 / (math.sqrt(2) + EPS)
    assert advantages([2, 0]) == pytest.approx([two, -two], rel=1e-12)


def test_a_group_of_one_and_one_without_differences():
    """Of one: mean 0, deviation 1. All alike: nobody is better, and 0/0 is 0."""
    assert advantages([0.7]) == pytest.approx([0.7 / (1 + EPS)], rel=1e-12)
    assert advantages([0.7], "mean") == [0.7]
    assert advantages([1, 1, 1]) == [0, 0, 0]


def test_who_is_compared_with_whom():
    """The responses to one copy of one prompt that the engine drew; the dataset's never."""
    group = [rollout(0, 0, 1.0), rollout(1, 0, 0.0), rollout(0, 1, 0.0), rollout(0, 0, 5.0, copy=1)]
    group += [rollout(0, 2, 9.0, drawn=False)]
    got = [r.advantage for r in with_advantages(group, how="mean")]
    assert got == [0.5, 0.0, -0.5, 5.0, 9.0]


def tokens(*, fraction=1.0, count=1, order=1):
    """Return packed rollouts of two prompts and the teacher's word on each of their tokens."""
    logp = {(0, 0): (-1.0, -2.0), (0, 1): (-0.5,), (1, 0): (-3.0,)}
    rollouts = [rollout(*key, logp=x) for key, x in logp.items()][::order]
    batches = pack(rollouts, microbatch_tokens=99, count=count, measure_fraction=fraction)
    teacher = {-1.0: -1.5, -2.0: 0.0, -0.5: -0.5, -3.0: -1.0}
    said = [torch.tensor([teacher[x] for x in b.rollout_logp_N.tolist()]) for b in batches]
    return batches, said


def by_token(batches):
    return {
        logp: advantage
        for b in batches
        for logp, advantage in zip(b.rollout_logp_N.tolist(), b.advantage_N.tolist(), strict=True)
    }


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("order", [1, -1])
def test_token_grpo_by_hand_in_any_microbatches(count, order):
    """r = −0.5, 2, 0 of the first prompt: mean ½, unbiased variance (1 + 2.25 + .25) / 2 = 1.75;
    the second has one token: mean 0, deviation 1. Then Σ_{t' ≥ t} within the response."""
    batches = of_tokens(*tokens(count=count, order=order), how="std")
    s = math.sqrt(1.75) + EPS
    want = {-1.0: -1 / s, -2.0: 1.5 / s, -0.5: -0.5 / s, -3.0: 2 / (1 + EPS)}
    assert by_token(batches) == pytest.approx(want, rel=1e-6)
    to_go = [
        replace(b, advantage_N=reward_to_go(b.advantage_N, b.sequence_N, 1.0)) for b in batches
    ]
    assert by_token(to_go) == pytest.approx({**want, -1.0: 0.5 / s}, rel=1e-6)
    centred = of_tokens(*tokens(count=count, order=order), how="mean")
    assert by_token(centred) == pytest.approx({-1.0: -1.0, -2.0: 1.5, -0.5: -0.5, -3.0: 2.0})


def test_what_is_not_supervised_or_not_drawn_is_not_compared():
    batches, said = tokens()
    batch = batches[0]
    for field in ("mask_N", "drawn_N"):
        out_N = (batch.rollout_logp_N != -0.5).float()
        (got,) = of_tokens([replace(batch, **{field: out_N})], said, how="mean")
        assert by_token([got]) == pytest.approx({-1.0: -1.25, -2.0: 1.25, -0.5: 0.0, -3.0: 2.0})


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(-9, 9), st.booleans()), min_size=1, max_size=12)
)
def test_every_group_has_mean_0_and_deviation_1_whatever_else_there_is(rows):
    group, x, counts = zip(*rows, strict=True)
    group, counts = torch.tensor(group), torch.tensor(counts)
    x = torch.tensor(x, dtype=torch.float64)
    got = standardize(x, group, counts, how="std")
    for name in group.unique():
        mine = (group == name) & counts
        own, values = x[mine], got[mine]
        if len(own) == 1:
            torch.testing.assert_close(values, own / (1 + EPS))
        if len(own) > 1:
            assert abs(values.mean()) < 1e-6 / max(own.std(), EPS)
            torch.testing.assert_close(values.std(), own.std() / (own.std() + EPS))


def test_what_a_step_says_of_its_rewards():
    rollouts = [rollout(0, i, x) for i, x in enumerate([1, 1])]
    rollouts += [rollout(1, i, x) for i, x in enumerate([0, 1, 1])] + [rollout(2, 0, 0)]
    got = summary(rollouts)
    assert got["reward/mean"] == (4, 6)
    assert got["reward/std"] == (pytest.approx(1 / math.sqrt(3)), 2)  # of 0, 1, 1; 0 of 1, 1
    assert got["reward/solved_all_fraction"] == (1, 3)
    assert got["reward/solved_none_fraction"] == (1, 3)
    assert all(count == 0 for _, count in summary([rollout(0)]).values())
