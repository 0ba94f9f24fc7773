"""The miniatures: what they learn, that every run can be made, and one figure in a few steps."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.rethinking_opd import skills
from examples.rethinking_opd.figures import FIGURES, RUNS
from examples.rethinking_opd.lab import HERE, NETWORKS, Lab
from examples.rethinking_opd.report import report
from examples.rethinking_opd.run import main
from megatron_opd.build import build_objective
from megatron_opd.config_file import load_config
from megatron_opd.types import Prompt

NUMBERS = st.integers(100, 999)


def value(terms: str) -> int:
    """Add up terms such as 7-5-1."""
    return sum(map(int, terms.replace("-", "+-").split("+")))


@given(NUMBERS, NUMBERS)
def test_both_orders_of_work_are_right_and_are_told_apart(a, b):
    row = skills.addition(a, b)
    prompt = Prompt(0, (1,), row["prompt"], "sums", row["answer"], None)
    for order in ("right", "left"):
        assert skills.right_answer(row[order], prompt) == 1
        work, answer = row[order].split(";")
        assert all(value(t) == int(v) for t, v in (x.split("=") for x in work.split(",")))
        assert skills.right_answer(f"{work};{int(answer) + 1}", prompt) == 0
    assert skills.from_the_left(row["prompt"], row["left"])
    ends_differ = (str(a)[0], str(b)[0]) != (str(a)[-1], str(b)[-1])
    assert skills.from_the_left(row["prompt"], row["right"]) != ends_differ


@given(NUMBERS, NUMBERS)
def test_differences_are_worked_out_with_what_was_borrowed(a, b):
    row = skills.subtraction(a, b)
    work, answer = row["right"].split(";")
    steps = [step.split("=") for step in work.split(",")]
    assert all(value(terms) == int(rest) for terms, rest in steps)
    borrowed = [int(rest) < 0 for _, rest in steps]
    assert [terms.count("-") - 1 for terms, _ in steps] == [0, *borrowed[:-1]] and not borrowed[-1]
    assert "".join(str(int(rest) % 10) for _, rest in steps)[::-1].lstrip("0") == (
        answer if answer != "0" else ""
    )


def test_no_question_is_in_two_files(tmp_path):
    skills.write_data(tmp_path, seed=3)
    files = [tmp_path / name for name in ("sums.jsonl", "cold.jsonl", "test/sums.jsonl")]
    prompts = [{json.loads(x)["prompt"] for x in path.open()} for path in files]
    assert [len(found) for found in prompts] == [18_000, 2_000, 256]
    assert len(set.union(*prompts)) == 20_256
    plain = [json.loads(line)["right"] for line in (tmp_path / "plain.jsonl").open()]
    assert not any("+1=" in work and work.count("+") > 3 for work in plain)  # nothing is carried
    mixed = [json.loads(line)["prompt"] for line in (tmp_path / "facts_and_sums.jsonl").open()]
    assert sum("+" in prompt for prompt in mixed) / len(mixed) == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize("name", RUNS)
def test_every_run_is_a_config_that_holds(name):
    run = RUNS[name]
    assert run.start in RUNS or run.start in NETWORKS
    given_to_all = ["student.path=s", "data.prompts=[p]", "eval.prompts=[e]", "run.dir=r"]
    config = load_config(
        [HERE / ("opd.yaml" if run.teacher else "sft.yaml")], [*given_to_all, *run.settings]
    )
    assert build_objective(config).needs_teacher == bool(run.teacher)
    responses = config.train.prompts_per_step * config.rollout.n
    assert not run.teacher or responses == 128  # arms see as many responses a step


def test_what_a_figure_compares_was_measured():
    for figure in FIGURES.values():
        for run in map(RUNS.__getitem__, figure.arms.values()):
            asked = [run] + ([RUNS[run.teacher]] if run.teacher else [])
            assert all(set(figure.files) <= set(each.held_out) for each in asked), figure.title


def few_steps(run):
    cut = ("train.steps=2", "optimizer.warmup_steps=1", "run.save_rollouts_every=1")
    return replace(run, settings=(*run.settings, *cut, "train.prompts_per_step=8"))


def small_lab(root: Path, **changed) -> Lab:
    """Return a lab of little data, every run of which takes two steps."""
    folder = root / "seed_0"
    if not folder.exists():
        skills.write_data(folder / "data", seed=0)
        for path in (folder / "data").rglob("*.jsonl"):
            path.write_text("".join(path.open().readlines()[:32]))
    return Lab(folder, 0, [], {name: few_steps(run) for name, run in (RUNS | changed).items()})


def test_a_figure_trains_what_it_lacks_and_only_that(tmp_path):
    text = report("patterns", [small_lab(tmp_path)], tmp_path)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| arm", "| compatible", "| incompatible"]
    assert all(0 <= float(cell.split()[0]) <= 1 for row in rows[1:] for cell in row[5:7])
    assert (tmp_path / "patterns.png").stat().st_size > 10_000
    assert (tmp_path / "patterns.md").read_text().startswith("### ")

    runs = tmp_path / "seed_0"
    made = {path.parent.name: path.stat().st_mtime_ns for path in runs.glob("*/made.json")}
    assert sorted(made) == ["from_left", "left_teacher", "opd", "start", "teacher"]
    other = replace(RUNS["left_teacher"], settings=("data.response_key=right",))
    report("patterns", [small_lab(tmp_path, left_teacher=other)], tmp_path)
    again = {
        name for name, at in made.items() if (runs / name / "made.json").stat().st_mtime_ns > at
    }
    assert again == {"left_teacher", "from_left"}  # what changed, and what is made from it


def test_an_unknown_figure_is_one_line(capsys, tmp_path):
    assert main(["suport"], tmp_path) == 2
    assert capsys.readouterr().err.startswith(
        "error: figure: got 'suport', expected support, support_code, k,"
    )
    assert not list(tmp_path.iterdir())
