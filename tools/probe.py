"""Ask the student and the teacher of a run what it could learn from them, before it starts.

Each probe writes its figures to DIR/PROBE.json, a picture to DIR/PROBE.png, and prints a table. It
looks at the run's first step: train.prompts_per_step prompts, rollout.n responses to each, drawn by
the student as the run draws them, and verified by eval.reward (right: above one half). One process,
without gradients for weights.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from megatron_opd import parallel as mesh
from megatron_opd.config import Config
from megatron_opd.config_file import load_config, split_words
from megatron_opd.probes import coherence, continuation, length, pictures, reward_auroc
from megatron_opd.probes.pair import Pair

EXAMPLE = """\
examples:
  %(prog)s reward-auroc run.yaml train.prompts_per_step=256 parallel.tp=1 --out probes/auroc
  %(prog)s continuation run.yaml --lengths 1024 4096 8192 --out probes/continuation
  %(prog)s length run.yaml --lengths 1024 3072 7168 --out probes/length
  %(prog)s coherence run.yaml --tokens 2048 --supports sampled full --out probes/coherence"""


class Probe(NamedTuple):
    """One question: how it is put, and how its answer is shown."""

    about: Any  # the module, whose docstring says what the figures mean
    ask: Callable[[Pair, argparse.Namespace], dict[str, Any]]
    picture: Callable[[dict[str, Any]], Any]


PROBES = {
    "reward-auroc": Probe(
        reward_auroc, lambda pair, _: reward_auroc.probe(pair), pictures.reward_auroc
    ),
    "continuation": Probe(
        continuation,
        lambda pair, options: continuation.probe(pair, options.lengths),
        pictures.continuation,
    ),
    "length": Probe(
        length, lambda pair, options: length.probe(pair, options.lengths), pictures.length
    ),
    "coherence": Probe(
        coherence,
        lambda pair, options: coherence.probe(pair, options.tokens, options.supports),
        pictures.coherence,
    ),
}


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the words after the program's name; each probe has options of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shape = "CONFIG.yaml [section.key=value ...] --out DIR"
    kinds = parser.add_subparsers(dest="probe", metavar="PROBE", required=True)
    for name, probe in PROBES.items():
        text = probe.about.__doc__
        own = kinds.add_parser(
            name,
            help=text.split("\n")[0],
            description=text.split("\nShape suffixes")[0],
            usage=f"{parser.prog} {name} {shape} [options]",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        own.add_argument("words", nargs="+", metavar="CONFIG.yaml | section.key=value")
        own.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory")
        _add_options(own, name)
    return parser.parse_args(argv)


def _add_options(parser: argparse.ArgumentParser, name: str) -> None:
    if name in ("continuation", "length"):
        what = "prefixes" if name == "continuation" else "limits"
        told = f"{what} in tokens; default: by the responses that are seen"
        parser.add_argument("--lengths", type=int, nargs="+", metavar="L", help=told)
    if name == "coherence":
        parser.add_argument("--tokens", type=int, default=1024, help="tokens to sample (1024)")
        parser.add_argument(
            "--supports",
            nargs="*",
            default=["sampled"],
            choices=list(coherence.SUPPORTS),
            help="reverse KL on these, beside the run's objective (sampled)",
        )


def check(options: argparse.Namespace) -> None:
    """Find what is wrong with the options before anything is loaded.

    Raises:
        ValueError: one line.
    """
    least = 0 if options.probe == "continuation" else 1
    for value in getattr(options, "lengths", None) or ():
        if value < least:
            raise ValueError(f"--lengths: got {value}, expected {least} or more")
    if getattr(options, "tokens", 2) < 2:
        raise ValueError(f"--tokens: got {options.tokens}, expected 2 or more")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ValueError(f"--out: '{options.out}' exists; remove it or choose another directory")


def run(config: Config, options: argparse.Namespace) -> None:
    """Ask, then write and print what was found."""
    pair = Pair(config, mesh.initialize(seed=config.seed))
    for line in pair.warnings:
        print(f"warning: {line}", file=sys.stderr)
    probe = PROBES[options.probe]
    found = probe.ask(pair, options)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / options.probe
    told = {"probe": options.probe, "words": options.words, **found}
    stem.with_suffix(".json").write_text(json.dumps(_plain(told), indent=1) + "\n")
    probe.picture(found).savefig(stem.with_suffix(".png"), dpi=130)
    print("\n".join(probe.about.table(found)))
    if options.probe == "length":
        print("\n".join(["the runs that train it:", *length.sweep(options.words, found)]))
    print(f"figures  {stem.with_suffix('.json')}\npicture  {stem.with_suffix('.png')}")


def _plain(value: Any) -> Any:
    """Return named tuples as objects, which JSON would write as lists."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code: 0, or 2 after a one-line error."""
    options = arguments(sys.argv[1:] if argv is None else argv)
    files, overrides = split_words(options.words)
    try:
        if not files:
            raise ValueError("no config file; a run's own is expected: CONFIG.yaml")
        check(options)
        run(load_config(files, overrides), options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            mesh.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
