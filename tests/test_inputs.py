"""What a config asks of its data."""

import json
from pathlib import Path

import pytest

from megatron_opd.config_file import load_config
from megatron_opd.inputs import count_steps, load_data, load_tokenizer
from tests.home import make_home


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load the config of a home with overrides."""
    monkeypatch.chdir(make_home(tmp_path))
    return lambda *overrides: load_config(["config.yaml"], overrides)


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ([], 6),  # 3 passes of 10 // 4
        (["data.prompts=[prompts.jsonl, prompts.jsonl]", "data.weights=[3, 1]"], 15),
        (["data.schedule=fixed"], 3),
        (["data.schedule=one_total"], 3),
        (["data.schedule=one_per_batch"], 30),
        (["data.schedule=one_total", "train.steps=7"], 7),
    ],
)
def test_steps_are_counted_by_the_schedule(load, overrides, steps):
    config = load("train.epochs=3", *overrides)
    sources, _ = load_data(config, load_tokenizer("student"), print)
    assert count_steps(config, sum(map(len, sources))) == steps


def test_a_step_needs_its_prompts_and_a_share_some_prompt(load):
    def refusal(*overrides):
        with pytest.raises(ValueError) as raised:
            load_data(load(*overrides), load_tokenizer("student"), print)
        return str(raised.value)

    line = refusal("train.prompts_per_step=11")
    assert line == "train.prompts_per_step: got 11, expected at most the 10 prompts in data.prompts"
    assert line == refusal("train.prompts_per_step=11", "data.schedule=fixed")
    config = load("train.prompts_per_step=11", "data.schedule=one_total")
    assert len(load_data(config, load_tokenizer("student"), print)[0][0]) == 10

    Path("long.jsonl").write_text(json.dumps({"prompt": "x" * 99}) + "\n")
    two = ["data.prompts=[prompts.jsonl, long.jsonl]", "data.too_long=drop"]
    assert refusal(*two, "data.weights=[0.5, 0.5]").startswith(
        "data.weights: no prompt of 'long.jsonl' is within data.max_prompt_tokens"
    )
    sources, _ = load_data(load(*two), load_tokenizer("student"), print)
    assert [len(source) for source in sources] == [10, 0]
