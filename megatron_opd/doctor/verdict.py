"""All rows → one, in the terms of the paper."""

from collections.abc import Sequence

from megatron_opd.doctor.report import NOT_RUN, Row

BROKEN = (
    "tokenizers",
    "student loads",
    "teacher loads",
    "student logits",
    "teacher logits",
    "engine = trainer",
    "teacher = student",
    "memory",
)
DECISIVE = (  # causes before what they cause
    "new knowledge",
    "template",
    "teacher's margin",
    "overlap ratio",
    "overlap mass",
    "truncation",
    "format",
    "signal by position",
)


def verdict(rows: Sequence[Row]) -> Row:
    """Sum up in the paper's terms: what is broken, then what will not work, then go.

    It repeats the first row that decides, and is as bad as the worst of these. Checks that were not
    run decide nothing; they and every other doubt are named.
    """
    ran = {row.check: row for row in rows if row.value != NOT_RUN}
    for row in (ran[name] for name in BROKEN if name in ran):
        if row.verdict == "fail":
            return Row("verdict", "fail", f"{row.check}: {row.advice}")
    deciding = [ran[name] for name in DECISIVE if name in ran and _decides(ran[name])]
    told = deciding[:1]
    doubts = [row.check for row in rows if row.verdict != "ok" and row not in told]
    also = f"look at: {', '.join(doubts)}" if doubts else ""
    if not told:
        return Row("verdict", "ok", "compatible, go", also)
    failed = any(row.verdict == "fail" for row in deciding)
    return Row("verdict", "fail" if failed else "warn", told[0].advice, also)


def _decides(row: Row) -> bool:
    """A margin within noise is a doubt that no plan should hang on."""
    return row.verdict == "fail" or (row.verdict == "warn" and row.check != "teacher's margin")
