"""Rollouts as a file: what is kept, what is drawn again, what replay reads, and a kill between."""

import json

import pytest

from megatron_opd.config import Data
from megatron_opd.data import encode_response, load_prompts
from megatron_opd.rollout import Sampling, request_seed
from megatron_opd.rollout.replay import ReplayEngine
from megatron_opd.writer import Writer
from tests.distributed import run_ranks
from tests.tokenizers import train_tokenizer
from tests.writing import make_model, make_questions, run_tool
from tools.generate import conversations, main


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    model, questions = make_model(folder / "model"), make_questions(folder / "questions.jsonl")
    words = [model, questions, "--reward", "tests.writing:even", "--reject", "truncated", "wrong"]
    words += ["--n", 2, "--max-tokens", 12, "--dtype", "float32", "--batch-size", 2]
    words += ["--max-prompt-tokens", 64]
    assert run_tool(main, [*words, "--out", folder / "whole.jsonl"]) == [0]
    return folder, words


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_kept_is_right_and_what_is_not_was_tried_again(home):
    folder, _ = home
    kept, rejected = rows(folder / "whole.jsonl"), rows(folder / "whole.rejected.jsonl")
    assert kept and rejected
    assert all(row["reward"] == 1 and row["finish"] == "stop" for row in kept)
    tries: dict[tuple, list] = {}
    for row in [*kept, *rejected]:
        tries.setdefault((row["index"], row["sample"]), []).append(row)
    assert sorted(tries) == [(index, sample) for index in range(7) for sample in (0, 1)]
    for drawn in tries.values():
        drawn.sort(key=lambda row: row["attempt"])
        assert [row["attempt"] for row in drawn] == list(range(len(drawn)))
        assert all(row.get("rejected") for row in drawn[:-1])
        assert not drawn[-1].get("rejected") or len(drawn) == 3
    for row in rejected:
        cut, wrong = row["finish"] == "length", row["reward"] == 0
        assert row["rejected"] == ["truncated"] * cut + ["wrong"] * wrong


def test_a_draw_depends_on_prompt_sample_and_attempt_alone(home):
    folder, (model, questions, *_) = home

    def draw(rank):
        how = {"dtype": "float32", "max_prompt_tokens": 64, "max_tokens": 12, "batch_size": 64}
        with Writer.open(str(model), **how) as writer:
            prompts = load_prompts(writer.config.data, writer.tokenizer, [str(questions)])
            sampling, seed = Sampling(12, 0.7, 0.95, 0, writer.stop_ids), request_seed(0, 1)
            written = writer.generate(prompts, n=2, sampling=sampling, seed=seed)
            return {(r.prompt.index, r.sample): len(r.response_ids) for r in written}

    (second,) = run_ranks(draw, 1)
    for row in rows(folder / "whole.jsonl") + rows(folder / "whole.rejected.jsonl"):
        if row["attempt"] == 1:
            assert second[row["index"], row["sample"]] == row["tokens"]


def test_after_a_kill_it_goes_on_to_the_same_files(home, tmp_path):
    folder, words = home
    progress = json.loads((folder / "whole.progress.json").read_text())
    assert progress["settings"]["prompts of a round"] == 4
    for name in ("whole.jsonl", "whole.rejected.jsonl"):
        lines = (folder / name).read_bytes().splitlines(keepends=True)
        first = [line for line in lines if json.loads(line)["index"] < 4]
        progress["bytes"][name.replace("whole", "killed")] = sum(map(len, first))
        cut = lines[: len(first) + 1]
        cut[-1] = cut[-1][:20]
        (tmp_path / name.replace("whole", "killed")).write_bytes(b"".join(cut))
    (tmp_path / "killed.progress.json").write_text(json.dumps({**progress, "done": 4}))
    assert run_tool(main, [*words, "--out", tmp_path / "killed.jsonl"], 2) == [0, 0]
    for name in ("jsonl", "rejected.jsonl"):
        assert rows(tmp_path / f"killed.{name}") == [
            {**row, "logp_mean": pytest.approx(row["logp_mean"], rel=1e-5)}
            for row in rows(folder / f"whole.{name}")
        ]


def test_replay_reads_the_file(home, tmp_path):
    folder, _ = home
    tokenizer = train_tokenizer(tmp_path)
    file = str(folder / "whole.jsonl")
    data = Data(prompts=(file,))
    prompts = load_prompts(data, tokenizer, require=("answer", "response"))
    engine = ReplayEngine(lambda text: encode_response(tokenizer, text))
    replayed = engine.generate(prompts, n=1, sampling=Sampling(40), seed=0)
    for rollout, row in zip(replayed, rows(folder / "whole.jsonl"), strict=True):
        assert rollout.reward == 1.0 and rollout.prompt.answer == row["answer"]
        assert rollout.prompt.question == row["question"] == row["prompt"][0]["content"]
        assert tokenizer.decode(rollout.response_ids[:-1]) == row["response"]


def test_prompts_are_written_in_the_words_they_were_asked_in(tmp_path):
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1?"}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": talk}))
    asked = conversations(Data(prompts=(str(tmp_path / "x.jsonl"),), template="boxed"))
    assert asked == [
        [
            {"role": "system", "content": "s"},
            {
                "role": "user",
                "content": "1+1? Please reason step by step, and put your final answer within "
                "\\boxed{}.",
            },
        ]
    ]


def test_it_reports_what_it_did(home, capfd):
    folder, words = home
    assert run_tool(main, [*words, "--out", folder / "whole.jsonl"]) == [0]
    said = capfd.readouterr().out
    kept, rejected = rows(folder / "whole.jsonl"), rows(folder / "whole.rejected.jsonl")
    drawn, cut = len(kept) + len(rejected), sum("truncated" in r["rejected"] for r in rejected)
    assert said.startswith(f"{len(kept)} of 14 responses kept, of {drawn} drawn; in ")
    (line,) = [line for line in said.splitlines() if "truncated" in line]
    assert [cell.strip() for cell in line.split("|")[2:4]] == [str(cut), f"{cut / drawn:.1%}"]


def test_errors_are_one_line(home, tmp_path, capfd):
    folder, words = home
    model, questions, *_ = words
    plain, out = [model, questions], ["--out", tmp_path / "new.jsonl"]
    (tmp_path / "old.jsonl").write_text("{}\n")
    for asked, told in [
        ([*plain, "--out", tmp_path / "x.parquet"], "x.parquet', expected a .jsonl file"),
        ([*plain, "--out", tmp_path / "old.jsonl"], "old.jsonl' exists, and"),
        ([*plain, *out, "--reject", "boring"], "filter: got 'boring', expected one of truncated"),
        ([*plain, *out, "--reject", "truncated:n=1"], "filter truncated.n: no such option"),
        ([*plain, *out, "--reject", "repeated_lines:times=x"], "repeated_lines.times: got 'x'"),
        ([*plain, *out, "--reject", "wrong"], "--reject wrong: nothing scores"),
        ([*plain, *out, "--temperature", 0], "--attempts: got 3, expected 1 with --temperature 0"),
        ([*words, "--seed", 3, "--out", folder / "whole.jsonl"], "begun with seed=0, got 3"),
    ]:
        capfd.readouterr()
        small = ["--max-tokens", 12, "--max-prompt-tokens", 64, "--dtype", "float32"]
        assert run_tool(main, [*asked, *small]) == [2], told
        error = capfd.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and told in error, error
