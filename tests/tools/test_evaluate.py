"""The evaluation of a model: figures from its responses, the same after a kill, and the gap."""

import json

import pytest

from megatron_opd.data import load_prompts
from megatron_opd.evaluation import grade, summarize
from megatron_opd.rollout import Sampling
from megatron_opd.writer import Writer
from tests.distributed import run_ranks
from tests.writing import even, make_model, make_questions, run_tool
from tools.evaluate import main

REWARD = "tests.writing:even"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    model, questions = make_model(folder / "model"), make_questions(folder / "questions.jsonl")
    words = [model, questions, "--reward", REWARD, "--n", 4, "--max-tokens", 12]
    words += ["--dtype", "float32", "--batch-size", 3, "--max-prompt-tokens", 64]
    assert run_tool(main, [*words, "--out", folder / "whole"]) == [0]
    return folder, words


def _expected(rank, model, questions):
    how = {"dtype": "float32", "max_prompt_tokens": 64, "max_tokens": 12, "batch_size": 64}
    with Writer.open(str(model), **how) as writer:
        prompts = load_prompts(writer.config.data, writer.tokenizer, [str(questions)])
        sampling = Sampling(12, 0.7, 0.95, 0, writer.stop_ids)
        rollouts = writer.generate(prompts, n=4, sampling=sampling, seed=0)
        return grade(rollouts, even, writer.tokenizer)


def test_it_measures_what_the_model_writes(home):
    folder, (model, questions, *_) = home
    (graded,) = run_ranks(_expected, 1, model, questions)
    summary = json.loads((folder / "whole" / "summary.json").read_text())
    assert summary["all"] == summarize(graded)
    assert 0 < summary["all"]["accuracy"] < summary["all"]["pass@4"] <= 1
    assert {n: p["problems"] for n, p in summary["sources"].items()} == {"set0": 4, "set1": 3}
    assert summary["accuracies"]["set1"] == [g.accuracy for g in graded if g.source == "set1"]
    lines = (folder / "whole" / "responses.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["index"] for row in rows] == list(range(7))
    for row in rows:
        assert row["scores"] == [even(text, None) for text in row["responses"]]
    assert rows[3]["question"] == "3+1+1+1=?" and rows[3]["answer"] == "6"


def test_after_a_kill_it_goes_on_to_the_same_files(home, tmp_path):
    """Four problems are whole, half a line of the fifth is there; the other ranks are two now."""
    folder, words = home
    whole, killed = folder / "whole", tmp_path / "killed"
    killed.mkdir()
    lines = (whole / "responses.jsonl").read_bytes().splitlines(keepends=True)
    progress = json.loads((whole / "progress.json").read_text())
    assert progress["settings"]["prompts of a round"] == 3
    progress |= {"done": 3, "bytes": {"responses.jsonl": sum(map(len, lines[:3]))}}
    (killed / "progress.json").write_text(json.dumps(progress))
    (killed / "responses.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:30])
    assert run_tool(main, [*words, "--out", killed], 2) == [0, 0]
    for name in ("responses.jsonl", "summary.json", "progress.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_what_is_finished_is_only_reported(home, capfd):
    folder, words = home
    before = (folder / "whole" / "responses.jsonl").stat().st_mtime_ns
    assert run_tool(main, [*words, "--out", folder / "whole"]) == [0]
    assert (folder / "whole" / "responses.jsonl").stat().st_mtime_ns == before
    table = [line.split("|")[1:-1] for line in capfd.readouterr().out.splitlines()]
    columns, _, *rows = [[cell.strip() for cell in line] for line in table]
    assert columns[:6] == ["source", "problems", "avg@4", "pass@2", "pass@4", "maj@4"]
    assert [row[:2] for row in rows] == [["set0", "4"], ["set1", "3"], ["all", "7"]]
    summary = json.loads((folder / "whole" / "summary.json").read_text())["all"]
    assert rows[2][2] == f"{100 * summary['accuracy']:.1f} ± {100 * summary['accuracy±']:.1f}"


def test_the_gap_and_how_much_of_it_is_recovered(home, tmp_path, capfd):
    folder, words = home
    summary = json.loads((folder / "whole" / "summary.json").read_text())
    for name, shift in (("teacher", 0.5), ("before", -0.5), ("worse", -1.0)):
        moved = {s: [x + shift for x in part] for s, part in summary["accuracies"].items()}
        (tmp_path / name).write_text(json.dumps({**summary, "accuracies": moved}))
    gap = [*words, "--out", folder / "whole", "--baseline", tmp_path / "before", "--teacher"]
    assert run_tool(main, [*gap, tmp_path / "teacher"]) == [0]
    lines = capfd.readouterr().out.splitlines()
    assert [line for line in lines if "gap recovery" in line] == [
        f"gap recovery, {name}: 50.0% [50.0%, 50.0%]" for name in ("set0", "set1", "all")
    ]
    assert run_tool(main, [*gap, tmp_path / "worse"]) == [0]
    assert capfd.readouterr().out.count("there is no gap to recover") == 3


def test_errors_are_one_line(home, tmp_path, capfd):
    folder, words = home
    model, questions, *more = words
    empty, out = tmp_path / "empty.jsonl", ["--out", tmp_path / "new"]
    empty.write_text('{"prompt": "x"}\n')
    whole = ["--out", folder / "whole"]
    other = json.loads((folder / "whole" / "summary.json").read_text())
    other["settings"]["problems"] = "3"
    (tmp_path / "other").write_text(json.dumps(other))
    pair = ["--teacher", tmp_path / "other", "--baseline", folder / "whole" / "summary.json"]
    for asked, told in [
        ([tmp_path / "no", questions, *more, *out], "MODEL: no directory"),
        ([model, tmp_path / "no.jsonl", *more, *out], "no.jsonl: no such file"),
        ([model, empty, *more, *out], "empty.jsonl, row 0: no answer"),
        ([*words, *out, "--temperature", 0], "--n: got 4, expected 1 with --temperature 0"),
        ([*words, *out, "--top-p", 0], "--top-p: got 0, expected more than 0"),
        ([*words, *out, "--reward", "maths"], "--reward: got 'maths'"),
        ([*words, *out, "--url", "http://x"], "--url: has no effect with --engine megatron"),
        ([*words, *out, "--template", "boxing"], "--template: got 'boxing'"),
        ([*words, *out, "--tp", 2], "--tp"),
        ([*words, *whole, "--seed", 1], "was begun with seed=0, got 1"),
        ([*words, *whole, "--teacher", tmp_path / "no"], "--teacher, --baseline: got one"),
        ([*words, *whole, *pair], "--teacher: it was asked other problems"),
    ]:
        capfd.readouterr()
        assert run_tool(main, asked) == [2], told
        error = capfd.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and told in error, error
    assert not (tmp_path / "new").exists()
