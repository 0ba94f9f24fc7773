"""A run that goes on at another layout is the run that was never interrupted.

Weights, the optimiser's states, the cursor in the data and the seeds of the responses must all
survive: each response after the resume is drawn by the weights before it.
"""

import shutil
from pathlib import Path

import pytest

from tests.test_train import exported, make_home, records, run

# of the optimiser: at 1e-8 its first steps are the sign of rounding
WORDS = [
    "train.steps=4",
    "run.save_every=2",
    "optimizer.eps=1e-3",
    "eval.prompts=[]",
    "eval.every=0",
]
LAYOUTS = {
    "one": (1, []),
    "TP2": (2, ["parallel.tp=2"]),
    "TP2·SP": (2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "PP2": (2, ["parallel.pp=2"]),
    "DP2": (2, []),
    "PP2·VPP2": (2, ["parallel.pp=2", "parallel.vpp=2"]),
    "TP2·PP2": (4, ["parallel.tp=2", "parallel.pp=2"]),
    "TP2·DP2": (4, ["parallel.tp=2"]),
    "CP2": (2, ["parallel.cp=2"]),
    "TP2·CP2": (4, ["parallel.tp=2", "parallel.cp=2"]),
    "EP2": (2, ["parallel.ep=2"]),
    # every other layer has experts: the first stage has none
    "PP2·VPP2·EP2": (4, ["parallel.pp=2", "parallel.vpp=2", "parallel.ep=2"]),
}
MOVES = [
    ("one", "TP2·PP2"),
    ("TP2·SP", "PP2·VPP2"),
    ("PP2·VPP2", "DP2"),
    ("DP2", "CP2"),
    ("TP2·CP2", "TP2·DP2"),
    ("PP2", "one"),
]


EXPERTS = [("PP2·VPP2·EP2", "one"), ("TP2·SP", "EP2")]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A student without experts."""
    return make_home(tmp_path_factory.mktemp("dense"), layers=4)


@pytest.fixture(scope="module")
def home_of_experts(tmp_path_factory):
    """A student with experts in every other layer."""
    return make_home(tmp_path_factory.mktemp("experts"), layers=4, student="qwen3_moe")


@pytest.mark.parametrize(("before", "after"), MOVES, ids=[f"{a} to {b}" for a, b in MOVES])
def test_resume_at_another_layout(home, tmp_path, monkeypatch, before, after):
    monkeypatch.chdir(home)
    assert_moves(tmp_path, before, after)


@pytest.mark.parametrize(("before", "after"), EXPERTS, ids=[f"{a} to {b}" for a, b in EXPERTS])
def test_so_does_a_mixture_of_experts(home_of_experts, tmp_path, monkeypatch, before, after):
    monkeypatch.chdir(home_of_experts)
    assert_moves(tmp_path, before, after)


def assert_moves(tmp_path: Path, before: str, after: str) -> None:
    """Run four steps; go back to the second, and take the others at another layout."""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    _go(before, whole)
    shutil.copytree(whole, moved)
    shutil.rmtree(moved / "checkpoints/step_000004")
    shutil.rmtree(moved / "hf")
    _go(after, moved, "run.resume=true")
    assert_same_run(moved, whole)


def _go(layout: str, folder: Path, *more: str) -> None:
    world, axes = LAYOUTS[layout]
    run(world, *WORDS, *axes, f"run.dir={folder}", *more)


def assert_same_run(moved: Path, whole: Path) -> None:
    for mine, theirs in zip(records(moved), records(whole), strict=True):
        for name in ("loss/objective", "optim/grad_norm", "rollout/response_tokens", "optim/lr"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3), (mine["step"], name)
    one, other = exported(moved, 4), exported(whole, 4)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor - other[name]).abs().max() < 1e-5, name
