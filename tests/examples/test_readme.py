"""What the README says of objectives and metrics is what there is."""

import re
from pathlib import Path

import pytest
import yaml

from megatron_opd.build import build_objective
from megatron_opd.config import Config
from megatron_opd.loss.rules import DIVERGENCES, SUPPORTS
from megatron_opd.loss.weights import CORRECTIONS, WEIGHTS

README = (Path(__file__).parents[2] / "README.md").read_text()
OBJECTIVE, ROLLOUT = r"`(\{[^`]+\})`", r"(?:, `rollout: (\{[^`]+\})`)?"
METHODS = re.findall(rf"^\| (.+?) \| {OBJECTIVE}{ROLLOUT} \|$", README, re.MULTILINE)


@pytest.mark.parametrize(("method", "section", "rollout"), METHODS, ids=[row[0] for row in METHODS])
def test_a_method_is_a_setting(method, section, rollout):
    objective = yaml.safe_load(section)
    config = {
        "student": {"path": "s"},
        "teacher": None if objective.get("divergence") == "cross_entropy" else {"path": "t"},
        "base": {"path": "b"} if "extrapolation" in objective else None,
        "data": {"prompts": ("p",)},
        "objective": objective,
        "rollout": yaml.safe_load(rollout or "{}"),
    }
    built = build_objective(Config(**config))
    assert built.support == objective["support"]
    assert built.correction == config["rollout"].get("correction", "none")


def test_every_name_is_in_the_table():
    assert len(METHODS) > 15
    for name in (*SUPPORTS, *DIVERGENCES, *WEIGHTS, *CORRECTIONS):
        assert f"`{name}`" in README, name
