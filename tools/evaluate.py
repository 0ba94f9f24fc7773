"""Measure how often a model is right: avg@n, pass@k, maj@n, with confidence intervals.

The defaults are those of "Rethinking On-Policy Distillation": 16 responses a problem, temperature
0.7, top-p 0.95, at most 31,744 tokens. DIR gets responses.jsonl (a line a problem, as they come),
summary.json, and progress.json: the same command goes on where it was stopped.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_opd.config import resolve
from megatron_opd.evaluation import (
    Graded,
    Recovery,
    by_source,
    grade,
    recovery,
    summarize,
    texts,
)
from megatron_opd.journal import Journal, in_rounds, read_lines
from megatron_opd.reward import REWARDS
from megatron_opd.tables import markdown
from megatron_opd.types import Prompt, Reward, Rollout
from megatron_opd.writer import Writer
from megatron_opd.writer_options import (
    exit_code,
    make_parser,
    open_writer,
    read_prompts,
    round_size,
    sampling,
    settings,
)

EXAMPLES = """\
examples:
  %(prog)s Qwen3-1.7B aime24.parquet amc23.parquet --template boxed --out eval/student
  torchrun --nproc-per-node 8 %(prog)s MODEL aime24.parquet --engine vllm --tp 2 --out eval/m
  %(prog)s MODEL aime24.parquet --out eval/m \\
      --teacher eval/teacher/summary.json --baseline eval/before/summary.json"""
RESPONSES, SUMMARY = "responses.jsonl", "summary.json"
PAPER = {"n": 16, "max_tokens": 31744, "temperature": 0.7, "top_p": 0.95, "top_k": 0, "seed": 0}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, EXAMPLES, **PAPER)
    group = parser.add_argument_group("judging and writing")
    names = ", ".join(REWARDS)
    group.add_argument("--reward", default="math", help=f"{names}, or module:function (math)")
    group.add_argument("--out", type=Path, required=True, metavar="DIR")
    group.add_argument("--teacher", type=Path, metavar="SUMMARY", help="its summary.json")
    group.add_argument("--baseline", type=Path, metavar="SUMMARY", help="the student's, before")
    return parser.parse_args(argv)


def measure(options: argparse.Namespace, writer: Writer, reward: Reward) -> None:
    """Write and grade what is still missing, then sum it up; collective."""
    prompts = read_prompts(options, writer, require=("answer",))
    asked = settings(options, prompts) | {"reward": options.reward}
    how, parallel = sampling(options, writer), writer.parallel

    def judged(some: Sequence[Prompt]) -> dict[str, list[dict[str, Any]]]:
        rollouts = writer.generate(list(some), n=options.n, sampling=how, seed=options.seed)
        return parallel.owner(lambda: {RESPONSES: _rows(rollouts, reward, writer.tokenizer)})

    def begin() -> Journal:
        return Journal(options.out / "progress.json", [options.out / RESPONSES], asked)

    in_rounds(parallel, prompts, round_size(options), begin, judged)
    parallel.main_only(lambda: _sum_up(options.out, asked))


def _rows(rollouts: Sequence[Rollout], reward: Reward, tokenizer: Any) -> list[dict[str, Any]]:
    """Return what is kept of each problem: its verdicts, its texts."""
    said = dict[int, list[str]]()
    for rollout, text in zip(rollouts, texts(rollouts, tokenizer), strict=True):
        said.setdefault(rollout.prompt.index, []).append(text)
    about = {r.prompt.index: r.prompt for r in rollouts}
    return [
        asdict(one)
        | {"question": about[one.index].question, "answer": about[one.index].answer}
        | {"responses": said[one.index]}
        for one in grade(rollouts, reward, tokenizer)
    ]


def _sum_up(folder: Path, asked: Mapping[str, Any]) -> None:
    """Write summary.json from all rows."""
    names = [field.name for field in fields(Graded)]
    rows = read_lines(folder / RESPONSES)
    graded = [Graded(**{name: row[name] for name in names}) for row in rows]
    parts = by_source(graded)
    summary = {
        "settings": asked,
        "all": summarize(graded),
        "sources": {name: summarize(part) for name, part in parts.items()},
        "accuracies": {name: [g.accuracy for g in part] for name, part in parts.items()},
    }
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    (folder / SUMMARY).write_text(text + "\n")


def report(options: argparse.Namespace) -> str:
    """Return what is printed at the end: a table, and the gap recovery if that is asked for."""
    summary = read_summary(options.out / SUMMARY)
    lines = [table(summary)]
    if options.teacher is not None:
        models = [summary, read_summary(options.baseline), read_summary(options.teacher)]
        lines += ["", *recovery_lines(*models)]
    return "\n".join(lines)


def read_summary(path: Path) -> dict[str, Any]:
    """Read the summary.json of an evaluation.

    Raises:
        ValueError: it is none.
    """
    try:
        summary = json.loads(path.read_text())
        return {key: summary[key] for key in ("settings", "all", "sources", "accuracies")}
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"'{path}': no summary.json of this tool") from None


def table(summary: Mapping[str, Any]) -> str:
    """Return the metrics of each source, and of all problems, in percent ± 95 % interval."""
    parts = dict(summary["sources"])
    if len(parts) > 1:
        parts["all"] = summary["all"]
    n = int(summary["all"]["n"])
    rates = [name for name in summary["all"] if f"{name}±" in summary["all"]]
    columns = ["source", "problems", f"avg@{n}", *rates[1:], "tokens", "cut", "boxed"]
    rows = []
    for name, part in parts.items():
        row = [name, f"{part['problems']:.0f}"]
        row += [f"{100 * part[rate]:.1f} ± {100 * part[f'{rate}±']:.1f}" for rate in rates]
        row += [f"{part['response_tokens']:.0f}", f"{part['truncated_fraction']:.1%}"]
        rows.append([*row, f"{part['boxed_fraction']:.1%}"])
    return markdown(columns, rows)


def recovery_lines(
    student: Mapping[str, Any], baseline: Mapping[str, Any], teacher: Mapping[str, Any]
) -> list[str]:
    """Return a line for each source, and for all problems, on how much of the gap is recovered.

    Raises:
        ValueError: the three were not asked the same problems.
    """
    for name, other in (("--baseline", baseline), ("--teacher", teacher)):
        if other["settings"]["problems"] != student["settings"]["problems"]:
            raise ValueError(f"{name}: it was asked other problems; evaluate it on the same FILEs")
    models = [m["accuracies"] for m in (student, baseline, teacher)]
    parts = {name: [m[name] for m in models] for name in models[0]}
    if len(parts) > 1:
        parts["all"] = [list(chain.from_iterable(m.values())) for m in models]
    return [_recovery_line(name, recovery(*part)) for name, part in parts.items()]


def _recovery_line(name: str, found: Recovery) -> str:
    line = f"gap recovery, {name}: {found.rate:.1%} [{found.low:.1%}, {found.high:.1%}]"
    return line if found.caution is None else f"{line}; {found.caution}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code: 0, or 2 after a one-line error."""
    options = arguments(argv)
    return exit_code(lambda: run(options), lambda: report(options))


def run(options: argparse.Namespace) -> None:
    """Check the options, then work; collective.

    Raises:
        ValueError: one line.
    """
    _check(options)
    reward = resolve("--reward", options.reward, REWARDS)
    with open_writer(options) as writer:
        measure(options, writer, reward)


def _check(options: argparse.Namespace) -> None:
    """Find what is wrong with the summaries before anything is written."""
    if (options.teacher is None) != (options.baseline is None):
        raise ValueError("--teacher, --baseline: got one, expected both or none")
    if options.teacher is not None:
        read_summary(options.teacher)
        read_summary(options.baseline)


if __name__ == "__main__":
    sys.exit(main())
