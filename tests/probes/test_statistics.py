"""AUROC against counting pairs one by one, and intervals against formulas that are known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.probes.statistics import auroc, estimate, mean

RESPONSES = st.lists(
    st.tuples(st.integers(-2, 2), st.booleans(), st.integers(0, 3)), min_size=1, max_size=24
)


def columns(responses):
    score, right, prompt = zip(*responses, strict=True)
    return np.array(score, float), np.array(right), np.array(prompt)


def counted(responses, *, same_prompt: bool) -> float | None:
    """Compare every right response with every wrong one."""
    wins = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a, a_right, one in responses
        for b, b_right, other in responses
        if a_right and not b_right and (one == other or not same_prompt)
    ]
    return sum(wins) / len(wins) if wins else None


@settings(max_examples=60, deadline=None)
@given(RESPONSES)
def test_auroc_counts_pairs_and_halves_ties(responses):
    found = auroc(*columns(responses))
    for one, same_prompt in ((found.overall, False), (found.within, True)):
        expected = counted(responses, same_prompt=same_prompt)
        assert (one is None) == (expected is None)
        if one is not None:
            assert one.value == pytest.approx(expected, abs=1e-12)
            assert 0 <= one.low <= one.high <= 1
    score, right, prompt = columns(responses)
    flipped = auroc(-score, right, prompt).overall
    if found.overall is not None:
        assert flipped.value == pytest.approx(1 - found.overall.value, abs=1e-12)


def test_where_all_are_right_or_all_are_wrong_there_is_no_auroc():
    score, prompt = np.arange(6.0), np.arange(6) // 2
    for right in (np.ones(6, bool), np.zeros(6, bool)):
        assert auroc(score, right, prompt) == (None, None, (0, 0))


def test_the_interval_of_a_mean_is_the_normal_one_of_independent_responses():
    value = np.random.default_rng(0).normal(2.0, 3.0, size=400)
    found = mean(value, np.arange(400))
    spread = 1.96 * value.std() / np.sqrt(400)
    assert found.value == pytest.approx(value.mean())
    assert found.low == pytest.approx(value.mean() - spread, abs=0.15 * spread)
    assert found.high == pytest.approx(value.mean() + spread, abs=0.15 * spread)


def test_more_responses_that_say_the_same_do_not_narrow_an_interval():
    draw = np.random.default_rng(1)
    score, right = draw.normal(size=60), draw.random(60) < 0.4
    score = score + right
    once = auroc(score, right, np.arange(60)).overall
    often = auroc(*(np.repeat(x, 5) for x in (score, right, np.arange(60)))).overall
    assert often == pytest.approx(once)
    alone = auroc(*(np.repeat(x, 5) for x in (score, right)), np.arange(300)).overall
    assert alone.high - alone.low < 0.6 * (often.high - often.low)


def test_the_interval_of_an_auroc_covers_the_truth_as_often_as_it_says():
    draw, inside = np.random.default_rng(2), 0
    for _ in range(100):  # two normals, 1 apart: Φ(1/√2) = 0.7602
        right = np.arange(80) % 2 == 0
        score = draw.normal(size=80) + right
        found = auroc(score, right, np.arange(80)).overall
        inside += found.low <= 0.7602 <= found.high
    assert 86 <= inside <= 100  # of 95 expected, 2.2 is the deviation


def test_what_is_not_defined_has_no_interval():
    assert estimate(3, lambda weight_RG: weight_RG.sum(1) * np.nan) is None
