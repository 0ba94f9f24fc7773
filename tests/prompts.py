"""Prompt files, and questions in the words of a template."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_opd.templates import read, reword


def write(path: Path, rows: Sequence[Any]) -> str:
    """Write rows as parquet or JSON lines; return the path as a config has it."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def wrap(template: str, question: str) -> str:
    """Return a question as a row would be asked it in a template."""
    (message,) = reword([{"role": "user", "content": question}], read(template))
    return message["content"]
