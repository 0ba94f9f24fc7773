"""The tool that prepares prompts: what it drops, what it writes, what it says."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megatron_opd.config import Data
from megatron_opd.data import load_prompts
from megatron_opd.templates import bare
from tests.prompts import wrap
from tests.test_dedup import minilm
from tests.tokenizers import train_tokenizer
from tools.prepare_prompts import main

DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, *rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(*words):
    """Run the tool; return the rows that it writes, and its report."""
    assert main([*words, "--out", "out.parquet", "--report", "report.json"]) == 0
    rows = pq.read_table("out.parquet").to_pylist()
    return rows, json.loads(Path("report.json").read_text())


def refusal(capsys, *words):
    assert main([*words]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


def test_every_layout_comes_out_as_one_without_repeated_questions(capsys):
    verl = {
        "data_source": "dapo",
        "prompt": [{"role": "user", "content": wrap("dapo", "1+1?")}],
        "ability": "math",
        "reward_model": {"ground_truth": "2", "style": "rule"},
        "extra_info": {"index": "u-1"},
    }
    talk = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    system = [{"role": "system", "content": "short"}, {"role": "user", "content": "3+3?"}]
    write("a.jsonl", verl, {"prompt": wrap("boxed", "1+1?"), "answer": 3, "id": "u-2"})
    write("b.jsonl", {"messages": talk}, {"prompt": system, "id": "u-1"}, {"prompt": "5+5?"})
    write("known.jsonl", {"prompt": wrap("dapo", "5+5?")})
    rows, report = prepare("a.jsonl", "b.jsonl", "--against", "known.jsonl")
    asked = [row["prompt"][-1]["content"] for row in rows]
    assert asked == [wrap("boxed", question) for question in ("1+1?", "2+2?", "3+3?")]
    assert rows[2]["prompt"][0] == {"role": "system", "content": "short"}
    assert [row["reward_model"]["ground_truth"] for row in rows] == ["2", None, None]
    assert [row["extra_info"]["index"] for row in rows] == ["u-1", "b-0", "u-1-1"]
    assert [row["data_source"] for row in rows] == ["dapo", "b", "b"]
    assert [row["response"] for row in rows] == [None, "4", None]
    assert report["read"] == {"a.jsonl": 2, "b.jsonl": 3} and report["kept"] == 3
    assert report["against"] == {"known.jsonl": 1}
    assert report["dropped"] == {"exact_against": 1, "exact_within": 1}
    first, second = report["examples"]["exact"]
    assert first["dropped"] == {"row": "a.jsonl, row 1", "question": "1+1?"}
    assert first["kept"]["row"] == "a.jsonl, row 0"
    assert second["kept"]["row"] == "known.jsonl, row 0"
    assert "1 dropped: exact, against\n" in capsys.readouterr().out


def test_what_it_writes_is_what_training_reads():
    write("a.jsonl", {"prompt": "1+1?", "id": 7}, {"prompt": "1+1?", "id": 7}, {"prompt": "2+2?"})
    rows, _ = prepare("a.jsonl", "--template", "none", "--dedup", "none")
    assert len(rows) == 3
    tokenizer = train_tokenizer("tokenizer")
    data = Data(prompts=("out.parquet",), template="boxed", chat_template="none")
    prompts = load_prompts(data, tokenizer)
    assert [p.text for p in prompts] == [wrap("boxed", q) for q in ("1+1?", "1+1?", "2+2?")]
    assert [p.source for p in prompts] == ["a"] * 3


def test_what_says_the_same_goes_and_the_report_shows_why():
    pytest.importorskip("faiss")
    area = "A triangle has sides of 3, 4 and 5. What is its area?"
    primes = "How many primes lie between 100 and 200?"
    write("known.jsonl", {"prompt": wrap("dapo", area)})
    write(
        "new.jsonl",
        {"prompt": wrap("boxed", primes)},
        {"prompt": "Find the area of the triangle whose side lengths are 3, 4 and 5."},
        {"prompt": "What is the number of prime numbers between 100 and 200?"},
        {"prompt": primes},
    )
    rows, report = prepare(
        "new.jsonl", "--against", "known.jsonl", "--dedup", "semantic", "--model", minilm()
    )
    assert [bare(row["prompt"][0]["content"]) for row in rows] == [primes]
    assert report["dropped"] == {
        "exact_against": 0,
        "exact_within": 1,
        "semantic_against": 1,
        "semantic_within": 1,
    }
    assert report["threshold"] == 0.6 and report["longer_than_the_model_reads"] == 0
    pairs = report["examples"]["semantic_closest"]
    partner = {pair["dropped"]["row"]: pair["kept"]["row"] for pair in pairs}
    assert partner == {
        "new.jsonl, row 1": "known.jsonl, row 0",
        "new.jsonl, row 2": "new.jsonl, row 0",
    }
    assert pairs[::-1] == report["examples"]["semantic_farthest"]
    assert 1 > pairs[0]["cosine"] >= pairs[1]["cosine"] > 0.6


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--out", "out.json"], "--out: got 'out.json', expected a .parquet file"),
        (["--out", "q.parquet"], "--out: 'q.parquet' exists; remove it or choose another"),
        (["--out", "no/out.parquet"], "--out: no folder 'no' for 'out.parquet'"),
        (["--threshold", "0.5"], "--threshold: has no effect without --dedup semantic"),
        (["--dedup", "none", "--against", "q.jsonl"], "--against: has no effect with --dedup none"),
        (["--dedup", "semantic", "--threshold", "2"], "--threshold: got 2, expected more than 0"),
        (["--template", "bxd"], "--template: got 'bxd', expected one of none, dapo, boxed, or"),
        (["--against", "q.jsonl"], "IN: no question is left; see --against"),
        (["--against", "absent.jsonl"], "absent.jsonl: no such file"),
    ],
)
def test_what_is_refused(capsys, words, line):
    write("q.jsonl", {"prompt": "1+1?"})
    Path("q.parquet").touch()
    words = words if "--out" in words else [*words, "--out", "out.parquet"]
    assert line in refusal(capsys, "q.jsonl", *words)
    assert not Path("out.parquet").exists()


def test_a_row_without_a_question_is_named(capsys):
    write("q.jsonl", {"prompt": "q"}, {"prompt": [{"role": "system", "content": "short"}]})
    line = refusal(capsys, "q.jsonl", "--out", "out.parquet")
    assert line == "error: q.jsonl, row 1: no message by the user, so no question\n"


@pytest.mark.skipif(not DATA.exists(), reason="the real prompts are not beside the repository")
def test_dapo_boxed_has_519_repeated_questions_and_gets_its_braces_right():
    rows, report = prepare(str(DATA / "dapo-math-17k-boxed.parquet"))
    assert report["dropped"]["exact_within"] == 519 and len(rows) == report["kept"] == 17398
    assert all(row["prompt"][0]["content"].endswith("within \\boxed{}.") for row in rows)
    assert len({row["extra_info"]["index"] for row in rows}) == 17398
