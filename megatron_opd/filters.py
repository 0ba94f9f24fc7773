"""Which responses are not worth learning from: pure functions, linear in the length of a text.

A response that was cut, goes round in circles or gives no answer teaches a student to do the same.
The defaults are those of the published cold start.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from megatron_opd.advantage import SOLVED
from megatron_opd.answers import boxed
from megatron_opd.types import Rollout

Filter = Callable[[str, Rollout], bool]  # (response text, rollout) → is it to be rejected


def truncated(text: str, rollout: Rollout) -> bool:
    """Say whether the response was cut at its longest length."""
    return rollout.finish == "length"


def empty(text: str, rollout: Rollout) -> bool:
    """Say whether the response ended at once: there is nothing to learn, or to replay."""
    return not text.strip()


def no_box(text: str, rollout: Rollout) -> bool:
    r"""Say whether no `\boxed{…}` holds an answer."""
    return boxed(text) is None


def wrong(text: str, rollout: Rollout, *, above: float = SOLVED) -> bool:
    """Say whether the reward is not above `above`; without a reward nothing is wrong."""
    return rollout.reward is not None and rollout.reward <= above


def repeated_lines(text: str, rollout: Rollout, *, length: int = 20, times: int = 5) -> bool:
    """Say whether a line of at least `length` characters is there at least `times` times."""
    lines = [line for line in map(str.strip, text.splitlines()) if len(line) >= length]
    return _most(lines) >= times


def repeated_windows(
    text: str, rollout: Rollout, *, length: int = 100, stride: int = 10, times: int = 3
) -> bool:
    """Say whether `times` of the windows text[i·stride : i·stride + length] are the same."""
    starts = range(0, len(text) - length + 1, stride)
    return _most([text[start : start + length] for start in starts]) >= times


def repeated_blocks(
    text: str, rollout: Rollout, *, length: int = 50, times: int = 3, longer_than: int = 5000
) -> bool:
    """Say whether a block of `length` characters stands `times` times in a row, at any place.

    Only texts of more than `longer_than` characters are looked at. They are such when each of
    length · (times − 1) neighbouring characters is the same as the one `length` further on.
    """
    if len(text) <= longer_than:
        return False
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    breaks = np.flatnonzero(points[:-length] != points[length:])
    runs = np.diff(breaks, prepend=-1, append=len(points) - length) - 1
    return int(runs.max()) >= length * (times - 1)


def _most(parts: Sequence[str]) -> int:
    return max(Counter(parts).values(), default=0)


FILTERS: dict[str, Callable[..., bool]] = {
    "truncated": truncated,
    "empty": empty,
    "no_box": no_box,
    "wrong": wrong,
    "repeated_lines": repeated_lines,
    "repeated_windows": repeated_windows,
    "repeated_blocks": repeated_blocks,
}


def build_filters(asked: Mapping[str, Mapping[str, Any]]) -> dict[str, Filter]:
    """Return the filters of these names, each with its options.

    Raises:
        ValueError: no such filter, no such option, or one that is not a positive number.
    """
    built: dict[str, Filter] = {}
    for name, options in asked.items():
        if name not in FILTERS:
            raise ValueError(f"filter: got '{name}', expected one of {', '.join(FILTERS)}")
        known = [p.name for p in inspect.signature(FILTERS[name]).parameters.values()][2:]
        for key, value in options.items():
            if key not in known:
                has = f"its options are {', '.join(known)}" if known else "it has no options"
                raise ValueError(f"filter {name}.{key}: no such option; {has}")
            kind, expected = (float, "number") if key == "above" else (int, "whole number")
            if not isinstance(value, int | kind) or value <= 0:
                raise ValueError(f"filter {name}.{key}: got {value!r}, expected a {expected} > 0")
        built[name] = partial(FILTERS[name], **options)
    return built


def reasons(filters: Mapping[str, Filter], text: str, rollout: Rollout) -> tuple[str, ...]:
    """Return the names of the filters that reject a response; of none: it is kept."""
    return tuple(name for name, rejects in filters.items() if rejects(text, rollout))
