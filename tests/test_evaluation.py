"""Figures of an evaluation, against brute force and by hand."""

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_opd import parallel as mesh
from megatron_opd.evaluation import (
    Graded,
    evaluate,
    grade,
    interval,
    majority,
    pass_at,
    recovery,
    summarize,
)
from megatron_opd.reward import REWARDS
from megatron_opd.types import Prompt, Rollout
from tests.distributed import run_ranks


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(right, data):
    n = len(right)
    k = data.draw(st.integers(1, n))
    subsets = list(combinations(right, k))
    expected = sum(map(any, subsets)) / len(subsets)
    assert pass_at(n, sum(right), k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_one_is_the_mean_and_all_of_them_is_any():
    assert pass_at(16, 3, 1) == pytest.approx(3 / 16)
    assert [pass_at(16, c, 16) for c in (0, 1, 16)] == [0, 1, 1]


def same(one, other):
    return float(one) == float(other)


@pytest.mark.parametrize(
    ("answers", "scores", "expected"),
    [
        (["1", "2", "2"], [1, 0, 0], 0),
        (["2", "1", "1.0"], [0, 1, 1], 1),
        (["1", "2"], [1, 0], 1),  # a tie: the first
        (["2", "1"], [0, 1], 0),
        ([None, None, "1"], [0, 0, 1], 1),  # silence is no vote
        ([None, None], [0, 1], 0),
        (["3", "2", "1", "1"], [0, 0, 1, 1], 1),
    ],
)
def test_the_majority_decides(answers, scores, expected):
    assert majority(answers, scores, same) == expected


def test_answers_of_other_scores_are_not_compared():
    def never(one, other):
        raise AssertionError

    assert majority(["1", "2", "3"], [0.0, 0.5, 1.0], never) == 0


def made(index, scores, source="a", voted=0.0) -> Graded:
    n = len(scores)
    lengths = tuple(range(1, n + 1))
    return Graded(index, source, tuple(scores), voted, lengths, (False,) * n, (True,) * n)


def test_a_summary_by_hand():
    graded = [made(0, [1, 0, 0, 0], voted=1.0), made(1, [1, 1, 1, 1], voted=1.0), made(2, [0] * 4)]
    summary = summarize(graded)
    assert summary["problems"] == 3 and summary["n"] == 4
    assert summary["accuracy"] == pytest.approx(5 / 12)
    assert summary["pass@2"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert summary["pass@4"] == summary["maj@4"] == pytest.approx(2 / 3)
    deviation = math.sqrt(sum((x - 5 / 12) ** 2 for x in (1 / 4, 1, 0)) / 2)
    assert summary["accuracy±"] == pytest.approx(1.96 * deviation / math.sqrt(3))
    assert summary["response_tokens"] == 2.5 and summary["boxed_fraction"] == 1
    assert {k for k in summarize([made(0, [1] * 6)]) if "pass" in k and "±" not in k} == {
        "pass@2",
        "pass@4",
        "pass@6",
    }
    assert not any("@" in key for key in summarize([made(0, [1])]))


def test_an_interval_is_of_problems_and_needs_two():
    assert interval([0.5]) == 0
    assert interval([0, 1]) == pytest.approx(1.96 * 0.5)


class Words:
    """A tokenizer whose tokens are words; 99 is special."""

    def decode(self, ids, skip_special_tokens):
        return " ".join(str(i) for i in ids if i != 99 or not skip_special_tokens)


def test_rollouts_are_graded_without_their_end_token():
    prompt = Prompt(4, (1,), "", source="s", answer="7 8")
    rollouts = [
        Rollout(prompt, 0, (7, 8, 99), (0.0,) * 3, "stop"),
        Rollout(prompt, 1, (7,), (0.0,), "length"),
    ]
    (graded,) = grade(rollouts, REWARDS["exact_match"], Words())
    assert graded == Graded(4, "s", (1.0, 0.0), 1.0, (3, 1), (False, True), (False, False))
    assert graded.accuracy == 0.5 and graded.right == 1


class Fixed:
    """An engine whose response to a prompt is its index, then for odd samples the next number."""

    def generate(self, prompts, *, n, sampling, seed):
        return [
            Rollout(p, s, (p.index + s % 2, 99), (0.0,) * 2, "stop" if p.index else "length")
            for p in prompts
            for s in range(n)
        ]

    def sync(self):
        pass

    def close(self):
        pass


def _evaluate(rank, tp, n, bad):
    parallel = mesh.initialize(tp)
    prompts = [
        Prompt(i, (1,), "", source="ab"[i % 2], answer=str(i if i < 4 else -1)) for i in range(5)
    ]
    reward = (lambda text, prompt: math.nan) if bad else REWARDS["exact_match"]
    how = {"n": n, "sampling": None, "seed": 0, "tokenizer": Words(), "parallel": parallel}
    try:
        return evaluate(Fixed(), prompts, reward, **how)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(("world", "tp"), [(1, 1), (4, 2)])
def test_a_run_records_the_same_on_any_ranks(world, tp):
    expected = {
        "eval/accuracy": 4 / 10,
        "eval/response_tokens": 2.0,
        "eval/truncated_fraction": 1 / 5,
        "eval/pass@2": 4 / 5,
        "eval/maj@2": 4 / 5,
        "eval/accuracy@a": 2 / 6,
        "eval/accuracy@b": 2 / 4,
    }
    for record in run_ranks(_evaluate, world, tp, 2, False):
        assert record == pytest.approx(expected)
    for record in run_ranks(_evaluate, world, tp, 1, False):
        assert record["eval/accuracy"] == 0.8 and not any("pass" in name for name in record)


def test_a_reward_that_is_no_number_ends_every_rank():
    lines = run_ranks(_evaluate, 4, 2, 1, True)
    assert len(set(lines)) == 1 and "reward: got nan for a response to prompt" in lines[0]


def test_the_gap_recovered():
    before, teacher = [0.0, 0.2, 0.4, 0.2] * 10, [0.5, 0.8, 0.8, 0.7] * 10
    half = [(b + t) / 2 for b, t in zip(before, teacher, strict=True)]
    found = recovery(half, before, teacher)
    assert [found.rate, found.low, found.high] == pytest.approx([0.5] * 3)
    assert found.gap == pytest.approx(0.5) and found.caution is None
    assert recovery(teacher, before, teacher).rate == pytest.approx(1.0)
    assert recovery(half, before, teacher) == found  # the same dice


def test_a_gap_that_is_none_is_said_to_be():
    up, down = [0.0, 1.0] * 5, [1.0, 0.0] * 5
    assert "inside the noise" in (recovery(up, up, [*down[:9], 1.0]).caution or "")
    assert "no gap to recover" in (recovery(up, up, [0.0] * 10).caution or "")
    assert "no gap to recover" in (recovery(up, up, up).caution or "")
