"""What a teacher reads in place of the student's question: what only it is told.

The response stays the student's, token by token; only what comes before it is exchanged.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_opd.rows import Row
from megatron_opd.templates import asked, bare, read_file

CONTEXTS = {
    # self-distillation from a worked solution (2601.18734)
    "opsd": (
        "{message}\n\nFor reference, this is a correct solution:\n\n{response}\n\nMake sure that "
        "you understand it, then solve the problem yourself, step by step and in your own words."
    ),
    # from a demonstration (2601.19897)
    "sdft": (
        "{message}\n\nThis is how somebody answered it well:\n\n{response}\n\nAnswer it now "
        "yourself, with all the thinking that it takes."
    ),
}
_FIELD = re.compile(r"\{(message|question|answer|response)\}")


@dataclass(frozen=True)
class Context:
    """How one teacher reads prompts."""

    key: str  # of its section, for messages
    words: str | None  # in place of the user's message, with fields; None: that message
    variables: Mapping[str, Any] | None  # for the chat template; None: the student's
    longest: int  # tokens of a prompt

    def exchange(self, row: Row, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the student's conversation with this teacher's words in place of the question.

        Fields: {message}, the user's message as the student reads it; {question}, the bare
        question in it; {answer} and {response}, the dataset's.

        Raises:
            ValueError: no message by the user; the row does not have what the words tell.
        """
        if self.words is None:
            return messages
        last = asked(messages)
        if last is None:
            raise ValueError(
                f"{row.where}: no message by the user, which {self.key}.template takes the place of"
            )
        message = messages[last]["content"]
        told = {"message": message, "question": bare(row.messages[last]["content"])}
        told |= {"answer": row.answer, "response": row.response}
        for name in _FIELD.findall(self.words):
            if told[name] is None:
                raise ValueError(
                    f"{row.where}: no {name}, which {self.key}.template tells the teacher; set "
                    f"data.{name}_key to the column that has it"
                )
        content = _FIELD.sub(lambda field: str(told[field[1]]), self.words)
        return [*messages[:last], {**messages[last], "content": content}, *messages[last + 1 :]]


def read_words(template: str, key: str) -> str:
    """Return the text of a teacher's template: a built-in name, or a text file.

    Raises:
        ValueError: neither; or the file has no field for the question.
    """
    if template in CONTEXTS:
        return CONTEXTS[template]
    expected = f"one of {', '.join(CONTEXTS)}, or a text file with {{message}} or {{question}}"
    words = read_file(template, key, expected)
    if not {"message", "question"}.intersection(_FIELD.findall(words)):
        raise ValueError(
            f"{key}: '{template}' has no {{message}} and no {{question}}: the teacher would not "
            "know what is asked"
        )
    return words.removesuffix("\n")
