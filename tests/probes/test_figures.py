"""Figures of responses whose tokens are known: mean reward, limits, sets of tokens."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_opd.probes import coherence, length, reward_auroc
from megatron_opd.told import Told
from tests.tiny import make_rollouts

LENGTHS = (4, 2, 4, 1)
METRICS = (
    "distill/reverse_kl",
    "distill/entropy_gap",
    "distill/overlap_ratio",
    "student/entropy",
    "teacher/entropy",
)


def told(right=(True, False, True, False), finished=(True, True, False, True)) -> Told:
    """Return two responses to each of two prompts; token t of response r is worth 10 r + t."""
    rollouts = [
        replace(
            rollout,
            prompt=replace(rollout.prompt, index=number // 2),
            finish="stop" if done else "length",
        )
        for number, (rollout, done) in enumerate(
            zip(make_rollouts([(3, n) for n in LENGTHS]), finished, strict=True)
        )
    ]
    value_T = np.concatenate([10.0 * r + np.arange(n) for r, n in enumerate(LENGTHS)])
    metric_T = dict.fromkeys(METRICS, value_T)
    metric_T |= {"student/nll": value_T, "teacher/nll": np.zeros(len(value_T))}
    return Told(rollouts, np.array(right), metric_T)


def test_tokens_know_their_response():
    one = told()
    assert one.rollout_T.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 3]
    assert one.position_T.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 0]
    assert one.prompt_R.tolist() == [0, 0, 1, 1] and one.length_R.tolist() == list(LENGTHS)


def test_the_mean_reward_of_a_response_and_of_its_start():
    assert reward_auroc.mean_reward(told()).tolist() == [1.5, 10.5, 21.5, 30]
    assert reward_auroc.mean_reward(told(), 0.5).tolist() == [0.5, 10, 20.5, 30]
    assert reward_auroc.mean_reward(told(), 0.1).tolist() == [0, 10, 20, 30]  # one at least


def test_right_responses_against_wrong_ones():
    found = reward_auroc.figures(told())
    assert found["accuracy"].value == 0.5 and found["truncated"] == 0.25
    everything = found["auroc"][-1]
    assert everything["overall"].value == 0.25  # of 1.5 and 21.5 over 10.5 and 30: one of four
    assert everything["within"].value == 0 and everything["pairs"] == (4, 2)
    assert [one["mean_reward"] for one in found["each"]] == [1.5, 10.5, 21.5, 30]
    assert found["mean_reward"]["right"]["mean"] == 11.5
    row = "           10%   0.250 (0.000 to 0.250) 0.000 (0.000 to 0.000)"
    assert reward_auroc.table(found)[3] == row


@pytest.mark.parametrize(("right", "line"), [(True, "right; take harder"), (False, "wrong; take")])
def test_without_both_kinds_there_is_a_line_instead(right, line):
    found = reward_auroc.figures(told(right=[right] * 4))
    (told_so,) = [text for text in reward_auroc.table(found) if text.startswith("AUROC")]
    assert f"not defined where all responses are {line}" in told_so


def test_what_a_limit_leaves():
    found = length.limited(told(), 2)
    assert found["finished"].value == 0.5 and found["accuracy"].value == 0
    assert found["tokens_beyond"] == pytest.approx(4 / 11)
    assert found["reverse_kl_beyond"] == pytest.approx((2 + 3 + 22 + 23) / (6 + 21 + 86 + 30))
    assert found["beyond"] is None  # two prompts are too few for means
    whole = length.limited(told(), 4)
    assert whole["finished"].value == 0.75 and whole["accuracy"].value == 0.25
    assert whole["tokens_beyond"] == 0 and whole["reverse_kl_beyond"] == 0


def test_sets_of_sampled_tokens():
    chosen = np.array([1, 4, 5, 9, 10])
    sets = coherence.token_sets(told(), chosen, 2)
    assert {name: mask.tolist() for name, mask in sets.items()} == {
        "all": [True] * 5,
        "right": [True, False, False, True, False],
        "wrong": [False, True, True, False, True],
        "overlap below mean": [True, True, True, False, False],
        "overlap above mean": [False, False, False, True, True],
        "position 0–1": [True, True, True, False, True],
        "position 2–3": [False, False, False, True, False],
    }
