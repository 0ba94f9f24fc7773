"""Rewards: what is right, for mathematics and for text."""

from pathlib import Path

import pytest
from pyarrow import parquet

from megatron_opd import verifier
from megatron_opd.reward import REWARDS, answer_of, ballot, same_answer, scored
from megatron_opd.types import Prompt

DATA = Path(__file__).parents[2] / "shared" / "data"


def right(name: str, response: str, answer: str | None) -> float:
    return REWARDS[name](response, Prompt(0, (1,), "", answer=answer))


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        (r"Thus \boxed{142}.", "142.0", 1),
        (r"\boxed{142.0}", "142", 1),
        (r"\boxed{025}", "25", 1),
        (r"\boxed{\dfrac{1}{2}}", "0.5", 1),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1),
        (r"\boxed{1}, no: \boxed{2}", "1", 0),
        (r"\boxed{22099999999999998951425}", "22099999999999998951424", 0),
        ("142", "142", 0),
        ("Answer: 142", "142", 0),
        (r"\boxed{142", "142", 0),
        (r"\boxed{142}", r"so \boxed{142}", 1),
        (r"\boxed{142}", None, 0),
    ],
)
def test_math_judges_the_last_box(response, answer, reward):
    assert right("math", response, answer) == reward


def test_the_dapo_template_scores_nothing_under_the_boxed_grader():
    response = "12 · 2 = 24\nAnswer: $24.0$"
    assert right("math_line", response, "24") == 1
    assert right("math_line", r"\boxed{24}", "24") == 0
    assert right("math", response, "24") == 0


def test_exact_match_is_of_text():
    assert right("exact_match", " a b\n", "a b") == 1
    assert right("exact_match", "1.0", "1") == right("exact_match", "", None) == 0


def test_plain_numbers_need_no_verifier():
    before = verifier.same.cache_info()
    assert same_answer("142.0", "142") and not same_answer("142", "-142")
    assert verifier.same.cache_info() == before


def test_answers_for_a_vote():
    assert answer_of(r"Answer: 3, I mean \boxed{4.0}") == "4"
    assert answer_of("so\nAnswer: 4.0") == "4"
    assert answer_of("4") is None
    read, same = ballot(REWARDS["math"])
    assert read is answer_of and same("1/2", "0.5")
    read, same = ballot(REWARDS["exact_match"])
    assert read(" 1/2 ") == "1/2" and not same("1/2", "0.5")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_is_an_error(value):
    prompt = Prompt(7, (1,), "", source="AIME24")
    with pytest.raises(ValueError, match=r"got (nan|inf) for a response to prompt 7 of 'AIME24'"):
        scored(lambda response, prompt: value, "", prompt)


@pytest.mark.skipif(not DATA.exists(), reason="no ../shared/data")
def test_every_published_answer_is_right_in_a_box():
    """All of the evaluation sets; of DeepMath's LaTeX every 200th, and not by being equal text."""
    for file, every in (("aime24", 1), ("aime25", 1), ("amc23", 1), ("deepmath-deduped", 200)):
        rows = parquet.read_table(DATA / f"{file}.parquet")["reward_model"].to_pylist()[::every]
        for answer in (row["ground_truth"] for row in rows):
            assert right("math", rf"\boxed{{{answer}}}", answer) == 1
            assert verifier.same(answer, answer), answer
