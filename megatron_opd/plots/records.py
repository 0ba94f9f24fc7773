"""What runs have logged, and how they were configured."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

Records = list[dict[str, float]]

log = logging.getLogger("megatron_opd")


@dataclass(frozen=True)
class Run:
    """A run under the name that pictures give it."""

    name: str
    records: Records
    config: dict[str, Any] = field(default_factory=dict)
    """Dotted key → value; empty where there is no config.yaml."""

    @cached_property
    def metrics(self) -> set[str]:
        """The names of all that was logged, but for what is by position."""
        return {name for name in self._names if _split(name) is None}

    @cached_property
    def _names(self) -> set[str]:
        return {name for record in self.records for name in record} - {"step"}

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Return the steps at which a metric was logged, and its values."""
        points = [(int(r["step"]), r[metric]) for r in self.records if metric in r]
        return [step for step, _ in points], [value for _, value in points]

    def by_position(self, metric: str) -> "Grid | None":
        """Return a metric by position and step; None without at least two buckets of positions."""
        found = {name: _split(name) for name in self._names}
        columns = {parts[1]: name for name, parts in found.items() if parts and parts[0] == metric}
        if len(columns) < 2:
            return None
        firsts = sorted(columns)
        rows = [r for r in self.records if any(name in r for name in columns.values())]
        values = [[r.get(columns[first], np.nan) for r in rows] for first in firsts]
        return Grid([int(r["step"]) for r in rows], firsts, np.array(values, dtype=float))


@dataclass(frozen=True)
class Grid:
    """A metric by position in the response and by step; NaN where a bucket had no token."""

    steps: list[int]
    firsts: list[int]  # first position of each bucket
    values_PS: np.ndarray


def _split(name: str) -> tuple[str, int] | None:
    """Split `name@first-position`; names as `eval/accuracy@file` are no such."""
    metric, _, first = name.rpartition("@")
    return (metric, int(first)) if first.isdecimal() and not name.startswith("eval/") else None


def read_metrics(folder: str | Path) -> Records:
    """Return the records of a run, in order of their steps.

    A last line that was cut off, as by a crash, is left out with a warning.

    Raises:
        ValueError: the folder holds no metrics, or something else under their name.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"'{folder}': no metrics.jsonl, expected the directory of a run")
    records = []
    for row, line in enumerate(path.read_text().splitlines(keepends=True), 1):
        try:
            records.append(_record(line))
        except ValueError:
            if line.endswith("\n"):
                raise ValueError(
                    f"'{path}', row {row}: got '{line.strip()[:40]}', expected a JSON record of "
                    "numbers with a step; remove the line"
                ) from None
            log.warning("'%s', row %d: the last line is cut off, and left out", path, row)
    if not records:
        raise ValueError(f"'{path}': no records yet; wait for the first step")
    return records


def _record(line: str) -> dict[str, float]:
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError("no step")
    if not all(isinstance(value, int | float) for value in record.values()):
        raise ValueError("no number")
    return record


def read_runs(words: Sequence[str]) -> list[Run]:
    """Read runs from their folders, each given as FOLDER or NAME=FOLDER.

    Raises:
        ValueError: a folder holds no metrics; two runs have the same name.
    """
    folders: dict[str, Path] = {}
    for word in words:
        name, folder = _named(word)
        if name in folders:
            raise ValueError(
                f"two runs are called '{name}': '{folders[name]}' and '{folder}'; "
                f"name one, as other={folder}"
            )
        folders[name] = folder
    return [Run(name, read_metrics(path), read_config(path)) for name, path in folders.items()]


def _named(word: str) -> tuple[str, Path]:
    name, equals, folder = word.partition("=")
    if equals and name and not Path(word).exists():  # folders may have = in their own names
        return name, Path(folder)
    return Path(word).resolve().name, Path(word)


def read_config(folder: str | Path) -> dict[str, Any]:
    """Return the resolved config of a run by dotted keys; empty if it was not kept.

    Raises:
        ValueError: config.yaml is no YAML mapping.
    """
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"'{path}': no YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(config, dict):
        raise ValueError(f"'{path}': expected sections of a config; remove the file to do without")
    return dict(_flat(config))


def _flat(section: dict[str, Any], prefix: str = ""):
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the config keys whose values differ among the runs, with each one's value.

    Left out is run.dir, which always differs; None stands for a key that a run does not have.
    """
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "run.dir")
    table = {key: [run.config.get(key) for run in runs if run.config] for key in keys}
    differing = [key for key, values in table.items() if any(v != values[0] for v in values)]
    return {key: [run.config.get(key) for run in runs] for key in differing}
