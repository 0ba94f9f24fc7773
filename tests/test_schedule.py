"""Numbers that change: their values, where they go, and what is no such number."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_opd import schedule
from megatron_opd.config import Config, Schedule


def config(schedules=None, **sections):
    known = {"student": {"path": "s"}, "data": {"prompts": ("p",)}}
    return Config(**known | sections, schedules=schedules or {})


def changing(start, end, steps=10, shape="linear"):
    return {"start": start, "end": end, "steps": steps, "shape": shape}


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        ("linear", {1: 0.8, 2: 0.6, 3: 0.4, 5: 0.0, 9: 0.0}),
        ("cosine", {1: 0.8, 2: 0.4 + 0.4 * math.cos(math.pi / 4), 3: 0.4, 5: 0.0, 9: 0.0}),
        ("step", {1: 0.8, 2: 0.8, 4: 0.8, 5: 0.0, 9: 0.0}),
    ],
)
def test_the_value_at_a_step(shape, values):
    """Veto's β_0 (1 − i/N) for i = 0, 1, …: the first step has the start, the fifth the end."""
    one = Schedule(start=0.8, end=0.0, steps=4, shape=shape)
    got = {step: schedule.value(one, step) for step in values}
    assert got == pytest.approx(values)


@given(
    st.floats(-5, 5),
    st.floats(-5, 5),
    st.integers(1, 50),
    st.sampled_from(["linear", "cosine", "step"]),
)
def test_it_goes_from_start_to_end_and_never_back(start, end, steps, shape):
    one = Schedule(start=start, end=end, steps=steps, shape=shape)
    values = [schedule.value(one, step) for step in range(1, steps + 3)]
    assert values[0] == start and values[-1] == values[-2] == end
    there = [value * (1 if end >= start else -1) for value in values]
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(there))


def test_every_number_of_every_loss_has_a_place():
    """Optional ones too, and the options of weights; what is not scheduled stays."""
    weights = {"prune_drift": {"threshold": 0.7, "drop": 0.01}, "my.losses:early": {"limit": 3.0}}
    before = config(
        {
            "objective.reward_floor": changing(-9.0, -1.0),
            "terms.rl.weight": changing(0.0, 1.0),
            "objective.weights.prune_drift.drop": changing(0.0, 0.1),
            "objective.weights.my.losses:early.limit": changing(1.0, 2.0),
            "rollout.data_fraction": changing(0.5, 0.0),
        },
        objective={"weights": weights},
        terms={"rl": {"outcome": 0.25}},
    )
    last = schedule.at(before, 99)
    assert last.objective.reward_floor == -1 and last.terms["rl"].weight == 1
    assert last.terms["rl"].outcome == 0.25 and last.rollout.data_fraction == 0
    assert last.objective.weights["prune_drift"] == {"threshold": 0.7, "drop": 0.1}
    assert last.objective.weights["my.losses:early"] == {"limit": 2.0}
    assert schedule.values(before, 6)["rollout.data_fraction"] == 0.25
    assert schedule.mixes(before) and not schedule.mixes(config())
    assert [end.terms["rl"].weight for end in schedule.ends(before)] == [0, 1]
    assert schedule.at(config(), 7) == config() and len(schedule.ends(config())) == 1
    assert before.objective.reward_floor is None  # a config does not change


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("objective.vetto", "no such number, .*; did you mean objective.veto?"),
        ("objective.k", "no such number"),  # of entries, not a quantity
        ("objective.support", "no such number"),
        ("optimizer.lr", "expected one of objective, of terms.NAME, or rollout.data_fraction"),
        ("rollout.temperature", "no such number"),
        ("terms.kd.weight", "no such number"),  # there is no such term
    ],
)
def test_what_is_no_number_that_changes(key, line):
    with pytest.raises(ValueError, match=rf"^schedules\.{key}: .*{line}"):
        schedule.ends(config({key: changing(0.0, 1.0)}))


def test_both_ends_are_checked_as_the_config_is():
    wrong = config({"rollout.data_fraction": changing(0.5, 1.5, steps=4)})
    with pytest.raises(
        ValueError, match=r"^schedules, at step 5: rollout.data_fraction: .* than or"
    ):
        schedule.ends(wrong)


def test_a_number_that_a_schedule_overrules_is_named():
    weights = {"position_decay": {"half_life": 9.0}}
    overruled = config(
        {
            "objective.veto": changing(0.8, 0.0),
            "objective.outcome": changing(0.5, 1.0),
            "objective.weights.position_decay.half_life": changing(5.0, 6.0),
        },
        objective={"veto": 0.3, "outcome": 0.5, "weights": weights},
    )
    (line,) = schedule.idle(overruled)
    assert line.startswith("objective.veto: has no effect in this config: schedules.objective.veto")
