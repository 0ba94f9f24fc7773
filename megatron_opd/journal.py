"""Files of JSON lines that are written for hours, and go on after a kill where they stood.

Beside them lies what is known to be whole: how far the work is, and how long each file was then.
What a kill left behind that is cut off, and the work is done again from there.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from megatron_opd.parallel import Parallel

T = TypeVar("T")
Rows = Sequence[Mapping[str, Any]]


class Journal:
    """The `files` of one piece of work with `settings`; one process writes them.

    Raises:
        ValueError: the files are of other settings, or were changed since.
    """

    def __init__(self, state: Path, files: Sequence[Path], settings: Mapping[str, Any]):
        self.state, self.files = state, {path.name: path for path in files}
        self.settings = json.loads(json.dumps(settings))  # as it will be read again
        self.done = 0  # things that are finished, of whatever is counted
        state.parent.mkdir(parents=True, exist_ok=True)
        if state.exists():
            self._go_on(json.loads(state.read_text()))
        else:
            self._begin()

    def _begin(self) -> None:
        for path in self.files.values():
            if path.exists() and path.stat().st_size:
                raise ValueError(
                    f"'{path}' exists, and '{self.state}', which would say how far it is, does "
                    "not; remove it, or choose another --out"
                )
            path.touch()
        self._note()

    def _go_on(self, kept: dict[str, Any]) -> None:
        for key in sorted({*kept["settings"], *self.settings}):
            was, now = kept["settings"].get(key), self.settings.get(key)
            if was != now:
                raise ValueError(
                    f"'{self.state}' was begun with {key}={was!r}, got {now!r}; go on with the "
                    "same, or choose another --out"
                )
        for name, path in self.files.items():
            size = kept["bytes"][name]
            if not path.is_file() or path.stat().st_size < size:
                raise ValueError(
                    f"'{path}' is shorter than the {size} bytes of '{self.state}'; remove both, "
                    "or choose another --out"
                )
            if path.stat().st_size > size:
                os.truncate(path, size)
        self.done = kept["done"]

    def append(self, rows: Mapping[str, Rows], done: int) -> None:
        """Write rows to the files of these names; from now on `done` things are finished."""
        for name, lines in rows.items():
            with self.files[name].open("a") as file:
                for line in lines:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self.done = done
        self._note()

    def _note(self) -> None:
        kept = {
            "settings": self.settings,
            "done": self.done,
            "bytes": {name: path.stat().st_size for name, path in self.files.items()},
        }
        unfinished = self.state.with_suffix(".tmp")
        unfinished.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
        unfinished.replace(self.state)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def in_rounds(
    parallel: Parallel,
    things: Sequence[T],
    size: int,
    begin: Callable[[], Journal],
    write: Callable[[Sequence[T]], Mapping[str, Rows]],
) -> None:
    """Let `write` make the rows of `size` things after the other, where the journal stands.

    Collective: `write` returns the same on every rank, rank 0 alone has the journal. A round is
    whole or not there, and the rounds are the same after a kill: so are the batches in them.

    Raises:
        ValueError: see `Journal`.
    """
    journals: list[Journal] = []
    done = parallel.owner(lambda: journals.append(begin()) or journals[0].done)
    silent = not (parallel.is_main and sys.stderr.isatty())
    with tqdm(total=len(things), initial=done, unit=" prompts", disable=silent) as bar:
        for start in range(done, len(things), size):
            some = things[start : start + size]
            rows, end = write(some), start + len(some)
            parallel.main_only(lambda rows=rows, end=end: journals[0].append(rows, end))
            bar.update(len(some))
