"""Prompt files → templates → tokens, the student's and its teachers'."""

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jinja2

from megatron_opd import templates
from megatron_opd.context import Context
from megatron_opd.rows import Row, check_ids, read_rows
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
    """Return the prompts of `load_sources` as one list."""
    sources = load_sources(data, tokenizer, files, require=require, warn=warn)
    return [prompt for source in sources for prompt in source]


def load_sources(
    data: Any,
    tokenizer: Any,
    files: Sequence[str] | None = None,
    *,
    require: Sequence[str] = (),
    teachers: Collection[str] = (),
    contexts: Mapping[str, Context] | None = None,
    warn: Callable[[str], None] = log.warning,
) -> list[list[Prompt]]:
    """Read, render and tokenise the prompts of each of `files`; None: those of the data section.

    A row's prompt is a string or a list of {role, content}; without one, its `messages` are taken,
    and a last message by the assistant is its response. `require` names what every row must have:
    "answer", "response"; `teachers`, the names that its teacher column may have (none: there is at
    most one teacher, and no such column). `contexts` tells by these names, "" where there are none,
    which teachers read something else than the student, and what. Prompts that are dropped for
    their length are counted in a line to `warn`.

    Raises:
        ValueError: a file is missing, empty or malformed; a row lacks something, or has a value of
            the wrong type; a prompt is longer than `max_prompt_tokens`; there is no such template;
            a teacher judges no row.
    """
    words, chat = templates.read(data.template, key="data.template"), _chat(data, tokenizer)
    paths: Sequence[str] = data.prompts if files is None else files
    rows_of = [read_rows(data, path, teachers=teachers or None) for path in paths]
    rows = [row for of_one in rows_of for row in of_one]
    if not rows:  # of no files
        return []
    _check(data, rows_of, require, teachers)
    asked = [(row, reworded(data, words, row)) for row in rows]
    texts, tokens = _encode(data, tokenizer, chat, asked)
    prompts = [
        _prompt(index, row, text, ids, row.teacher if teachers else "")
        for index, (row, text, ids) in enumerate(zip(rows, texts, tokens, strict=True))
    ]
    prompts = _short_enough(data, rows, prompts, warn)
    for name, context in (contexts or {}).items():
        if chat is not None and context.variables:
            _check_variables(data, tokenizer, chat, context.variables, context.key)
        own = [prompt for prompt in prompts if prompt.teacher == name]
        others = [prompt for prompt in prompts if prompt.teacher != name]
        told = [(rows[prompt.index], context.exchange(*asked[prompt.index])) for prompt in own]
        _, tokens = _encode(data, tokenizer, chat, told, context)
        own = [
            replace(prompt, teacher_token_ids=tuple(ids))
            for prompt, ids in zip(own, tokens, strict=True)
        ]
        prompts = [*others, *_short_enough(data, rows, own, warn, context)]
    return _by_file(prompts, rows_of)


def _check(
    data: Any, rows_of: Sequence[list[Row]], require: Sequence[str], teachers: Collection[str]
) -> None:
    """Check what rows must have, and what they must not have in common."""
    for of_one in rows_of:
        check_ids(data, of_one)
        for row in of_one:
            _check_required(row, require)
    if teachers:
        _check_teachers(data, [row for of_one in rows_of for row in of_one], teachers)


def _by_file(prompts: list[Prompt], rows_of: Sequence[list[Row]]) -> list[list[Prompt]]:
    """Return the prompts of each file, in its order."""
    file_of = [number for number, of_one in enumerate(rows_of) for _ in of_one]
    sources: list[list[Prompt]] = [[] for _ in rows_of]
    for prompt in sorted(prompts, key=lambda prompt: prompt.index):
        sources[file_of[prompt.index]].append(prompt)
    return sources


def _prompt(index: int, row: Row, text: str, token_ids: Sequence[int], teacher: str) -> Prompt:
    asked = templates.asked(row.messages)
    return Prompt(
        index=index,
        token_ids=tuple(token_ids),
        text=text,
        source=row.source,
        answer=row.answer,
        response=row.response,
        reward=row.reward,
        question="" if asked is None else templates.bare(row.messages[asked]["content"]),
        teacher=teacher,
    )


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


def reworded(data: Any, words: str, row: Row) -> list[dict[str, Any]]:
    """Return a row's messages, the last one by the user in `words`, the text of data.template.

    Raises:
        ValueError: there is no such message.
    """
    if data.template == "none":
        return row.messages
    if templates.asked(row.messages) is None:
        raise ValueError(
            f"{row.where}: no message by the user, but data.template={data.template} goes around it"
        )
    return templates.reword(row.messages, words)


