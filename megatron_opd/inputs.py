"""Config → what goes in: tokenizer, the ids that end a response, prompts, and their stream."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from megatron_opd import config as cfg
from megatron_opd import schedule
from megatron_opd.build import build_objective
from megatron_opd.context import Context, read_words
from megatron_opd.data import load_prompts, load_sources
from megatron_opd.reward import REWARDS
from megatron_opd.stream import PromptStream, steps_per_epoch
from megatron_opd.types import Prompt


def load_tokenizer(path: str) -> Any:
    """Load the tokenizer of a Hugging Face directory, without a network."""
    return AutoTokenizer.from_pretrained(path, local_files_only=True)


def stop_ids(folder: str, tokenizer: Any, more: Sequence[int] = ()) -> tuple[int, ...]:
    """Return the ids that end a response: the tokenizer's, generation_config.json's, and `more`.

    Base models end with one token and their chat templates with another; their files often name
    only one.

    Raises:
        ValueError: generation_config.json cannot be read.
    """
    ids, path = {tokenizer.eos_token_id, *more}, Path(folder) / "generation_config.json"
    if path.exists():
        try:
            listed = json.loads(path.read_text()).get("eos_token_id")
        except (json.JSONDecodeError, AttributeError):
            raise ValueError(f"'{path}': not a JSON object") from None
        ids.update(listed if isinstance(listed, list) else [listed])
    return tuple(sorted(ids - {None}))


def load_data(
    config: cfg.Config, tokenizer: Any, warn: Callable[[str], None]
) -> tuple[list[list[Prompt]], list[Prompt]]:
    """Read each file's prompts for training, and those for evaluation; rank 0 does this for all.

    Raises:
        ValueError: see `load_sources`; or fewer prompts than a step takes.
    """
    replay, wanted = config.rollout.engine == "replay", config.reward.function
    scored = not wanted and any(build_objective(c).needs_reward for c in schedule.ends(config))
    needed = ["response"] * (replay or schedule.mixes(config))
    needed += ["answer"] * (wanted in REWARDS) + ["reward"] * (replay and scored)
    sources = load_sources(
        config.data,
        tokenizer,
        require=needed,
        teachers=tuple(config.teachers),
        contexts=contexts(config),
        warn=warn,
    )
    _check_sources(config, sources)
    if not config.eval.prompts:
        return sources, []
    return sources, load_prompts(
        config.data, tokenizer, config.eval.prompts, require=("answer",), warn=warn
    )


def contexts(config: cfg.Config) -> dict[str, Context]:
    """Return how those teachers read that read something else than the student, by name.

    Raises:
        ValueError: there is no such template.
    """
    found = {}
    for name, teacher in config.judging.items():
        if teacher.reads_own_prompt:
            key, template = cfg.key_of_teacher(name), teacher.template
            words = None if template is None else read_words(template, f"{key}.template")
            longest = config.longest_prompt(teacher)
            found[name] = Context(key, words, teacher.chat_template_kwargs, longest)
    return found


def _check_sources(config: cfg.Config, sources: Sequence[Sequence[Prompt]]) -> None:
    """Check that there are enough prompts for a step, and some for each share of it."""
    count, needed = sum(map(len, sources)), config.train.prompts_per_step
    if count < needed and config.data.schedule in ("all", "fixed"):
        raise ValueError(
            f"train.prompts_per_step: got {needed}, expected at most the {count} prompts in "
            "data.prompts"
        )
    for file, prompts in zip(config.data.prompts, sources, strict=True):
        if config.data.weights is not None and not prompts:
            raise ValueError(
                f"data.weights: no prompt of '{file}' is within data.max_prompt_tokens, and it is "
                "to have a share; raise the limit, or leave the file out"
            )


def build_stream(config: cfg.Config, sources: Sequence[Sequence[Prompt]]) -> PromptStream:
    """Line the prompts of each file up as the data section wants them."""
    data = config.data
    return PromptStream(
        sources, config.seed, shuffle=data.shuffle, weights=data.weights, schedule=data.schedule
    )


def count_steps(config: cfg.Config, prompts: int) -> int:
    """Return the number of updates: train.steps, or the full batches of train.epochs passes."""
    one = steps_per_epoch(config.data.schedule, prompts, config.train.prompts_per_step)
    return config.train.steps or one * config.train.epochs
