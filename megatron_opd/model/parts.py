"""Work that is cut into parts, done by several processes, and gone on with after a kill.

They are written to a draft folder, beside notes of what the work is and of what is whole; the
folder gets its name when all parts are.
"""

import ctypes
import fcntl
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
JOURNAL = "conversion"  # folder in the draft: what the work is, and notes of its parts


class Job(Protocol):
    """The parts are numbered; `sizes` are their bytes."""

    sizes: list[int]

    def is_done(self, part: int) -> bool: ...

    def do(self, part: int) -> Iterator[int]:
        """Do a part, and yield bytes as they are done."""
        ...


class Draft:
    """The folder that becomes `final`; at most one program writes it."""

    def __init__(self, final: Path, settings: Mapping[str, Any]):
        """Begin the work with `settings`, or go on with it.

        Raises:
            ValueError: `final` exists, or a draft of other work, or another program is at it.
        """
        if final.exists():
            raise ValueError(f"{final} exists; remove it or choose another name")
        self.final, self.folder = final, draft_of(final)
        self.journal = self.folder / JOURNAL
        note, ours = self.journal / "settings.json", json.loads(json.dumps(settings))
        if self.folder.exists() and not note.exists():
            raise ValueError(f"{self.folder} exists and is no unfinished conversion; remove it")
        self.journal.mkdir(parents=True, exist_ok=True)
        if not note.exists():
            write_whole(note, ours)
        self._lock = note.open()
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.folder}: another program is writing it") from None
        self._compare(json.loads(note.read_text()), ours)

    def _compare(self, kept: dict[str, Any], settings: dict[str, Any]) -> None:
        for key in sorted({*kept, *settings}):
            was, now = kept.get(key), settings.get(key)
            if was != now:
                told = f"{was!r}, got {now!r}" if len(f"{was}{now}") < 200 else "other values"
                raise ValueError(
                    f"{self.folder} was begun with {key}={told}; go on with the same, or remove it"
                )

    def publish(self) -> None:
        self.folder.rename(self.final)
        shutil.rmtree(self.final / JOURNAL)

    def drop(self) -> None:
        shutil.rmtree(self.folder)


def draft_of(final: Path) -> Path:
    return final.with_name(f"tmp_{final.name}")


def write_whole(file: Path, content: Any) -> None:
    """Write JSON so that the file is whole or not there."""
    draft = file.with_suffix(".tmp")
    draft.write_text(json.dumps(content))
    draft.replace(file)


def check_room(final: Path, job: Job) -> None:
    """Raise `ValueError` when what is left to be written does not fit on the disk."""
    left = sum(size for part, size in enumerate(job.sizes) if not job.is_done(part))
    disk = next(parent for parent in final.absolute().parents if parent.exists())
    free = shutil.disk_usage(disk).free
    if left > free:
        raise ValueError(f"{disk}: {left / 1e9:.1f} GB are to be written, {free / 1e9:.1f} free")


def run(job: Job, workers: int, text: str) -> None:
    """Do the parts that are not done, in so many processes.

    Raises:
        ValueError, OSError: what the first part that failed has raised; a process was killed.
    """
    done = {part for part in range(len(job.sizes)) if job.is_done(part)}
    todo = [part for part in range(len(job.sizes)) if part not in done]
    with tqdm(
        desc=text,
        total=sum(job.sizes),
        initial=sum(job.sizes[part] for part in done),
        unit="B",
        unit_scale=True,
        disable=not sys.stderr.isatty(),
    ) as bar:
        if workers == 1:
            for part in todo:
                for size in job.do(part):
                    bar.update(size)
        else:
            for size in _spread(job, todo, workers):
                bar.update(size)


def _spread(job: Job, todo: Sequence[int], workers: int) -> Iterator[int]:
    """Yield the bytes of each part that a process has done."""
    with ProcessPoolExecutor(
        min(workers, len(todo) or 1),
        mp_context=get_context("fork"),  # the job is inherited, and nothing is imported again
        initializer=_enter,
        initargs=(job, os.getpid()),
    ) as pool:
        futures = [pool.submit(_do, part) for part in todo]
        try:
            for future in futures:
                yield future.result()
        except BrokenProcessPool:
            raise ChildProcessError("a worker was killed; is there memory for so many?") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_job: Job | None = None  # of this worker


def _enter(job: Job, parent: int) -> None:
    global _job
    die_with(parent)
    torch.set_num_threads(1)
    _job = job


def _do(part: int) -> int:
    assert _job is not None
    return sum(_job.do(part))


def die_with(parent: int) -> None:
    """Have the kernel, if it is Linux, kill this process when the thread that forked it ends."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)
