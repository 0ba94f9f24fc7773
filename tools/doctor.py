"""Will this distillation work? Ask before a cluster is spent on it."""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from megatron_opd.config import Config
from megatron_opd.config_file import load_config, split_words

DESCRIPTION = """\
Examine the student, the teacher and the prompts of a run's config with a few dozen rollouts, and
say what is broken, what will not work, and what to do about it: one row a check, and a verdict.
Under torchrun, at the config's tp and pp; what is left over are replicas. Exit code 0: nothing
fails; 1: a row fails; 2: bad input."""
EXAMPLES = """\
examples:
  %(prog)s config.yaml
  %(prog)s config.yaml data.template=boxed --prompts 64 --json doctor.json
  torchrun --nproc-per-node 2 %(prog)s config.yaml parallel.tp=2"""


def main(argv: list[str] | None = None) -> int:
    """Examine, print the table, write the JSON; return the exit code."""
    options = arguments(argv)
    try:
        rows = run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return int(any(row["verdict"] == "fail" for row in rows))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="+", metavar="CONFIG.yaml | section.key=value")
    parser.add_argument("--prompts", type=int, default=32, help="prompts to answer (default: 32)")
    parser.add_argument("--teacher", default="", help="which of several teachers to examine")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_intermixed_args(argv)
    if options.prompts < 1:
        parser.error(f"--prompts: got {options.prompts}, expected at least 1")
    return options


def run(options: argparse.Namespace) -> list[dict[str, str]]:
    """Examine at the config's layout; rank 0 speaks.

    Raises:
        ValueError: one line.
    """
    config = load_config(*split_words(options.words))
    check(options, config)
    # takes seconds: what is wrong with the words is said at once
    from transformers.utils.logging import disable_progress_bar

    from megatron_opd import parallel as mesh
    from megatron_opd.doctor.checks import examine
    from megatron_opd.doctor.material import Material
    from megatron_opd.doctor.report import table
    from megatron_opd.preflight import check as check_files

    disable_progress_bar()
    check_files(config, int(os.environ.get("WORLD_SIZE", 1)), writes=False)
    layout = config.parallel
    parallel = mesh.initialize(
        layout.tp,
        layout.pp,
        sequence_parallel=layout.sequence_parallel,
        seed=config.seed,
        timeout_minutes=layout.timeout_minutes,
    )
    how = {"prompts": options.prompts, "teacher": options.teacher, "words": " ".join(options.words)}
    rows = examine(Material(config, parallel, **how))
    told = [asdict(row) for row in rows]
    if parallel.is_main:
        print(table(rows, color=sys.stdout.isatty()), flush=True)
        if options.json:
            options.json.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n")
    mesh.shutdown()
    return told


def check(options: argparse.Namespace, config: Config) -> None:
    """Refuse what there is nothing to examine of.

    Raises:
        ValueError: one line.
    """
    names = [name for name in config.judging if name]
    if not config.judging:
        raise ValueError("teacher: missing, and the doctor compares a student with one; set it")
    if options.teacher not in config.judging:
        got = f"got '{options.teacher}'" if options.teacher else "missing"
        known = f"one of {', '.join(names)}" if names else "none: there is a single teacher"
        raise ValueError(f"--teacher: {got}, expected {known}")
    if options.json and not options.json.absolute().parent.is_dir():
        raise ValueError(f"--json: no directory '{options.json.parent}'")


if __name__ == "__main__":
    sys.exit(main())
