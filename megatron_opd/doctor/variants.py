"""The same questions in other words: what else `data.template` and `data.chat_template` could be.

One key is changed at a time: two wrong ones are found by setting the first and asking again.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_opd import config as cfg
from megatron_opd.data import load_prompts
from megatron_opd.rows import read_rows
from megatron_opd.templates import TEMPLATES
from megatron_opd.types import Prompt


def others(data: cfg.Data, tokenizer: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what to set, as the user would, and the fields of the data section it changes."""
    for name in TEMPLATES:
        if name != data.template:
            yield f"data.template={name}", {"template": name}
    if not tokenizer.chat_template:
        return
    if data.chat_template != "none":
        change = {"chat_template": "none", "chat_template_kwargs": {}}
        yield "data.chat_template=none", change
    if data.chat_template != "tokenizer":
        yield "data.chat_template=tokenizer", {"chat_template": "tokenizer"}
    elif "enable_thinking" in tokenizer.get_chat_template():
        thinks = not data.chat_template_kwargs.get("enable_thinking", True)
        keys = {**data.chat_template_kwargs, "enable_thinking": thinks}
        key = f"data.chat_template_kwargs.enable_thinking={str(thinks).lower()}"
        yield key, {"chat_template_kwargs": keys}


def rendered(
    data: cfg.Data, tokenizer: Any, prompts: Sequence[Prompt]
) -> tuple[dict[str, list[Prompt]], list[str]]:
    """Return `prompts` rendered in every other way, and of the ways that fail, why.

    Ways that change no token are left out. Only the rows of these prompts are rendered again.
    """
    found: dict[str, list[Prompt]] = {}
    failed: list[str] = []
    same = {prompt.token_ids for prompt in prompts}
    with tempfile.TemporaryDirectory() as folder:
        file = _write_rows(data, prompts, Path(folder))
        for keys, change in others(data, tokenizer):
            plain = {"prompts": (str(file),), "weights": None, "prompt_key": "prompt", **change}
            try:
                again = load_prompts(data.model_copy(update=plain), tokenizer)
            except ValueError as problem:
                failed.append(f"{keys}: {_short(str(problem), str(file))}")
                continue
            if {prompt.token_ids for prompt in again} != same:
                found[keys] = _renumbered(again, prompts)
    return found, failed


def _write_rows(data: cfg.Data, prompts: Sequence[Prompt], folder: Path) -> Path:
    """Write the rows that some prompts came from to a file of their own."""
    rows = [row for file in data.prompts for row in read_rows(data, file)]
    file = folder / "prompts.jsonl"
    lines = [{"prompt": rows[prompt.index].messages} for prompt in prompts]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def _renumbered(again: list[Prompt], prompts: Sequence[Prompt]) -> list[Prompt]:
    """Give prompts that were rendered again the index and the answer that they had."""
    return [replace(prompts[new.index], token_ids=new.token_ids, text=new.text) for new in again]


def _short(problem: str, file: str) -> str:
    """Leave out where the rows were written to, and what a user of the file would do."""
    return problem.removeprefix(f"{file}, ").removeprefix(f"{file}: ").split(";")[0]
