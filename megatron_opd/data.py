"""Prompt files → chat template → tokens → a stream that resumes where it stopped."""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow
import pyarrow.parquet

from megatron_opd.types import Prompt

log = logging.getLogger(__name__)


def load_prompts(
    data: Any,
    tokenizer: Any,
    files: Sequence[str] | None = None,
    *,
    require: Sequence[str] = (),
    warn: Callable[[str], None] = log.warning,
) -> list[Prompt]:
    """Read, render and tokenise the prompts of `files` (default: those of the data section).

    A row's prompt is a string or a list of {role, content}; without one, its `messages` are taken,
    and a last message by the assistant is its response. `require` names what every row must have:
    "answer", "response". Prompts that are dropped for their length are counted in a line to
    `warn`.

    Raises:
        ValueError: a file is missing, empty or malformed; a row lacks something; a prompt is longer
            than `max_prompt_tokens`; the tokenizer has no chat template.
    """
    _check_template(data, tokenizer)
    rows = [
        _row(data, tokenizer, file, number, columns)
        for file in (data.prompts if files is None else files)
        for number, columns in enumerate(_read(file))
    ]
    if not rows:  # of no files
        return []
    # a template writes its special tokens itself; plain text gets what the tokenizer adds (BOS)
    tokens = tokenizer(
        [row.text for row in rows], add_special_tokens=data.chat_template == "none", verbose=False
    )["input_ids"]
    prompts = []
    for index, (row, ids) in enumerate(zip(rows, tokens, strict=True)):
        prompt = Prompt(index, tuple(ids), row.text, row.source, row.answer, row.response)
        missing = [name for name in require if getattr(prompt, name) is None]
        if missing:
            raise ValueError(
                f"{row.where}: no {missing[0]}; set data.{missing[0]}_key to the column that has it"
            )
        prompts.append(prompt)
    return _short_enough(data, rows, prompts, warn)


def encode_response(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Return the tokens of a response from a dataset, ending with the tokenizer's end token.

    Raises:
        ValueError: the tokenizer has no end token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(f"student.path: the tokenizer of '{tokenizer.name_or_path}' has no EOS")
    ids = tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return ids if ids[-1:] == (end,) else (*ids, end)


@dataclass(frozen=True)
class _Row:
    """What a file says about one prompt, before tokens."""

    where: str  # file and row, for messages
    source: str
    text: str  # rendered
    answer: str | None
    response: str | None


def _check_template(data: Any, tokenizer: Any) -> None:
    if data.chat_template == "none":
        return
    if not tokenizer.chat_template:
        raise ValueError(
            f"data.chat_template: got 'tokenizer', but the tokenizer of '{tokenizer.name_or_path}' has no "
            "chat template; set data.chat_template=none"
        )
    for name in data.chat_template_kwargs:
        # Jinja ignores a variable that it does not know
        if not re.search(rf"\b{re.escape(name)}\b", tokenizer.get_chat_template()):
            raise ValueError(
                f"data.chat_template_kwargs.{name}: the chat template of "
                f"'{tokenizer.name_or_path}' has no such variable"
            )


def _read(file: str) -> list[dict[str, Any]]:
    """Return the rows of one file."""
    path = Path(file)
    if path.suffix not in (".parquet", ".jsonl"):
        raise ValueError(f"{file}: got '{path.suffix}', expected a .parquet or .jsonl file")
    if not path.is_file():
        raise ValueError(f"{file}: no such file")
    rows = _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path)
    if not rows:
        raise ValueError(f"{file}: empty, expected at least one row")
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file: {str(error).splitlines()[0]}") from None


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    with path.open() as lines:
        for number, line in enumerate(lines):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, row {number}: not JSON: {error.msg}") from None
            if not isinstance(rows[-1], dict):
                raise ValueError(f"{path}, row {number}: expected an object with named columns")
    return rows


def _row(data: Any, tokenizer: Any, file: str, number: int, columns: dict[str, Any]) -> _Row:
    where = f"{file}, row {number}"
    messages, response = _messages(data, where, columns)
    answer = _text(columns, data.answer_key)
    return _Row(
        where=where,
        source=_text(columns, "data_source") or Path(file).stem,
        text=_render(data, tokenizer, where, messages),
        answer=_text(columns, "reward_model.ground_truth") if answer is None else answer,
        response=_text(columns, data.response_key) or response,
    )


def _messages(data: Any, where: str, columns: dict[str, Any]) -> tuple[list[dict], str | None]:
    """Return the conversation up to the student's turn, and the response that follows it."""
    found = _lookup(columns, data.prompt_key)
    messages = _lookup(columns, "messages") if found is None else found
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("content"), str) and m.get("role")
        for m in messages
    ):
        raise ValueError(
            f"{where}: data.prompt_key='{data.prompt_key}' gives {str(messages)[:40]!r}, expected "
            f"a string or a list of {{role, content}}; columns: {', '.join(columns)}"
        )
    response = None
    if messages and messages[-1]["role"] == "assistant":
        *messages, last = messages
        response = last["content"]
    if not messages:
        raise ValueError(f"{where}: no message that the student could answer")
    return messages, response


