"""What the tools that write responses share: their options, and how they begin and end."""

import argparse
import hashlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from megatron_opd.data import load_sources
from megatron_opd.rollout import Sampling
from megatron_opd.types import Prompt
from megatron_opd.writer import Writer

KEYS = {  # what a line about a config says → what the tools call it
    "student.path": "MODEL",
    "data.prompts": "FILE",
    "parallel.tp": "--tp",
    "rollout.tp": "--tp",
    "rollout.url": "--url",
    "rollout.engine": "--engine",
    "rollout.max_tokens": "--max-tokens",
    "data.max_prompt_tokens": "--max-prompt-tokens",
    "data.chat_template": "--chat-template",
    "data.template": "--template",
    "data.too_long=drop": "--drop-long",
    "set rollout.stop_token_ids": "mend its files",
}


def make_parser(about: str | None, examples: str, **defaults: Any) -> argparse.ArgumentParser:
    """Return a parser of what the tools share; `defaults` has those of the drawing."""
    parser = argparse.ArgumentParser(
        description=about,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face directory")
    parser.add_argument("files", nargs="+", metavar="FILE", help="prompts: .parquet or .jsonl")
    group = parser.add_argument_group("model and engine")
    group.add_argument("--engine", default="megatron", choices=("megatron", "vllm", "vllm_server"))
    group.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks, under torchrun")
    group.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    group.add_argument("--url", help="address of the server of --engine vllm_server")
    _add_pairs(group, "--vllm", "fields of vLLM's EngineArgs")
    group.add_argument("--batch-size", type=int, default=64, help="sequences decoded together (64)")
    group = parser.add_argument_group("prompts")
    group.add_argument("--template", default="none", help="words around it, as data.template")
    group.add_argument("--chat-template", default="tokenizer", help="as data.chat_template")
    _add_pairs(group, "--chat-template-kwargs", "variables for it: enable_thinking=false")
    group.add_argument("--max-prompt-tokens", type=int, default=2048, help="longest prompt (2048)")
    group.add_argument("--drop-long", action="store_true", help="leave out longer ones")
    group.add_argument("--limit", type=int, metavar="N", help="only the first N of every file")
    group = parser.add_argument_group("drawing")
    for name, kind, meaning in (
        ("n", int, "responses per prompt"),
        ("max_tokens", int, "longest response"),
        ("temperature", float, "0: the most likely token"),
        ("top_p", float, "smallest set of this probability; 1: all"),
        ("top_k", int, "most likely tokens; 0: all"),
        ("seed", int, "of the draws"),
    ):
        flag, given = f"--{name.replace('_', '-')}", defaults[name]
        group.add_argument(flag, type=kind, default=given, help=f"{meaning} ({given})")
    return parser


def _add_pairs(group: Any, flag: str, text: str) -> None:
    group.add_argument(flag, nargs="*", default=[], metavar="KEY=VALUE", help=text)


def open_writer(options: argparse.Namespace) -> Writer:
    """Return the writer that the options ask for.

    Raises:
        ValueError: one line.
    """
    _check(options)
    data = {
        "prompts": options.files,
        "template": options.template,
        "chat_template": options.chat_template,
        "chat_template_kwargs": _pairs("--chat-template-kwargs", options.chat_template_kwargs),
        "too_long": "drop" if options.drop_long else "error",
    }
    return Writer.open(
        options.model,
        engine=options.engine,
        tp=options.tp,
        dtype=options.dtype,
        max_prompt_tokens=options.max_prompt_tokens,
        max_tokens=options.max_tokens,
        batch_size=options.batch_size,
        vllm=_pairs("--vllm", options.vllm),
        url=options.url,
        data=data,
    )


def _check(options: argparse.Namespace) -> None:
    least = {"n": 1, "temperature": 0, "top_k": 0, "seed": 0, "limit": 1, "max_tokens": 1, "tp": 1}
    for name, bound in (least | {"batch_size": 1, "max_prompt_tokens": 1}).items():
        value = getattr(options, name)
        if value is not None and not value >= bound:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: got {value}, expected {bound} or more")
    if not 0 < options.top_p <= 1:
        raise ValueError(f"--top-p: got {options.top_p:g}, expected more than 0 and at most 1")
    if options.temperature == 0 and options.n > 1:
        raise ValueError(
            f"--n: got {options.n}, expected 1 with --temperature 0: greedy responses are all alike"
        )
    for flag, given, engine in (
        ("--vllm", options.vllm, "vllm"),
        ("--url", options.url, "vllm_server"),
    ):
        if given and options.engine != engine:
            raise ValueError(f"{flag}: has no effect with --engine {options.engine}")


def _pairs(flag: str, words: Sequence[str]) -> dict[str, Any]:
    """Return {key: value} of KEY=VALUE words, values read as YAML."""
    pairs = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"{flag}: got '{word}', expected KEY=VALUE")
        try:
            pairs[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"{flag} {key}: got '{value}', expected a value in YAML") from None
    return pairs


def sampling(options: argparse.Namespace, writer: Writer) -> Sampling:
    """Return how the responses are drawn."""
    return Sampling(
        options.max_tokens, options.temperature, options.top_p, options.top_k, writer.stop_ids
    )


def read_prompts(
    options: argparse.Namespace, writer: Writer, require: Sequence[str] = ()
) -> list[Prompt]:
    """Return the prompts that the options ask for, on every rank; collective.

    Raises:
        ValueError: see `load_sources`.
    """

    def read() -> list[Prompt]:
        sources = load_sources(writer.config.data, writer.tokenizer, require=require)
        return [prompt for source in sources for prompt in source[: options.limit]]

    return writer.parallel.owner(read)


def settings(options: argparse.Namespace, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return what the responses depend on: two pieces of work that agree in it are one.

    Neither the ranks nor where vLLM runs: other roundings are no other work.
    """
    names = ("model", "dtype", "n", "max_tokens", "temperature", "top_p", "top_k", "seed")
    return {name: getattr(options, name) for name in names} | {
        "prompts": _hash([prompt.token_ids for prompt in prompts]),
        "problems": _hash([(prompt.question, prompt.answer) for prompt in prompts]),
        "prompts of a round": round_size(options),
    }


def _hash(things: Sequence[Any]) -> str:
    digest = hashlib.blake2b(repr(things).encode(), digest_size=8).hexdigest()
    return f"{len(things)}, hash {digest}"


def round_size(options: argparse.Namespace) -> int:
    """Return how many prompts are asked together: what a kill may lose.

    Four full batches: an engine's last batch of a round is never full.
    """
    return max(1, 4 * options.batch_size // options.n)


def exit_code(work: Callable[[], None], report: Callable[[], str]) -> int:
    """Work on every rank and print the report on the first; 0, or 2 after a one-line error."""
    first = int(os.environ.get("RANK", 0)) == 0
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        work()
        if first:
            print(report())
    except ValueError as error:
        if first:
            print(f"error: {_in_their_words(error)}", file=sys.stderr)
        return 2
    return 0


def _in_their_words(error: Exception) -> str:
    """Return a message about a config as the tools' users know its keys."""
    line = str(error)
    for key, ours in sorted(KEYS.items(), key=lambda pair: -len(pair[0])):
        line = line.replace(key, ours)
    return line
