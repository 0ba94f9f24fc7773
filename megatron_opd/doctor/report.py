"""What the doctor says: rows, as a table and as JSON."""

import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warn", "fail"]
NOT_RUN = "not run"
_COLORS = {"ok": "32", "warn": "33", "fail": "31"}  # of a terminal: green, yellow, red


@dataclass(frozen=True)
class Row:
    """One check: what was found, what it means, and what to do about it."""

    check: str
    verdict: Verdict
    value: str
    advice: str = ""


def not_run(check: str, reason: str) -> Row:
    """Return the row of a check that could not be made: a doubt, and no approval."""
    return Row(check, "warn", NOT_RUN, reason)


def table(rows: Sequence[Row], *, color: bool = False, width: int | None = None) -> str:
    """Return the rows as aligned columns; advice is wrapped below the value it is about."""
    width = width or shutil.get_terminal_size((100, 24)).columns
    checks = max(len(row.check) for row in rows)
    indent = checks + 8  # of the value: check, verdict of four letters, two gaps
    lines = []
    for row in rows:
        verdict = f"{row.verdict:<4}"
        if color:
            verdict = f"\033[{_COLORS[row.verdict]}m{verdict}\033[0m"
        texts = [row.value, row.advice]
        if row.value == NOT_RUN:
            texts = [f"{row.value}: {row.advice}"]
        told = [part for text in texts for part in _wrap(text, width - indent)]
        lines.append(f"{row.check:<{checks}}  {verdict}  {told[0]}")
        lines += [" " * indent + part for part in told[1:]]
    return "\n".join(lines)


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(width, 40), break_long_words=False, break_on_hyphens=False)
