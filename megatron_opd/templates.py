"""The words around a question: put on by name or from a file, and taken off again.

A question that already wears a template would get a second one, and two files with the same
questions in different templates would have nothing in common: so what is known is taken off first.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FIELD = "{question}"
TEMPLATES = {
    "none": FIELD,
    # DAPO-Math-17K as published; its answers fail a grader that looks for a box
    "dapo": (
        "Solve the following math problem step by step. The last line of your response should be "
        "of the form Answer: $Answer (without quotes) where $Answer is the answer to the problem."
        f'\n\n{FIELD}\n\nRemember to put your answer on its own line after "Answer:".'
    ),
    # what the teachers of the paper were trained with by reinforcement learning
    "boxed": f"{FIELD} Please reason step by step, and put your final answer within \\boxed{{}}.",
}
_DAPO_FIRST, _DAPO_LAST = TEMPLATES["dapo"].split(FIELD)
_BOXED_LAST = "Please reason step by step, and put your final answer within \\boxed"
# DeepMath and AIME write \boxed{}, the published DAPO file \boxed{{}}: a format string, unfilled
_BOX = re.compile(r"\{(?:\{\})?\}\.?\s*")


def bare(text: str) -> str:
    """Return the question without the templates that it wears; its own white space stays.

    17,398 questions of DAPO-Math-17K are unique that way, in either of its published templates.
    """
    if text.startswith(_DAPO_FIRST) and text.endswith(_DAPO_LAST):
        return bare(text[len(_DAPO_FIRST) : -len(_DAPO_LAST)])
    question, worn, box = text.rpartition(_BOXED_LAST)
    if worn and _BOX.fullmatch(box):
        # one space before the template, as here, or lines of its own
        apart = question[:-1] if question.endswith(" ") else question.rstrip("\n")
        return bare(apart)
    return text


def asked(messages: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the position of the last message by the user: the question; None: there is none."""
    by_user = [i for i, message in enumerate(messages) if message["role"] == "user"]
    return by_user[-1] if by_user else None


def reword(messages: Sequence[dict[str, Any]], words: str) -> list[dict[str, Any]]:
    """Return the conversation with its last question in `words`, the text of a template."""
    last = asked(messages)
    assert last is not None
    question = bare(messages[last]["content"])
    reworded = {**messages[last], "content": words.replace(FIELD, question)}
    return [*messages[:last], reworded, *messages[last + 1 :]]


def read(template: str, *, key: str = "template") -> str:
    """Return the text of a template: a built-in name, or a text file with {question} in it.

    `key` is what the user calls it.

    Raises:
        ValueError: neither; or the file has no {question}.
    """
    if template in TEMPLATES:
        return TEMPLATES[template]
    expected = f"one of {', '.join(TEMPLATES)}, or a text file with {FIELD} in it"
    text = read_file(template, key, expected)
    if FIELD not in text:
        raise ValueError(f"{key}: '{template}' has no {FIELD}, where the question would go")
    return text.removesuffix("\n")


def read_file(path: str, key: str, expected: str) -> str:
    """Return the text of a file that `key` names in place of one of the names that it may have.

    Raises:
        ValueError: no such file, or it is none of text; says what was expected.
    """
    if not Path(path).is_file():
        raise ValueError(f"{key}: got '{path}', expected {expected}")
    try:
        return Path(path).read_text()
    except UnicodeDecodeError:
        raise ValueError(f"{key}: '{path}' is not a text file") from None
