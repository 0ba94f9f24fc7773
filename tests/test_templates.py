"""The words around a question: on, off, and off again."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_opd.templates import TEMPLATES, asked, bare, read, reword
from tests.prompts import wrap

DATA = Path(__file__).parents[2] / "shared" / "data"
# as published, letter by letter: the first rows' last words in the files of DAPO and DeepMath
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    '{}\n\nRemember to put your answer on its own line after "Answer:".'
)
BOXED = "{} Please reason step by step, and put your final answer within \\boxed{}."


def test_the_built_in_templates_are_the_published_words():
    assert wrap("none", "1+1?") == "1+1?"
    assert wrap("dapo", "1+1?") == DAPO.replace("{}", "1+1?")
    assert wrap("boxed", "1+1?") == BOXED.replace("{}", "1+1?", 1)
    assert wrap("boxed", "1+1?").endswith(" \\boxed{}.")  # one pair of braces


@given(question=st.text(), name=st.sampled_from(["dapo", "boxed"]))
def test_a_template_comes_off_and_leaves_the_question_alone(question, name):
    question = bare(question)
    assert bare(wrap(name, question)) == question
    assert bare(question) == question


@pytest.mark.parametrize(
    "ending",
    [
        " Please reason step by step, and put your final answer within \\boxed{{}}.",
        " Please reason step by step, and put your final answer within \\boxed{}.",
        "\nPlease reason step by step, and put your final answer within \\boxed{}",
        "\n\nPlease reason step by step, and put your final answer within \\boxed{}.\n",
    ],
)
def test_every_spelling_of_the_box_comes_off(ending):
    question = "Is $\\boxed{x}$ even? \\frac{{1}}{2}"
    assert bare(question + ending) == question
    assert bare(wrap("dapo", question) + ending) == question  # both, as evaluation scripts do
    assert bare(question + ending + ending) == question


@pytest.mark.parametrize(
    "text",
    [
        "Please reason step by step, and put your final answer within \\boxed{7}.",
        "Please reason step by step, and put your final answer within \\boxed{}. Why?",
        'x\n\nRemember to put your answer on its own line after "Answer:".',  # half a template
        " 2 + 2 = \n",
    ],
)
def test_what_is_no_template_stays(text):
    assert bare(text) == text


def test_a_file_is_a_template_and_latex_braces_are_not_fields(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("Think. {question} \\boxed{{}} {answer}\n")
    assert wrap(str(path), "a{b}") == "Think. a{b} \\boxed{{}} {answer}"


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("boxd", None, "got 'boxd', expected one of none, dapo, boxed, or a text file with"),
        ("words.txt", b"Think.", "'words.txt' has no {question}, where the question would go"),
        ("words.txt", b"\xff\xfe{question}", "'words.txt' is not a text file"),
    ],
)
def test_templates_that_are_refused(tmp_path, monkeypatch, name, content, line):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as raised:
        read(name, key="data.template")
    assert str(raised.value).startswith(f"data.template: {line}")


def test_only_the_last_question_of_a_conversation_is_reworded():
    talk = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": wrap("dapo", "1+1?")},
        {"role": "assistant", "content": "The sum"},
    ]
    assert asked(talk) == 3 and asked(talk[:1]) is None
    reworded = reword(talk, TEMPLATES["boxed"])
    assert reworded[3] == {"role": "user", "content": wrap("boxed", "1+1?")}
    assert reworded[:3] + reworded[4:] == talk[:3] + talk[4:]
    assert talk[3]["content"] == wrap("dapo", "1+1?")  # the caller's own is left alone


@pytest.mark.skipif(not DATA.exists(), reason="the real prompts are not beside the repository")
def test_the_published_templates_leave_the_same_questions():
    def questions(name):
        column = pq.read_table(DATA / name, columns=["prompt"])["prompt"].to_pylist()
        return [messages[-1]["content"] for messages in column]

    original, boxed = (questions(f"dapo-math-17k{kind}.parquet") for kind in ("", "-boxed"))
    assert [*map(bare, original)] == [*map(bare, boxed)]
    assert len({*map(bare, original)}) == 17398 and len(original) == 17917
    assert original[0] == wrap("dapo", bare(original[0]))
    others = questions("deepmath-deduped.parquet") + questions("amc23.parquet")
    assert all(text == wrap("boxed", bare(text)) != bare(text) for text in others)
