"""Train a teacher, give a student a weak start, distil on-policy, and show what came of it.

python examples/quickstart/demo.py [section.key=value ...] [--seeds 0 1 2]

Words with a `=` go to the distillation; `seed=1` goes to every stage. All is written to
runs/quickstart, whose contents are replaced.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from task import write_data, write_model

from megatron_opd.config_file import load_config
from megatron_opd.plots import plot_dynamics, read_metrics
from megatron_opd.preflight import preflight

HERE = Path(__file__).parent
ROOT = Path("runs/quickstart")
STAGES = ("teacher", "start", "distill")
RANKS = 2
# one thread a rank: two ranks share two cores, and tiny matrices gain nothing from more
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}


def main() -> int:
    """Run every seed, then write the summary, the plot and the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    try:
        seeds, overrides = _seeds(options.seeds, options.overrides)
        check(overrides)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if ROOT.exists():
        say(f"replacing {ROOT}")
        shutil.rmtree(ROOT)
    rows = [run_seed(seed, overrides) for seed in seeds]
    summary = summarise(rows)
    (ROOT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    picture = draw(rows)
    print(f"\n{table(rows, summary)}\n")
    print(f"curves   {picture}\nfigures  {ROOT / 'summary.json'}")
    print(f"model    {rows[-1]['model']}  (loads in transformers as it is)")
    return 0


def _seeds(listed: list[int] | None, overrides: list[str]) -> tuple[list[int], list[str]]:
    """Let `seed=3` mean `--seeds 3`: it belongs to all stages."""
    named = [word.removeprefix("seed=") for word in overrides if word.startswith("seed=")]
    if not all(word.isdecimal() for word in named):
        raise ValueError(f"seed: got '{named[-1]}', expected a whole number")
    seeds = listed or [int(word) for word in named[-1:]] or [0]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds: got {seeds}, expected every seed once")
    return seeds, [word for word in overrides if not word.startswith("seed=")]


def check(overrides: list[str]) -> None:
    """Find what is wrong with the overrides before anything is replaced or trained."""
    for word in overrides:
        if word.startswith(("student.", "teacher.path", "data.prompts", "eval.", "run.")):
            raise ValueError(f"'{word}': the demo sets this itself; run distill.yaml alone")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_task(folder, seed=0)
        moved = [*paths("distill", folder), f"student.path={folder}/models/student"]
        moved += [f"teacher.path={folder}/models/teacher", *overrides]
        preflight(load_config([HERE / "distill.yaml"], moved), RANKS, dry_run=True)


def say(text: str) -> None:
    """Print a progress line."""
    print(f"[quickstart] {text}", flush=True)


def run_seed(seed: int, overrides: list[str]) -> dict:
    """Run all stages of one seed and return what came of it."""
    begin, folder = time.monotonic(), ROOT / f"seed_{seed}"
    say(f"seed {seed}: writing the task, and two models without weights")
    write_task(folder, seed)
    for number, stage in enumerate(STAGES, 1):
        say(f"seed {seed}: stage {number} of {len(STAGES)}, {stage}")
        run_stage(stage, seed, folder, overrides if stage == "distill" else [])
    return measure(seed, folder, time.monotonic() - begin)


def write_task(folder: Path, seed: int) -> None:
    """Write the data of a seed, and both models' configurations and tokenizers."""
    write_model(folder / "models/teacher", hidden=128, layers=3)
    write_model(folder / "models/student", hidden=96, layers=2)
    write_data(folder / "data", train=20_000, test=256, digits=3, seed=seed)


def paths(stage: str, folder: Path) -> list[str]:
    """Return the overrides that move a stage's data and run into the folder of a seed."""
    return [
        f"data.prompts=[{folder}/data/train.jsonl]",
        f"eval.prompts=[{folder}/data/test.jsonl]",
        f"run.dir={folder}/{stage}",
    ]


def run_stage(stage: str, seed: int, folder: Path, overrides: list[str]) -> None:
    """Run one config under torchrun, its paths moved to the folder of this seed."""
    moved = [f"seed={seed}", *paths(stage, folder)]
    if stage == "distill":
        moved += [
            f"student.path={model(folder, 'start')}",
            f"teacher.path={model(folder, 'teacher')}",
        ]
    else:
        moved += [f"student.path={folder}/models/{'teacher' if stage == 'teacher' else 'student'}"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(RANKS), "-m", "megatron_opd"]
    command += [str(HERE / f"{stage}.yaml"), *moved, *overrides]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, check=False)
    if done.returncode:
        sys.exit(done.returncode)  # the stage has said why


def model(folder: Path, stage: str) -> Path:
    """Return the Hugging Face directory that a stage exported."""
    return max((folder / stage / "hf").iterdir())


def measure(seed: int, folder: Path, seconds: float) -> dict:
    """Read accuracies off the runs: the student's before and after, the teacher's."""
    accuracy = {
        stage: [r["eval/accuracy"] for r in read_metrics(folder / stage) if "eval/accuracy" in r]
        for stage in STAGES
    }
    before, after, teacher = (
        accuracy["distill"][0],
        accuracy["distill"][-1],
        accuracy["teacher"][-1],
    )
    return {
        "seed": seed,
        "before": before,
        "after": after,
        "teacher": teacher,
        "gap_recovery": (after - before) / (teacher - before),
        "seconds": round(seconds, 1),
        "model": str(model(folder, "distill")),
    }


def summarise(rows: list[dict]) -> dict:
    """Return the means over seeds, and every seed."""
    names = ("before", "after", "teacher", "gap_recovery", "seconds")
    return {name: sum(row[name] for row in rows) / len(rows) for name in names} | {"seeds": rows}


def draw(rows: list[dict]) -> Path:
    """Draw the distillation of every seed."""
    picture = ROOT / "curves.png"
    say(f"drawing {picture}")
    runs = {f"seed {r['seed']}": read_metrics(ROOT / f"seed_{r['seed']}/distill") for r in rows}
    plot_dynamics(runs, picture, teacher_accuracy=[row["teacher"] for row in rows])
    return picture


def table(rows: list[dict], summary: dict) -> str:
    """Return the accuracies as a table, one line a seed and their mean."""
    lines = ["seed   student before   student after   teacher   gap recovered   seconds"]
    named = [(str(row["seed"]), row) for row in rows]
    for name, r in [*named, ("mean", summary)] if len(rows) > 1 else named:
        lines.append(
            f"{name:<4} {r['before']:>16.1%} {r['after']:>15.1%} {r['teacher']:>9.1%}"
            f" {r['gap_recovery']:>15.1%} {r['seconds']:>9.0f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
