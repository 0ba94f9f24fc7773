"""Write a model's responses to a file: the teacher's for a cold start, or anyone's.

OUT is JSON lines that rollout.engine=replay reads: prompt, response, answer, reward, finish and
more. A response that a filter rejects is drawn again, and at last left out; all that were rejected
are in OUT's neighbour NAME.rejected.jsonl, with the reasons. NAME.progress.json says how far the
work is: the same command goes on where it was stopped, and ends with the same files.

filters: truncated · empty · no_box · wrong (by --reward; :above=0.5) · repeated_lines (:length=20,
times=5) · repeated_windows (:length=100,stride=10,times=3) · repeated_blocks (:length=50,times=3,
longer_than=5000). Options go behind a colon: repeated_lines:times=4,length=10."""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from megatron_opd import templates
from megatron_opd.config import Data, resolve
from megatron_opd.data import reworded
from megatron_opd.evaluation import texts
from megatron_opd.filters import Filter, build_filters, reasons
from megatron_opd.journal import Journal, in_rounds, read_lines
from megatron_opd.reward import REWARDS, scored
from megatron_opd.rollout import request_seed
from megatron_opd.rows import read_rows
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
  %(prog)s Qwen3-4B openthoughts.parquet --template boxed --engine vllm --tp 2 \\
      --chat-template-kwargs enable_thinking=false --reward math \\
      --reject truncated empty no_box repeated_lines repeated_windows repeated_blocks \\
      --out rollouts.jsonl
  python -m megatron_opd sft.yaml rollout.engine=replay data.prompts=[rollouts.jsonl]"""
PAPER = {"n": 1, "max_tokens": 12288, "temperature": 0.7, "top_p": 0.95, "top_k": 0, "seed": 0}
ALWAYS = ("truncated", "empty", "repeated_lines", "repeated_windows", "repeated_blocks")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, EXAMPLES, **PAPER)
    group = parser.add_argument_group("keeping")
    names = ", ".join(REWARDS)
    group.add_argument("--reward", help=f"score responses: {names}, or module:function")
    group.add_argument(
        "--reject", nargs="*", default=ALWAYS, metavar="FILTER", help=f"({' '.join(ALWAYS)})"
    )
    group.add_argument(
        "--attempts", type=int, default=3, help="times that a response is drawn at most (3)"
    )
    group.add_argument("--out", type=Path, required=True, metavar="OUT.jsonl")
    return parser.parse_args(argv)


def collect(
    options: argparse.Namespace,
    writer: Writer,
    reward: Reward | None,
    filters: Mapping[str, Filter],
) -> None:
    """Write what is still missing of OUT and of what was rejected; collective."""
    prompts, parallel = read_prompts(options, writer, require=_required(options)), writer.parallel
    asked = settings(options, prompts) | {
        "reward": options.reward,
        "reject": options.reject,
        "attempts": options.attempts,
    }
    asked_as = parallel.main_only(lambda: conversations(writer.config.data))
    how, files = sampling(options, writer), [options.out, beside(options.out, "rejected.jsonl")]

    def judged(rollouts: Sequence[Rollout], attempt: int) -> list[dict[str, Any]]:
        assert asked_as is not None  # on rank 0
        rows = []
        for rollout, text in zip(rollouts, texts(rollouts, writer.tokenizer), strict=True):
            if reward is not None:
                rollout = replace(rollout, reward=scored(reward, text, rollout.prompt))
            why = reasons(filters, text, rollout)
            messages = asked_as[rollout.prompt.index]
            rows.append(_row(rollout, text, messages) | {"attempt": attempt, "rejected": why})
        return rows

    def draw(some: Sequence[Prompt]) -> dict[str, list[dict[str, Any]]]:
        pending = [replace(p, copy=sample) for p in some for sample in range(options.n)]
        rows: list[dict[str, Any]] = []
        for attempt in range(options.attempts):
            # a draw depends on nothing but its own prompt, number and attempt
            seed = request_seed(options.seed, attempt)
            rollouts = writer.generate(pending, n=1, sampling=how, seed=seed)
            new = parallel.owner(partial(judged, rollouts, attempt))
            rows += new
            pending = [p for p, row in zip(pending, new, strict=True) if row["rejected"]]
            if not pending:
                break
        rows.sort(key=lambda row: (row["index"], row["sample"], row["attempt"]))
        kept = [
            {k: v for k, v in row.items() if k != "rejected"} for row in rows if not row["rejected"]
        ]
        return {files[0].name: kept, files[1].name: [row for row in rows if row["rejected"]]}

    def begin() -> Journal:
        return Journal(beside(options.out, "progress.json"), files, asked)

    in_rounds(parallel, prompts, round_size(options), begin, draw)


def _required(options: argparse.Namespace) -> tuple[str, ...]:
    return ("answer",) if options.reward else ()


def beside(out: Path, ending: str) -> Path:
    """Return the file NAME.ending next to NAME.jsonl."""
    return out.with_name(f"{out.stem}.{ending}")


def conversations(data: Data) -> list[list[dict[str, Any]]]:
    """Return the messages of all rows as they were asked, in the words of data.template."""
    words = templates.read(data.template, key="data.template")
    return [reworded(data, words, row) for file in data.prompts for row in read_rows(data, file)]


def _row(rollout: Rollout, text: str, messages: list[dict[str, Any]]) -> dict[str, Any]:
    prompt = rollout.prompt
    return {
        "prompt": messages,
        "question": prompt.question,
        "response": text,
        "answer": prompt.answer,
        "reward": rollout.reward,
        "data_source": prompt.source,
        "finish": rollout.finish,
        "tokens": len(rollout.response_ids),
        "logp_mean": sum(rollout.logp) / len(rollout.logp),
        "index": prompt.index,
        "sample": rollout.sample,
    }


def report(options: argparse.Namespace) -> str:
    """Return what is printed at the end: how many were kept, and why the others were not."""
    kept = read_lines(options.out)
    rejected = read_lines(beside(options.out, "rejected.jsonl"))
    drawn, wanted = (
        len(kept) + len(rejected),
        len({(r["index"], r["sample"]) for r in kept + rejected}),
    )
    counts = Counter(name for row in rejected for name in row["rejected"])
    lines = [
        f"{len(kept):,} of {wanted:,} responses kept, of {drawn:,} drawn; in {options.out}",
        f"{_mean(kept, 'tokens'):.0f} tokens on average",
    ]
    if options.reward:
        lines[-1] += f", reward {_mean(kept, 'reward'):.3f}"
    if counts:
        rows = [[name, f"{counts[name]:,}", f"{counts[name] / drawn:.1%}"] for name in counts]
        lines += ["", markdown(["rejected for", "responses", "of drawn"], rows)]
    cut = sum(row["finish"] == "length" for row in kept)
    if cut:
        lines.append(f"warning: {cut:,} were cut, and replay ends them as if they were whole")
    return "\n".join(lines)


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows) if rows else 0.0


def parse_filters(words: Sequence[str]) -> dict[str, Filter]:
    """Return the filters of NAME or NAME:key=value,… words.

    Raises:
        ValueError: see `build_filters`.
    """
    asked: dict[str, dict[str, Any]] = {}
    for word in words:
        name, _, rest = word.partition(":")
        pairs = [pair.partition("=") for pair in rest.split(",") if pair]
        asked[name] = {key: yaml.safe_load(value) for key, _, value in pairs}
    return build_filters(asked)


def _check(options: argparse.Namespace, filters: Mapping[str, Filter]) -> None:
    if options.out.suffix != ".jsonl":
        raise ValueError(f"--out: got '{options.out}', expected a .jsonl file")
    if options.attempts < 1:
        raise ValueError(f"--attempts: got {options.attempts}, expected 1 or more")
    if options.attempts > 1 and options.temperature == 0 and filters:
        raise ValueError(
            f"--attempts: got {options.attempts}, expected 1 with --temperature 0: another attempt "
            "would write the same"
        )
    if "wrong" in filters and not options.reward:
        raise ValueError("--reject wrong: nothing scores the responses; set --reward")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code: 0, or 2 after a one-line error."""
    options = arguments(argv)
    return exit_code(lambda: run(options), lambda: report(options))


def run(options: argparse.Namespace) -> None:
    """Check the options, then work; collective.

    Raises:
        ValueError: one line.
    """
    filters = parse_filters(options.reject)
    _check(options, filters)
    reward = resolve("--reward", options.reward, REWARDS) if options.reward else None
    with open_writer(options) as writer:
        collect(options, writer, reward, filters)


if __name__ == "__main__":
    sys.exit(main())
