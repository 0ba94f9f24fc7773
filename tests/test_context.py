"""What a teacher reads: its words, its chat template's variables, and what a row must have."""

import pytest

from megatron_opd.config import Data
from megatron_opd.context import CONTEXTS, Context, read_words
from megatron_opd.data import load_sources
from tests.prompts import write
from tests.tokenizers import train_tokenizer

QUESTION = "What is 2 + {2}?"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("student"))


def read(folder, tokenizer, words, *, variables=None, longest=1000, warn=None, rows=None, **data):
    """The prompts of a file whose only teacher reads `words`."""
    known = {"prompt": QUESTION, "answer": 4, "response": "It is {answer}: 4."}
    file = write(folder / "prompts.jsonl", rows or [known])
    context = Context("teacher", words, variables, longest)
    section = Data(prompts=(file,), **data)
    told = warn if warn is not None else []
    return load_sources(section, tokenizer, contexts={"": context}, warn=told.append)[0]


def chat(text, system=""):
    before = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return f"{before}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_fields_are_filled_once_and_braces_of_the_data_stay(tmp_path, tokenizer):
    words = "{question} | {message} | {answer} | {response} | \\boxed{} {other}"
    (prompt,) = read(tmp_path, tokenizer, words, template="boxed")
    assert prompt.text == chat(
        f"{QUESTION} Please reason step by step, and put your final answer within \\boxed{{}}."
    )
    (message,) = prompt.text.removeprefix("<|im_start|>user\n").split("<|im_end|>")[:1]
    filled = f"{QUESTION} | {message} | 4 | It is {{answer}}: 4. | \\boxed{{}} {{other}}"
    assert tokenizer.decode(prompt.teacher_token_ids) == chat(filled)


def test_only_the_last_question_is_exchanged(tmp_path, tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Well?"},
    ]
    (prompt,) = read(tmp_path, tokenizer, "{message} Hint: 4.", rows=[{"prompt": messages}])
    assert tokenizer.decode(prompt.token_ids) == chat("Well?", "Be brief.")
    assert tokenizer.decode(prompt.teacher_token_ids) == chat("Well? Hint: 4.", "Be brief.")


def test_the_chat_template_may_have_other_variables_or_be_none(tmp_path, tokenizer):
    (plain,) = read(tmp_path, tokenizer, "{question} Hint.", chat_template="none")
    assert tokenizer.decode(plain.token_ids) == QUESTION
    assert tokenizer.decode(plain.teacher_token_ids) == f"{QUESTION} Hint."
    jinja = tmp_path / "chat.jinja"
    jinja.write_text("{{ messages[0].content }}{% if think %} <think>{% endif %}")
    how = dict(chat_template=str(jinja), chat_template_kwargs={"think": True})
    (prompt,) = read(tmp_path, tokenizer, None, variables={"think": False}, **how)
    assert tokenizer.decode(prompt.token_ids) == f"{QUESTION} <think>"
    assert tokenizer.decode(prompt.teacher_token_ids) == QUESTION
    (prompt,) = read(tmp_path, tokenizer, "{message}!", **how)
    assert tokenizer.decode(prompt.teacher_token_ids) == f"{QUESTION}! <think>"


@pytest.mark.parametrize("name", CONTEXTS)
def test_the_built_in_words_tell_question_and_response(tmp_path, tokenizer, name):
    (prompt,) = read(tmp_path, tokenizer, read_words(name, "teacher.template"))
    told = tokenizer.decode(prompt.teacher_token_ids)
    assert QUESTION in told and "It is {answer}: 4." in told


@pytest.mark.parametrize(
    ("words", "row", "line"),
    [
        ("{message} {answer}", {"prompt": "x"}, "row 0: no answer, which teacher.template tells"),
        ("{message} {response}", {"prompt": "x"}, "no response, which teacher.template tells the"),
        (
            "{message}",
            {"prompt": [{"role": "system", "content": "x"}]},
            "no message by the user, which teacher.template takes the place of",
        ),
    ],
)
def test_what_a_row_does_not_have_is_one_line(tmp_path, tokenizer, words, row, line):
    with pytest.raises(ValueError, match=line) as raised:
        read(tmp_path, tokenizer, words, rows=[row])
    assert "\n" not in str(raised.value) and "prompts.jsonl, row 0" in str(raised.value)


def test_what_is_too_long_for_the_teacher_is_refused_or_dropped(tmp_path, tokenizer):
    rows = [{"prompt": "x", "answer": "1"}, {"prompt": "y", "answer": "1" * 200}]
    words = "{message} {answer}"
    with pytest.raises(ValueError, match=r"1 of 2 prompts are longer than teacher.max_prompt_tok"):
        read(tmp_path, tokenizer, words, rows=rows, longest=99)
    told = []
    how = dict(rows=rows, longest=99, too_long="drop", warn=told)
    (kept,) = read(tmp_path, tokenizer, words, **how)
    assert kept.index == 0 and len(kept.teacher_token_ids) <= 99
    assert "prompts.jsonl, row 1); dropped" in told[0]


def test_words_come_from_a_file_that_asks(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("{question}\nThink of {answer}.\n")
    assert read_words(str(path), "teacher.template") == "{question}\nThink of {answer}."
    path.write_text("Think of {answer}.")
    with pytest.raises(ValueError, match=r"has no \{message\} and no \{question\}: the teacher"):
        read_words(str(path), "teacher.template")
    with pytest.raises(
        ValueError, match=r"teacher.template: got 'ospd', expected one of opsd, sdft"
    ):
        read_words("ospd", "teacher.template")
