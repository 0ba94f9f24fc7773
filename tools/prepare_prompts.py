"""Prepare prompt files: take templates off, drop what was asked before, put a template on."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_opd import dedup, templates
from megatron_opd.config import Data
from megatron_opd.dedup import Twin
from megatron_opd.rows import Row, read_rows, write_rows

DESCRIPTION = """\
Read prompt files (parquet or JSON lines: the layout of verl, a plain prompt, or messages), strip
their questions of the templates that they wear, drop those that were asked before, in the files or
in those of --against, and write one parquet file in the layout of verl, in one template. Of
questions that say the same, the first stays."""
EXAMPLES = """\
examples:
  %(prog)s dapo-math-17k.parquet --out dapo.parquet
  %(prog)s deepmath.parquet --against dapo.parquet --dedup semantic --out ood.parquet"""
SHOWN = 10  # examples of a kind in the report


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="IN", help="prompt file to read")
    add("--out", type=Path, required=True, help="parquet file to write; must not exist")
    add(
        "--template",
        default="boxed",
        help="words around the questions: none, dapo, boxed (default), or a text file with "
        "{question} in it",
    )
    add("--against", nargs="+", default=[], metavar="FILE", help="drop what these files ask, too")
    add(
        "--dedup",
        choices=["exact", "semantic", "none"],
        default="exact",
        help="drop questions that equal an earlier one (exact, default), or are close to one in "
        "meaning, too (semantic)",
    )
    add(
        "--model",
        help="sentence-transformers model of --dedup semantic, a folder or a name; default: "
        + dedup.MODEL,
    )
    add(
        "--threshold",
        type=float,
        help=f"cosine from which two questions say the same; default: {dedup.THRESHOLD}",
    )
    add("--report", type=Path, metavar="FILE.json", help="write what was dropped, and why")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Find what the user got wrong before anything is read.

    Raises:
        ValueError: one line: option, got, expected.
    """
    if args.out.suffix != ".parquet":
        raise ValueError(f"--out: got '{args.out}', expected a .parquet file")
    if args.out.exists():
        raise ValueError(f"--out: '{args.out}' exists; remove it or choose another name")
    for option, path in (("out", args.out), ("report", args.report)):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"--{option}: no folder '{path.parent}' for '{path.name}'")
    for option in ("model", "threshold"):
        if getattr(args, option) is not None and args.dedup != "semantic":
            raise ValueError(f"--{option}: has no effect without --dedup semantic")
    if args.against and args.dedup == "none":
        raise ValueError("--against: has no effect with --dedup none")
    if args.threshold is not None and not 0 < args.threshold <= 1:
        raise ValueError(f"--threshold: got {args.threshold:g}, expected more than 0, at most 1")
    templates.read(args.template, key="--template")


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Read, drop, and write; return the report.

    Raises:
        ValueError: a file that cannot be read, or a row that is wrong; nothing is left.
    """
    columns = Data(prompts=tuple(args.files))
    known = [row for file in args.against for row in read_rows(columns, file)]
    new = {file: read_rows(columns, file) for file in args.files}
    rows = known + [row for of_one in new.values() for row in of_one]
    for row in rows[len(known) :]:
        if templates.asked(row.messages) is None:
            raise ValueError(f"{row.where}: no message by the user, so no question")
    twins, embedding = find_twins(
        [dedup.question_of(row.messages) for row in rows], len(known), args
    )
    gone = {twin.index for of_one in twins.values() for twin in of_one}
    kept = [row for i, row in enumerate(rows) if i >= len(known) and i not in gone]
    if not kept:
        raise ValueError("IN: no question is left; see --against and --threshold")
    write_rows(args.out, finished(kept, templates.read(args.template)))
    return {
        "read": {file: len(of_one) for file, of_one in new.items()},
        "against": dict(Counter(row.where.rpartition(", row ")[0] for row in known)),
        "dropped": count(twins, len(known)),
        "kept": len(kept),
        "template": args.template,
        **embedding,
        "examples": examples(twins, rows),
    }


def find_twins(
    questions: Sequence[str], known: int, args: argparse.Namespace
) -> tuple[dict[str, list[Twin]], dict[str, Any]]:
    """Return the questions to drop, by reason, and how they were compared."""
    if args.dedup == "none":
        return {}, {}
    exact = dedup.equal(questions, known=known)
    if args.dedup == "exact":
        return {"exact": exact}, {}
    model, threshold = args.model or dedup.MODEL, args.threshold or dedup.THRESHOLD
    gone = {twin.index for twin in exact}
    place = [i for i in range(len(questions)) if i not in gone]
    vectors_ND, cut = dedup.embed([questions[i] for i in place], model)
    alike = [
        Twin(place[twin.index], place[twin.partner], twin.cosine)
        for twin in dedup.alike(vectors_ND, known=known, threshold=threshold)
    ]
    settings = {"model": model, "threshold": threshold, "longer_than_the_model_reads": cut}
    return {"exact": exact, "semantic": alike}, settings


def finished(rows: Sequence[Row], words: str) -> list[Row]:
    """Put the template on, and give every row an id of its own: two files may use the same."""
    taken: set[str] = set()
    times: Counter[str] = Counter()
    done = []
    for row in rows:
        file, _, number = row.where.rpartition(", row ")
        own = name = row.id or f"{Path(file).stem}-{number}"
        while own in taken:
            times[name] += 1
            own = f"{name}-{times[name]}"
        taken.add(own)
        done.append(replace(row, id=own, messages=templates.reword(row.messages, words)))
    return done


def count(twins: dict[str, list[Twin]], known: int) -> dict[str, int]:
    """Return how many go for each reason: like a question of --against, or of the files."""
    return {
        f"{reason}_{where}": sum((twin.partner < known) == (where == "against") for twin in found)
        for reason, found in twins.items()
        for where in ("against", "within")
    }


def examples(twins: dict[str, list[Twin]], rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """Return pairs to judge the threshold by: the closest, and those that hardly reached it."""
    ranked = sorted(twins.get("semantic", []), key=lambda twin: -twin.cosine)
    picked = {
        "exact": twins.get("exact", [])[:SHOWN],
        "semantic_closest": ranked[:SHOWN],
        "semantic_farthest": ranked[::-1][:SHOWN],
    }
    return {
        name: [
            {
                "cosine": round(twin.cosine, 4),
                "dropped": shown(rows[twin.index]),
                "kept": shown(rows[twin.partner]),
            }
            for twin in found
        ]
        for name, found in picked.items()
        if found
    }


def shown(row: Row) -> dict[str, str]:
    return {"row": row.where, "question": dedup.question_of(row.messages)}


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code: 0, or 2 after a one-line error."""
    args = arguments(argv)
    try:
        check(args)
        report = prepare(args)
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    if args.report is not None:
        args.report.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print(f"{sum(report['read'].values()):,} questions read")
    for reason, number in report["dropped"].items():
        print(f"{number:,} dropped: {reason.replace('_', ', ')}")
    print(f"{report['kept']:,} kept, in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
