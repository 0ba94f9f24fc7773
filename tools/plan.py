"""Which layout? Before a cluster is asked for."""

import argparse
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

from megatron_opd.config import Config
from megatron_opd.config_file import load_config, split_words
from megatron_opd.planner.layout import Layout, parse
from megatron_opd.planner.machine import GPUS, Achieved, assumptions

DESCRIPTION = """\
List the layouts in which a student and its teacher fit into so many GPUs, the fastest first, with
the seconds of each phase and the bytes that leave a rank in it: arithmetic on config.json, nothing
is loaded. Times take counted operations and bytes over the rates of data sheets, times what
--assume says is reached of them; nothing overlaps, and all responses are equally long. Compare
layouts by them, and measure the one you take."""
EXAMPLES = """\
examples:
  %(prog)s models/Qwen3-1.7B-Base models/Qwen3-4B --gpu h100 --ranks 16 rollout.engine=vllm
  %(prog)s config.yaml --gpu h200 --ranks 64 --response 3000 --top 5
  %(prog)s config.yaml --gpu h100 --ranks 8 --why tp=4,pp=2"""


def main(argv: list[str] | None = None) -> int:
    """Plan and print; return the exit code: 2 after an error of the user's, 1 if nothing fits."""
    options = arguments(argv)
    try:
        return run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="+", metavar="STUDENT TEACHER | CONFIG.yaml | key=value")
    parser.add_argument("--gpu", required=True, choices=GPUS)
    parser.add_argument("--ranks", type=int, required=True, help="GPUs, in all")
    parser.add_argument("--per-node", type=int, default=8, help="GPUs of a node (default: 8)")
    parser.add_argument("--prompt", type=int, help="tokens of a prompt (default: the most allowed)")
    parser.add_argument(
        "--response", type=int, help="tokens of a response (default: the most allowed)"
    )
    parser.add_argument(
        "--assume",
        default="",
        metavar="NAME=X,…",
        help="what is reached of peak rates: " + ", ".join(vars(Achieved())),
    )
    parser.add_argument("--top", type=int, default=10, help="layouts to list (default: 10)")
    parser.add_argument(
        "--why", metavar="tp=4,pp=2", help="explain one layout instead: tp, pp, vpp, cp, ep, etp"
    )
    parser.add_argument("--json", type=Path, help="file to write the list to, in bytes and seconds")
    options = parser.parse_intermixed_args(argv)
    for name in ("ranks", "per_node", "prompt", "response", "top"):
        number = getattr(options, name)
        if number is not None and number < 1:
            parser.error(f"--{name.replace('_', '-')}: got {number}, expected at least 1")
    return options


def run(options: argparse.Namespace) -> int:
    """Print what fits, or why a layout does not.

    Raises:
        ValueError: one line.
    """
    config, achieved = read(options.words), assumptions(options.assume)
    sizes = parse(options.why) if options.why else None
    # takes seconds: what is wrong with the words is said at once
    from megatron_opd.planner import search, table

    setting = search.setting(
        config,
        GPUS[options.gpu],
        achieved,
        ranks=options.ranks,
        per_node=options.per_node,
        prompt=options.prompt,
        response=options.response,
    )
    print(table.heading(setting), end="\n\n")
    if sizes is not None:
        layout = asked(sizes, options.ranks)
        print(table.explanation(setting, layout, layout))
        return 0
    found = list(itertools.islice(search.candidates(setting), options.top))
    if options.json:
        options.json.write_text(json.dumps(table.as_json(setting, found), indent=2) + "\n")
    if not found:
        print(
            "nothing fits; --why tp=8,pp=2 says what a layout needs, and train.recompute=full, "
            "teacher.offload=true and optimizer.offload=true make it need less"
        )
        return 1
    print(table.comparison(found))
    return 0


def read(words: list[str]) -> Config:
    """Return the config that a pair of directories, or files and overrides, stand for.

    Raises:
        ValueError: one line.
    """
    files, overrides = split_words(words)
    if not files or not Path(files[0]).is_dir():
        return load_config(files, overrides)
    if len(files) != 2:
        raise ValueError(f"got {len(files)} directories, expected two: STUDENT TEACHER")
    pair = [f"{who}.path={json.dumps(path)}" for who, path in zip(_PAIR, files, strict=True)]
    return load_config([], [*pair, 'data.prompts=["-"]', *overrides])


_PAIR = ("student", "teacher")


def asked(sizes: dict[str, int], ranks: int) -> Layout:
    """Return the layout of these sizes on so many ranks."""
    layout = Layout(
        **{"etp": sizes.get("tp", 1), **sizes}, sequence_parallel=sizes.get("tp", 1) > 1
    )
    return replace(layout, dp=sizes.get("dp", max(ranks // layout.replica, 1)))


if __name__ == "__main__":
    sys.exit(main())