def _render(data: Any, tokenizer: Any, where: str, messages: list[dict]) -> str:
    if data.chat_template == "none":
        if len(messages) != 1:
            raise ValueError(
                f"{where}: {len(messages)} messages, but data.chat_template=none takes the text of one"
            )
        return messages[0]["content"]
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **data.chat_template_kwargs
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"{where}: the chat template refuses it: {error}") from None


def _text(columns: dict[str, Any], key: str) -> str | None:
    value = _lookup(columns, key)
    return None if value is None else str(value)


def _lookup(columns: Any, key: str) -> Any:
    """Return the column of that name, or enter nested columns at the dots; None where absent."""
    if key in columns:
        return columns[key]
    for name in key.split("."):
        columns = columns.get(name) if isinstance(columns, dict) else None
    return columns


def _short_enough(
    data: Any, rows: list[_Row], prompts: list[Prompt], warn: Callable[[str], None]
) -> list[Prompt]:
    """Refuse or drop what is longer than `max_prompt_tokens`; refuse what has no token at all."""
    limit = data.max_prompt_tokens
    for row, prompt in zip(rows, prompts, strict=True):
        if not prompt.token_ids:
            raise ValueError(f"{row.where}: the prompt has no tokens")
    kept = [prompt for prompt in prompts if len(prompt.token_ids) <= limit]
    long = len(prompts) - len(kept)
    if not long:
        return kept
    worst = max(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
    line = (
        f"{long} of {len(prompts)} prompts are longer than data.max_prompt_tokens={limit}; the "
        f"longest has {len(prompts[worst].token_ids)} tokens ({rows[worst].where})"
    )
    if data.too_long == "error":
        raise ValueError(f"{line}; raise the limit, or set data.too_long=drop")
    if not kept:
        raise ValueError(f"{line}; none is left")
    warn(f"{line}; dropped")
    return kept


class PromptStream:
    """Prompts in epoch order, for ever; where it stands can be saved and restored."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool):
        self.prompts, self.seed, self.shuffle = prompts, seed, shuffle
        self.epoch = 0  # this pass
        self.position = 0  # prompts taken of this pass

    def take(self, n: int) -> list[Prompt]:
        """Return the next n prompts, of one pass: what is left of a pass and too few is skipped.

        So the prompts of a step differ, and so do their random draws.
        """
        assert n <= len(self.prompts)
        if self.position + n > len(self.prompts):
            self.epoch, self.position = self.epoch + 1, 0
        ahead = self._order()[self.position : self.position + n]
        self.position += n
        return [self.prompts[index] for index in ahead]

    def _order(self) -> np.ndarray:
        """Return this pass's order: a function of seed and epoch alone, so it need not be saved."""
        if not self.shuffle:
            return np.arange(len(self.prompts))
        return np.random.default_rng((self.seed, self.epoch)).permutation(len(self.prompts))

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream stands, and what it streams over."""
        return {"epoch": self.epoch, "position": self.position, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            ValueError: seed, shuffling or the prompts are others.
        """
        for name, value in self._identity.items():
            if state[name] != value:
                raise ValueError(
                    f"data: {name} is {value}, but the checkpoint was taken with {state[name]}; "
                    "resume with the same data, or start another run.dir"
                )
        self.epoch, self.position = state["epoch"], state["position"]

    @cached_property
    def _identity(self) -> dict[str, Any]:
        tokens = repr([prompt.token_ids for prompt in self.prompts]).encode()
        return {
            "seed": self.seed,
            "shuffle": self.shuffle,
            "number of prompts": len(self.prompts),
            "hash of their tokens": hashlib.blake2b(tokens, digest_size=8).hexdigest(),
        }


def vocab_size(tokenizer: Any) -> int:
    """Return the number of vocabulary rows that tokens use: the highest id + 1."""
    return max(tokenizer.get_vocab().values()) + 1


def same_tokenizer(
    student: Any,
    other: Any,
    *,
    name: str = "teacher",
    allow: bool = False,
    warn: Callable[[str], None] = log.warning,
) -> None:
    """Check that every id is the same token to both, ids that only one of them has included.

    `name` is that of the other's section.

    Raises:
        ValueError: it is not, and `allow` is false; with `allow`, the line is a logged warning.
    """
    mine = {index: token for token, index in student.get_vocab().items()}
    theirs = {index: token for token, index in other.get_vocab().items()}
    differ = [i for i in sorted(mine | theirs) if mine.get(i) != theirs.get(i)]
    if not differ:
        return
    first = ", ".join(f"{i}: {mine.get(i)!r} vs {theirs.get(i)!r}" for i in differ[:10])
    line = f"{name}: {len(differ)} token ids differ from the student's ({first})"
    if not allow:
        raise ValueError(f"{line}; set {name}.allow_tokenizer_mismatch=true if it does not matter")
    warn(f"{line}; allowed")
