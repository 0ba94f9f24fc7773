"""Start a student on its teacher's responses, then distil on-policy: both stages, one command.

python examples/cold_start/run.py [SFT.yaml OPD.yaml] [--compare] [--ranks N] [section.key=value]
                                  [-- OPTIONS OF tools/generate.py]

  1  the teacher of OPD.yaml answers the prompts of SFT.yaml (tools/generate.py)
  2  the student of SFT.yaml learns the responses
  3  what it has become is distilled on the prompts of OPD.yaml, which must be others

Without files: tiny models, made on the spot. Words with a `=` go to stage 3. What has finished is
not done again.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))  # for examples.…, which is not installed

from examples.rethinking_opd.lab import Lab, fork
from examples.rethinking_opd.report import accuracies, dynamics
from megatron_opd import __main__
from megatron_opd.config import Config
from megatron_opd.config_file import load_config
from megatron_opd.data import load_prompts
from megatron_opd.plots import read_metrics
from megatron_opd.tables import markdown
from tools import generate

HERE = Path(__file__).parent
FILES = [HERE / "sft.yaml", HERE / "opd.yaml"]
MODELS = Path("runs/rethinking_opd/seed_0")  # which the two files name
PROGRAMS = {"megatron_opd": __main__.main, "tools.generate": generate.main}
COLUMNS = ("reverse KL", "overlap", "overlap mass")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}  # of the tiny models


def main(arguments: list[str]) -> int:
    """Do what is not done yet, then say what came of it."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options, generating = parser().parse_intermixed_args(arguments[:cut]), arguments[cut + 1 :]
    overrides = [word for word in options.words if "=" in word]
    files = [Path(word) for word in options.words if word not in overrides]
    try:
        if len(files) not in (0, 2):
            raise ValueError(f"got {len(files)} files, expected SFT.yaml OPD.yaml, or none")
        if not files:
            os.environ.update(ENVIRONMENT)
            make_models(MODELS)
        sft_file, opd_file = files or FILES
        stages = Stages(sft_file, opd_file, overrides, options.ranks)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    runs = {"cold start": stages.learn(stages.write(generating)), "then OPD": stages.distil()}
    if options.compare:
        runs["OPD alone"] = stages.distil_alone()
    print(f"\n{table(runs)}")
    return 0


def parser() -> argparse.ArgumentParser:
    """Return what the command line may say."""
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument("words", nargs="*", metavar="FILE | section.key=value")
    words.add_argument("--compare", action="store_true", help="also OPD alone, as many updates")
    words.add_argument("--ranks", type=int, default=1, help="processes of every stage (1)")
    return words


def make_models(folder: Path) -> None:
    """Train the weak student and the teacher with another way of working, unless they exist."""
    lab = Lab(folder, seed=0, overrides=[])
    for name in ("start", "left_teacher"):
        lab.run(name)


class Stages:
    """Both configs, checked together, and the commands that make the stages of them.

    Raises:
        ValueError: one line, before anything is written.
    """

    def __init__(self, sft_file: Path, opd_file: Path, overrides: list[str], ranks: int):
        self.files, self.overrides, self.ranks = (str(sft_file), str(opd_file)), overrides, ranks
        self.sft, self.opd = load_config([sft_file]), load_config([opd_file], overrides)
        self.root = Path(self.opd.run.dir).parent
        if self.sft.rollout.engine != "replay":
            got = self.sft.rollout.engine
            raise ValueError(f"{sft_file}: rollout.engine: got '{got}', expected replay")
        if self.opd.teacher is None:
            raise ValueError(f"{opd_file}: teacher: missing, expected the one that writes")
        asked, left = prompts_of(self.sft), prompts_of(self.opd)
        if both := asked & left:
            raise ValueError(
                f"data.prompts: {len(both)} prompts of {sft_file} are in {opd_file} too, such as "
                f"{min(both)[:40]!r}; the cold start wants others, so take them out of one"
            )

    def write(self, options: list[str]) -> Path:
        """Have the teacher answer the prompts of the cold start; return the file of responses."""
        path, data, teacher = self.root / "responses.jsonl", self.sft.data, self.opd.teacher
        assert teacher is not None
        words = [teacher.path, *data.prompts, "--out", str(path)]
        words += ["--max-tokens", str(self.sft.rollout.max_tokens)]
        words += ["--max-prompt-tokens", str(data.max_prompt_tokens)]
        words += ["--dtype", teacher.dtype or self.opd.student.dtype]
        words += ["--template", data.template, "--chat-template", data.chat_template]
        chat = [f"{name}={json.dumps(value)}" for name, value in data.chat_template_kwargs.items()]
        words += ["--chat-template-kwargs", *chat] if chat else []
        self._launch("tools.generate", [*words, *options])
        return path

    def learn(self, responses: Path) -> Path:
        """Train the student on the responses; return the folder of the run."""
        words = [f"data.prompts=[{responses}]", "data.response_key=response"]
        return self._train(self.files[0], words, Path(self.sft.run.dir))

    def distil(self) -> Path:
        """Distil what the cold start has made; return the folder of the run."""
        words = [*self.overrides, f"student.path={exported(Path(self.sft.run.dir))}"]
        return self._train(self.files[1], words, Path(self.opd.run.dir))

    def distil_alone(self) -> Path:
        """Distil the student as it was, for as many updates as both stages make."""
        folder = self.root / "opd_alone"
        made = [read_metrics(run.dir)[-1]["step"] for run in (self.sft.run, self.opd.run)]
        words = [*self.overrides, f"student.path={self.sft.student.path}"]
        words += [f"train.steps={int(sum(made))}", f"run.dir={folder}"]
        return self._train(self.files[1], words, folder)

    def _train(self, file: str, words: list[str], folder: Path) -> Path:
        if exported(folder) is None:
            self._launch("megatron_opd", [file, *words])
        return folder

    def _launch(self, name: str, words: list[str]) -> None:
        """Run a program on all ranks, and end with it if it fails: it has said why."""
        print(f"[cold start] python -m {name} {' '.join(words)}", flush=True)
        if self.ranks == 1:
            return fork(PROGRAMS[name], words)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(self.ranks), "-m", name, *words]
        done = subprocess.run(command, check=False)
        if done.returncode:
            sys.exit(done.returncode)


def prompts_of(config: Config) -> set[str]:
    """Return the texts of a config's prompts."""
    tokenizer = AutoTokenizer.from_pretrained(config.student.path)
    return {prompt.text for prompt in load_prompts(config.data, tokenizer)}


def exported(folder: Path) -> Path | None:
    """Return the Hugging Face directory of a finished run; None: it has not finished."""
    return max((folder / "hf").glob("step_*"), default=None)


def table(runs: dict[str, Path]) -> str:
    """Return the stages as a table: updates, accuracy, and how far student and teacher agree."""
    rows = []
    for name, folder in runs.items():
        records = read_metrics(folder)
        course = accuracies(records)
        shown = [f"{course[0]:.1%} → {course[-1]:.1%}"] if course else ["–"]
        judged = dict(dynamics(records)) if "distill/reverse_kl" in records[-1] else {}
        shown += [
            " → ".join(f"{x:.2f}" for x in judged[c]) if c in judged else "–" for c in COLUMNS
        ]
        rows.append([name, f"{records[-1]['step']}", *shown])
    return markdown(["stage", "updates", "accuracy", *COLUMNS], rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
