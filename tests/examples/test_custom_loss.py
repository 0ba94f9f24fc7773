"""Every function of examples/custom_loss: short, exact on any number of ranks, trained with."""

import ast
import json
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml

from examples.custom_loss.losses import jeffreys, where_they_differ, with_teachers_first
from megatron_opd import train
from megatron_opd.config_file import load_config
from megatron_opd.loss import Objective
from tests.distributed import run_ranks
from tests.loss.dense import far, judge, make_problem, reference
from tests.test_train import make_home

EXAMPLE = Path(__file__).parents[2] / "examples/custom_loss"
OBJECTIVES = {
    "divergence": Objective(divergence=jeffreys, k=4),
    "support": Objective(support=with_teachers_first, k=3, normalize="vocab", tail=True),
    "weight": Objective(weights={where_they_differ: {"scale": 0.5}}, k=4),
    "all": Objective(
        support=with_teachers_first,
        divergence=jeffreys,
        weights={where_they_differ: {"scale": 0.5}},
        k=3,
    ),
}


def on_a_rank(rank, problem, objective):
    return judge(problem, objective, rank=rank, widths=(7, 7), group=dist.group.WORLD)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradient_are_those_of_the_formula(name):
    problem, objective = make_problem(), OBJECTIVES[name]
    want, alone = reference(problem, objective), judge(problem, objective)
    ranks = run_ranks(on_a_rank, 2, problem, objective)
    for got in (alone, *ranks):
        for what in ("loss", "hidden"):
            assert far(got[what], want[what]) < 1e-9, what
    assert far(alone["weight"], want["weight"]) < 1e-9
    assert far(ranks[0]["weight"], want["weight"][:7]) < 1e-9


def test_each_takes_less_than_ten_lines():
    tree = ast.parse((EXAMPLE / "losses.py").read_text())
    lengths = {
        f.name: f.end_lineno - f.lineno + 1
        for f in tree.body
        if hasattr(f, "end_lineno") and isinstance(f, ast.FunctionDef)
    }
    assert len(lengths) == 3 and max(lengths.values()) < 10, lengths


def test_the_config_names_them():
    section = yaml.safe_load((EXAMPLE / "custom.yaml").read_text())["objective"]
    names = [section["support"], section["divergence"], *section["weights"]]
    functions = ["with_teachers_first", "jeffreys", "where_they_differ"]
    assert [name.split(":")[1] for name in names] == functions


def train_with_them(rank, files, overrides):
    train.main(load_config(files, overrides))


def test_a_run_trains_with_all_three(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_home(tmp_path)
    overrides = ["train.steps=3", "run.save_every=0", "eval.prompts=[]", "eval.every=0"]
    files = ["config.yaml", str(EXAMPLE / "custom.yaml")]
    run_ranks(train_with_them, 2, files, [*overrides, "parallel.tp=2"])
    lines = (tmp_path / "runs/custom_loss/metrics.jsonl").read_text().splitlines()
    for record in map(json.loads, lines):
        assert record["loss/objective"] > 0 == record["distill/support_empty"]
        assert record["optim/grad_norm"] > 0
