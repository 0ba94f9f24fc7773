"""One seed's models: a run is trained when it is asked for, and before it what it is made from."""

import importlib
import json
import multiprocessing
import shutil
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from examples.quickstart.task import write_model
from examples.rethinking_opd import skills
from examples.rethinking_opd.figures import RUNS, Run
from megatron_opd.__main__ import main
from megatron_opd.plots import read_metrics
from tools import generate

HERE = Path(__file__).parent
Records = list[dict[str, float]]  # of a run, one a step
NETWORKS = {"big": {"hidden": 128, "layers": 3}, "small": {"hidden": 96, "layers": 2}}
WRITE = {"max-prompt-tokens": 16, "max-tokens": 40, "chat-template": "none", "dtype": "float32"}


class Lab:
    """The data and the runs of one seed, in one folder, which later calls find again."""

    def __init__(self, folder: Path, seed: int, overrides: list[str], runs: dict[str, Run] = RUNS):
        self.folder, self.seed, self.overrides, self.runs = folder, seed, overrides, runs

    @cached_property
    def data(self) -> Path:
        """The folder of prompt files."""
        folder = self.folder / "data"
        if not folder.exists():
            skills.write_data(folder, self.seed)
        return folder

    def run(self, name: str) -> Path:
        """Return the folder of a finished run: of an earlier call, if it was made the same way."""
        folder, made = self.folder / name, self._made(name)
        note = folder / "made.json"
        if note.exists() and json.loads(note.read_text()) == made:
            return folder
        words = self.words(name)
        if folder.exists():
            shutil.rmtree(folder)
        print(f"[seed {self.seed}] {name}: python -m megatron_opd {' '.join(words)}", flush=True)
        fork(main, words)
        note.write_text(json.dumps(made, indent=2))
        return folder

    def records(self, name: str) -> Records:
        """Return the metrics of a finished run."""
        return read_metrics(self.run(name))

    def words(self, name: str) -> list[str]:
        """Return the command line of a run, everything before it done."""
        run = self.runs[name]
        words = [str(_config(run)), f"seed={self.seed}", f"student.path={self._model(run.start)}"]
        if run.teacher:
            words.append(f"teacher.path={self._model(run.teacher)}")
        held_out = ",".join(f"{self.data}/test/{file}.jsonl" for file in run.held_out)
        words += [
            f"data.prompts=[{','.join(str(self._file(file)) for file in run.data)}]",
            f"eval.prompts=[{held_out}]",
            f"run.dir={self.folder / name}",
        ]
        return [*words, *run.settings, *(self.overrides if run.teacher else ())]

    def _model(self, name: str) -> Path:
        """Return the Hugging Face directory of a run, or of a network without weights."""
        if name in self.runs:
            return max((self.run(name) / "hf").iterdir())
        folder = self.folder / "networks" / name
        if not folder.exists():
            write_model(folder, **NETWORKS[name])
        return folder

    def _file(self, name: str) -> Path:
        kind, _, writer = name.partition(":")
        return self._written(writer) if kind == "written" else self.data / f"{name}.jsonl"

    def _written(self, writer: str) -> Path:
        """Return the responses of a run's model to cold.jsonl."""
        path = self.run(writer) / "written.jsonl"
        words = [str(self._model(writer)), str(self.data / "cold.jsonl"), "--out", str(path)]
        words += [f"--{name}={value}" for name, value in (WRITE | {"seed": self.seed}).items()]
        fork(generate.main, words)  # which goes on where it was stopped, or is done
        return path

    def _made(self, name: str) -> dict[str, Any]:
        """Return what a run depends on, and all that it is made from."""
        run = self.runs[name]
        before = {run.start, run.teacher, *(f.partition(":")[2] for f in run.data)} & set(self.runs)
        return {
            "config": _config(run).read_text(),
            "run": repr(run),
            "overrides": self.overrides if run.teacher else [],
            "before": {other: self._made(other) for other in sorted(before)},
        }


def _config(run: Run) -> Path:
    return HERE / ("opd.yaml" if run.teacher else "sft.yaml")


def fork(program: Callable[[list[str]], int], words: list[str]) -> None:
    """Run a program in a process that finds everything imported; end with it if it fails."""
    importlib.import_module("megatron_opd.train")  # once for all runs, and not for --help
    child = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(program(words)))
    child.start()
    child.join()
    if child.exitcode:
        sys.exit(child.exitcode)  # it has said why
