"""YAML files and `section.key=value` words → Config, or one line that says what is wrong."""

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_opd.config import Config, Mesh, sections


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-6 as a number and refuses a key that is written twice."""

    def construct_mapping(self, node, deep=False):
        seen: set = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=deep)
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{name}' is there twice", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    [*"-+0123456789"],
)


def load_config(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """Merge YAML files left to right, then `section.key=value` overrides, and check the result.

    Raises:
        ValueError: one line naming the first wrong key, what it got, and what was expected.
    """
    merged: dict[str, Any] = {}
    for path in paths:
        merged = _merge(merged, _read(Path(path)))
    for override in overrides:
        merged = _merge(merged, _parse_override(override))
    return checked(merged)


def checked(tree: dict[str, Any]) -> Config:
    """Return the config that a tree of plain values is.

    Raises:
        ValueError: one line, as of `load_config`.
    """
    try:
        # through JSON, where a list is what a tuple looks like even to a strict model
        return Config.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise ValueError(_explain(error)) from None


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the files and the `section.key=value` overrides among the words of a command."""
    overrides = [word for word in words if re.match(r"[\w.]+=", word)]
    return [word for word in words if word not in overrides], overrides


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"config: no file '{path}'")
    try:
        content = _parse(path.read_text(), str(path))
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file, expected YAML") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got a {type(content).__name__}, expected `key: value` lines")
    return content


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{where}{line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def _parse_override(text: str) -> dict[str, Any]:
    """`a.b=value` → {"a": {"b": value}}."""
    key, equals, value = text.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ValueError(f"'{text}': expected section.key=value")
    tree = _parse(value, key)
    if names[0] == "schedules" and len(names) > 2:  # by keys that have dots themselves
        field = [] if isinstance(tree, dict) else names[-1:]
        names = ["schedules", ".".join(names[1 : len(names) - len(field)]), *field]
    for name in reversed(names):
        tree = {name: tree}
    return tree


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Return base with top laid over it: mappings merge, everything else is replaced."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            value = _merge(below, value)
        merged[key] = value
    return merged


def _explain(error: ValidationError) -> str:
    """One line about the first error; an unknown key before what may only follow from it."""
    problems = error.errors(include_url=False)
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    first, more = problems[0], len(problems) - 1
    key = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"]).lstrip(".")
    if first["type"] == "extra_forbidden":
        line = f"{key}: no such key{_suggestion(key)}"
    elif first["type"] == "missing":
        line = f"{key}: missing; it has no default"
    elif first["type"] == "value_error":  # the line of a _contradiction
        line = first["msg"].removeprefix("Value error, ")
    else:
        line = f"{key}: got {_shown(first)}, expected {_expected(first)}"
    return line + (f" (and {more} more error{'s' * (more > 1)})" if more else "")


def _shown(problem) -> str:
    return "a section" if isinstance(problem["input"], dict) else json.dumps(problem["input"])


def _expected(problem) -> str:
    if problem["type"] == "too_short":
        return f"at least {problem['ctx']['min_length']}"
    words = problem["msg"].removeprefix("Input should be ")
    for theirs, ours in (("a valid array", "a list"), ("an object", "a section")):
        words = words.replace(theirs, ours)
    return words.removeprefix("a valid ")


def _suggestion(key: str) -> str:
    """The closest key: a sibling that is spelt alike, else the same name in another section."""
    section, _, name = key.rpartition(".")
    kinds = sections()
    for many, kind in (("terms", "objective"), ("teachers", "teacher")):  # by names of the user's
        if re.fullmatch(rf"{many}\.[\w-]+", section):
            kinds[section] = kinds[kind]
    if section.endswith(".parallel"):  # of a judge
        kinds[section] = Mesh
    known = {
        f"{where}.{field}".lstrip("."): field
        for where, kind in kinds.items()
        for field in kind.model_fields
    }
    siblings = [field for path, field in known.items() if path.rpartition(".")[0] == section]
    alike = difflib.get_close_matches(name, siblings, n=1, cutoff=0.7)
    close = [f"{section}.{field}".lstrip(".") for field in alike]
    close += [path for path, field in known.items() if field == name]
    close += difflib.get_close_matches(key, list(known), n=1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else "; --help lists every key"
