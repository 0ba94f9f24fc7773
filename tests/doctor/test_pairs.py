"""Five pairs of which it is known what is wrong, trained by the loop, and the doctor's word."""

import dataclasses
import json

import pytest

from megatron_opd import parallel as mesh
from megatron_opd.config_file import load_config
from megatron_opd.data import load_prompts
from megatron_opd.doctor import variants
from megatron_opd.doctor.checks import examine
from megatron_opd.doctor.material import Material
from megatron_opd.doctor.report import Row
from tests.distributed import run_ranks
from tests.tokenizers import train_tokenizer
from tools import doctor


def _examine(rank: int, words: list[str], prompts: int) -> list[Row]:
    config = load_config(["config.yaml"], words)
    parallel = mesh.initialize(config.parallel.tp, config.parallel.pp)
    return examine(Material(config, parallel, prompts=prompts, words="config.yaml"))


@pytest.fixture
def ask(pairs, monkeypatch):
    """Return what runs the doctor on the config with some words, and gives rows by name."""
    monkeypatch.chdir(pairs)

    def asked(*words: str, world: int = 1, prompts: int = 24) -> dict[str, Row]:
        seen = run_ranks(_examine, world, list(words), prompts)
        assert all(rows == seen[0] for rows in seen)  # every rank says the same
        return {row.check: row for row in seen[0]}

    return asked


def failed(rows: dict[str, Row]) -> list[str]:
    return [name for name, row in rows.items() if row.verdict == "fail"]


def test_a_good_pair_may_go(ask):
    rows = ask()
    assert failed(rows) == []
    assert rows["verdict"].verdict == "ok" and rows["verdict"].value == "compatible, go"
    sure = ("tokenizers", "stop ids", "memory", "student loads", "teacher loads", "template")
    sure += ("student logits", "teacher logits", "engine = trainer", "teacher = student")
    sure += ("overlap mass", "teacher's margin", "truncation", "new knowledge", "reverse KL")
    assert {rows[name].verdict for name in sure} == {"ok"}


def _program(rank: int, words: list[str]) -> int:
    return doctor.main(words)


def test_a_good_pair_is_exit_code_0(pairs, monkeypatch):
    monkeypatch.chdir(pairs)
    assert run_ranks(_program, 1, ["config.yaml", "--prompts", "16"]) == [0]


def at_times_no_number(response: str, prompt) -> float:
    """Fail on a prompt that the second of two replicas has."""
    return float("nan") if prompt.index == 50 else 0.0


def test_a_reward_that_is_no_number_ends_every_rank(pairs, monkeypatch, capfd):
    monkeypatch.chdir(pairs)
    words = ["config.yaml", f"eval.reward={__name__}:at_times_no_number", "--prompts", "4"]
    assert run_ranks(_program, 2, words) == [2, 2]
    assert capfd.readouterr().err.count("error: reward: got nan for a response to prompt 50") == 2


def test_another_tokenizer_of_equal_size_fails_at_once(ask):
    rows = ask("teacher.path=other_tokenizer")
    assert failed(rows) == ["tokenizers", "verdict"]
    assert "2 of 21 ids differ (5: 'a' vs 'b', 6: 'b' vs 'a')" in rows["tokenizers"].value
    assert {row.value for row in list(rows.values())[1:-1]} == {"not run"}
    assert rows["verdict"].value.startswith("tokenizers: ")


@pytest.mark.parametrize("name", ["zeroed", "constant", "random"])
def test_a_teacher_that_is_none_fails(ask, name):
    rows = ask(f"teacher.path={name}")
    assert failed(rows) == ["teacher loads", "verdict"]
    assert rows["student loads"].verdict == "ok"
    assert rows["verdict"].value.startswith("teacher loads: ")
    assert "teacher.path" in rows["verdict"].value


def test_a_wrong_template_is_told_with_the_right_one(ask):
    rows = ask("data.chat_template=none")
    assert rows["template"].verdict in ("warn", "fail")
    assert "set data.chat_template=tokenizer" in rows["template"].advice
    assert rows["verdict"].verdict == "fail"  # and worse than the student the teacher is, so
    assert rows["verdict"].value == rows["template"].advice
    assert rows["teacher loads"].verdict == "ok"  # asked in the template that it knows


@pytest.mark.parametrize("name", ["further", "student"])
def test_a_teacher_of_the_same_pipeline_adds_nothing_new(ask, name):
    rows = ask(f"teacher.path={name}")
    assert failed(rows) == []
    assert rows["verdict"].verdict == "warn"
    assert rows["verdict"].value.startswith("teacher adds nothing new: same pipeline?")


def test_the_layout_changes_no_verdict(ask):
    one, two = ask(prompts=9), ask("parallel.tp=2", "train.prompts_per_step=2", world=4, prompts=9)
    same = ("overlap mass", "reverse KL", "teacher's margin", "template", "new knowledge")
    assert [one[name] for name in same] == [two[name] for name in same]
    assert {n: row.verdict for n, row in one.items()} == {n: row.verdict for n, row in two.items()}


def test_what_cannot_be_checked_says_why(ask, pairs):
    rows = [{"prompt": letters} for letters in ("abc", "hfd", "mno", "gki")]
    (pairs / "bare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = ("data.prompts=[bare.jsonl]", "train.prompts_per_step=2", "objective.veto=0.5")
    rows = ask(*few, "rollout.top_p=0.9", "objective.support=full")
    why = {name: row.advice for name, row in rows.items() if row.value == "not run"}
    assert why["reward AUROC"] == why["teacher's margin"] == "4 of 4 prompts have no answer"
    assert "rollout.top_p" in why["engine = trainer"]
    assert "veto" in why["teacher = student"]


def test_questions_are_rendered_again_with_what_is_known_of_them(tmp_path):
    tokenizer = train_tokenizer(tmp_path / "tokenizer")
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"What is {i}+{i}?", "answer": str(2 * i)} for i in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.yaml").write_text(
        f"student: {{path: x}}\nteacher: {{path: x}}\ndata: {{prompts: [{file}]}}"
    )
    data = load_config([tmp_path / "config.yaml"], []).data
    some = load_prompts(data, tokenizer)[1::2]
    ways, failures = variants.rendered(data, tokenizer, some)
    assert failures == [] and list(ways) == [
        "data.template=dapo",
        "data.template=boxed",
        "data.chat_template=none",
        "data.chat_template_kwargs.enable_thinking=false",
    ]
    for prompts in ways.values():
        for before, after in zip(some, prompts, strict=True):
            same = dataclasses.replace(after, token_ids=before.token_ids, text=before.text)
            assert same == before and after.token_ids != before.token_ids
    assert ways["data.chat_template=none"][0].text == "What is 1+1?"
    assert "\\boxed{}" in ways["data.template=boxed"][0].text
    short = data.model_copy(update={"max_prompt_tokens": 60})
    ways, failures = variants.rendered(short, tokenizer, some)
    assert failures[0] == (
        "data.template=dapo: 3 of 3 prompts are longer than data.max_prompt_tokens=60"
    )
