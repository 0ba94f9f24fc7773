"""The answer that a response gives: found in the text, and written so that equals look equal."""

import re
from decimal import Decimal

# what opens a box; a backslash with what it escapes; the braces that count
_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_ANSWER = re.compile(r"^[\s>*#]*answer\s*[*]*\s*:[\s*]*(.*?)[\s*.]*$", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)")
_SIZING = re.compile(r"\\[,!;: ]|\\(left|right)(?![a-z])")
_SPACE = re.compile(r"(?<!\w)\s+|\s+(?!\w)")  # but not that of 2 1/2


def boxed(text: str) -> str | None:
    r"""Return what the last `\boxed{…}` holds; None where no box closes, or it is empty.

    Braces balance, escaped ones do not count, and of nested boxes the innermost is meant. One pass:
    a long text of boxes that never close costs no more than another.
    """
    opened: list[int | None] = []  # where the content of a box starts; None: a brace of another
    last: tuple[int, int] | None = None
    for token in _BRACES.finditer(text):
        if token[0].startswith("\\boxed"):
            opened.append(token.end())
        elif token[0] == "{":
            opened.append(None)
        elif token[0] == "}" and opened:
            start = opened.pop()
            if start is not None and (last is None or start > last[0]):
                last = start, token.start()
    return text[slice(*last)].strip() or None if last else None


def stated(text: str) -> str | None:
    """Return what follows "Answer:" in the last line that is not empty; None where nothing does.

    The original DAPO template asks for it. A box around the answer, or dollars, are taken off.
    """
    lines = text.rstrip().splitlines()
    found = _ANSWER.match(lines[-1]) if lines else None
    if not found:
        return None
    return boxed(found[1]) or found[1].strip(" $") or None


def canonical(answer: str) -> str:
    r"""Return an answer without what changes only its looks: 142.0 → 142, \dfrac → \frac.

    Two answers with one canonical form are equal; equal ones may still differ (1/2 and 0.5).
    """
    answer = _SPACE.sub("", _SIZING.sub("", answer.strip().strip("$")))
    answer = answer.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    if not _NUMBER.fullmatch(answer):
        return answer
    number = Decimal(answer)
    whole = number.to_integral_value()
    return str(whole if number == whole else number.normalize()).replace("-0", "0", number == 0)
