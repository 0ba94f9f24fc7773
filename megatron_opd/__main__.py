"""The command line: `python -m megatron_opd CONFIG.yaml [more.yaml] [section.key=value]`."""

import argparse
import logging
import os
import sys
import textwrap
import time
import traceback
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from megatron_opd.config import Config, Schedule, Section, sections
from megatron_opd.config_file import load_config, split_words

USAGE = "python -m megatron_opd CONFIG.yaml [more.yaml ...] [section.key=value ...] [options]"
ABOUT = """\
On-policy distillation of language models on Megatron-Core.

Files merge left to right, then the words with a `=`, whose values are read as YAML.
On several GPUs: torchrun --nproc-per-node 8 -m megatron_opd CONFIG.yaml"""
# in which rank 0 can say the same: when it ends, torchrun ends the others; one error, one line
GRACE_SECONDS = 30


def main(arguments: list[str]) -> int:
    """Run one job, or plan it; return the exit code: 2 after an error of the user's."""
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    if options.ranks is not None and (options.ranks < 1 or not options.dry_run):
        parser.error("--ranks: expected a positive number, together with --dry-run")
    rank, world = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    _log_to_console(rank)
    files, overrides = split_words(options.words)
    try:
        if not files:
            raise ValueError(f"no config file; usage: {USAGE}; --help lists every key")
        config = load_config(files, overrides)
        if not options.dry_run:
            _run(config, world)
        elif rank == 0:
            _plan(config, options.ranks, world)
    except (ValueError, FloatingPointError) as error:
        if not _is_for_the_user(error):
            raise
        if rank > 0:
            time.sleep(GRACE_SECONDS)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def _run(config: Config, world: int) -> None:
    # imported late: --help and errors in the config come without waiting for torch
    from megatron_opd.preflight import check

    check(config, world)
    from megatron_opd import train

    train.main(config)


def _plan(config: Config, ranks: int | None, world: int) -> None:
    from megatron_opd import platform
    from megatron_opd.preflight import preflight, render

    plan = preflight(config, ranks or world, dry_run=True)
    print(render(plan, "cuda" if ranks else platform.device().type))


def _is_for_the_user(error: Exception) -> bool:
    """Say whether one of our `raise` statements did it: any other keeps its traceback."""
    cause = error.__cause__ or error  # what a rank found, before all ranks agreed on it
    if isinstance(cause, OSError):
        return True
    innermost = traceback.extract_tb(cause.__traceback__)[-1]
    ours = Path(innermost.filename).is_relative_to(Path(__file__).parent)
    return ours and (innermost.line or "").startswith("raise")


def _log_to_console(rank: int) -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(f"[rank {rank}] %(message)s" if rank else "%(message)s"))
    handler.setLevel(logging.WARNING if rank else logging.INFO)
    log = logging.getLogger("megatron_opd")
    log.addHandler(handler)
    log.setLevel(logging.INFO)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_opd",
        usage=USAGE,
        description=ABOUT,
        epilog=_reference(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml | section.key=value")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything that needs no weights, and print batches and memory",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        help="with --dry-run: GPUs to plan for, one a rank (default: torchrun's ranks, as here)",
    )
    return parser


def _reference() -> str:
    """Return every key with its type, default and help sentence, by section."""
    parts = []
    for name, kind in {**sections(), "schedules.KEY": Schedule}.items():
        inner = () if name else sections()
        fields = {key: f for key, f in kind.model_fields.items() if key not in inner}
        lines = [f"{name}: {kind.__doc__}" if name else "keys of a config file"]
        for key, field in fields.items():
            path = f"{name}.{key}".lstrip(".")
            given = "required" if field.is_required() else f"default {_shown(field.default)}"
            line = f"  {path:<34} {_kind(field.annotation)}; {given}"
            indent = " " * 37
            lines += textwrap.wrap(line, 100, subsequent_indent=indent, break_on_hyphens=False)
            lines.append(f"      {field.description}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _kind(annotation: Any) -> str:
    names = {int: "integer", float: "number", bool: "true | false", str: "text", dict: "section"}
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(inner)
    if origin in (Union, types.UnionType):
        return " | ".join("null" if kind is type(None) else _kind(kind) for kind in inner)
    if origin is Annotated:
        return _kind(inner[0])
    if origin is tuple:
        return "list"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    return names[origin or annotation]


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