def _chat(data: Any, tokenizer: Any) -> str | None:
    """Return the Jinja text that renders conversations; None: the text of a prompt is taken as is.

    Raises:
        ValueError: there is none of that name, or it does not know a variable that is set.
    """
    name = data.chat_template
    if name == "none":
        return None
    if name == "tokenizer" and not tokenizer.chat_template:
        raise ValueError(
            f"data.chat_template: got 'tokenizer', but the tokenizer of '{tokenizer.name_or_path}' "
            "has no chat template; set data.chat_template=none, or to a Jinja file"
        )
    if name == "tokenizer":
        text = tokenizer.get_chat_template()
    else:
        text = templates.read_file(name, "data.chat_template", "tokenizer, none, or a Jinja file")
    _check_variables(data, tokenizer, text, data.chat_template_kwargs)
    return text


def _check_variables(
    data: Any, tokenizer: Any, text: str, variables: Mapping[str, Any], key: str = "data"
) -> None:
    """Refuse variables that the chat template does not know: Jinja would ignore them."""
    for variable in variables:
        if not re.search(rf"\b{re.escape(variable)}\b", text):
            name = data.chat_template
            of = f"of '{tokenizer.name_or_path}'" if name == "tokenizer" else f"'{name}'"
            raise ValueError(
                f"{key}.chat_template_kwargs.{variable}: the chat template {of} has no such "
                "variable"
            )


def _encode(
    data: Any,
    tokenizer: Any,
    chat: str | None,
    conversations: Sequence[tuple[Row, list[dict[str, Any]]]],
    context: Context | None = None,
) -> tuple[list[str], list[list[int]]]:
    """Return the text and the tokens of conversations, as a teacher's `context` renders them."""
    variables = data.chat_template_kwargs
    if context is not None and context.variables is not None:
        variables = context.variables
    if not conversations:
        return [], []
    texts = [_render(tokenizer, chat, variables, *of_one) for of_one in conversations]
    # a template writes its special tokens itself; plain text gets what the tokenizer adds (BOS)
    return texts, tokenizer(texts, add_special_tokens=chat is None, verbose=False)["input_ids"]


def _render(
    tokenizer: Any,
    chat: str | None,
    variables: Mapping[str, Any],
    row: Row,
    messages: list[dict[str, Any]],
) -> str:
    if chat is None:
        if len(messages) != 1:
            raise ValueError(
                f"{row.where}: {len(messages)} messages, but data.chat_template=none takes the "
                "text of one"
            )
        return messages[0]["content"]
    try:
        return tokenizer.apply_chat_template(
            messages,
            chat_template=chat,
            tokenize=False,
            add_generation_prompt=True,
            **variables,
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"{row.where}: the chat template refuses it: {error}") from None


def _check_required(row: Row, require: Sequence[str]) -> None:
    for name in require:
        if getattr(row, name) is None:
            raise ValueError(
                f"{row.where}: no {name}; set data.{name}_key to the column that has it"
            )


def _check_teachers(data: Any, rows: Sequence[Row], teachers: Collection[str]) -> None:
    """Check that each row has a teacher, and each teacher a row."""
    known = ", ".join(teachers)
    for row in rows:
        if not row.teacher:
            raise ValueError(
                f"{row.where}: no teacher; name one of {known} in the column "
                f"data.teacher_key='{data.teacher_key}'"
            )
    idle = sorted(set(teachers) - {row.teacher for row in rows})
    if idle:
        raise ValueError(
            f"teachers.{idle[0]}: no row of data.prompts has it in its column "
            f"data.teacher_key='{data.teacher_key}'; leave it out"
        )


def _short_enough(
    data: Any,
    rows: Sequence[Row],
    prompts: list[Prompt],
    warn: Callable[[str], None],
    context: Context | None = None,
) -> list[Prompt]:
    """Refuse or drop what is longer than `max_prompt_tokens`; refuse what has no token at all.

    With `context`, of what a teacher reads.
    """
    limit = data.max_prompt_tokens if context is None else context.longest
    key = "data" if context is None else context.key
    lengths = [
        len(prompt.token_ids if context is None else prompt.teacher_token_ids or ())
        for prompt in prompts
    ]
    for prompt, length in zip(prompts, lengths, strict=True):
        if not length:
            raise ValueError(f"{rows[prompt.index].where}: the prompt has no tokens")
    kept = [p for p, length in zip(prompts, lengths, strict=True) if length <= limit]
    long = len(prompts) - len(kept)
    if not long:
        return kept
    worst = max(range(len(prompts)), key=lambda i: lengths[i])
    line = (
        f"{long} of {len(prompts)} prompts are longer than {key}.max_prompt_tokens={limit}; the "
        f"longest has {lengths[worst]} tokens ({rows[prompts[worst].index].where})"
    )
    if data.too_long == "error":
        raise ValueError(f"{line}; raise the limit, or set data.too_long=drop")
    if not kept:
        raise ValueError(f"{line}; none is left")
    warn(f"{line}; dropped")
    return kept
