"""Rewards through the loop, as users run it: GRPO, PPO, token_grpo, sums, routes, schedules."""

import json
from pathlib import Path

import pytest

from tests.test_train import QUICK, home, records, run

__all__ = ["home"]  # a fixture
HERE = "tests.test_train_reward"
RL = "support: sampled, form: policy_gradient, divergence: outcome"
ALONE = ["teacher=null", f"reward.function={HERE}:early_letters", "rollout.n=4"]


def early_letters(response: str, prompt) -> float:
    """A reward that can be learned in a few steps: the share of letters before n."""
    return sum("a" <= letter < "n" for letter in response.lower()) / max(len(response), 1)


def sometimes_nan(response: str, prompt) -> float:
    return float("nan") if prompt.index % 2 else 1.0


def test_grpo_learns_what_is_rewarded(home):
    words = [*ALONE, f"objective={{{RL}, clip_low: 0.2, clip_high: 0.28, dual_clip: 3.0}}"]
    run(1, *words, *QUICK, "train={steps: 20}", "optimizer.lr=1e-2")
    history = records(Path("runs/one"))
    rewards = [sum(r["reward/mean"] for r in part) / 4 for part in (history[:4], history[-4:])]
    assert rewards[1] > rewards[0] + 0.2
    for record in history:
        assert record["policy/clipped_fraction"] == 0  # one update a rollout: the ratio is one
        assert record["reward/std"] > 0 and 0 <= record["reward/solved_all_fraction"] <= 1
        assert not any(name.startswith("distill/") for name in record)
        assert record["optim/grad_norm"] > 0


def test_several_updates_a_rollout_are_clipped(home):
    words = [*ALONE, f"objective={{{RL}, clip_low: 0.02, clip_high: 0.02}}"]
    run(1, *words, *QUICK, "train={steps: 4, updates_per_rollout: 2}", "optimizer.lr=1e-2")
    clipped = [record["policy/clipped_fraction"] for record in records(Path("runs/one"))]
    assert clipped[0] == clipped[2] == 0 and clipped[1] > 0.1 and clipped[3] > 0.1


@pytest.mark.parametrize("layout", ["parallel.tp=2", "parallel.pp=2"])
def test_everything_at_once_at_every_layout(home, layout):
    """A sum of distillation, plus_grpo and supervised terms, one of them scheduled; the same
    metrics on two ranks as on one."""
    words = [
        f"reward.function={HERE}:early_letters",
        "objective={support: student_topk, veto: 0.5}",
        "terms.plus={support: sampled, form: policy_gradient, outcome: 0.5, weight: 0.3}",
        f"terms.routed={{{RL}, weights: {{incorrect_only: {{threshold: 0.2}}, rlsd: {{}}}}}}",
        "schedules={objective.veto: {start: 0.5, end: 0.1, steps: 2},"
        " terms.plus.weight: {start: 0.0, end: 1.0, steps: 1, shape: step}}",
    ]
    run(1, *words, *QUICK, "run.dir=runs/single")
    run(2, *words, layout, *QUICK)
    single, history = records(Path("runs/single")), records(Path("runs/one"))
    names = ["loss/objective", "loss/plus", "loss/routed", "loss/total", "reward/mean"]
    for mine, theirs in zip(history, single, strict=True):
        for name in (*names, "distill/reverse_kl", "optim/grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
    assert [record["schedule/objective.veto"] for record in history] == [0.5, 0.3, 0.1]
    assert [record["schedule/terms.plus.weight"] for record in history] == [0, 1, 1]
    parts = [(r["loss/objective"], r["loss/plus"], r["loss/routed"]) for r in history]
    for record, (kd, plus, routed) in zip(history, parts, strict=True):
        weight = record["schedule/terms.plus.weight"]
        assert record["loss/total"] == pytest.approx(kd + weight * plus + routed, abs=1e-6)


@pytest.mark.parametrize("layout", ["parallel.pp=2", "parallel.pp=1", "parallel.cp=2"])
def test_token_grpo_at_every_layout(home, layout):
    words = [
        "objective={support: sampled, form: policy_gradient, group_normalize: std, discount: 1.0}",
        "teacher.payload=sampled",
        "train.microbatch_tokens=77",  # so that a prompt's responses are in several
    ]
    run(1, *words, *QUICK, "run.dir=runs/single")
    run(2, *words, layout, *QUICK)
    for mine, theirs in zip(records(Path("runs/one")), records(Path("runs/single")), strict=True):
        for name in ("loss/objective", "optim/grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


def test_supervised_on_the_rows_that_were_right(home):
    """The dataset says what its responses are worth; the others weigh nothing."""
    rows = [json.loads(line) for line in Path("prompts.jsonl").read_text().splitlines()]
    scored = [json.dumps(row | {"reward": float(i % 2)}) + "\n" for i, row in enumerate(rows)]
    Path("prompts.jsonl").write_text("".join(scored))
    words = ["teacher=null", "rollout={engine: replay, n: 1}", "train.prompts_per_step=10"]
    words += ["objective={support: sampled, divergence: cross_entropy}"]
    run(1, *words, *QUICK, "objective.weights={correct_only: {}}")
    run(1, *words, *QUICK, "objective.weights={}", "run.dir=runs/all")
    some, all_of_them = (records(Path(f"runs/{name}"))[0] for name in ("one", "all"))
    assert some["reward/mean"] == all_of_them["reward/mean"] == 0.5
    assert 0.3 < some["loss/objective"] / all_of_them["loss/objective"] < 0.7


def test_a_schedule_may_pass_where_no_base_is_asked(home):
    """λ = 1 asks none, and the base that is there for later is left alone."""
    words = ["base={path: student}", "objective={support: full, extrapolation: 1.0}"]
    words += ["schedules={objective.extrapolation: {start: 1.0, end: 1.5, steps: 2}}"]
    run(1, *words, *QUICK)
    assert [r["schedule/objective.extrapolation"] for r in records(Path("runs/one"))] == [
        1,
        1.25,
        1.5,
    ]


def test_the_share_of_the_dataset_may_fall(home):
    words = ["objective.support=full", "rollout.n=1", "train.prompts_per_step=10"]
    words += ["schedules={rollout.data_fraction: {start: 1.0, end: 0.0, steps: 2}}"]
    run(1, *words, *QUICK)
    share = [record["rollout/data_fraction"] for record in records(Path("runs/one"))]
    assert share[0] == 1 and 0 < share[1] < 1 and share[2] == 0


@pytest.mark.parametrize("world", [1, 2])
def test_a_reward_that_is_no_number_is_one_line_on_every_rank(home, world):
    with pytest.raises(RuntimeError, match=r"reward: got nan for a response to prompt \d+ of 'pro"):
        run(world, *ALONE, f"objective={{{RL}}}", *QUICK, f"reward.function={HERE}:sometimes_nan")
