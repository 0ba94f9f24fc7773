"""Prompt files ⇄ rows: what a dataset says, checked, before any template or token.

Every refusal is one line with the file, the row (from 0) and what to do.
"""

import json
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet


@dataclass(frozen=True)
class Row:
    """What a file says about one prompt."""

    where: str  # file and row, for messages
    source: str  # its data_source column, or the file's name
    messages: list[dict[str, Any]]  # {role, content}, up to the student's turn; at least one
    answer: str | None
    response: str | None
    reward: float | None
    id: str | None
    teacher: str  # "": the row names none
    ability: str | None


def read_rows(data: Any, file: str, *, teachers: Collection[str] | None = None) -> list[Row]:
    """Read one parquet or JSON-lines file, by the column names of the data section.

    `teachers`: the names that a row may have in its teacher column; None: any.

    Raises:
        ValueError: the file is missing, empty or malformed; a row lacks its prompt, or has a value
            of the wrong type, or a teacher that is none of them.
    """
    return [
        _row(data, file, number, columns, teachers) for number, columns in enumerate(_read(file))
    ]


def _read(file: str) -> list[dict[str, Any]]:
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
    except (pyarrow.ArrowException, OSError) as error:  # OSError: its pages end too early
        raise ValueError(
            f"{path}: not a parquet file, or not a whole one; write or copy it again: "
            f"{str(error).splitlines()[0]}"
        ) from None


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines()):
        try:
            rows.append(json.loads(line))
        except UnicodeDecodeError:
            raise ValueError(f"{path}, row {number}: not UTF-8 text") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, row {number}: not JSON: {error.msg}") from None
        if not isinstance(rows[-1], dict):
            raise ValueError(f"{path}, row {number}: expected an object with named columns")
    return rows


def _row(
    data: Any, file: str, number: int, columns: dict[str, Any], teachers: Collection[str] | None
) -> Row:
    where = f"{file}, row {number}"
    messages, response = _messages(data, where, columns)
    written = lookup(columns, data.response_key)
    if not isinstance(written, str | None):
        raise _wrong(where, "response_key", data.response_key, written, "text")
    answer = lookup(columns, data.answer_key)
    if answer is None:
        answer = lookup(columns, "reward_model.ground_truth")
    if _is_nan(answer):
        raise _wrong(where, "answer_key", data.answer_key, answer, "text or a number, or nothing")
    return Row(
        where=where,
        source=_text(lookup(columns, "data_source")) or Path(file).stem,
        messages=messages,
        answer=_text(answer),
        response=written or response,
        reward=_reward(data, where, columns),
        id=_id(data, columns),
        teacher=_teacher(data, where, columns, teachers),
        ability=_text(lookup(columns, "ability")),
    )


def _messages(data: Any, where: str, columns: dict[str, Any]) -> tuple[list[dict], str | None]:
    """Return the conversation up to the student's turn, and the response that follows it."""
    found = lookup(columns, data.prompt_key)
    messages = lookup(columns, "messages") if found is None else found
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


def _reward(data: Any, where: str, columns: dict[str, Any]) -> float | None:
    value = lookup(columns, data.reward_key)
    if value is None:
        return None
    if not isinstance(value, int | float) or not math.isfinite(value):
        expected = "a finite number, or nothing (null) where nobody scored the response"
        raise _wrong(where, "reward_key", data.reward_key, value, expected)
    return float(value)


def _id(data: Any, columns: dict[str, Any]) -> str | None:
    if data.id_key is None:
        return None
    value = lookup(columns, data.id_key)
    return _text(lookup(columns, "extra_info.index") if value is None else value)


def _teacher(
    data: Any, where: str, columns: dict[str, Any], teachers: Collection[str] | None
) -> str:
    name = lookup(columns, data.teacher_key)
    if name is None:
        return ""
    if teachers is not None and name not in teachers:
        expected = f"one of {', '.join(teachers)}"
        raise _wrong(where, "teacher_key", data.teacher_key, name, expected)
    return str(name)


def check_ids(data: Any, rows: Iterable[Row]) -> None:
    """Refuse two rows of one file with the same id: a file that was joined to itself, mostly.

    Raises:
        ValueError: names both rows.
    """
    first: dict[str, Row] = {}
    for row in rows:
        if row.id is None:
            continue
        other = first.setdefault(row.id, row)
        if other is not row:
            number = other.where.rpartition(" ")[2]
            raise ValueError(
                f"{row.where}: its id '{row.id}' (data.id_key='{data.id_key}', else "
                f"extra_info.index) is that of row {number}; drop repeated questions with "
                "tools/prepare_prompts.py, or set data.id_key=null if the ids mean nothing"
            )


def _wrong(where: str, key: str, column: str, value: Any, expected: str) -> ValueError:
    shown = str(value)[:40]
    return ValueError(f"{where}: data.{key}='{column}' gives {shown!r}, expected {expected}")


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def lookup(columns: Any, key: str) -> Any:
    """Return the column of that name, or enter nested columns at the dots; None where absent."""
    if key in columns:
        return columns[key]
    for name in key.split("."):
        columns = columns.get(name) if isinstance(columns, dict) else None
    return columns


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a parquet file in the layout of verl, whole or not at all.

    Columns: data_source, prompt, ability, reward_model.{ground_truth, style}, extra_info.index;
    response, reward and teacher where a row has one.
    """
    optional = [
        name
        for name in ("response", "reward", "teacher")
        if any(getattr(row, name) not in (None, "") for row in rows)
    ]
    columns = [
        {
            "data_source": row.source,
            "prompt": [{"role": m["role"], "content": m["content"]} for m in row.messages],
            "ability": row.ability,
            "reward_model": {"ground_truth": row.answer, "style": "rule"},
            "extra_info": {"index": row.id},
            **{name: getattr(row, name) for name in optional},
        }
        for row in rows
    ]
    unfinished = path.with_name(f"tmp_{path.name}")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(columns), unfinished)
    unfinished.rename(path)
