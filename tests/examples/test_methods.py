"""Every method that is a config: it takes two steps on tiny models, and changes the student."""

import json
from pathlib import Path

import pytest

from megatron_opd import train
from megatron_opd.config_file import load_config
from tests.distributed import run_ranks
from tests.test_train import make_home

METHODS = Path(__file__).parents[2] / "examples/methods"
NAMES = sorted(path.stem for path in METHODS.glob("*.yaml") if path.stem != "base")
SMALL = (
    "student.path=student",
    "data.prompts=[prompts.jsonl]",
    "data.max_prompt_tokens=64",
    "rollout.max_tokens=12",
    "train.prompts_per_step=4",
    "train.steps=4",
    "optimizer.warmup_steps=1",
    "train.microbatch_tokens=256",
    "eval.prompts=[]",
    "eval.every=0",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = make_home(tmp_path_factory.mktemp("methods"))
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    routed = [{**row, "teacher": ("strong", "weak")[i % 2]} for i, row in enumerate(rows)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in routed))
    return folder


def _main(rank, name, words):
    train.main(load_config([METHODS / "base.yaml", METHODS / f"{name}.yaml"], words))


def even(response, prompt):
    """Reward half of what an untrained model writes."""
    return float(len(response) % 2 == 0)


def words(name):
    config = load_config([METHODS / "base.yaml", METHODS / f"{name}.yaml"])
    own = [f"teachers.{one}.path=teacher" for one in config.teachers]
    if config.teacher is not None and config.teacher.template is not None:
        own.append(f"teacher.template={METHODS / 'solution_first.txt'}")
    elif config.teacher is not None:
        own.append("teacher.path=teacher")
    if config.reward.function:
        own.append(f"reward.function={__name__}:even")
    return config, [*SMALL, *own]


@pytest.mark.parametrize("name", NAMES)
def test_a_method_runs(home, monkeypatch, name):
    monkeypatch.chdir(home)
    config, own = words(name)
    run_ranks(_main, 1, name, own)
    lines = Path(config.run.dir, "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 4
    assert any(record["optim/grad_norm"] > 0 for record in records)
    for term in ("objective", *config.terms):
        assert all(f"loss/{term}" in record for record in records)


def test_the_readme_names_every_method():
    text = (METHODS / "README.md").read_text()
    assert [name for name in NAMES if f"[{name}]({name}.yaml)" not in text] == []
    runs = [words(name)[0].run.dir for name in NAMES]
    assert [Path(run).name for run in runs] == NAMES
