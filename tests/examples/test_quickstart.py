"""The quickstart's task and what it reports. The demo itself is minutes; its parts are not."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

FOLDER = Path(__file__).parents[2] / "examples/quickstart"
sys.path.insert(0, str(FOLDER))

import demo  # noqa: E402
import task  # noqa: E402


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_the_work_shown_is_right(a, b):
    prompt, response = task.question_and_answer(a, b)
    work, total = response.split(";")
    assert prompt == f"{a}+{b}=" and int(total) == a + b
    columns = [column.split("=") for column in work.split(",")]
    assert all(sum(map(int, terms.split("+"))) == int(value) for terms, value in columns)
    digits = "".join(value[-1] for _, value in columns[:-1])
    assert total == columns[-1][1] + digits[::-1]


def test_questions_do_not_repeat_and_survive_the_tokenizer(tmp_path):
    task.write_data(tmp_path, train=300, test=50, digits=3, seed=1)
    task.write_model(tmp_path / "model", hidden=32, layers=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    rows = [
        json.loads(line)
        for name in ("train", "test")
        for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()
    ]
    assert len({row["prompt"] for row in rows}) == len(rows) == 350
    for row in rows:
        for text in (row["prompt"], row["response"]):
            ids = tokenizer(text)["input_ids"]
            assert len(ids) == len(text) and tokenizer.decode(ids) == text


def test_seed_is_an_override_of_every_stage():
    assert demo._seeds(None, []) == ([0], [])
    assert demo._seeds(None, ["optimizer.lr=1", "seed=3"]) == ([3], ["optimizer.lr=1"])
    assert demo._seeds([1, 2], []) == ([1, 2], [])


def test_the_summary_has_every_seed_and_their_mean(tmp_path):
    for stage, values in (("teacher", [0.9]), ("start", [0.1]), ("distill", [0.1, 0.5, 0.7])):
        folder = tmp_path / stage
        (folder / "hf/step_000010").mkdir(parents=True)
        lines = [{"step": i, "eval/accuracy": value} for i, value in enumerate(values)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    row = demo.measure(4, tmp_path, 12.34)
    assert row["gap_recovery"] == pytest.approx(0.75) and row["seconds"] == 12.3
    assert (row["before"], row["after"], row["teacher"], row["seed"]) == (0.1, 0.7, 0.9, 4)
    summary = demo.summarise([row, {**row, "gap_recovery": 0.85}])
    assert summary["gap_recovery"] == pytest.approx(0.8) and len(summary["seeds"]) == 2
    assert demo.table([row], summary).splitlines()[1].split() == [
        "4", "10.0%", "70.0%", "90.0%", "75.0%", "12",
    ]  # fmt: skip
