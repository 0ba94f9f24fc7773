"""The planner: what fits, why not, how fast, and the command line of it."""

import itertools
import json
from dataclasses import replace

import pytest

from megatron_opd.config import Config
from megatron_opd.planner import machine, search
from megatron_opd.planner.layout import Layout, parse
from megatron_opd.planner.machine import GB, GPUS, Achieved
from megatron_opd.planner.times import phases
from tests.examples.test_recipes import QWEN3_1_7B, QWEN3_4B
from tools import plan


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, network in (("student", QWEN3_1_7B), ("teacher", QWEN3_4B)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(network))
    return folder


def setting(models, gpu="h100", ranks=16, achieved=None, **how):
    paths = [str(models / "student"), str(models / "teacher")]
    config = plan.read([*paths, "rollout.engine=vllm", *how.pop("words", ())])
    return search.setting(config, GPUS[gpu], achieved or Achieved(), ranks=ranks, **how)


def test_what_is_listed_fits_and_comes_fastest_first(models):
    planned = setting(models, response=2000)
    found = list(itertools.islice(search.candidates(planned), 12))
    seconds = [candidate.seconds for candidate in found]
    assert len(found) == 12 and seconds == sorted(seconds)
    assert len({candidate.layout for candidate in found}) == 12
    for candidate in found:
        assert candidate.layout.world == candidate.judging.world == 16
        assert candidate.memory <= 0.9 * 80 * GB
        assert search.refusal(planned, candidate.layout, candidate.judging) is None


def test_a_small_memory_leaves_fewer_and_a_tiny_one_none(models):
    planned = setting(models, ranks=8)
    half = replace(planned, achieved=Achieved(memory=0.87))
    whole, less = (sum(1 for _ in search.candidates(s)) for s in (planned, half))
    assert 0 < less < whole
    assert not list(search.candidates(replace(planned, achieved=Achieved(memory=0.1))))


@pytest.mark.parametrize(
    "layout, why",
    [
        (Layout(tp=3, dp=5), "3 ranks a replica do not divide 16 ranks"),
        (Layout(dp=16), "train.prompts_per_step=40 is no multiple of dp 16"),
        (Layout(ep=2, dp=8, cp=2), "no model on this mesh has experts"),
        (Layout(pp=16), "num_hidden_layers=28"),
        (Layout(vpp=2, dp=16), "train.prompts_per_step"),
        (Layout(tp=16), "num_key_value_heads=8"),
    ],
    ids=["world", "prompts", "experts", "layers", "order", "heads"],
)
def test_why_a_layout_is_refused(models, layout, why):
    planned = setting(models, words=["train.prompts_per_step=40"])
    assert why in (search.refusal(planned, layout, layout) or "")


def test_a_faster_gpu_and_more_ranks_take_less_time(models):
    layout, wide = Layout(tp=2, dp=8, sequence_parallel=True), Layout(tp=2, dp=16)
    slow, fast = (phases(setting(models, gpu), layout, layout) for gpu in ("a100-80", "b200"))
    assert all(fast[name].seconds < slow[name].seconds for name in ("rollout", "score", "train"))
    many = phases(setting(models, ranks=32), wide, wide)
    few = phases(setting(models), replace(wide, dp=8), replace(wide, dp=8))
    assert many["train"].seconds < 0.6 * few["train"].seconds


def test_what_is_between_nodes_is_slower(models):
    layout = Layout(tp=8, dp=2, sequence_parallel=True)
    inside, across = (phases(setting(models, per_node=n), layout, layout) for n in (8, 4))
    assert across["train"].parts["tp"] > 3 * inside["train"].parts["tp"]
    assert across["train"].sent == inside["train"].sent


def test_the_arithmetic_of_a_step_on_one_gpu(models):
    planned = setting(models, ranks=1, prompt=1, response=1000, words=["rollout.n=1"])
    parts = phases(planned, Layout(), Layout())["train"].parts
    tokens, matrices = 64 * 1000, 28 * (2048 * 128 * (16 + 8 + 8 + 16) + 3 * 2048 * 6144)
    attention, head = 28 * 4 * 16 * 128 * 1000 / 2, 2 * 2048 * 151936
    looked_at = 0.05 * head * (1 + 2560 / 2048)
    flops = tokens * (6 * matrices + 3.5 * attention + head + looked_at)
    assert parts["compute"] == pytest.approx(flops / (989e12 * 0.4), rel=1e-3)


def test_the_command_lists_layouts_and_explains_one(models, capsys, tmp_path):
    pair = [str(models / "student"), str(models / "teacher"), "--gpu", "h200", "--ranks", "8"]
    assert plan.main([*pair, "--top", "3", "--json", str(tmp_path / "plan.json")]) == 0
    told = capsys.readouterr().out
    assert "| the same |" in told.replace("  ", "") and "phases: seconds" in told
    listed = json.loads((tmp_path / "plan.json").read_text())["layouts"]
    assert len(listed) == 3 and listed[0]["phases"]["train"]["seconds"]["compute"] > 0
    assert plan.main([*pair, "--why", "tp=4,pp=2"]) == 0
    told = capsys.readouterr().out
    assert "tp 4 sp · pp 2: fits" in told and "tp all_gather" in told
    assert plan.main([*pair, "--assume", "memory=0.1"]) == 1
    assert "nothing fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, line",
    [
        (["--assume", "trian=1"], "--assume: no such word 'trian'"),
        (["--assume", "train=2"], "--assume train: got 2, expected more than 0 and at most 1"),
        (["--why", "tq=1"], "--why: no axis 'tq'"),
        (["--why", "tp=0"], "--why tp: got '0', expected a positive number"),
        (["student.dtype=float32"], "dtype: got float32, expected bfloat16"),
        (["rollout.nn=1"], "rollout.nn: no such key; did you mean rollout.n?"),
    ],
    ids=["word", "share", "axis", "size", "dtype", "key"],
)
def test_mistakes_are_one_line(models, capsys, words, line):
    pair = [str(models / "student"), str(models / "teacher"), "--gpu", "h100", "--ranks", "8"]
    assert plan.main([*pair, *words]) == 2
    assert line in capsys.readouterr().err


def test_a_config_file_is_planned_too(models, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(f"student: {{path: {models}/student}}\nteacher: {{path: {models}/teacher}}\n")
    config = plan.read([str(file), 'data.prompts=["p"]', "train.prompts_per_step=32"])
    assert isinstance(config, Config) and config.train.prompts_per_step == 32


def test_words_of_layouts():
    assert parse("tp=4,pp=2") == {"tp": 4, "pp": 2}
    assert machine.assumptions("train=0.3,hbm=0.5") == replace(Achieved(), train=0.3, hbm=0.5)
    assert str(Layout(tp=4, dp=2, sequence_parallel=True)) == "tp 4 sp · dp 2"
