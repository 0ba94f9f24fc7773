"""Numbers of the config that change from step to step: `schedules: {objective.veto: …}`."""

import difflib
import math
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from megatron_opd.config import Config, Schedule

CHANGING = ("objective", "terms", "rollout.data_fraction")  # what every step looks up anew


def value(schedule: Schedule, step: int) -> float:
    """Return the number of a step, the first being 1: `start` there, `end` after `steps` updates.

    With x the share of `steps` that is done, linear: start·(1 − x) + end·x; cosine: the same with
    (1 − cos πx) / 2 for x; step: start until x = 1.
    """
    done = min(step - 1, schedule.steps) / schedule.steps
    if schedule.shape == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    if schedule.shape == "step":
        done = math.floor(done)
    return schedule.start * (1 - done) + schedule.end * done  # exact at both ends


def values(config: Config, step: int) -> dict[str, float]:
    """Return all scheduled numbers of a step, by key."""
    return {key: value(schedule, step) for key, schedule in config.schedules.items()}


def at(config: Config, step: int) -> Config:
    """Return the config of a step, with every scheduled number in its place."""
    for key, number in values(config, step).items():
        config = _with(config, _paths(config)[key], number)
    return config


def ends(config: Config) -> list[Config]:
    """Return the configs of the first and of the last step: one, where nothing changes.

    Raises:
        ValueError: a key that is none, or not that of a number; a number that may not be.
    """
    paths = _paths(config)
    for key in config.schedules:
        if key not in paths:
            close = difflib.get_close_matches(key, list(paths), n=1, cutoff=0.6)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(
                f"schedules.{key}: no such number, expected one of objective, of terms.NAME, or "
                f"rollout.data_fraction{hint}"
            )
    last = max((schedule.steps for schedule in config.schedules.values()), default=0)
    return [_checked(config, step) for step in ((1, last + 1) if last else (1,))]


def idle(config: Config) -> Iterator[str]:
    """Yield the numbers that were given and are never used: a schedule says another from step 1.

    The options of weights are not among them, which must be written out to have a place.
    """
    for key, schedule in config.schedules.items():
        *above, name = _paths(config)[key]
        section: Any = config
        for part in above:
            section = section[part] if isinstance(section, dict) else getattr(section, part)
        if isinstance(section, dict):
            continue
        given = getattr(section, name)
        if given not in (type(section).model_fields[name].default, schedule.start):
            yield f"{key}: has no effect in this config: schedules.{key} says what it is"


def mixes(config: Config) -> bool:
    """Say whether the dataset answers some prompts in place of the engine, at whatever step."""
    return any(end.rollout.data_fraction > 0 for end in ends(config))


def _checked(config: Config, step: int) -> Config:
    try:
        return Config.model_validate_json(at(config, step).model_dump_json())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(name) for name in first["loc"])
        told = f"{where}: {first['msg']}" if where else first["msg"].removeprefix("Value error, ")
        raise ValueError(f"schedules, at step {step}: {told}") from None


def _paths(config: Config) -> dict[str, tuple[str, ...]]:
    """Return where every number is that may change, by its dotted key."""
    found = {}
    for top in CHANGING:
        section, *rest = top.split(".")
        for path in _numbers(getattr(config, section), (section,)):
            if list(path[1 : 1 + len(rest)]) == rest:
                found[".".join(path)] = path
    return found


def _numbers(section: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if isinstance(section, dict):
        for name, inner in section.items():
            if isinstance(inner, float):
                yield (*path, name)
            yield from _numbers(inner, (*path, name))
        return
    for name, field in getattr(type(section), "model_fields", {}).items():
        if float in (field.annotation, *getattr(field.annotation, "__args__", ())):
            yield (*path, name)
        yield from _numbers(getattr(section, name), (*path, name))


def _with(section: Any, path: tuple[str, ...], number: float) -> Any:
    """Return a copy of a section, or of a mapping in one, with another number at a path."""
    name, *rest = path
    inner: Any = number
    if rest:
        below = section[name] if isinstance(section, dict) else getattr(section, name)
        inner = _with(below, tuple(rest), number)
    if isinstance(section, dict):
        return {**section, name: inner}
    return section.model_copy(update={name: inner})
