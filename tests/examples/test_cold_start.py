"""The cold start as one command: what it refuses, and all stages of a very short one."""

import json
from pathlib import Path

import pytest
import yaml

from examples.cold_start import run
from examples.rethinking_opd.lab import Lab
from megatron_opd.config_file import load_config
from megatron_opd.plots import read_metrics
from tests.examples.test_rethinking_opd import small_lab

PAPERS = run.HERE / "qwen3_1.7b_from_4b"


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    return small_lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture
def files(lab, tmp_path, monkeypatch) -> list[str]:
    """The example's two configs, of two steps each, on models that are hardly trained."""
    monkeypatch.chdir(tmp_path)
    models = {name: max((lab.run(name) / "hf").iterdir()) for name in ("start", "left_teacher")}
    for path, prompts in zip(run.FILES, ("cold", "sums"), strict=True):
        config = yaml.safe_load(path.read_text())
        config["student"]["path"] = str(models["start"])
        if "teacher" in config:
            config["teacher"]["path"] = str(models["left_teacher"])
        config["data"]["prompts"] = [f"{lab.data}/{prompts}.jsonl"]
        config["eval"]["prompts"] = [f"{lab.data}/test/sums.jsonl"]
        config["train"] |= {"prompts_per_step": 8, "steps": 2}
        config["optimizer"]["warmup_steps"] = 1
        (tmp_path / path.name).write_text(yaml.safe_dump(config))
    return [path.name for path in run.FILES]


def rows_of(file: str) -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def test_the_stages_build_on_each_other(files, lab, capfd):
    # such a teacher seldom ends a response, and nothing is rejected for it
    assert run.main([*files, "--compare", "--", "--temperature", "0", "--reject"]) == 0
    rows = rows_of("runs/cold_start/responses.jsonl")
    asked = {row["prompt"] for row in rows_of(f"{lab.data}/cold.jsonl")}
    assert {row["prompt"][0]["content"] for row in rows} == asked and len(rows) == len(asked)

    learned = load_config(["runs/cold_start/sft/config.yaml"])
    assert learned.data.prompts == ("runs/cold_start/responses.jsonl",)
    assert learned.data.response_key == "response"
    distilled = load_config(["runs/cold_start/opd/config.yaml"])
    assert distilled.student.path == "runs/cold_start/sft/hf/step_000002"
    alone = load_config(["runs/cold_start/opd_alone/config.yaml"])
    assert alone.student == learned.student and alone.train.steps == 4
    assert alone.teacher == distilled.teacher and alone.data == distilled.data

    table = capfd.readouterr().out.splitlines()[-3:]
    stages = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert [row[:2] for row in stages] == [
        ["cold start", "2"],
        ["then OPD", "2"],
        ["OPD alone", "4"],
    ]
    assert read_metrics("runs/cold_start/opd")[-1]["distill/reverse_kl"] > 0


def test_a_finished_stage_is_not_run_again(files):
    stages = run.Stages(*map(Path, files), [], 1)
    folder = Path("runs/cold_start/sft")
    (folder / "hf/step_000002").mkdir(parents=True)
    assert stages.learn(Path("responses.jsonl")) == folder
    assert not (folder / "metrics.jsonl").exists()


def test_prompts_of_both_stages_are_told_apart(files, lab, capsys):
    config = yaml.safe_load(Path("opd.yaml").read_text())
    config["data"]["prompts"] = [f"{lab.data}/cold.jsonl"]
    Path("opd.yaml").write_text(yaml.safe_dump(config))
    assert run.main(files) == 2
    assert "32 prompts of sft.yaml are in opd.yaml too, such as '" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_files_that_cannot_be_the_stages_are_refused(files, capsys):
    for words, line in (
        (["sft.yaml"], "got 1 files, expected SFT.yaml OPD.yaml, or none"),
        (["opd.yaml", "opd.yaml"], "opd.yaml: rollout.engine: got 'megatron', expected replay"),
        (["sft.yaml", "sft.yaml"], "sft.yaml: teacher: missing, expected the one that writes"),
        ([*files, "train.stepz=2"], "train.stepz: no such key; did you mean train.steps?"),
    ):
        assert run.main(words) == 2
        assert line in capsys.readouterr().err


def test_the_papers_settings():
    sft, opd = load_config([PAPERS / "sft.yaml"]), load_config([PAPERS / "opd.yaml"])
    assert (sft.optimizer.lr, sft.optimizer.schedule, sft.train.epochs) == (1e-5, "cosine", 1)
    assert sft.rollout.max_tokens == 12288 and sft.train.prompts_per_step == 64
    assert (opd.objective.k, opd.rollout.n, opd.optimizer.lr) == (16, 4, 1e-6)
    assert opd.rollout.max_tokens == 7168 and opd.train.prompts_per_step == 64
