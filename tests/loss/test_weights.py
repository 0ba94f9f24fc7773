"""Token weights by hand; test_objective compares their product with the dense reference."""

import math

import pytest
import torch

from megatron_opd.loss import weights
from megatron_opd.loss.weights import bind, reward_to_go

SEQUENCE = torch.tensor([0, 0, 0, 1, 1])
POSITION = torch.tensor([0, 1, 2, 0, 1])


def numbers(*x):
    return torch.tensor(x, dtype=torch.float64)


def test_prune_drift_loses_weight_with_every_drifted_token():
    """Overlap [1, .5, 0], τ .75, drop .1 ⇒ 1.5, 1.4, 1.3 with the base of .5; then anew."""
    overlap = numbers(1, 0.5, 0, 0, 1)
    got = weights.prune_drift(overlap, SEQUENCE, threshold=0.75, drop=0.1)
    torch.testing.assert_close(got, numbers(1.5, 1.4, 1.3, 1.4, 1.4))
    assert weights.prune_drift(overlap, SEQUENCE, drop=0.7, base=0.0)[2] == 0


def test_sod_step_telescopes_and_is_cut():
    """Steps of one token: Π (d_u + ε) / (d_u+1 + ε) = (d_1 + ε) / (d_k + ε), at most 1 + δ."""
    d = numbers(0.3, 0.6, 0.1, 0.5, 0.4)
    got = weights.sod_step(
        -d, torch.zeros(5), POSITION, SEQUENCE, torch.ones(5), step_tokens=1, eps=0.0
    )
    torch.testing.assert_close(got, numbers(1, 0.5, 1.2, 1, 1.2))
    pairs = weights.sod_step(
        d, torch.zeros(5), POSITION, SEQUENCE, torch.ones(5), step_tokens=2, eps=0.0, delta=9
    )
    torch.testing.assert_close(pairs, numbers(1, 1, 0.45 / 0.1, 1, 1))


def test_student_entropy_top_is_a_share_of_each_response():
    entropy = numbers(0.1, 0.9, 0.5, 0.2, 0.1)
    got = weights.student_entropy_top(entropy, SEQUENCE, torch.ones(5), fraction=0.5)
    assert got.tolist() == [0, 1, 1, 1, 0]  # ⌈1.5⌉ of three, 1 of two


def test_gate_and_decay():
    assert weights.teacher_entropy_gate(numbers(0.8, 0.81)).tolist() == [0, 1]
    torch.testing.assert_close(
        weights.position_decay(torch.tensor([0, 10, 20]), half_life=10), numbers(1, 0.5, 0.25)
    )


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        ("tis", (0.4, 0.6, 1, 1.9, 2, 2, 2)),
        ("icepop", (0, 0.6, 1, 1.9, 2, 0, 0)),
        ("mask", (0, 1, 1, 1, 1, 0, 0)),
    ],
)
def test_corrections_of_a_ratio(correction, expected):
    """The ends of [0.5, 2] belong to it; an engine that gives a token probability 0 is outside."""
    delta = numbers(0.4, 0.6, 1, 1.9, 2, 2.5, math.inf).log()
    got = weights.CORRECTIONS[correction](delta, low=0.5, high=2.0)
    torch.testing.assert_close(got, numbers(*expected))


def test_a_ratio_that_is_no_number_is_outside():
    assert weights.inside(numbers(math.nan, 0.0), 0.5, 2.0).tolist() == [False, True]


@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
def test_reward_to_go_stays_in_its_response(discount):
    x = torch.randn(11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sequence = torch.tensor([0] * 7 + [1] * 4)
    want = [
        sum(discount ** (j - i) * x[j] for j in range(i, 11) if sequence[j] == sequence[i])
        for i in range(11)
    ]
    torch.testing.assert_close(reward_to_go(x, sequence, discount), torch.stack(want))


def anywhere(half_life):
    return half_life


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (weights.prune_drift, {"cut": 2}, "prune_drift: got 'cut', expected threshold, drop, base"),
        (weights.position_decay, {}, "missing 'half_life'"),
        (anywhere, {"half_life": 1}, "has no parameter of position_N"),
    ],
)
def test_options_are_checked_by_name(function, options, message):
    with pytest.raises(ValueError, match=message):
        bind(function, options)


def test_a_weight_says_what_it_looks_at():
    """By the names of its parameters: whole responses, a model's logits, or the batch alone."""
    for name, whole, looks in (
        ("position_decay", False, False),
        ("teacher_entropy_gate", False, True),
        ("prune_drift", True, True),
    ):
        weight = bind(weights.WEIGHTS[name], {"half_life": 2} if name == "position_decay" else {})
        assert (weight.whole, weight.looks) == (whole, looks), name
    gate = bind(weights.teacher_entropy_gate, {"threshold": 1.0})
    assert gate.of(teacher_entropy_N=numbers(0.9, 1.1)).tolist() == [0, 1]
