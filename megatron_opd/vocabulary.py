"""Whether two tokenizers are one, id by id, and how many ids there are."""

import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)


def vocab_size(tokenizer: Any) -> int:
    """Return the number of vocabulary rows that tokens use: the highest id + 1."""
    return max(tokenizer.get_vocab().values()) + 1


def same_tokenizer(
    student: Any,
    other: Any,
    *,
    name: str = "teacher",
    allow: bool = False,
    warn: Callable[[str], None] = log.warning,
) -> None:
    """Check that every id is the same token to both, ids that only one of them has included.

    `name` is that of the other's section.

    Raises:
        ValueError: it is not, and `allow` is false; with `allow`, the line is a logged warning.
    """
    differ = differing_ids(student, other)
    if not differ:
        return
    first = ", ".join(differ[:10])
    line = f"{name}: {len(differ)} token ids differ from the student's ({first})"
    if not allow:
        raise ValueError(f"{line}; set {name}.allow_tokenizer_mismatch=true if it does not matter")
    warn(f"{line}; allowed")


def differing_ids(student: Any, other: Any) -> list[str]:
    """Return "id: token vs token" for every id that is another token, or none, to one of them."""
    mine = {index: token for token, index in student.get_vocab().items()}
    theirs = {index: token for token, index in other.get_vocab().items()}
    differ = [i for i in sorted(mine | theirs) if mine.get(i) != theirs.get(i)]
    return [f"{i}: {mine.get(i)!r} vs {theirs.get(i)!r}" for i in differ]
