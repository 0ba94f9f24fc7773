"""What a run says of itself is the same at every layout, key by key."""

import json
from pathlib import Path

import pytest

from tests.test_train import make_home, records, run

WORDS = [
    "train.steps=2",
    "run.save_every=0",
    "run.export=false",
    "run.tensorboard=false",
    "optimizer.eps=1e-3",  # at 1e-8 its first steps are the sign of rounding
    "optimizer.warmup_steps=0",
    "eval.n=2",
    "eval.temperature=1.0",
    "metrics={position_bucket: 4, token_fraction: 0.7}",
    "reward.function=exact_match",
    "rollout.correction=tis",
    "rollout.mask_format='[0-9a-zA-Z]'",
    "rollout.logprobs=8",
]
DENSE = ["objective.support=rollout_topk"]
EXPERTS = ["teacher=null", "teachers={a: {path: teacher}, b: {weights: ema, ema_rate: 0.2}}"]
LAYOUTS = {
    "TP2·CP2": (4, "{tp: 2, cp: 2}"),
    "PP2·VPP2": (2, "{pp: 2, vpp: 2}"),
    "DP2": (2, "{}"),
    "TP2·SP": (2, "{tp: 2, sequence_parallel: true}"),
    "EP2": (2, "{ep: 2}"),
}
# what describes the layout: microbatches of a replica, how full they are, how alike replicas
OF_THE_LAYOUT = {"train/microbatches", "train/fill", "train/balance"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Return a home, and what one process says of a run in it."""
    return home(tmp_path_factory.mktemp("dense"), DENSE, layers=4)


@pytest.fixture(scope="module")
def of_experts(tmp_path_factory):
    """The same with experts on both sides, and the student's running mean for every other row."""
    folder = tmp_path_factory.mktemp("experts")
    return home(folder, EXPERTS, layers=4, student="qwen3_moe", teacher="qwen2_moe")


def home(folder: Path, words: list[str], **how) -> tuple[Path, list[str], list[dict]]:
    make_home(folder, **how)
    path = folder / "prompts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    named = ({**row, "teacher": "ab"[index % 2]} for index, row in enumerate(rows))
    path.write_text("".join(json.dumps(row) + "\n" for row in named))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, words, written(1, "{}", words, folder / "runs/one")


def written(world: int, parallel: str, words: list[str], folder: Path) -> list[dict]:
    run(world, *WORDS, *words, f"parallel={parallel}", f"run.dir={folder}")
    return records(folder)


@pytest.mark.parametrize("layout", ["TP2·CP2", "PP2·VPP2", "DP2"])
def test_a_run_says_the_same_at_every_layout(dense, tmp_path, monkeypatch, layout):
    compare(dense, tmp_path, monkeypatch, layout)


@pytest.mark.parametrize("layout", ["TP2·SP", "EP2"])
def test_so_does_one_of_experts(of_experts, tmp_path, monkeypatch, layout):
    compare(of_experts, tmp_path, monkeypatch, layout)


def compare(home, tmp_path, monkeypatch, layout) -> None:
    folder, words, one = home
    monkeypatch.chdir(folder)
    assert len(one[1]) > 100 and any("eval/accuracy" in record for record in one)
    for mine, theirs in zip(written(*LAYOUTS[layout], words, tmp_path), one, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - OF_THE_LAYOUT:
            if name == "policy/mismatch_max":  # rounding, all of it
                assert 0 < mine[name] < 1e-4
            else:
                assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-7), name
